"""`synthkd teacher check` and `synthkd teacher moments`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from synthkd.dfkd.nets import build_net
from synthkd.dfkd.teachers import load_teacher


@pytest.fixture
def bare_card(tmp_path: Path) -> Path:
    """A network without BatchNorm, of three classes."""
    torch.manual_seed(0)
    save_file(build_net("plain_cnn", 3, {"widths": [8, 16]}).state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "bare.toml").write_text(
        'arch = "plain_cnn"\nweights = "w.safetensors"\ninput_size = [32, 32]\nmean = [0.5, 0.5, 0.5]\n'
        'std = [0.25, 0.25, 0.25]\nclasses = ["cat", "dog", "bird"]\n[arch_args]\nwidths = [8, 16]\n'
    )
    return tmp_path / "bare.toml"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Thirty labelled images."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x=rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8), y=np.arange(30) % 3)
    return tmp_path / "x.npz"


def line(done: Any) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2, done.stdout
    lines = [x for x in done.stderr.splitlines() if x.startswith("synthkd: ")]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr
    return str(lines[0])


def test_help_teaches(call: Any) -> None:
    """Each command has an example to copy."""
    for name in ("check", "moments"):
        shown = call("teacher", name, "--help")
        assert shown.returncode == 0
        assert f"Example: synthkd teacher {name}" in shown.stdout


def test_check_of_the_embedded_default(call: Any) -> None:
    """Nothing but the card: it is shown its own prior's images, and scored where data is named."""
    done = call("teacher", "check", "embedded:digits", "--data", "digits:test", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parameters"] == 696_618
    assert found["accuracy"] > 99
    assert found["batchnorm"] == {"layers": 15, "channels": 1120}
    assert found["prior"]["logits"] == [40, 10]
    assert found["prior"]["bn_distance"] < found["noise"]["bn_distance"]
    assert found["prior"]["predicted_classes"] > found["noise"]["predicted_classes"]


def test_check_with_a_model_alone(call: Any, teacher_card: Path, pipeline_folder: Path) -> None:
    """A default recipe of the card's classes at the model's size; without a prior, noise alone."""
    done = call("teacher", "check", teacher_card, "--model", pipeline_folder, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["prior"]["logits"] == [3, 3]
    assert found["accuracy"] is None
    done = call("teacher", "check", teacher_card)
    assert done.returncode == 0, done.stderr
    for part in ("resnet", "16 x 16", "cat, dog, bird", "BatchNorm", "[64, 3]", "confidence", "--model or --preset"):
        assert part in done.stdout


def test_moments_from_file_to_check(call: Any, bare_card: Path, data: Path) -> None:
    """Written once from images, named in the card, seen by `check`; only means and variances leave."""
    words = ("teacher", "moments", bare_card, "--data", data, "--out", bare_card.with_name("m.safetensors"))
    done = call(*words, "--batch-size", 7)
    assert done.returncode == 0, done.stderr
    assert 'in the card: moments = "m.safetensors"' in done.stdout
    path = bare_card.with_name("m.safetensors")
    state = load_file(path)
    assert {n: tuple(v.shape) for n, v in state.items()} == {
        "features.1.mean": (8,), "features.1.var": (8,), "features.5.mean": (16,), "features.5.var": (16,)
    }  # fmt: skip
    with safe_open(path, "pt") as f:
        assert f.metadata() == {"format": "synthkd moments 1", "images": "30"}
    bare_card.write_text('moments = "m.safetensors"\n' + bare_card.read_text())
    assert call(*words, "--batch-size", 30).returncode == 0
    for name, value in load_file(path).items():
        torch.testing.assert_close(value, state[name])
    found = json.loads(call("teacher", "check", bare_card, "--json").stdout)
    assert found["moments"] == 2
    assert found["noise"]["moments_distance"] > 0
    assert found["noise"]["bn_distance"] is None
    assert load_teacher(str(bare_card)).has_statistics


def test_wrong_words(call: Any, bare_card: Path, data: Path, teacher_card: Path, tmp_path: Path) -> None:
    """One line and exit code 2 for each."""
    target = tmp_path / "m.safetensors"
    moments = ("teacher", "moments", bare_card, "--out", target, "--data")
    assert "cannot be read" in line(call("teacher", "check", tmp_path / "no.toml"))
    assert "did you mean 'digits'" in line(call("teacher", "check", teacher_card, "--preset", "digit"))
    assert "no model_index.json there" in line(call("teacher", "check", teacher_card, "--model", tmp_path))
    assert "expected digits:test" in line(call("teacher", "check", teacher_card, "--data", tmp_path / "no"))
    assert "--device 'cpx'" in line(call("teacher", "check", teacher_card, "--device", "cpx"))
    assert "expected digits:test" in line(call(*moments, tmp_path / "no"))
    assert "--batch-size is 0" in line(call(*moments, data, "--batch-size", 0))
    assert "nothing to store" in line(call("teacher", "moments", teacher_card, "--out", target, "--data", data))
    assert "No such file" in line(
        call("teacher", "moments", bare_card, "--data", data, "--out", tmp_path / "no" / "m.safetensors")
    )
    assert not target.exists()
    assert call("teacher", "moments", bare_card).returncode == 2


def test_own_code_needs_the_option(call: Any, bare_card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused without --allow-code; with it the card works."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "cli_users_net.py").write_text(
        "from synthkd.dfkd.nets import build_net\n\n\ndef make(num_classes, widths):\n"
        "    return build_net('plain_cnn', num_classes, {'widths': widths})\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "path")
    bare_card.write_text(bare_card.read_text().replace("plain_cnn", "cli_users_net:make"))
    assert "pass --allow-code" in line(call("teacher", "check", bare_card))
    assert call("teacher", "check", bare_card, "--allow-code").returncode == 0


def test_logits_that_are_not_finite(call: Any, bare_card: Path) -> None:
    """Said instead of shown."""
    state = load_file(bare_card.with_name("w.safetensors"))
    state["fc.bias"][0] = float("nan")
    save_file(state, bare_card.with_name("w.safetensors"))
    assert "its logits are not finite" in line(call("teacher", "check", bare_card))
