"""A teacher from labelled images: it learns them, a kill changes nothing, and wrong inputs are one line."""

import json
import os
import re
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthkd.bench.fit_teacher import TeacherFit, TeacherSpec, load_training_set, main
from synthkd.dfkd.data import load_test_set
from synthkd.dfkd.evaluate import evaluate
from synthkd.dfkd.teachers import load_teacher
from synthkd.dfkd.training import Stopped
from synthkd.engine.errors import SynthkdError

NET = {"widths": [8, 16], "blocks": [1, 1], "stem_stride": 1}
SPEC = TeacherSpec(arch_args=NET, steps=30, batch_size=16, warmup_steps=2, learning_rate=1e-2, ema=0.8, shift=0.05)


def write(path: Path, part: str, seed: int, **other: Any) -> Path:
    """Images 16x16 of three classes: bright above, bright below, bright all over, in noise."""
    draw = np.random.default_rng(seed)
    y = np.arange(48) % 3
    x = draw.integers(0, 60, (48, 16, 16, 3))
    x[y != 1, :8] += 150
    x[y != 0, 8:] += 150
    arrays = {"x": x.astype(np.uint8), "y": y, "classes": ["up", "down", "all"], "trained_on": [f"bars/{part}"]}
    np.savez(path, **{name: value for name, value in (arrays | other).items() if value is not None})
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of both parts."""
    write(tmp_path / "train.npz", "train", 0)
    write(tmp_path / "test.npz", "test", 1)
    return tmp_path


def fit(data: Path, out: str, **hooks: Any) -> dict[str, Any]:
    """One call of the training, in a folder."""
    training = load_training_set(data / "train.npz")
    test = load_test_set(str(data / "test.npz"), training.data.classes, (0, 0))
    return TeacherFit(training=training, spec=SPEC, out=data / out, name="bars", **hooks).execute(test)


def test_it_learns_and_says_what_it_is(data: Path) -> None:
    """A card that loads, right on images it has not seen; BatchNorm as on the training images; no checkpoint left."""
    told = fit(data, "teacher")
    card = data / "teacher" / "bars.toml"
    teacher = load_teacher(str(card))
    test = load_test_set(str(data / "test.npz"), teacher.classes, teacher.input_size)
    assert teacher.classes == ("up", "down", "all")
    assert evaluate(teacher, test).accuracy > 95
    about = tomllib.loads(card.read_text())["about"]
    assert about == {"trained_on": ["bars/train"], "images": 48, "test_accuracy": told["test_accuracy"]}
    assert evaluate(teacher, test).accuracy == pytest.approx(told["test_accuracy"], abs=0.01)
    images = load_training_set(data / "train.npz").data.images.float() / 255
    seen = teacher.preprocess(images)
    assert seen.mean((0, 2, 3)).abs().max() < 1e-3
    assert (seen.std((0, 2, 3)) - 1).abs().max() < 1e-2
    net: Any = teacher.net
    first, read = net.bn1, net.conv1(seen)
    assert torch.allclose(first.running_mean, read.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(first.running_var, read.var((0, 2, 3)), rtol=1e-3, atol=1e-5)
    assert sorted(p.name for p in (data / "teacher").glob("[!.]*")) == [
        "bars.json", "bars.safetensors", "bars.toml", "log.jsonl"
    ]  # fmt: skip


def test_stopped_and_killed_it_ends_in_the_same_bytes(
    data: Path, killed: Callable[[Callable[[], object]], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by itself after 7 steps, killed after 12 more behind a checkpoint, then to the end."""
    whole = fit(data, "whole")
    monkeypatch.setattr("synthkd.dfkd.prior_loop.SAVE_SECONDS", -1.0)  # a checkpoint at every step

    def until(count: int, then: Callable[[], bool]) -> Callable[[], bool]:
        steps = iter(range(1, 1000))
        return lambda: next(steps) >= count and then()

    def work(count: int, then: Callable[[], bool]) -> object:
        return fit(data, "parts", should_stop=until(count, then))

    def die() -> bool:
        os.kill(os.getpid(), signal.SIGKILL)
        return True

    with pytest.raises(Stopped):
        work(7, lambda: True)
    assert (data / "parts" / "bars.checkpoint.safetensors").is_file()
    assert killed(lambda: work(12, die))
    parts = fit(data, "parts")
    assert parts["sha256"] == whole["sha256"]
    for name in ("bars.safetensors", "bars.toml"):
        assert (data / "parts" / name).read_bytes() == (data / "whole" / name).read_bytes()
    before = (data / "parts" / "bars.json").stat().st_mtime_ns
    (data / "parts" / "bars.checkpoint.safetensors.1.tmp").write_bytes(b"left by a kill")
    assert fit(data, "parts") == parts, "what is finished is not trained again"
    assert (data / "parts" / "bars.json").stat().st_mtime_ns == before
    assert not list((data / "parts").glob("bars.checkpoint*"))


def test_the_command(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stops at its time limit with 75, goes on to the end; held-out images are scored, and not trained on."""
    words = [str(data / "train.npz"), "--test", str(data / "test.npz"), "--out", str(data / "t"), "--name", "n"]
    words += ["--set", "steps=4", "--set", "batch_size=8", "--set", "held_out=0.25"]
    words += ["--set", "arch_args={widths=[8],blocks=[1]}"]
    write(data / "test.npz", "test", 1, trained_on=None)  # need not say what it is
    assert main([*words, "--minutes", "1e-9"]) == 75
    assert main(words) == 0
    said = capsys.readouterr().out
    told = json.loads((data / "t" / "n.json").read_text())
    assert f"n.toml: accuracy {told['test_accuracy']} % on the test part" in said
    assert told["images"] == 36
    assert 0 <= told["training"]["accuracy_held_out"] <= 100
    untested = [words[0], *words[3:]]
    (data / "t" / "n.json").unlink()
    assert main(untested) == 0
    assert re.search(r"accuracy [\d.]+ % on what is held out", capsys.readouterr().out)
    assert main(words) == 0, "scored now, though it is trained"
    assert "on the test part" in capsys.readouterr().out
    assert json.loads((data / "t" / "n.json").read_text())["test_accuracy"] == told["test_accuracy"]
    assert tomllib.loads((data / "t" / "n.toml").read_text())["about"]["test_accuracy"] == told["test_accuracy"]
    assert main([*words, "--set", "steps=5"]) == 2
    assert "n.json: is of other data or another spec" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"trained_on": None}, "classes and trained_on are missing"),
        ({"trained_on": ["Bars"]}, "of data sets in lower case"),
        ({"classes": ["up", "down"]}, "labels 0..2; the teacher has 2 classes"),
        ({"x": np.zeros((48, 16, 16), np.float32)}, "expected uint8"),
        ({"classes": np.array(["up", None, 3], dtype=object)}, "expected an .npz of x, y, classes and trained_on"),
    ],
)
def test_wrong_training_data(
    changes: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit 2."""
    path = write(tmp_path / "train.npz", "train", 0, **changes)
    refused([str(path)], tmp_path, capsys, expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--set", "steps=0"], "steps is 0; expected a whole number >= 1"),
        (["--set", "stepz=5"], "stepz"),
        (["--set", "batch_size=64"], "48 images to train on; expected at least one batch of 64"),
        (["--arch", "resnet5000", "--set", "batch_size=8"], "arch 'resnet5000' is unknown"),
        (
            ["--arch", "plain_cnn", "--set", "arch_args={widths=[8]}", "--set", "batch_size=8"],
            "does not take these images",
        ),
        (["--test", "train.npz"], "is 'bars/train', and 'bars/train' is trained on"),
        (["--test", "whole.npz"], "is 'bars', and 'bars/train' is trained on"),
        (["--test", "none.npz"], "none.npz: expected an .npz"),
        (["--minutes", "-1"], "--minutes is -1.0"),
        (["--name", "../up"], "--name '../up': expected letters"),
        (["--set", "seed=5"], "--set seed=5: a seed is given by --seed"),
        (["--device", "gpu"], "--device 'gpu'"),
    ],
)
def test_wrong_options(words: list[str], expected: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit 2; also where the test part holds what is trained on."""
    write(data / "whole.npz", "x", 1, trained_on=["bars"])
    words = [str(data / w) if w.endswith(".npz") else w for w in words]
    refused([str(data / "train.npz"), *words], data, capsys, expected)


def refused(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str], expected: str) -> None:
    """Exit code 2, one line, no card."""
    assert main([*words, "--out", str(folder / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert expected in said
    assert not (folder / "out" / "resnet.toml").exists()


def test_a_loss_that_is_not_finite(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends in one line that names the command, and leaves no card."""
    nothing = lambda *_: torch.full((), torch.nan, requires_grad=True)  # noqa: E731
    monkeypatch.setattr(TeacherFit, "_loss", nothing)
    with pytest.raises(SynthkdError, match="fit-teacher: the loss of the bars is not finite at step 30"):
        fit(data, "bad")
