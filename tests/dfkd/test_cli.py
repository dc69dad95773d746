"""The command line where all is well: what each subcommand prints and writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

COMMANDS = ("run", "synth", "distill", "evaluate", "verify", "replay", "report", "info")


def test_help_of_every_subcommand_has_an_example(call: Any) -> None:
    """`--help` teaches: each subcommand shows a command to copy."""
    top = call("--help")
    assert top.returncode == 0
    for name in COMMANDS:
        assert name in top.stdout
        shown = call(name, "--help")
        assert shown.returncode == 0
        assert f"Example: synthkd {name}" in shown.stdout


def test_unknown_command_and_option_exit_2(call: Any) -> None:
    """Also what the option parser refuses."""
    assert call("sinth").returncode == 2
    assert call("verify").returncode == 2
    assert call("synth", "--no-such").returncode == 2


def test_info(call: Any) -> None:
    """Versions, devices, presets."""
    done = call("info")
    assert done.returncode == 0
    assert "torch" in done.stdout
    assert "digits" in done.stdout


def test_distill_and_evaluate(call: Any, tiny_set: Path, tmp_path: Path) -> None:
    """A student is trained under the set's own teacher, is loadable by its card, and is scored."""
    done = call("distill", tiny_set, "--out", tmp_path / "student", "--steps", 5, "--batch-size", 8)
    assert done.returncode == 0, done.stderr
    assert "agrees with the teacher" in done.stdout
    with safe_open(tmp_path / "student/student.safetensors", "pt") as f:
        assert json.loads(f.metadata()["card"])["classes"] == ["cat", "dog", "bird"]
    np.savez(tmp_path / "x.npz", x=np.zeros((6, 16, 16), np.uint8), y=np.arange(6) % 3)
    done = call("evaluate", tmp_path / "student/student.toml", "--data", tmp_path / "x.npz", "--json")
    assert done.returncode == 0, done.stderr
    assert np.sum(json.loads(done.stdout)["confusion"]) == 6


def test_verify_and_report_of_a_set(call: Any, tiny_set: Path) -> None:
    """A clean set is said to be clean; a bare set gets a report."""
    done = call("verify", tiny_set)
    assert done.returncode == 0
    assert "30 images in 2 shards, all as written" in done.stdout
    assert call("report", tiny_set).returncode == 0
    assert (tiny_set / "report.html").exists()


def test_replay_gives_the_identical_image(call: Any, tiny_set: Path, tmp_path: Path) -> None:
    """From the manifest alone, in any shard."""
    for sample in (0, 17, 29):
        done = call("replay", tiny_set, "--id", sample, "--out", tmp_path / "x.png")
        assert done.returncode == 0, done.stderr
        assert "identical to the stored image" in done.stdout


def test_class_folders_are_read(call: Any, teacher_card: Path, tmp_path: Path) -> None:
    """A folder of class folders, images of any size."""
    from PIL import Image

    for i, name in enumerate(("cat", "dog", "bird")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20 + i, 31), (80 * i, 10, 10)).save(tmp_path / name / "a.png")
    done = call("evaluate", teacher_card, "--data", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert np.sum(json.loads(done.stdout)["confusion"]) == 3
