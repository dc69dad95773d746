"""Training settings, recipes and presets of the wrong kind: one line that names option, file and field."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synthkd.dfkd.cli_options import Asked, build_job
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.student import DistillSpec, spec_from
from synthkd.engine import SynthkdError

SETTINGS = [
    ("arch", 3, "a text"),
    ("arch_args", 3, "a table"),
    ("steps", 2.5, "a whole number >= 1"),
    ("steps", True, "a whole number >= 1"),
    ("batch_size", 2.5, "a whole number >= 2"),
    ("learning_rate", float("nan"), "a number > 0"),
    ("learning_rate", 0, "a number > 0"),
    ("weight_decay", "x", "a number >= 0"),
    ("weight_decay", -1, "a number >= 0"),
    ("warmup_steps", "x", "a whole number >= 0, below 2**31"),
    ("warmup_steps", -1, "a whole number >= 0, below 2**31"),
    ("warmup_steps", 2**31, "a whole number >= 0, below 2**31"),
    ("temperature", float("inf"), "a number > 0"),
    ("held_out", 1, "0 < share < 1"),
    ("shift", "x", "a number >= 0"),
    ("rotate", float("inf"), "a number >= 0"),
    ("zoom", -0.5, "0 <= share < 1"),
    ("flip", "no", "true or false"),
    ("mix", [0.5], "0 to 1"),
    ("seed", -1, "0 <= seed < 2**63"),
    ("seed", 1.0, "0 <= seed < 2**63"),
]


def one_line(done: Any) -> str:
    """The message of a refused command."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.strip().split("\n") if line.startswith("synthkd: ")]
    assert len(lines) == 1, done.stderr
    return lines[0].removeprefix("synthkd: ")


@pytest.mark.parametrize(("name", "value", "expected"), SETTINGS)
def test_spec_of_the_wrong_kind(name: str, value: Any, expected: str) -> None:
    for make, where in (
        (lambda: DistillSpec(**{name: value}), "distill"),
        (lambda: spec_from({name: value}, "a file"), "a file"),
    ):
        with pytest.raises(SynthkdError) as caught:
            make()
        assert str(caught.value) == f"{where}: {name} is {value!r}; expected {expected}"


def test_whole_numbers_are_floats_where_a_float_is_meant() -> None:
    assert repr(DistillSpec(temperature=4, shift=0)) == repr(DistillSpec(temperature=4.0, shift=0.0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 2.5", "steps is 2.5; expected a whole number >= 1"),
        ('flip = "no"', "flip is 'no'; expected true or false"),
        ("learning_rate = nan", "learning_rate is nan; expected a number > 0"),
        ("arch = 3", "arch is 3; expected a text"),
        ("arch_args = 3", "arch_args is 3; expected a table"),
        ("seed = 3", "seed is 3; expected none there, it is given by --seed"),
        ("stepz = 3", "unknown field 'stepz'; did you mean 'steps'"),
        ("steps = 2020-01-01", "steps is datetime.date(2020, 1, 1); expected a whole number >= 1"),
        ("steps = 0x" + "f" * 5000, "not valid TOML"),
        ("x = " + "[" * 5000 + "]" * 5000, "not valid TOML"),
    ],
)
def test_spec_file(call: Any, tiny_set: Path, tmp_path: Path, text: str, message: str) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text(text)
    found = one_line(call("distill", tiny_set, "--out", tmp_path / "s", "--spec", spec))
    assert found.startswith(f"--spec {spec}: {message}"), found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[arch_args]\nin_channels = -1", "arch 'resnet': arch_args do not fit"),
        ("[arch_args]\nin_channels = 1", "distill: arch 'resnet' does not take 3x16x16 images"),
        ("[arch_args]\nstem_stride = 0", "distill: arch 'resnet' does not take 3x16x16 images"),
        ("[arch_args]\nstem_stride = 'x'", "distill: arch 'resnet' does not take 3x16x16 images"),
        ("[arch_args]\nwidths = [10000000000000]\nblocks = [1]", "arch 'resnet': arch_args do not fit"),
        ('[arch_args]\nwidths = "ab"\nblocks = "cd"', "arch 'resnet': arch_args do not fit"),
        ("[arch_args]\nwidths = [1e400, 2]", "arch 'resnet': arch_args do not fit"),
        ('arch = "plain_cnn"\narch_args = {widths = [-8]}', "arch 'plain_cnn': arch_args do not fit"),
        ('arch = "plain_cnn"\narch_args = {widths = []}', "arch 'plain_cnn': arch_args do not fit"),
        ('arch = "plain_cnn"\narch_args = {widths = [8]}', "distill: arch 'plain_cnn' does not take 3x16x16 images"),
        ('arch = "wrn"\narch_args = {depth = 10.5, width = 1}', "arch 'wrn': arch_args do not fit"),
        ('arch = "vgg8"\narch_args = {num_classes = 3}', "arch 'vgg8': arch_args do not fit"),
    ],
)
def test_students_that_cannot_be_built(call: Any, tiny_set: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "spec.toml").write_text("steps = 1\nbatch_size = 4\n" * ("arch =" not in text) + text)
    found = one_line(call("distill", tiny_set, "--out", tmp_path / "s", "--spec", tmp_path / "spec.toml"))
    assert found.startswith(message), found


@pytest.mark.parametrize(
    ("recipe", "option", "message"),
    [
        ("guidance = 3", "--scale", "recipe: guidance is 3; expected a table of fields"),
        ("guidance = [1]", "--scale", "recipe: guidance is [1]; expected a table of fields"),
        ("classes = 3", "--targets", "recipe: classes is 3; expected a list of strings"),
        ("classes = [1, 2]", "--targets", "recipe: classes is [1, 2]; expected a list of strings"),
        ("classes = [[1]]", "--targets", "recipe: classes is [[1]]; expected a list of strings"),
        ("[classes]\na = 1", "--targets", "recipe: classes is {'a': 1}; expected a list of strings"),
    ],
)
def test_recipe_under_an_option(call: Any, tmp_path: Path, recipe: str, option: str, message: str) -> None:
    (tmp_path / "recipe.toml").write_text(recipe)
    (tmp_path / "targets.toml").write_text("[cat]\nweight = 2\n")
    value = {"--scale": 0.1, "--targets": tmp_path / "targets.toml"}[option]
    for start in (("--preset", "digits"), ("--model", "embedded:digits", "--teacher", "embedded:digits")):
        words = ("--recipe", tmp_path / "recipe.toml", option, value, "--out", tmp_path / "o")
        assert one_line(call("synth", *start, *words)) == message


def test_a_presets_allow_code_is_kept(tiny_job: SynthJob) -> None:
    assert build_job(replace(tiny_job, allow_code=True), Asked(), "cpu").allow_code
    assert build_job(tiny_job, Asked(allow_code=True), "cpu").allow_code
    assert not build_job(tiny_job, Asked(), "cpu").allow_code
