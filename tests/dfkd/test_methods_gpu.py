"""Methods on a GPU: compiled steps in bfloat16, pools read to the device, what is left behind when a run is stopped."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from synthkd.dfkd.method_run import MethodRun
from synthkd.dfkd.presets import Preset, load_preset
from synthkd.dfkd.train_options import TrainOptions
from synthkd.dfkd.training import Stopped
from synthkd.engine.verify import verify_set

DEVICE = "cuda"  # "cpu" rehearses
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SMALL: dict[str, dict[str, Any]] = {
    "mosaickd": {"keep": True, "widths": [32, 16, 8], "patch_width": 16, "student_steps": 2},
    "fastdfkd": {"samples_per_class": 2, "warmup": 2, "inner": 2, "widths": [32, 16, 8], "noise": 32},
    "deepinversion": {"samples_per_class": 3, "steps": 5},
    "pool": {},
}


@pytest.fixture
def preset(tmp_path: Path) -> Preset:
    """Digits on the GPU, thirty steps, a pool of 80 images."""
    np.savez(tmp_path / "pool.npz", x=np.random.default_rng(1).integers(0, 256, (80, 32, 32, 3), dtype=np.uint8))
    found = load_preset("digits").on(DEVICE)
    spec = replace(found.distill, steps=30, batch_size=16, warmup_steps=2)
    return replace(found, distill=spec, num_images=100, pool=str(tmp_path / "pool.npz"), methods={})


def curves(run: MethodRun) -> list[dict[str, Any]]:
    """Rows of the log, after a run whose weights are finite."""
    run.execute()
    weights = load_file(run.out / "student.safetensors")
    assert all(torch.isfinite(w).all() for w in weights.values() if w.is_floating_point())
    return [json.loads(line) for line in (run.out / "student_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", sorted(SMALL))
@pytest.mark.parametrize("compiled", [False, True])
def test_methods_run(method: str, compiled: bool, preset: Preset, tmp_path: Path) -> None:
    """In bfloat16, eager and compiled: finite terms, a whole set."""
    how = TrainOptions(device=DEVICE, precision="bfloat16", compile="default" if compiled else "off")
    rows = curves(MethodRun(preset=preset, method=method, out=tmp_path / "x", options=SMALL[method], how=how))
    assert all(np.isfinite([v for v in row.values() if v is not None]).all() for row in rows)
    if method != "pool":
        assert not verify_set(tmp_path / "x" / "shards").problems


@pytest.mark.parametrize("method", ["mosaickd", "fastdfkd"])
def test_compiled_terms_are_eager_ones(method: str, preset: Preset, tmp_path: Path) -> None:
    """In float32 the first row of the log is nearly the same: a gradient that is lost would show."""
    found = []
    for name in ("off", "default"):
        how = TrainOptions(device=DEVICE, precision="float32", compile=name)
        run = MethodRun(preset=preset, method=method, out=tmp_path / name, options=SMALL[method], how=how)
        found.append(curves(run)[0])
    for name in ("discriminator", "local", "ce"):
        if name in found[0]:
            assert found[1][name] == pytest.approx(found[0][name], rel=0.1, abs=0.05), name


@pytest.mark.parametrize("method", ["mosaickd", "fastdfkd"])
def test_a_stopped_run_goes_on(method: str, preset: Preset, tmp_path: Path) -> None:
    """From its checkpoint, with optimizers, players and pools on the device."""
    how = TrainOptions(device=DEVICE, compile="off", checkpoint_seconds=0.0)
    run = MethodRun(preset=preset, method=method, out=tmp_path / "x", options=SMALL[method], how=how)
    asked = 0

    def soon() -> bool:
        nonlocal asked
        asked += 1
        return asked > 12

    with pytest.raises(Stopped):
        replace(run, should_stop=soon).execute()
    assert curves(run)[-1]["step"] == 30
    assert not verify_set(tmp_path / "x" / "shards").problems
