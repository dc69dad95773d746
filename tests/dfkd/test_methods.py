"""Methods behind one interface: found by name, run, killed and gone on with, compared."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from synthkd.dfkd.compare import Comparison, summarised
from synthkd.dfkd.method_run import MethodRun
from synthkd.dfkd.methods.base import load_method, method_names
from synthkd.dfkd.presets import Preset, load_preset
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


def test_means_and_reach() -> None:
    """Of rows that have the column."""
    rows = [{"method": "a", "seed": s, "x": v} for s, v in ((0, 1.0), (1, 4.0))] + [{"method": "b", "seed": 0}]
    assert summarised(rows, "x") == {"a": (2.5, 1.0, 4.0)}
    assert json.dumps(rows)
