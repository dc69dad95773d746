"""Methods behind one interface: found by name, run, killed and gone on with, compared."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from synthkd.dfkd.compare import COMPARISON, Comparison, summarised
from synthkd.dfkd.method_run import MethodRun
from synthkd.dfkd.methods.base import load_method, method_names
from synthkd.dfkd.presets import Preset, load_preset
from synthkd.dfkd.progress import Silent
from synthkd.dfkd.report_compare import write_comparison
from synthkd.dfkd.sets import open_set
from synthkd.dfkd.train_options import TrainOptions
from synthkd.dfkd.training import Stopped
from synthkd.engine import SynthkdError
from synthkd.engine.verify import verify_set

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
ALL = ["dda", "deepinversion", "diffdfkd", "diffusion", "fastdfkd", "mosaickd", "pool"]


@pytest.fixture
def preset(tmp_path: Path) -> Preset:
    """Digits with a training of a few steps and a pool of 40 images."""
    np.savez(tmp_path / "pool.npz", x=np.random.default_rng(1).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8))
    found = load_preset("digits")
    student = {"widths": [4, 8], "blocks": [1, 1], "stem_stride": 2}
    spec = replace(found.distill, steps=6, batch_size=8, arch_args=student, ema=0.0, warmup_steps=0)
    return replace(found, distill=spec, num_images=20, pool=str(tmp_path / "pool.npz"))


@pytest.fixture
def tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's method, installed as another distribution's."""
    if not PAGE.exists():
        pytest.skip("the documentation is not installed with the package")
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    assert len(code.splitlines()) < 60
    (tmp_path / "tiles_of_a_stranger.py").write_text(code)
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[synthkd.methods]\ntiles = tiles_of_a_stranger:tiles\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "tiles"


def result(run: MethodRun) -> dict[str, Any]:
    """Of a run, after which its student's tensors are finite."""
    found = run.execute()
    weights = load_file(run.out / "student.safetensors")
    assert all(torch.isfinite(w).all() for w in weights.values() if w.is_floating_point())
    return found


def test_all_are_installed() -> None:
    """The table of the page names each of them, and each loads."""
    assert set(ALL) <= set(method_names())
    for name in ALL:
        assert callable(load_method(name))
        assert not PAGE.exists() or f"| `{name}` |" in PAGE.read_text()
    with pytest.raises(SynthkdError, match="did you mean 'mosaickd'"):
        load_method("mosaikd")


def test_a_method_from_outside(tiles: str, preset: Preset, tmp_path: Path) -> None:
    """The page's example draws a set that is verified, trains a student, and is repeated bit by bit."""
    assert tiles in method_names()
    first = MethodRun(preset=preset, method=tiles, out=tmp_path / "a", options={"tile": 16})
    found = result(first)
    assert found["num_images"] == 20
    assert found["method"] == tiles
    assert not verify_set(tmp_path / "a" / "shards").problems
    result(replace(first, out=tmp_path / "b"))
    for name in ("student.safetensors", "shards/shard-000000.tar"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    result(replace(first, out=tmp_path / "c", options={"tile": 8}))
    assert open_set(tmp_path / "c" / "shards").digest != open_set(tmp_path / "a" / "shards").digest
    assert "tiles" in (tmp_path / "a" / "report.html").read_text()


def test_finished_runs_are_not_repeated(preset: Preset, tmp_path: Path) -> None:
    """The same run returns its result; another seed in the same folder is another student."""
    run = MethodRun(preset=preset, method="pool", out=tmp_path / "p")
    found = result(run)
    stamp = (tmp_path / "p" / "student.safetensors").stat().st_mtime_ns
    assert run.execute() == found
    assert (tmp_path / "p" / "student.safetensors").stat().st_mtime_ns == stamp
    before = (tmp_path / "p" / "student.safetensors").read_bytes()
    result(replace(run, seed=1))
    assert (tmp_path / "p" / "student.safetensors").read_bytes() != before


def test_stopped_and_gone_on_with(preset: Preset, tmp_path: Path) -> None:
    """A run that is stopped after three steps ends in the student of one that is not."""
    how = TrainOptions(checkpoint_seconds=0.0, compile="off")
    whole = MethodRun(preset=preset, method="pool", out=tmp_path / "whole", how=how)
    result(whole)
    asked = 0

    def soon() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    cut = replace(whole, out=tmp_path / "cut")
    with pytest.raises(Stopped):
        replace(cut, should_stop=soon).execute()
    assert not (tmp_path / "cut" / "result.json").exists()
    result(cut)
    assert (tmp_path / "cut" / "student.safetensors").read_bytes() == (
        tmp_path / "whole" / "student.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("options", "pool", "words"),
    [
        ({"selct": 3}, None, "unknown field 'selct'; did you mean 'select'"),
        ({"select": "all"}, None, "expected a whole number"),
        ({}, "nowhere", "'nowhere': not found"),
    ],
)
def test_wrong_options_leave_nothing_behind(
    preset: Preset, tmp_path: Path, options: dict[str, Any], pool: str | None, words: str
) -> None:
    """One line that says what was expected."""
    with pytest.raises(SynthkdError, match=words):
        MethodRun(preset=preset, method="pool", out=tmp_path / "x", options=options, pool=pool).execute()
    assert not (tmp_path / "x").exists()


def test_a_method_that_wants_a_pool_says_so(preset: Preset, tmp_path: Path) -> None:
    """Where neither preset nor caller names one."""
    with pytest.raises(SynthkdError, match="needs out-of-domain images; give --pool"):
        MethodRun(preset=replace(preset, pool=None), method="pool", out=tmp_path / "x").execute()


def test_comparison(preset: Preset, tmp_path: Path) -> None:
    """A run in a process of its own: a row, a page, and nothing done twice."""
    run = MethodRun(preset=preset, method="", out=tmp_path / "c", how=TrainOptions())
    job = Comparison(run=run, methods=["pool"], seeds=[1])
    (row,) = job.execute()
    assert (row["method"], row["seed"]) == ("pool", 1)
    assert row["peak_mb"] > 50
    assert row["seconds"] > 0
    stamp = (tmp_path / "c" / "pool" / "seed-1" / "student.safetensors").stat().st_mtime_ns
    assert job.execute() == [row]
    assert (tmp_path / "c" / "pool" / "seed-1" / "student.safetensors").stat().st_mtime_ns == stamp
    page = write_comparison(tmp_path / "c").read_text()
    assert f"{row['student_accuracy']:.2f}" in page
    assert "<script" not in page


def test_a_failing_run_ends_a_comparison_with_its_words(preset: Preset, tmp_path: Path) -> None:
    """What a process of its own raises is raised here, with method and seed before it."""
    run = MethodRun(preset=replace(preset, pool="nowhere"), method="", out=tmp_path / "c")
    with pytest.raises(SynthkdError, match="pool, seed 3: pool 'nowhere': not found"):
        Comparison(run=run, methods=["pool"], seeds=[3]).execute()


SETS = [
    ("fastdfkd", {"samples_per_class": 1, "warmup": 2, "inner": 1, "widths": [8, 8, 4], "noise": 8}),
    ("mosaickd", {"keep": True, "widths": [8, 8, 4], "patch_width": 4, "noise": 8}),
    ("mosaickd", {"keep": False, "widths": [8, 8, 4], "patch_width": 4, "noise": 8}),
    ("deepinversion", {"samples_per_class": 2, "steps": 1}),
]


@pytest.mark.parametrize(("method", "options"), SETS)
def test_a_folder_holds_one_set(method: str, options: dict[str, Any], preset: Preset, tmp_path: Path) -> None:
    """Another seed in the folder of a finished run is refused before it learns; nothing of the first one is lost."""
    preset = replace(preset, methods={})
    run = MethodRun(preset=preset, method=method, out=tmp_path / "x", options=options)
    found = result(run)
    before = {p: p.read_bytes() for p in (tmp_path / "x" / "shards").glob("*.tar")}
    with pytest.raises(SynthkdError, match="seed"):
        replace(run, seed=1).execute()
    assert {p: p.read_bytes() for p in (tmp_path / "x" / "shards").glob("*.tar")} == before
    assert run.execute() == found
    assert not verify_set(tmp_path / "x" / "shards").problems


@pytest.mark.parametrize(("method", "options"), SETS[:2])
def test_a_growing_set_is_of_one_budget(method: str, options: dict[str, Any], preset: Preset, tmp_path: Path) -> None:
    """Neither more nor fewer images are drawn into its folder."""
    preset = replace(preset, methods={})
    run = MethodRun(preset=preset, method=method, out=tmp_path / "x", options=options)
    assert result(run)["num_images"] == 20
    for other in (18, 23):
        with pytest.raises(SynthkdError, match="num_images"):
            replace(run, num_images=other).execute()


def test_a_smaller_budget_of_a_finished_set_is_kept(preset: Preset, tmp_path: Path) -> None:
    """Sixty images on disk, of which thirty are asked for: thirty are seen, and thirty reported."""
    options = {"samples_per_class": 2, "steps": 1}
    run = MethodRun(preset=preset, method="deepinversion", out=tmp_path / "x", options=options, num_images=60)
    assert result(run)["num_images"] == 60
    assert result(replace(run, num_images=30))["num_images"] == 30
    assert result(replace(run, method="pool", options={}))["num_images"] == 0


def test_other_weights_or_another_pool_are_another_run(preset: Preset, tmp_path: Path) -> None:
    """What decides a set or a pool is part of a run's identity, not its name alone."""
    run = MethodRun(preset=preset, method="pool", out=tmp_path / "x")
    first = result(run)
    guided = replace(preset, job=replace(preset.job, alpha=5.0))
    assert replace(run, preset=guided).execute()["identity"] != first["identity"]
    np.savez(str(preset.pool), x=np.random.default_rng(2).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8))
    again = run.execute()
    assert again["identity"]["pool"] != first["identity"]["pool"]


def test_stopped_behind_the_last_step(preset: Preset, tmp_path: Path) -> None:
    """A run that is stopped while it writes its last set does not train again: the same student, the whole set."""
    options = {"widths": [8, 8, 4], "patch_width": 4, "noise": 8}
    how = TrainOptions(checkpoint_seconds=1e6, compile="off")
    preset = replace(preset, methods={}, num_images=300)
    run = MethodRun(preset=preset, method="mosaickd", out=tmp_path / "cut", options=options, how=how)
    result(replace(run, out=tmp_path / "whole"))
    with pytest.raises(Stopped):
        replace(run, should_stop=lambda: any((tmp_path / "cut" / "shards").glob("shard-*"))).execute()
    assert (tmp_path / "cut" / "checkpoint.safetensors").exists()
    steps: list[str] = []

    class Counted(Silent):
        def advance(self, stage: str, count: int) -> None:
            steps.extend([stage] * count)

    result(replace(run, progress=Counted()))
    assert steps.count("distill") == 6  # told at once, by the checkpoint
    for name in ("student.safetensors", "shards/shard-000000.tar"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_comparison_keeps_rows_of_its_budget(preset: Preset, tmp_path: Path) -> None:
    """Rows of other methods stay, those of another number of steps go; a name given twice is refused."""
    spec = preset.distill
    row = {"preset": "digits", "method": "diffusion", "seed": 0, "steps": spec.steps, "batch_size": spec.batch_size}
    rows = [row, {**row, "seed": 1, "steps": 7}, {**row, "method": "pool", "seed": 0}]
    (tmp_path / COMPARISON).write_text(json.dumps({"rows": rows}))
    run = MethodRun(preset=preset, method="", out=tmp_path)
    assert Comparison(run=run, methods=["pool"], seeds=[0])._others() == [row]
    with pytest.raises(SynthkdError, match="distinct"):
        Comparison(run=run, methods=["pool", "pool"], seeds=[0]).execute()


def test_a_group_that_is_told_to_end_stops_at_a_safe_point(preset: Preset, tmp_path: Path) -> None:
    """SIGTERM to a comparison's whole process group, as schedulers send it: exit code 75, and a checkpoint."""
    words = ["compare", "digits", "--methods", "pool", "--pool", str(preset.pool), "--out", str(tmp_path / "c")]
    code = "from synthkd.dfkd.cli import main; import sys; sys.argv = ['synthkd', *sys.argv[1:]]; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *words], start_new_session=True, stdout=subprocess.DEVNULL)
    log = tmp_path / "c" / "pool" / "seed-0"
    until = time.monotonic() + 90
    while not (log / "spent.json").exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.1)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 75
    assert (log / "checkpoint.safetensors").exists()


def test_the_command_runs_a_method(call: Callable[..., Any], preset: Preset, tmp_path: Path) -> None:
    """A dense preset, whose teacher could guide no prior, with a method that needs none; wrong words are one line."""
    words = ("run", "segments", "--method", "pool", "--pool", preset.pool, "--steps", 1, "--out", tmp_path / "s")
    assert call(*words).returncode == 0
    assert json.loads((tmp_path / "s" / "result.json").read_text())["student_miou"] >= 0
    done = call("run", "digits", "--patch", 22, "--out", tmp_path / "x")
    assert done.returncode == 2
    assert "are for --method" in done.stderr
    done = call("run", "digits", "--method", "mosaickd", "--patch", 11, "--out", tmp_path / "x")
    assert "patch is 11; expected 10 or 22 or 46" in done.stderr
    assert not (tmp_path / "x").exists()


def test_means_and_reach() -> None:
    """Of rows that have the column."""
    rows = [{"method": "a", "seed": s, "x": v} for s, v in ((0, 1.0), (1, 4.0))] + [{"method": "b", "seed": 0}]
    assert summarised(rows, "x") == {"a": (2.5, 1.0, 4.0)}
    assert json.dumps(rows)
