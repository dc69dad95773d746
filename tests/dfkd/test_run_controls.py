"""A preset's teacher, student and controls: one command on tiny stand-ins, stopped, gone on with, refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from synthkd.dfkd import controls, fit_prior, presets_cifar, students
from synthkd.dfkd.choices import takes_pool, with_controls, with_student, with_teacher
from synthkd.dfkd.controls import Controls, arm_spec
from synthkd.dfkd.method_run import MethodRun
from synthkd.dfkd.nets import build_net
from synthkd.dfkd.presets import Preset, load_preset
from synthkd.dfkd.presets_cifar import WORDS
from synthkd.dfkd.prior_data import load_captioned
from synthkd.dfkd.prior_spec import PriorSpec
from synthkd.dfkd.progress import Silent
from synthkd.dfkd.report_controls import controls as section
from synthkd.dfkd.report_data import Run as ReportRun
from synthkd.dfkd.run import Interrupted, Run
from synthkd.dfkd.teachers import load_teacher
from synthkd.dfkd.training import CHECKPOINT
from synthkd.engine import SynthkdError

PARTS = {"vae_widths": (16, 16), "unet_widths": (16, 32), "text_width": 16}
CLASSES = "\n".join(f'"{name}",' for name in WORDS)


def write_teacher(path: Path, seed: int) -> None:
    """A small random ResNet of ten classes, its running statistics moved off their defaults."""
    torch.manual_seed(seed)
    net = build_net("resnet", 10, {"widths": [8], "blocks": [1], "stem_stride": 2}).train()
    for _ in range(5):
        net(torch.randn(16, 3, 32, 32))
    path.parent.mkdir(exist_ok=True)
    save_file(net.state_dict(), path.with_suffix(".safetensors"))
    path.write_text(
        f'arch = "resnet"\nweights = "{path.stem}.safetensors"\ninput_size = [32, 32]\nmean = [0.5, 0.5, 0.5]\n'
        f"std = [0.25, 0.25, 0.25]\nclasses = [{CLASSES}]\n[arch_args]\nwidths = [8]\nblocks = [1]\nstem_stride = 2\n"
        '[about]\ntrained_on = ["cifar10/train"]\n'
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """$SYNTHKD_DATA with stand-ins of all files of the small preset but its prior."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    words = sorted({word for several in WORDS.values() for word in several.split("|")})
    (folder / "cifar10").mkdir()
    x, y = draw.integers(0, 256, (120, 32, 32, 3)).astype(np.uint8), np.arange(120) % len(words)
    np.savez(folder / "cifar10/pool.npz", x=x, y=y, captions=np.array(words), trained_on=np.array(["noise"]))
    np.savez(folder / "cifar10/test.npz", x=x[:20], y=np.arange(20) % 10)
    for seed, name in enumerate(("resnet20", "resnet56")):
        write_teacher(folder / f"cifar10/teacher/{name}.toml", seed)
    return folder


@pytest.fixture(scope="module")
def data(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, with a prior of a few steps."""
    folder = tmp_path_factory.mktemp("whole") / "data"
    shutil.copytree(root, folder)
    spec = PriorSpec(
        **PARTS, vae_steps=2, vae_batch_size=4, steps=2, batch_size=4, warmup_steps=0, held_out=2
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_prior, "learn_words", lambda *_: 0.0)
        patch.setattr(fit_prior, "_SHEET_CAPTIONS", 1)
        patch.setattr(fit_prior, "_SHEET_EACH", 1)
        pool = load_captioned(folder / "cifar10/pool.npz")
        fit_prior.PriorFit(data=pool, spec=spec, out=folder / "cifar10/prior-small").execute()
    return folder


class EndsAt(Silent):
    """Says when a stage begins that is named so."""

    def __init__(self, stage: str) -> None:
        self.stage, self.begun = stage, False

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.begun |= stage == self.stage

    def is_set(self) -> bool:
        return self.begun


@pytest.fixture
def tiny(data: Path, monkeypatch: pytest.MonkeyPatch) -> Preset:
    """The small preset with few steps of everything, which is what `load_preset` gives, and no process a student."""
    monkeypatch.setenv("SYNTHKD_DATA", str(data))
    monkeypatch.setattr(students, "cores", lambda: 1)
    found = load_preset("cifar10-small")
    job = replace(found.job, recipe=replace(found.job.recipe, steps=3, samples_per_class=2))
    fast = {"samples_per_class": 2, "warmup": 2, "inner": 1, "widths": [8, 8, 8]}
    spec = replace(found.distill, steps=6, batch_size=8, warmup_steps=0)
    made = replace(found, job=job, num_images=40, distill=spec, methods={"fastdfkd": fast})
    monkeypatch.setattr(presets_cifar, "cifar10_small", lambda: made)
    return made


def test_run_with_controls_stopped_in_one_and_gone_on_with(tiny: Preset, call: Any, tmp_path: Path) -> None:
    """Stopped within a control, the same command ends in the control's student, and everything is there and told.

    Another teacher in the same folder is refused, and what is there stays.
    """
    out, told = tmp_path / "run", EndsAt("fastdfkd 0: distill")
    with pytest.raises(Interrupted):
        Run(with_student(tiny, "resnet8"), out, 0, None, 1, told, told.is_set).execute()
    assert (out / "controls/fastdfkd" / CHECKPOINT).exists()
    assert not (out / "controls/fastdfkd/student.safetensors").exists()
    words = ("run", "cifar10-small", "--out", out, "--student", "resnet8", "--workers", 1, "--device", "cpu")
    done = call(*words)
    assert done.returncode == 0, done.stderr
    assert "fastdfkd student accuracy" in done.stdout
    result = json.loads((out / "result.json").read_text())
    assert (result["teacher"], result["student"], result["steps"]) == ("resnet56", "resnet8", 6)
    assert list(result["controls"]) == ["pool", "fastdfkd"]
    for control in result["controls"].values():
        assert 0 <= control["student_accuracy"] <= 100
        assert (control["steps"], control["batch_size"]) == (6, 8)
        assert control["seconds"] > 0
    assert [control["num_images"] for control in result["controls"].values()] == [0, 40]
    assert min(result["arm_seconds"].values()) > 0
    assert "The same student, by what it learned from" in (out / "report.html").read_text()

    MethodRun(preset=with_student(tiny, "resnet8"), method="fastdfkd", out=tmp_path / "alone").execute()
    of_control = (out / "controls/fastdfkd/student.safetensors").read_bytes()
    assert of_control == (tmp_path / "alone/student.safetensors").read_bytes()

    other = call(*words, "--teacher", "resnet20")
    assert other.returncode == 2
    assert "holds another recipe's set (guidance.teacher_sha256 is" in other.stderr
    assert (out / "controls/fastdfkd/student.safetensors").read_bytes() == of_control


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--teacher", "resnet65"), "--teacher 'resnet65': no card there and no name; did you mean 'resnet56'?"),
        (("--teacher", "embedded:digits"), "its class 0 is 'zero'; expected 'airplane', as preset cifar10"),
        (("--student", "resnet9"), "--student 'resnet9': did you mean 'resnet'? known: deeplab, plain_cnn"),
        (("--student", "deeplab"), "distill: arch 'deeplab'"),
        (("--controls", "pol"), "controls: 'pol' is no method; did you mean 'pool'?"),
        (("--controls", "diffusion"), "controls: 'diffusion' is the unguided control that every run has"),
        (("--controls", "pool,pool"), "expected distinct names"),
        (("--controls", "fastdfkd", "--num-images", "50"), "50 images are one group; make at least 81"),
        (("--controls", ","), "expected methods such as pool,fastdfkd, or none"),
        (("--controls", "pool", "--method", "pool"), "--controls are what a whole run compares with"),
        (("--method", "fastdfk"), "did you mean 'fastdfkd'?"),
    ],
)
def test_wrong_choices_are_one_line_and_nothing_is_drawn(
    data: Path, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    """Exit code 2, the name that was meant, no folder."""
    monkeypatch.setenv("SYNTHKD_DATA", str(data))
    done = call("run", "cifar10-small", "--out", tmp_path / "run", "--device", "cpu", *words)
    assert done.returncode == 2, done.stdout
    assert said in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "shards").exists()
    if "--controls" not in words and "deeplab" not in words:  # which is tried in a process of its own
        assert call("compare", "cifar10-small", "--out", tmp_path / "c", *words[:2]).returncode == 2


def test_a_controls_options_are_refused_before_anything_is_drawn(tiny: Preset, tmp_path: Path) -> None:
    """One that the method does not have, or that is out of range; a run without controls does not look at them."""
    for options, said in (({"inners": 5}, "unknown field 'inners'"), ({"inner": 0}, "inner is 0")):
        found = replace(tiny, methods={"fastdfkd": options})
        with pytest.raises(SynthkdError, match=said):
            Run(found, tmp_path, workers=1).execute()
        assert not list(tmp_path.iterdir())
        Controls(replace(found, controls=()), tmp_path).check(load_teacher(tiny.job.teacher))


def test_arms_have_the_controls_labels_where_there_are_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits with controls train all students with the teacher beside them; without, as they always did."""
    digits = load_preset("digits")
    assert arm_spec(digits) is digits.distill
    compared = with_controls(digits, "pool")
    job = Run(compared, Path())._students(10)["student"]
    control = MethodRun(preset=compared, method="pool", out=Path())._job(load_teacher(digits.job.teacher))
    assert (job.spec.soft_labels, job.spec.views) == ("teacher", 0)
    assert job.spec == control.spec


def test_a_pool_is_looked_at_where_an_arm_takes_it() -> None:
    """FastDFKD sees none; a method that is not ours may."""
    digits = load_preset("digits")
    found = [takes_pool(replace(digits, controls=names)) for names in ((), ("fastdfkd",), ("pool",), ("other",))]
    assert found == [False, False, True, True]


def test_a_method_without_a_prior_needs_none(
    root: Path, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--method pool` teaches the chosen student where the prior was never made; a whole run says how to make it."""
    monkeypatch.setenv("SYNTHKD_DATA", str(root))
    words = ("run", "cifar10-small", "--student", "resnet8", "--device", "cpu", "--out", tmp_path)
    refused = call(*words)
    assert refused.returncode == 2
    assert "prior-small/pipeline not found; make it with `make prior-cifar SIZE=small`" in refused.stderr
    done = call(*words, "--method", "pool", "--teacher", "resnet20", "--steps", 2)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["teacher"], result["student"]) == ("resnet20", "resnet8")


def test_a_control_of_another_student_is_done_anew(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is the control's alone; the same one is left as it is, and a stranger's folder is refused."""
    monkeypatch.setenv("SYNTHKD_DATA", str(root))
    began: list[bool] = []

    def run(job: Any, *_: Any) -> None:
        began.append((job.out / "student.toml").exists())
        (job.out / "student.toml").touch()
        (job.out / "result.json").write_text('{"student_accuracy": 1.0}')

    monkeypatch.setattr(controls, "in_own_process", run)

    def execute(preset: Preset) -> None:
        found = Controls(preset, tmp_path, 0, 160)
        found.check(load_teacher(preset.job.teacher))
        assert found.execute() == {"pool": {"student_accuracy": 1.0}}

    first = with_controls(with_student(load_preset("cifar10-small"), "resnet8"), "pool")
    for preset in (first, first, with_student(first, "resnet20"), with_teacher(first, "resnet20")):
        execute(preset)
    assert began == [False, True, False, False]
    (tmp_path / "controls/pool" / controls.MARK).unlink()
    with pytest.raises(SynthkdError, match="holds no control of a run"):
        execute(first)


def test_the_report_says_who_is_ahead(tmp_path: Path) -> None:
    """A row for each student, and the gain over the best control, from a result alone."""
    result = {
        "teacher_accuracy": 93.0, "student_accuracy": 60.0, "unguided_student_accuracy": 40.0, "num_images": 5000,
        "steps": 1200, "batch_size": 128, "arm_seconds": {"guided": 600.0},
        "controls": {"pool": {"student_accuracy": 64.5, "num_images": 0, "seconds": 60.0}, "fastdfkd": {}},
    }  # fmt: skip
    found = section(ReportRun(tmp_path, result, None, None))
    assert found is not None
    best = "The best control is pool with 64.5\N{NO-BREAK SPACE}%"
    assert found.takeaway == f"{best}: the guided student is 4.5 points below it."
    page = "".join(map(str, found.body))
    assert "1,200 steps of 128 images" in page
    assert section(ReportRun(tmp_path, {**result, "controls": {}}, None, None)) is None
