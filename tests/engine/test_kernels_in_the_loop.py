"""The engine's loop with kernels on: the reference's images, few launches, no wait, and one compiled step."""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from synthkd.dfkd.losses import class_scores
from synthkd.engine import CutMixSpec, GuidanceSpec, Request, Synthesizer, sampler
from synthkd.engine.clock import StageClock
from synthkd.engine.guidance import Terms, frozen, guidance_gradient, step_size
from synthkd.kernels import batchnorm_stats, guided_step, implementation, predict_x0, sum_of_squares
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
        return Synthesizer.from_pipeline(here, wanted, guidance=guidance, fuse=fuse)

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


class Tapped:
    """A teacher of one norm layer whose statistics are read in the open: what one graph can hold."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 5, 3, padding=1).to(device), nn.Linear(5, 3).to(device)
        self.mean, self.var = (torch.randn(5) * 0.1).to(device), (torch.rand(5) + 0.5).to(device)

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Terms]:
        """Distance of statistics, and cross-entropy."""
        x = self.first(images)
        stats = batchnorm_stats(x)
        bn = torch.linalg.vector_norm(stats.mean - self.mean) + torch.linalg.vector_norm(stats.var - self.var)
        ce = class_scores(self.last(x.relu().mean(dim=(2, 3))), targets)
        return bn + ce.mean(), {"bn": bn, "ce": ce}

    def describe(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def annotate(self, images: Tensor) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def modules(self) -> Iterable[nn.Module]:
        """Both layers."""
        return (self.first, self.last)


def _step(synth: Synthesizer) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """One guided call of the loop as a function: z, and a zero that stands before what is differentiated.

    Returns z_next and the gradient. torch 2.11 traces gradients of a graph's inputs only, hence the zero.
    """
    unit = synth.stream(Request(num_samples=6)).plan.unit(0)
    cond, uncond = synth._conditions(synth.prompts(unit, 0))
    steer, tables, spec = synth._steering(unit, 0, 0), synth._tables, synth.recipe.guidance
    c, t, source = tables.at(1), tables.timesteps[1], steer.maps[1]
    assert steer.loss is not None
    assert source is not None
    loss_of = steer.loss

    def step(z: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        through = spec.gradient == "unet"
        with torch.set_grad_enabled(through):
            moved = z + zero if through else z
            a, b = synth.model.denoise(moved, t, cond, uncond)
            x0 = predict_x0(moved, a, b, 3.0, c.alpha, c.sigma, tables.prediction_type)
        with torch.enable_grad():
            x0 = x0 if through else x0 + zero
            grad, loss, *_ = guidance_gradient(loss_of, steer.decode, x0, zero, steer.targets[1])
        with torch.no_grad():
            sumsq = sum_of_squares(grad)
            size = step_size(spec, steer.sizes[1], loss, sumsq, grad[0].numel())
            z_next, _ = guided_step(
                z, x0, c.alpha, c.sigma, c.to_x0, c.to_eps, grad=grad, sumsq=sumsq, step=size, src_map=source
            )
        return z_next.detach(), grad

    return step


@pytest.fixture
def one_graph(synthesizer: Callable[..., Synthesizer]) -> Iterator[Callable[..., Any]]:
    """The step of a small synthesizer, as a function and compiled into one graph."""

    def make(gradient: str, backend: str) -> tuple[Synthesizer, Callable[..., Any], Callable[..., Any]]:
        synth = synthesizer(guidance=GuidanceSpec(scale=0.3, gradient=gradient), cutmix=EXCHANGED, steps=3)
        synth = Synthesizer(synth.model, synth.recipe, Tapped(synth.model.device))
        step = _step(synth)
        torch._dynamo.reset()
        return synth, step, torch.compile(step, fullgraph=True, backend=backend)

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield make


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("gradient", ["x0", "unet"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=ON_A_GPU)])
def test_the_compiled_step_has_the_eager_gradient(one_graph: Callable[..., Any], gradient: str, backend: str) -> None:
    """Traced autograd through every op: a gradient of zeros, which some ways of tracing give in silence, fails."""
    synth, step, compiled = one_graph(gradient, backend)
    unit = synth.stream(Request(num_samples=6)).plan.unit(0)
    z = synth.initial_latents(unit.ids, 0)
    zero = torch.zeros_like(z).requires_grad_()
    with frozen([*synth.model.modules(), *synth.guidance.modules()]):
        with implementation("reference"):
            want = step(z, zero)
        eager, got = step(z, zero), compiled(z, zero)
    with pytest.raises(AssertionError):  # what follows can fail
        torch.testing.assert_close(torch.zeros_like(want[1]), want[1], rtol=1e-4, atol=1e-5)
    assert want[1].abs().amax(dim=(1, 2, 3)).min() > 1e-6  # no sample's gradient is zero
    for one, other, oracle in zip(got, eager, want, strict=True):
        near = {"rtol": 1e-5, "atol": 1e-6} if backend == "aot_eager" else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(one, other, **near)
        torch.testing.assert_close(one, oracle, rtol=1e-4, atol=1e-5)
