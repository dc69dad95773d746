"""The loop never waits for the device: under FakeTensor, where `.item()` raises, it runs to its end."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from synthkd.engine import CutMixSpec, GuidanceSpec, Request, Synthesizer
from synthkd.engine.clock import StageClock
from synthkd.engine.guidance import frozen
from synthkd.engine.sampler import sample

MODES = (
    {"unguided": GuidanceSpec(scale=0.0)}
    | {
        f"{gradient}, {schedule}, rederive {rederive}": GuidanceSpec(
            scale=0.3, gradient=gradient, schedule=schedule, rederive_eps=rederive
        )
        for gradient in ("x0", "unet")
        for schedule, rederive in (("sigma", False), ("constant", True))
    }
    | {"polyak, several looks": GuidanceSpec(scale=0.3, schedule="polyak", looks=3, look_flip=True)}
)


def _sample_fake(synth: Synthesizer, spoil: Callable[[Tensor], Tensor] = lambda z: z) -> tuple[Tensor, list[Any]]:
    """The engine's own loop over fake tensors: everything made before the loop is real, all that follows is not."""
    unit = synth.stream(Request(num_samples=6)).plan.unit(0)
    cond, uncond = synth._conditions(synth.prompts(unit, 0))
    steer, z = synth._steering(unit, 0, 0), synth.initial_latents(unit.ids, 0)
    assert any(m is not None for m in steer.maps)
    modules = [*synth.model.modules(), *(synth.guidance.modules() if synth.guidance else ())]
    with frozen(modules), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return sample(
            mode.from_tensor(z),
            lambda z, t, cfg: synth.model.denoise(spoil(z), t, cond, uncond if cfg else None),
            synth._tables,
            (synth.recipe.guidance_scale, 0.3),
            steer,
            StageClock(torch.device("cpu")),
        )[:2]


@pytest.fixture
def fake_synth(synthesizer: Callable[..., Synthesizer]) -> Callable[[GuidanceSpec], Synthesizer]:
    """A Synthesizer whose loop has everything in it."""
    return lambda spec: synthesizer(guidance=spec, cutmix=CutMixSpec(every=1, last_clean=1, scope="any"), steps=3)


@pytest.mark.parametrize("mode", MODES)
def test_the_loop_completes_without_a_value(fake_synth: Callable[..., Synthesizer], mode: str) -> None:
    z, log = _sample_fake(fake_synth(MODES[mode]))
    assert z.shape == (6, 4, 8, 8)
    assert z.dtype == torch.float32
    assert len(log) == (0 if mode == "unguided" else 3)
    assert all(terms["bn"].shape == () and terms["ce"].shape == (6,) for terms in log)


def test_a_memory_an_interval_and_previews_need_no_value(
    pipeline: Any, recipe: Callable[..., Any], guide: Callable[..., Any]
) -> None:
    wanted = recipe(
        guidance=GuidanceSpec(scale=0.3, every=2, decoder="pooled:2"), cfg_stop=0.5, previews=(0.5,), steps=3,
        cutmix=CutMixSpec(every=1, last_clean=1, scope="any"),
    )  # fmt: skip
    synth = Synthesizer.from_pipeline(pipeline, wanted, guidance=guide(bn_momentum=0.5))
    z, log = _sample_fake(synth)
    assert z.shape == (6, 4, 8, 8)
    assert len(log) == 2


def _item(z: Tensor) -> Tensor:
    return z * z.detach().abs().max().item()


def _branch(z: Tensor) -> Tensor:
    return z if (z > 3).any() else z * 1


@pytest.mark.parametrize("spoil", [_item, _branch])
def test_a_wait_in_the_denoiser_would_be_caught(
    fake_synth: Callable[..., Synthesizer], spoil: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(DataDependentOutputException):
        _sample_fake(fake_synth(MODES["unguided"]), spoil)


def test_a_wait_in_the_loss_would_be_caught(
    fake_synth: Callable[..., Synthesizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from synthkd.dfkd.methods import diffdfkd

    inner = diffdfkd.bn_distance
    monkeypatch.setattr(diffdfkd, "bn_distance", lambda taps: inner(taps) * inner(taps).detach().item())
    with pytest.raises(DataDependentOutputException):
        _sample_fake(fake_synth(GuidanceSpec(scale=0.3)))
