"""A prior's folder for the tests of evidence."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest


def _prior(home: Path) -> Path:
    """A prior's pipeline with the weights of nothing, and its prior.json."""
    unet = home / "pipeline/unet"
    unet.mkdir(parents=True)
    (unet / "weights.safetensors").write_bytes(b"weights")
    stage = {"steps": 10, "batch_size": 4, "seconds": 1800.0, "images_per_second": 70.0, "loss": 0.5}
    told = {
        "trained_on": ["cifar100/without-cifar10"], "images": 35986, "captions": ["sea"], "device": "cpu: AVX2",
        "parameters": {"unet": 2_000_000, "vae": 1_000_000}, "vae": {**stage, "psnr_held_out": 30.5},
        "unet": {**stage, "held_out_loss": 0.25},
        "sha256": {"unet/weights.safetensors": hashlib.sha256(b"weights").hexdigest()},
    }  # fmt: skip
    (home / "prior.json").write_text(json.dumps(told))
    log = [{"stage": "vae", "step": 5 * s, "loss": 1 / s} for s in range(1, 3)]
    log += [{"stage": "unet", "step": 5 * s, "loss": 2 / s} for s in range(1, 401)]
    log[1]["psnr_held_out"], log[56]["held_out_loss"], log[-1]["held_out_loss"] = 30.5, 0.3, 0.25
    (home / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return home / "pipeline"


@pytest.fixture
def prior_folder() -> Callable[[Path], Path]:
    """`prior_folder(home)`: what `synthkd fit-prior` leaves, with the weights of nothing; its pipeline."""
    return _prior
