"""A damaged or hostile manifest.json: one line that names the field, exit code 2."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synthkd.dfkd.job import SynthJob

Damage = Callable[..., Path]


def one_line(done: Any) -> str:
    """The message of a refused command."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.strip().split("\n") if line.startswith("synthkd: ")]
    assert len(lines) == 1, done.stderr
    return lines[0].removeprefix("synthkd: ")


@pytest.fixture
def damaged(tiny_set: Path, tmp_path: Path) -> Damage:
    """A copy of the tiny set with one field of its manifest replaced; a field is named with dots."""

    def make(name: str, value: Any) -> Path:
        folder = tmp_path / "set"
        shutil.copytree(tiny_set, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        *tables, last = name.split(".")
        inner = manifest
        for table in tables:
            inner = inner[table]
        inner[last] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return make


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that wrongly succeeds must not write into the checkout."""
    monkeypatch.chdir(tmp_path)


SOURCES = [
    ("source", 3, "source is 3; expected a table"),
    ("source", [1], "source is [1]; expected a table"),
    ("source", "x", "source is 'x'; expected a table"),
    ("source.model", 3, "source.model is 3; expected a text"),
    ("source.model", None, "source.model is None; expected a text"),
    ("source.teacher", 3, "source.teacher is 3; expected a text"),
    ("source.teacher", ["a"], "source.teacher is ['a']; expected a text"),
    ("source.loras", 5, "source.loras is 5; expected a list of texts"),
    ("source.loras", "a.safetensors", "source.loras is 'a.safetensors'; expected a list of texts"),
    ("source.loras", [1], "source.loras is [1]; expected a list of texts"),
    ("source.round_student", 3, "source.round_student is 3; expected a table"),
]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *SOURCES,
        ("source.round_student", {"stepz": 3}, "source.round_student: unknown field 'stepz'; did you mean 'steps'"),
        ("source.round_student", {"steps": 2.5}, "source.round_student: steps is 2.5; expected a whole number >= 1"),
        ("source.round_student", {"arch_args": 3}, "source.round_student: arch_args is 3; expected a table"),
        ("guidance", 3, "guidance no table"),
        ("guidance", [], "guidance no table"),
        ("guidance.alpha", None, "guidance.alpha is None; expected a number >= 0"),
        ("guidance.alpha", True, "guidance.alpha is True; expected a number >= 0"),
        ("guidance.beta", float("nan"), "NaN is no number of JSON"),
        ("guidance.gamma", "x", "guidance.gamma is 'x'; expected a number >= 0"),
        ("guidance.entropy", [1], "guidance.entropy is [1]; expected a number >= 0"),
        ("guidance.head", 10**400, "a whole number of 401 digits"),
        ("guidance.divergence", 3, "guidance.divergence is 3; expected a text"),
        ("guidance.kind", 3, "names no model and teacher"),
    ],
)
def test_replay(call: Any, damaged: Damage, name: str, value: Any, message: str) -> None:
    found = one_line(call("replay", damaged(name, value), "--id", 0))
    assert "manifest.json" in found and message in found, found  # noqa: PT018
    assert len(found) < 400


@pytest.mark.parametrize(("name", "value", "message"), SOURCES)
def test_distill_looks_for_the_teacher(call: Any, damaged: Damage, name: str, value: Any, message: str) -> None:
    found = one_line(call("distill", damaged(name, value), "--out", "never"))
    assert found == f"manifest.json: {message}"


@pytest.mark.parametrize("value", ["nowhere.toml", "a\0b", "embedded:", "x" * 5000])
def test_odd_teacher(call: Any, damaged: Damage, value: str) -> None:
    folder = damaged("source.teacher", value)
    one_line(call("replay", folder, "--id", 0))
    one_line(call("distill", folder, "--out", "never"))


def test_an_override_stands_for_a_damaged_field(call: Any, damaged: Damage, tiny_job: SynthJob, tmp_path: Path) -> None:
    words = ("--id", 0, "--model", tiny_job.model, "--out", tmp_path / "0.png")
    done = call("replay", damaged("source.model", 3), *words)
    assert done.returncode == 0, done.stderr
    assert "identical" in done.stdout


def test_a_place_with_an_at_sign_is_kept_whole(
    tiny_job: SynthJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("sd", "sd@v1", "lora", "lora@v2", "at@home"):
        (tmp_path / name).mkdir()
    (tmp_path / "card@v1.toml").write_text("")
    loras = ("lora@v2", "lora@0.5", "lora@v2@0.5", "lora", "at@home/none@2", "owner/hub@0.5", "owner/hub", "@0.5")
    source = replace(tiny_job, model="sd@v1", teacher="card@v1.toml", loras=loras).source()
    assert source["model"] == str(tmp_path / "sd@v1")
    assert source["teacher"] == str(tmp_path / "card@v1.toml")
    local = [str(tmp_path / name) for name in ("lora@v2", "lora@0.5", "lora@v2@0.5", "lora")]
    assert source["loras"] == [*local, "at@home/none@2", "owner/hub@0.5", "owner/hub", "@0.5"]
    assert replace(tiny_job, model="sd@v2").source()["model"] == "sd@v2"
