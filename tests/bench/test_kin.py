"""Words of classes that a prior does not know, from a teacher's word on the prior's own images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from synthkd.bench.kin import kin, main, shares
from synthkd.dfkd.prior_data import Captioned, load_captioned
from synthkd.dfkd.teachers import Teacher


class _Brightness(nn.Module):
    """Logits by brightness: dark images are class 0."""

    def forward(self, x: Tensor) -> Tensor:
        light = x.mean((1, 2, 3))
        return torch.stack([-8 * light, 8 * light], dim=1)


def _data() -> Captioned:
    light = torch.tensor([0, 0, 255, 255, 120, 140])
    images = light.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return Captioned(images, torch.tensor([0, 0, 1, 1, 2, 2]), ("night", "snow", "dusk", "never"), ("toy",))


def test_captions_go_to_the_class_that_the_teacher_names() -> None:
    teacher = Teacher(
        _Brightness(), mean=[0.5] * 3, std=[0.5] * 3, input_size=(8, 8), classes=("dark", "light")
    )
    found = shares(_data(), teacher, 10)
    assert found[0, 0] > 0.99
    assert found[1, 1] > 0.99
    assert found[3].tolist() == [0, 0]
    assert kin(found, 2) == [[0, 2], [1, 2]]
    assert kin(found, 9) == [[0, 2, 1], [1, 2, 0]], "a caption without images is no class's"


def test_the_command_prints_a_targets_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _data()
    x = data.images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "pool.npz", x=x, y=data.labels.numpy(), captions=np.array(data.captions), trained_on=["toy"])
    assert load_captioned(tmp_path / "pool.npz").words == ("night", "snow", "dusk", "never")
    assert main([str(tmp_path / "pool.npz"), "embedded:digits", "--each", "2"]) == 0
    told = capsys.readouterr().out
    assert told.startswith('["zero"]\nwords = "')
    assert main([str(tmp_path / "none.npz"), "embedded:digits"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
