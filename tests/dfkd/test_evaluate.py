"""Scores by hand on tiny cases, and what the command prints."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from synthkd.dfkd.data import LabelledImages
from synthkd.dfkd.dense import IGNORE, DenseImages
from synthkd.dfkd.evaluate import calibration_error, evaluate, evaluate_dense, predict
from synthkd.dfkd.ship import export_student
from synthkd.dfkd.teachers import load_teacher
from synthkd.engine.errors import SynthkdError


class Table(nn.Module):
    """Logits by image number, which stands in its first pixel."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        """x [B,3,H,W] in [0,1]"""
        return self.get_buffer("logits")[(x[:, 0, 0, 0] * 255).round().long()]


def _data(labels: list[int], count: int) -> LabelledImages:
    images = torch.zeros(len(labels), 3, 1, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(len(labels))
    return LabelledImages(images, torch.tensor(labels), tuple(f"c{k}" for k in range(count)))


def _log(*rows: list[float]) -> list[list[float]]:
    return [[math.log(p) for p in row] for row in rows]


def test_scores_by_hand() -> None:
    """Four images, three classes, one without an image; a teacher beside; progress in batches."""
    ours = _log([0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2])
    theirs = _log([0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8])
    seen: list[int] = []
    data = _data([0, 1, 1, 0], 3)
    score = evaluate(Table(ours), data, teacher=Table(theirs), batch_size=3, on_batch=seen.append)
    assert score.accuracy == 75.0
    assert score.confusion == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert score.class_accuracy == [100.0, 50.0, None]
    assert score.top5 is None
    assert score.nll == pytest.approx(-sum(map(math.log, (0.7, 0.4, 0.8, 0.5))) / 4, abs=1e-6)
    # bins (10/15,11/15]: .7, right; (7/15,8/15]: .5 twice, one right; (11/15,12/15]: .8, right
    assert score.calibration_error == pytest.approx(100 * (0.3 + abs(1 - 2 * 0.5) + 0.2) / 4, abs=1e-4)
    assert score.teacher_agreement == 50.0
    apart = sum(math.exp(p) * (p - q) for a, b in zip(theirs, ours, strict=True) for p, q in zip(a, b, strict=True))
    assert score.teacher_kl == pytest.approx(apart / 4, abs=1e-6)
    assert score.images_per_second is not None
    assert seen == [3, 1, 3, 1]
    assert "top5" not in score.to_dict()


def test_top5_and_calibration() -> None:
    """The fifth counts, the sixth does not; a confidence of 1 and a bin's upper edge lie in the bin below."""
    row = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    score = evaluate(Table([row, row, row]), _data([4, 5, 0], 7))
    assert score.top5 == pytest.approx(200 / 3, abs=1e-3)
    p = torch.tensor([[1.0, 0.0], [0.6, 0.4], [0.5999, 0.4001]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 0])
    assert calibration_error(p, labels, 5) == pytest.approx(100 * (abs(1 - 0.6 - 0.5999)) / 3, abs=1e-4)
    assert calibration_error(p, labels, 1) == pytest.approx(100 * abs(2 - 2.1999) / 3, abs=1e-4)


def test_refusals() -> None:
    """One line that names the image; other numbers of classes; nothing to score."""
    bad = Table([[0.0, 1.0], [1.0, float("nan")]])
    with pytest.raises(SynthkdError, match="network's outputs for image 1 are not finite"):
        evaluate(bad, _data([0, 1], 2))
    good = Table([[0.0, 1.0], [1.0, 0.0]])
    with pytest.raises(SynthkdError, match="teacher's outputs for image 1"):
        evaluate(good, _data([0, 1], 2), teacher=bad)
    with pytest.raises(SynthkdError, match="has 2 outputs, the set 3 classes"):
        evaluate(good, _data([0, 1], 3))
    with pytest.raises(SynthkdError, match="no image"):
        evaluate(good, _data([], 2))


def test_dense_scores() -> None:
    """Per pixel, resized to the masks, ignored ones out, batches of another size than the set."""
    masks = torch.tensor([[[0, 1], [1, IGNORE]], [[0, 1], [1, IGNORE]], [[0, 0], [1, 1]]])
    images = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([[[[3.0, 3.0], [0.0, 0.0]], [[0.0, 0.0], [3.0, 3.0]]]]).expand(len(x), -1, -1, -1)

    score = evaluate_dense(Net(), DenseImages(images, masks, ("a", "b")), batch_size=2)
    assert score.confusion == [[4, 0], [2, 4]]
    assert score.class_iou == [pytest.approx(200 / 3, abs=1e-3)] * 2
    assert score.mean_iou == pytest.approx(200 / 3, abs=1e-3)
    assert score.accuracy == 80.0
    with pytest.raises(SynthkdError, match=r"outputs are \[2, 2\]; expected \[B,2,h,w\]"):
        evaluate_dense(Table([[0.0, 1.0]]), DenseImages(images, masks, ("a", "b")), batch_size=2)


def test_command_on_cards_shipped_files_and_sets(call: Any, teacher_card: Path, tiny_set: Path, tmp_path: Path) -> None:
    """A shipped student scores as its card does; JSON alone on standard output; a set's labels; a table for people."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x=rng.integers(0, 256, (7, 16, 16, 3), np.uint8), y=np.array([0, 0, 0, 1, 1, 2, 2]))
    net = load_teacher(str(teacher_card))
    export_student(net, tmp_path / "t.pt2", "pt2")
    data = ("--data", tmp_path / "x.npz", "--json")
    by_card = json.loads(call("evaluate", teacher_card, *data, "--batch-size", 3).stdout)
    by_file = json.loads(call("evaluate", tmp_path / "t.pt2", *data, "--allow-code", "--teacher", teacher_card).stdout)
    assert by_file["teacher_agreement"] == 100
    assert by_file["teacher_kl"] < 1e-8
    for name in ("accuracy", "confusion", "class_accuracy"):
        assert by_card[name] == by_file[name]
    assert by_card["nll"] == pytest.approx(by_file["nll"], abs=1e-5)
    done = call("evaluate", teacher_card, *data, "--limit", 4)
    assert np.sum(json.loads(done.stdout)["confusion"], axis=1).tolist() == [2, 1, 1], "spread over a sorted set"
    done = call("evaluate", teacher_card, "--data", f"set:{tiny_set}", "--json")
    assert np.sum(json.loads(done.stdout)["confusion"]) == 30
    done = call("evaluate", teacher_card, "--data", tmp_path / "x.npz")
    assert done.returncode == 0, done.stderr
    assert "expected calibration error" in done.stdout
    assert "class bird" in done.stdout
    for words, part in (
        ((tmp_path / "t.pt2", *data), "can run code"),
        ((teacher_card, *data, "--limit", 0), "--limit is 0"),
        ((teacher_card, *data, "--batch-size", 0), "--batch-size is 0"),
        ((tmp_path / "no.onnx", *data), "not found"),
    ):
        done = call("evaluate", *words)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        assert part in done.stderr


def test_predict_keeps_the_order(teacher_card: Path) -> None:
    """Batches of any size give what one pass gives."""
    net, images = load_teacher(str(teacher_card)), torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(predict(net, images, 2), net(images / 255), rtol=1e-5, atol=1e-6)
