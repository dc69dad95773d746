"""The engine's loop with kernels on: the reference's images, few launches, no wait, and one compiled step."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from synthkd.engine import CutMixSpec, GuidanceSpec, Request, Synthesizer, sampler
from synthkd.engine.clock import StageClock
from synthkd.engine.guidance import frozen
from synthkd.kernels import guided_step, implementation, sum_of_squares
from synthkd.kernels.launch import recorded

pytest.importorskip("triton", reason="Triton runs on Linux only")

IN_THE_LOOP = {"guided_step", "predict_x0", "sum_of_squares", "batchnorm_stats", "to_uint8"}
IN_THE_DECODER = {"group_norm_silu", "upsample2x_conv3x3"}
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="minutes of compiling on a CPU")
EXCHANGED = CutMixSpec(every=1, last_clean=1, scope="any")


@pytest.fixture
def synthesizer(
    pipeline: Any, recipe: Callable[..., Any], guide: Callable[..., Any], device: torch.device
) -> Callable[..., Synthesizer]:
    """As everywhere in these tests, but on the device that runs kernels."""
    here = deepcopy(pipeline).to(device)

    def make(fuse: str = "off", **changes: Any) -> Synthesizer:
        wanted = recipe(**changes)
        guidance = guide() if wanted.guidance.scale > 0 else None
        for network in guidance.modules() if guidance else ():
            network.to(device)
        return Synthesizer.from_pipeline(here, wanted, guidance=guidance, fuse=fuse, compile="off")

    return make


def images(synth: Synthesizer) -> Tensor:
    """The first group, int16 [B,3,H,W]."""
    return next(iter(synth.stream(Request(num_samples=6)))).images.short().cpu()


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize(("solver", "fuse"), [("dpmpp_2m", "auto"), ("ddim", "off"), ("euler_ancestral", "off")])
def test_a_guided_run_is_that_of_the_references(
    synthesizer: Callable[..., Synthesizer], solver: str, fuse: str
) -> None:
    """Within a grey level on all values and equal on 99.9 %: float32 roundings of other orders of summation."""
    changes = {"guidance": GuidanceSpec(scale=0.3), "cutmix": EXCHANGED, "steps": 2, "sampler": solver}
    with implementation("reference"):
        want = images(synthesizer(**changes))
    with recorded() as launches:
        got = images(synthesizer(fuse=fuse, **changes))
    ops = {launch.kernel.fn.__module__.split(".")[2] for launch in launches}
    assert ops >= IN_THE_LOOP | (IN_THE_DECODER if fuse == "auto" else set())
    difference = (got - want).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 1e-3


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize(("scale", "most"), [(0.0, 1), (0.3, 3)])
def test_launches_per_call(
    synthesizer: Callable[..., Synthesizer], monkeypatch: pytest.MonkeyPatch, scale: float, most: int
) -> None:
    """guided_step is one launch, its sum of squares at most two more, whatever else the call carries."""
    counts: list[int] = []

    def counted(op: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with recorded() as launches:
                out = op(*args, **kwargs)
            counts.append(len(launches))
            return out

        return run

    monkeypatch.setattr(sampler, "guided_step", counted(guided_step))
    monkeypatch.setattr(sampler, "sum_of_squares", counted(sum_of_squares))
    synth = synthesizer(guidance=GuidanceSpec(scale=scale), cutmix=EXCHANGED, steps=3, sampler="dpmpp_2m")
    images(synth)
    calls = [sum(counts[k : k + 2]) for k in range(0, 6, 2)] if scale else counts
    assert len(calls) == 3
    assert all(1 <= launches <= most for launches in calls)


@pytest.mark.usefixtures("kernels_on")
def test_the_loop_with_kernels_never_waits(synthesizer: Callable[..., Synthesizer]) -> None:
    """Fake tensors have no values: every op of the loop stands for itself there."""
    synth = synthesizer(guidance=GuidanceSpec(scale=0.3), cutmix=EXCHANGED, steps=3)
    unit = synth.stream(Request(num_samples=6)).plan.unit(0)
    cond, uncond = synth._conditions(synth.prompts(unit, 0))
    steer, z = synth._steering(unit, 0, 0), synth.initial_latents(unit.ids, 0)
    modules = [*synth.model.modules(), *(synth.guidance.modules() if synth.guidance else ())]
    with frozen(modules), FakeTensorMode(allow_non_fake_inputs=True) as mode, recorded() as launches:
        z, *_ = sampler.sample(
            mode.from_tensor(z),
            lambda z, t, cfg: synth.model.denoise(z, t, cond, uncond if cfg else None),
            synth._tables,
            (3.0, 0.0),
            steer,
            StageClock(torch.device("cpu")),
        )
    assert z.shape == (6, 4, 8, 8)
    assert not launches
