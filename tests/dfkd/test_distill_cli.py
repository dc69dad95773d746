"""`synthkd distill`, `labels` and `online` as a user meets them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

SMALL = ("--steps", 6, "--batch-size", 8)


def test_a_finished_student_is_not_trained_again(call: Any, tiny_set: Path, tmp_path: Path) -> None:
    """Other settings train another one in its place; the folder holds log, page and summary, and no checkpoint."""
    first = call("distill", tiny_set, "--out", tmp_path, *SMALL)
    assert first.returncode == 0, first.stderr
    assert {"student.safetensors", "student_log.jsonl", "training.json", "report.html"} <= {
        p.name for p in tmp_path.iterdir()
    }
    assert not (tmp_path / "checkpoint.safetensors").exists()
    told = json.loads((tmp_path / "training.json").read_text())
    assert told["images_per_second"] > 0
    assert 0 <= told["data_wait"] <= 100
    assert "trained already" in call("distill", tiny_set, "--out", tmp_path, *SMALL).stdout
    assert "agrees with" in call("distill", tiny_set, "--out", tmp_path, *SMALL, "--temperature", 2).stdout
    assert call("report", tmp_path).returncode == 0


def test_labels_then_students(call: Any, tiny_set: Path, tmp_path: Path) -> None:
    """`labels` reports size and speed; `distill` finds them, or makes them."""
    import shutil

    folder = tmp_path / "set"
    shutil.copytree(tiny_set, folder)
    done = call("labels", folder, "--views", 2)
    assert done.returncode == 0, done.stderr
    assert "MB for 2 views of 27 images" in done.stdout
    words = ("distill", folder, "--out", tmp_path / "a", *SMALL, "--soft-labels", "stored", "--views", 2)
    done = call(*words)
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "soft_labels").iterdir())) == 1
    assert call("verify", folder).returncode == 0
    assert json.loads((tmp_path / "a/training.json").read_text())["identity"]["views"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--reader", "dalli"), "--reader 'dalli'"),
        (("--cache", "ram"), "--cache 'ram'"),
        (("--precision", "half"), "--precision 'half'"),
        (("--compile", "fast"), "--compile 'fast'"),
        (("--export", "tflite"), "--export 'tflite'"),
        (("--threads", -1), "--threads is -1"),
        (("--views", -2), "views is -2"),
        (("--soft-labels", "none"), "soft_labels is 'none'"),
        (("--checkpoint-seconds", "nan"), "--checkpoint-seconds is nan"),
    ],
)
def test_wrong_options_are_one_line(
    call: Any, tiny_set: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    """Exit code 2, and nothing written."""
    done = call("distill", tiny_set, "--out", tmp_path / "s", *SMALL, *words)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("synthkd: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "s").exists()


def test_online(call: Any, tiny_job: Any, tmp_path: Path) -> None:
    """From model and teacher to a student, no set between."""
    recipe = "height = 16\nwidth = 16\nsteps = 3\nclasses_per_group = 3\nsamples_per_class = 2\n"
    (tmp_path / "r.toml").write_text(recipe)
    done = call(
        "online", "--model", tiny_job.model, "--teacher", tiny_job.teacher, "--recipe", tmp_path / "r.toml",
        "--num-samples", 18, "--out", tmp_path / "s", *SMALL, "--pool", 8,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "% of the time spent drawing" in done.stdout
    assert (tmp_path / "s/student.toml").exists()
    assert (tmp_path / "s/report.html").exists()


@pytest.mark.slow
def test_the_documented_online_command(call: Any, tmp_path: Path) -> None:
    """`synthkd online --preset digits`: the preset's stored labels need a set, so its teacher is in the loop."""
    done = call("online", "--preset", "digits", "--num-samples", 80, "--steps", 3, "--out", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    assert "agrees with the teacher" in done.stdout


@pytest.mark.slow
def test_torchrun_trains_one_student_on_two_processes(tiny_set: Path, tmp_path: Path) -> None:
    """The documented command: one set of files, one voice, the ranks' weights averaged by DDP."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["--no-python", sys.executable, "-m", "synthkd.dfkd.cli", "distill", str(tiny_set)]
    words += ["--out", str(tmp_path / "s"), *map(str, SMALL)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=alone, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agrees with the teacher") == 1
    assert json.loads((tmp_path / "s/training.json").read_text())["execution"]["processes"] == 2
    assert load_file(tmp_path / "s/student.safetensors")
