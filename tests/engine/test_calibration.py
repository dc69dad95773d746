"""Calibration: which latents it looks at, what it compares, and what it chooses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from synthkd.engine import GuidanceSpec, Plan, Request, Synthesizer, calibration
from synthkd.engine.calibration import Calibration, Recorder, calibrate, gradient_of
from synthkd.engine.decoders import PooledDecoder
from synthkd.engine.fitted import FittedDecoder, FittedNet, shape_for

Make = Callable[..., Synthesizer]


@pytest.fixture
def guided(synthesizer: Make) -> Synthesizer:
    """Guided at the last two of four calls, CFG at the first two."""
    return synthesizer(guidance=GuidanceSpec(scale=0.2, start=0.5), cfg_stop=0.5)


def fresh() -> FittedDecoder:
    """A decoder that was fitted to nothing."""
    torch.manual_seed(0)
    return FittedDecoder(FittedNet(shape_for((4, 8, 8), 2, (16, 16), hidden=8, blocks=1)).requires_grad_(False))


class Spy:
    """A decoder that keeps what it was asked to decode."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.seen = inner, []  # type: Any, list[torch.Tensor]

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        self.seen.append(z.detach().clone())
        return self.inner(z)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_what_is_recorded_is_what_guidance_looks_at(guided: Synthesizer) -> None:
    spy = Spy(guided.model.decoder)
    run = Recorder(guided.model, guided.recipe, guided.guidance, spy)(seed=3, group=1)
    guidance_looked_at = [z for z in spy.seen if len(z) == 6][:2]
    assert run.latents.shape == (4, 6, 4, 8, 8)
    assert run.targets.shape == (4, 6, 3)
    torch.testing.assert_close(run.latents[2:], torch.stack(guidance_looked_at), rtol=0, atol=0)
    plan = Plan(guided.recipe, Request(num_samples=12, seed=3))
    assert run.targets[0].argmax(1).tolist() == list(plan.unit(1).classes)


def test_the_vae_agrees_with_itself_and_a_stranger_is_refused(guided: Synthesizer) -> None:
    full = guided.model.decoder
    own = calibrate(guided, full, full, seed=5)
    assert own.cosines == (1.0, 1.0)
    assert own.chosen == "cheap"
    stranger = calibrate(guided, fresh(), full, seed=5)
    assert len(stranger.cosines) == 2
    assert abs(stranger.mean) < 0.3
    assert stranger == Calibration(stranger.cosines, stranger.mean, 0.3, "vae")
    assert stranger == calibrate(guided, fresh(), full, seed=5)
    pooled = calibrate(guided, PooledDecoder(full, 2), full, seed=5)
    assert -1 < pooled.mean < 0.99


def test_a_decoder_that_breaks_a_run_is_not_chosen(guided: Synthesizer) -> None:
    broken = fresh()
    broken.module.get_parameter("head.weight").fill_(torch.inf)
    assert calibrate(guided, broken, guided.model.decoder, seed=5).chosen == "vae"


def test_a_gradient_in_parts_is_that_of_the_group(guided: Synthesizer) -> None:
    x0, targets = torch.randn(6, 4, 8, 8), torch.eye(3).repeat(2, 1)
    assert guided.guidance is not None
    whole = gradient_of(guided.guidance, guided.model.decoder, x0, targets)
    parts = gradient_of(guided.guidance, guided.model.decoder, x0, targets, chunk=4)
    torch.testing.assert_close(parts, whole)
    assert float(whole.abs().max()) > 0


def test_a_run_in_parts_is_recorded_as_the_group(guided: Synthesizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for large images, whose parts are fixed by their size: what is fitted must not hang on the free memory."""
    arguments = (guided.model, guided.recipe, guided.guidance, fresh())
    whole = Recorder(*arguments)(seed=3, group=0)
    monkeypatch.setattr(calibration, "images_at_once", lambda *_: 4)
    recorder = Recorder(*arguments)
    assert not recorder._synth.memory.whole
    parts = recorder(seed=3, group=0)
    torch.testing.assert_close(parts.latents, whole.latents, atol=1e-4, rtol=1e-4)
