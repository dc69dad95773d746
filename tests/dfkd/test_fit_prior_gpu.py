"""`synthkd fit-prior` on a GPU: compiled, in bfloat16, stopped and gone on; its pipeline draws there and on a CPU."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthkd.dfkd.fit_prior import PriorFit
from synthkd.dfkd.prior_data import load_captioned
from synthkd.dfkd.prior_loop import read_log
from synthkd.dfkd.prior_spec import PriorSpec
from synthkd.dfkd.training import Stopped
from synthkd.engine.new_prior import draw_samples

DEVICE = "cuda"  # "cpu" rehearses
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SPEC = PriorSpec(
    vae_widths=(16, 32), unet_widths=(32, 32), text_width=32, vae_steps=120, vae_batch_size=32, vae_learning_rate=3e-3,
    steps=250, batch_size=64, learning_rate=3e-3, warmup_steps=10, ema=0.95, held_out=64,
)  # fmt: skip
CAPTIONS = ("red", "green", "blue")


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Images of 16x16 pixels of one colour each, which their caption names."""
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 600)
    x = 40.0 + 160.0 * np.eye(3)[y][:, None, None, :] + random.normal(0, 20, (600, 16, 16, 3))
    path = tmp_path / "pool.npz"
    np.savez(path, x=x.clip(0, 255).astype(np.uint8), y=y, captions=np.array(CAPTIONS), trained_on=np.array(["toy"]))
    return path


def test_it_learns_stops_and_goes_on(pool: Path, tmp_path: Path) -> None:
    """Stopped in each stage, AdamW's fused state comes back; drawn colours follow the captions on both devices."""
    one, out = PriorFit(data=load_captioned(pool), spec=SPEC, out=tmp_path / "p", device=DEVICE), tmp_path / "p"
    for looks in (60, 100, 1400):  # autoencoder; its rest, latents, words; words, denoiser
        asked = iter([False] * looks)
        one.should_stop = lambda asked=asked: next(asked, True)  # type: ignore[misc]
        with pytest.raises(Stopped):
            one.execute()
    one.should_stop = lambda: False
    told: dict[str, Any] = one.execute()
    assert told["device"] == json.loads((out / "prior.json").read_text())["device"]
    held = [row["held_out_loss"] for row in read_log(out) if "held_out_loss" in row]
    assert held[-1] < held[0]
    assert told["vae"]["psnr_held_out"] > 15
    for device in {DEVICE, "cpu"}:
        asked_for = [caption for caption in CAPTIONS for _ in range(4)]
        images = draw_samples(out / "pipeline", asked_for, seed=0, steps=10, scale=3.0, device=device)
        found = images.float().mean((2, 3)).argmax(1)
        assert (found == torch.arange(3).repeat_interleave(4)).float().mean() > 0.8


def test_a_stopped_training_stays_near_an_undisturbed_one(pool: Path, tmp_path: Path) -> None:
    """Not to the bit there; but a moment or a step that is lost would show in the loss of what follows."""
    losses = []
    for name, looks in (("whole", []), ("parted", [40, 40])):
        one = PriorFit(data=load_captioned(pool), spec=SPEC, out=tmp_path / name, device=DEVICE)
        for count in [*looks, SPEC.vae_steps + 5 - sum(looks) - len(looks)]:  # in the end among the latents
            asked = iter([False] * count)
            one.should_stop = lambda asked=asked: next(asked, True)  # type: ignore[misc]
            with pytest.raises(Stopped):
                one.execute()
        losses.append([row["loss"] for row in read_log(tmp_path / name) if row["stage"] == "vae"][-1])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
