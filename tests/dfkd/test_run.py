"""The main job on a tiny prior: result, report, resume, and the control that differs in one number."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthkd.dfkd import run, scores
from synthkd.dfkd.evaluate import evaluate
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.presets import Preset, digits, unguided
from synthkd.dfkd.progress import Silent
from synthkd.dfkd.rounds import draw_set
from synthkd.dfkd.run import Interrupted, Run
from synthkd.dfkd.student import DistillSpec
from synthkd.dfkd.students import train_student
from synthkd.dfkd.training import CHECKPOINT
from synthkd.engine import Request
from synthkd.engine.index import flatten, read_manifest


@pytest.fixture
def preset(tiny_job: SynthJob, tmp_path: Path) -> Preset:
    """A preset around the tiny job, scored on random images."""
    data = tmp_path / "test.npz"
    rng = np.random.default_rng(0)
    np.savez(data, x=rng.integers(0, 256, (30, 16, 16, 3), dtype=np.uint8), y=np.arange(30) % 3)
    student = DistillSpec(arch_args={"widths": [4], "blocks": [1]}, steps=12, batch_size=8, warmup_steps=2)
    return Preset(name="tiny", job=tiny_job, num_images=14, distill=student, judge=tiny_job.teacher, test_set=str(data))


def test_run_writes_everything(preset: Preset, tmp_path: Path) -> None:
    """Sets, student with card and model card, result.json with the promised fields, report.html."""
    out = tmp_path / "run"
    result = Run(preset, out, seed=3, workers=1).execute()
    assert result == json.loads((out / "result.json").read_text())
    for name in ("teacher_accuracy", "student_accuracy", "unguided_student_accuracy"):
        assert 0 <= result[name] <= 100
    assert result["num_images"] == 14
    assert min(result["images_per_second"], result["guided_images_per_second"], result["seconds"]) > 0
    assert sum(map(sum, result["confusion"]["student"])) == 30
    for name in ("student.safetensors", "student.toml", "student.md", "student_log.jsonl", "report.html"):
        assert (out / name).stat().st_size > 0
    assert {p.name for p in (out / "shards").glob("*.tar")} == {"shard-000000.tar"}
    assert set(result["feature_distance"]) == {"network", "guided_unguided", "guided_real", "unguided_real"}
    assert result["feature_distance"]["network"] == "judge"
    assert result["feature_distance"]["guided_real"]["frechet"] > 0
    assert set(result["near_duplicates"]) == {"guided", "unguided", "threshold", "examples"}


def test_without_judge_and_test_set_the_teacher_compares_the_two_sets(preset: Preset, tmp_path: Path) -> None:
    """No real images: one distance, in the teacher's features."""
    alone = replace(preset, judge=None, test_set=None)
    found = Run(alone, tmp_path / "run", workers=1).execute()["feature_distance"]
    assert set(found) == {"network", "guided_unguided"}
    assert found["network"] == "teacher"


def test_finished_stages_are_kept(preset: Preset, tmp_path: Path) -> None:
    """A second run redraws and retrains nothing, and says the same."""
    out = tmp_path / "run"
    first = Run(preset, out, workers=1).execute()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".tar", ".safetensors")}
    second = Run(preset, out, workers=1).execute()
    assert before == {p: p.stat().st_mtime_ns for p in before}
    for name in ("student_accuracy", "unguided_student_accuracy", "judge", "confusion"):
        assert first[name] == second[name]


class Drawn(Silent):
    """Says when all is drawn, and the students begin."""

    begun = False

    def begin(self, stage: str, total: int, unit: str) -> None:
        self.begun |= stage == "distill"

    def is_set(self) -> bool:
        return self.begun


def test_a_stop_leaves_whole_groups(preset: Preset, tmp_path: Path) -> None:
    """Asked to stop, the run ends after a group and goes on from there; asked within the students, after a step."""
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        Run(preset, tmp_path / "run", workers=1, should_stop=lambda: next(asked, True)).execute()
    assert len((tmp_path / "run/shards/shard-000000.tar.journal").read_text().splitlines()) == 2
    told = Drawn()
    with pytest.raises(Interrupted):
        Run(preset, tmp_path / "run", workers=1, progress=told, should_stop=told.is_set).execute()
    for name in ("", "control"):
        assert (tmp_path / "run" / name / CHECKPOINT).exists()
        assert not (tmp_path / "run" / name / "student.toml").exists()
    result = Run(preset, tmp_path / "run", workers=1).execute()
    assert result["num_images"] == 14


def test_a_stop_is_heard_before_scores(
    preset: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked when the students are done, the run ends without scores; the teacher's is kept, another test set's not."""
    scored, told = [], Drawn()
    monkeypatch.setattr(scores, "evaluate", lambda net, data: scored.append(len(data)) or evaluate(net, data))
    monkeypatch.setattr(run, "evaluate", lambda *_: pytest.fail("scored"))
    monkeypatch.setattr(Run, "_distill", lambda *_: told.begin("distill", 2, "students") or {})
    asked = Run(preset, tmp_path / "run", workers=1, should_stop=told.is_set)
    for _ in range(2):
        told.begun = False
        with pytest.raises(Interrupted):
            asked.execute()
    assert scored == [30]
    np.savez(tmp_path / "other.npz", x=np.zeros((3, 16, 16, 3), np.uint8), y=np.arange(3))
    told.begun = False
    with pytest.raises(Interrupted):
        replace(asked, preset=replace(preset, test_set=str(tmp_path / "other.npz"))).execute()
    assert scored == [30, 3]


def test_a_student_is_known_by_its_teacher_wherever_that_lies(preset: Preset, tmp_path: Path) -> None:
    """Another path to the same card retrains nothing, nor does a stamp that has the path; other weights do."""
    out, spelled = tmp_path / "run", Path(preset.job.teacher)
    draw_set(preset.job, Request(num_samples=14, seed=0), out / "shards", workers=1)
    job = Run(preset, out)._students(14)["student"]
    train_student(job)
    before, seconds = (out / "student.safetensors").stat().st_mtime_ns, job.seconds
    shutil.copytree(spelled.parent, tmp_path / "moved")
    moved = replace(job, teacher=str(tmp_path / "moved" / spelled.name))
    (out / ".student-of").write_text(job.stamps[1])
    told = json.loads((out / "spent.json").read_text())
    (out / "spent.json").write_text(json.dumps(told | {"run": hashlib.sha256(job.stamps[1].encode()).hexdigest()}))
    train_student(job)
    assert job.seconds == seconds > 0
    (out / ".student-of").write_text(job.stamp)
    train_student(moved)
    assert (out / "student.safetensors").stat().st_mtime_ns == before
    card = tmp_path / "moved" / spelled.name
    card.write_text(card.read_text().replace("mean = [0.5", "mean = [0.4"))
    assert moved.stamp != job.stamp


def test_a_smaller_count_uses_fewer_images(preset: Preset, tmp_path: Path) -> None:
    """Asked for fewer images than the folder holds, the run trains on and reports on so many."""
    first = Run(preset, tmp_path, workers=1).execute()
    assert (first["resumed"], first["num_images"]) == (False, 14)
    fewer = Run(preset, tmp_path, workers=1, num_images=7).execute()
    assert (fewer["resumed"], fewer["num_images"]) == (True, 7)
    assert "- images: 7" in (tmp_path / "student.md").read_text()


@pytest.mark.parametrize("make", [digits])
def test_control_differs_in_guidance_scale_alone(make: Any) -> None:
    """The control of a preset: the same job but for guidance.scale = 0."""
    job = make().job
    ours, theirs = (flatten({"recipe": j.recipe.to_dict(), **j.source()}) for j in (job, unguided(job)))
    assert {name for name in ours if ours[name] != theirs[name]} == {"recipe.guidance.scale"}
    assert ours.keys() == theirs.keys()
    assert theirs["recipe.guidance.scale"] == 0.0
    assert ours["recipe.guidance.scale"] > 0


def test_control_on_disk_differs_in_guidance_scale_alone(preset: Preset, tmp_path: Path) -> None:
    """The manifests of a run's two sets, and its two students' settings."""
    Run(preset, tmp_path, workers=1).execute()
    kept = ("recipe", "seed", "guidance", "model_sha256", "source", "num_samples", "versions")
    ours, theirs = (
        flatten({k: read_manifest(f / "shards")[k] for k in kept}) for f in (tmp_path, tmp_path / "control")
    )
    assert {name for name in ours if ours[name] != theirs.get(name)} == {"recipe.guidance.scale"}
    cards = [(f / "student.md").read_text().partition("## Training")[2] for f in (tmp_path, tmp_path / "control")]
    assert cards[0] == cards[1]


def synth_command(job: SynthJob, folder: Path, count: int) -> list[str]:
    """`synthkd synth` for the tiny job as a process."""
    recipe = folder.parent / "recipe.toml"
    recipe.write_text(
        "height = 16\nwidth = 16\nsteps = 4\nguidance_scale = 3.0\nclasses_per_group = 3\nsamples_per_class = 2\n"
        "groups_per_shard = 3\n[guidance]\nscale = 0.2\n"
    )
    return [
        sys.executable, "-m", "synthkd.dfkd.cli", "synth", "--model", job.model, "--teacher", job.teacher,
        "--recipe", str(recipe), "--out", str(folder), "--num-samples", str(count), "--workers", "1", "--device", "cpu",
    ]  # fmt: skip


def wait_for_groups(folder: Path, count: int, process: "subprocess.Popen[bytes]") -> None:
    """Until so many groups of the first shard are journalled."""
    journal = folder / "shard-000000.tar.journal"
    for _ in range(3000):  # a minute: workers start slowly on a busy machine
        if journal.exists() and len(journal.read_text().splitlines()) >= count:
            return
        if process.poll() is not None:
            return
        time.sleep(0.02)
    raise AssertionError("the run did not get that far")


@pytest.mark.slow
def test_sigterm_ends_after_the_group_with_75(tiny_job: SynthJob, tmp_path: Path) -> None:
    """SIGTERM: exit code 75, the folder goes on later."""
    job = replace(tiny_job)
    process = subprocess.Popen(synth_command(job, tmp_path / "set", 6000), stdout=subprocess.DEVNULL, env=os.environ)
    wait_for_groups(tmp_path / "set", 1, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert not list((tmp_path / "set").glob("*.fresh"))


@pytest.mark.slow
def test_sigterm_to_the_workers_too_is_75(tiny_job: SynthJob, tmp_path: Path) -> None:
    """A signal to the whole process group, as batch systems send it, is a stop and no error."""
    words = synth_command(tiny_job, tmp_path / "set", 6000)
    words[words.index("--workers") + 1] = "2"
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=os.environ, start_new_session=True)
    wait_for_groups(tmp_path / "set", 1, process)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 75
