"""Rows of evidence, each once; contact sheets; wrong inputs."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from synthkd.bench import cli_evidence, evidence, evidence_page, evidence_pictures, record
from synthkd.bench.evidence import Evidence, facts_of, prior_facts, rows_of
from synthkd.dfkd import students
from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.presets import Preset, load_preset
from synthkd.dfkd.training import Stopped
from synthkd.engine import GuidanceSpec, SynthkdError

ARMS = evidence_page.ARMS
RESULT: dict[str, Any] = {
    "preset": "tiny", "seed": 0, "teacher_accuracy": 93.39, "student_accuracy": 60.0, "num_images": 400,
    "unguided_student_accuracy": 40.5, "guided_images_per_second": 4.0, "images_per_second": 8.0,
    "arm_seconds": {"guided": 3600.0, "unguided": 1800.0}, "device": "cpu: AVX2",
    "controls": {
        "pool": {"student_accuracy": 50.0, "num_images": 0, "seconds": 900.0},
        "fastdfkd": {"student_accuracy": 30.0, "num_images": 400, "seconds": 360.0},
    },
}  # fmt: skip


def finished(folder: Path, result: dict[str, Any] = RESULT) -> dict[str, Any]:
    """A run's folder as far as rows need it: a student of each arm."""
    homes = {"guided": folder, "unguided": folder / "control"} | {
        n: folder / "controls" / n for n in result["controls"]
    }
    for name, home in homes.items():
        home.mkdir(parents=True, exist_ok=True)
        (home / "student.safetensors").write_text(f"{name} {result['seed']}")
    return result


class FakeRun:
    """What `Run` leaves, at once."""

    calls: list[int]

    def __init__(self, preset: Preset, out: Path, seed: int, *_: Any) -> None:
        self.calls.append(seed)
        self.out, self.seed = out, seed

    def execute(self) -> dict[str, Any]:
        return finished(self.out, RESULT | {"seed": self.seed})


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeRun]:
    """Runs that take no time, and rows that go elsewhere."""
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(evidence, "Run", FakeRun)
    monkeypatch.setattr(FakeRun, "calls", [], raising=False)
    return FakeRun


@pytest.fixture
def preset() -> Preset:
    """Digits, with controls."""
    return replace(load_preset("digits"), name="tiny", controls=("pool", "fastdfkd"))


def test_rows_of_a_run(preset: Preset, tmp_path: Path) -> None:
    """One an arm, with its own student, hours and images; what guided the images stands in the row."""
    asked = facts_of(preset, 400)
    rows = rows_of(finished(tmp_path), tmp_path, asked)
    assert [row["control"] for row in rows] == list(ARMS)
    assert [row["student_accuracy"] for row in rows] == [60.0, 40.5, 50.0, 30.0]
    assert [row["hours"] for row in rows] == [1.0, 0.5, 0.25, 0.1]
    assert [row["images"] for row in rows] == [400, 400, 0, 400]
    assert [row["images_per_second"] for row in rows] == [4.0, 8.0, None, None]
    assert [(row["guidance"] or {}).get("scale") for row in rows] == [0.8, 0.0, None, None]
    assert {row["gpu_hours"] for row in rows} == {0.0}
    assert rows[0]["student_sha256"] == hashlib.sha256(b"guided 0").hexdigest()
    assert len({row["student_sha256"] for row in rows}) == 4
    for name in ("teacher", "teacher_sha256", "student", "size", "steps", "batch_size", "prior", "seed", "run"):
        assert name in rows[0]
    on_gpu = rows_of(finished(tmp_path, RESULT | {"device": "cuda: H100"}), tmp_path, asked)
    assert [row["gpu_hours"] for row in on_gpu] == [1.0, 0.5, 0.25, 0.1]


def test_a_run_is_known_by_what_was_declared_and_not_by_its_folder(preset: Preset) -> None:
    """Seed and paths are left out; guidance, steps and images are not."""
    base = facts_of(preset, 400)["run"]
    assert facts_of(replace(preset, distill=replace(preset.distill, seed=5)), 400)["run"] == base
    assert facts_of(preset, 401)["run"] != base
    recipe = preset.job.recipe
    other = replace(recipe, guidance=replace(recipe.guidance, scale=0.5))
    assert facts_of(replace(preset, job=replace(preset.job, recipe=other)), 400)["run"] != base
    assert facts_of(replace(preset, job=replace(preset.job, alpha=0.7)), 400)["run"] != base
    assert facts_of(replace(preset, distill=replace(preset.distill, steps=7)), 400)["run"] != base


def test_a_prior_tells_its_training_and_vouches_for_its_weights(
    prior_folder: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Size by folder; figures of other weights are refused, and no figures are none."""
    pipeline = prior_folder(tmp_path / "prior-small")
    found = prior_facts(str(pipeline))
    assert (found["size"], found["hours"], found["parameters"]) == ("small", 1.0, 3_000_000)
    assert found["sha256"] == hashlib.sha256(b"weights").hexdigest()
    (pipeline / "unet/weights.safetensors").write_bytes(b"others")
    with pytest.raises(SynthkdError, match=r"SHA-256 of unet/weights.safetensors is not that of the file"):
        prior_facts(str(pipeline))
    (pipeline.parent / "prior.json").write_text("[]")
    with pytest.raises(SynthkdError, match="not what `synthkd fit-prior` writes"):
        prior_facts(str(pipeline))
    (pipeline.parent / "prior.json").unlink()
    assert set(prior_facts(str(pipeline))) == {"size", "sha256"}
    assert prior_facts("embedded:digits") == {"size": "embedded:digits", "sha256": None}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_between_arms_loses_no_row_and_doubles_none(
    runs: type[FakeRun], preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the middle of the third row; the same command writes it and the fourth, and runs nothing again."""
    job = Evidence(preset=preset, seeds=[0], out=tmp_path / "out", record=True)
    path = tmp_path / "results/evidence.jsonl"
    child = os.fork()
    if child == 0:
        _append_two_and_a_half(monkeypatch, path)
        with contextlib.suppress(BaseException):
            job.execute()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(path.read_text().splitlines()) == 3
    for seeds in ([0], [0], [0, 1]):
        rows = replace(job, seeds=seeds).execute()
    assert runs.calls == [1]  # of this process: seed 0 ran in the other
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["seed"], row["control"]) for row in written] == [(seed, arm) for seed in (0, 1) for arm in ARMS]
    assert rows == written
    assert {"commit", "machine", "date"} <= written[0].keys()


def _append_two_and_a_half(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    append, count = record.append_row, [0]

    def stopped(name: str, row: dict[str, Any]) -> Path:
        count[0] += 1
        if count[0] == 3:
            with path.open("a") as f:
                f.write(json.dumps(row)[:50])
            os.kill(os.getpid(), signal.SIGKILL)
        return append(name, row)

    monkeypatch.setattr(record, "append_row", stopped)


def test_other_settings_and_controls_in_the_folder_are_run(runs: type[FakeRun], preset: Preset, tmp_path: Path) -> None:
    """Rows that lie there are those of this very run, or are made anew."""
    job = Evidence(preset=preset, seeds=[0], out=tmp_path)
    job.execute()
    job.execute()
    assert runs.calls == [0]
    replace(job, num_images=40).execute()
    replace(job, num_images=40, preset=replace(preset, controls=("pool",))).execute()
    assert runs.calls == [0, 0, 0]


@pytest.fixture
def ran(
    pipeline_folder: Path, teacher_card: Path, recipe: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[dict[str, Any], Path]:  # fmt: skip
    """A real run of twelve images an arm, in this process: its guided row and its folder."""
    monkeypatch.setattr(students, "cores", lambda: 1)
    np.savez(tmp_path / "test.npz", x=np.zeros((3, 16, 16, 3), np.uint8), y=np.arange(3))
    job = SynthJob(
        model=str(pipeline_folder), teacher=str(teacher_card), recipe=recipe(guidance=GuidanceSpec(scale=0.8))
    )
    student = DistillSpec(arch_args={"widths": [4], "blocks": [1]}, steps=4, batch_size=8, warmup_steps=1)
    tiny = Preset(name="tiny", job=job, num_images=12, distill=student, test_set=str(tmp_path / "test.npz"),
                  teachers={"own": str(teacher_card)})  # fmt: skip
    rows = Evidence(preset=tiny, seeds=[3], out=tmp_path / "out", workers=1).execute()
    assert [row["control"] for row in rows] == ["guided", "unguided"]
    return rows[0], tmp_path / "out/seed-3"


def test_a_real_run_and_its_contact_sheet(
    ran: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `Run` says makes the row; unguided left of guided, a row per class; too large a sheet loses columns."""
    row, folder = ran
    told = json.loads((folder / "result.json").read_text())
    assert row["student_accuracy"] == told["student_accuracy"]
    assert row["images_per_second"] == told["guided_images_per_second"]
    assert row["hours"] == round(told["arm_seconds"]["guided"] / 3600, 4)
    assert (row["seed"], row["images"], row["guidance"]["scale"]) == (3, 12, 0.8)
    path = evidence_pictures.write_sheet(folder, "tiny", tmp_path / "images")
    run = evidence_pictures.load_run(folder)
    assert run.main is not None
    assert run.control is not None
    sheet = torch.tensor(list(Image.open(path).convert("RGB").tobytes())).view(-1, Image.open(path).width, 3)
    high = wide = 16
    rows = [keys for _, keys in sorted(run.main.keys.items())]
    step = high + max(1, wide // 24)
    side = min(8, max(map(len, rows))) * step - (step - wide)
    for set_, left in ((run.control, 0), (run.main, sheet.shape[1] - side)):
        for i, keys in enumerate(rows):
            cell = sheet[i * step : i * step + high, left : left + wide]
            assert torch.equal(cell, torch.tensor(set_.pixels[keys[0]]).long())
    monkeypatch.setattr(evidence_pictures, "MOST_BYTES", path.stat().st_size - 1)
    smaller = evidence_pictures.write_sheet(folder, "tiny", tmp_path / "images")
    assert smaller.stat().st_size <= evidence_pictures.MOST_BYTES
    monkeypatch.setattr(evidence_pictures, "MOST_BYTES", 10)
    with pytest.raises(SynthkdError, match="expected 10 at most"):
        evidence_pictures.write_sheet(folder, "tiny", tmp_path / "images")
    shutil.rmtree(folder / "control")
    with pytest.raises(SynthkdError, match="no guided set and control"):
        evidence_pictures.write_sheet(folder, "tiny", tmp_path / "images")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "name a preset and --out"),
        (["digits"], "name a preset and --out"),
        (["digit", "--out", "x"], "did you mean 'digits'"),
        (["digits", "--out", "x"], "names neither teachers nor controls"),
        (["digits", "--out", "x", "--controls", "pol"], "did you mean 'pool'"),
        (["digits", "--out", "x", "--student", "resnet2"], "resnet20"),
        (["digits", "--out", "x", "--teacher", "nobody"], "no card there"),
        (["digits", "--out", "x", "--controls", "pool", "--seeds", "0,0"], "distinct numbers"),
        (["digits", "--out", "x", "--controls", "pool", "--minutes", "0"], "above 0"),
        (["--sheet", "x"], "need the preset's name"),
        (["digits", "--sheet", "nowhere"], "no result.json"),
        (["digits", "--trained", "nowhere"], "no finished training"),
    ],
)
def test_wrong_inputs_are_one_line(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, and nothing written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli_evidence.main(words)
    assert end.value.code == 2
    shown = capsys.readouterr().err.strip()
    assert says in shown
    assert shown.count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_a_stop_is_to_be_tried_again(runs: type[FakeRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 75 where the time was over."""

    def stopped(self: FakeRun) -> None:
        raise Stopped

    monkeypatch.setattr(FakeRun, "execute", stopped)
    with pytest.raises(SystemExit) as end:
        cli_evidence.main(["digits", "--controls", "pool", "--out", str(tmp_path), "--minutes", "1"])
    assert end.value.code == 75
