"""One denoiser call, one graph: the eager images, the eager gradient, one compilation per kind of call and no more."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from synthkd.engine import CutMixSpec, GuidanceSpec, Request, Synthesizer, SynthkdError, sampler
from synthkd.engine.compiled import CompiledCall
from synthkd.engine.guidance import frozen, step_size
from synthkd.engine.latent_model import Prompted
from synthkd.engine.sampler import Call, Setup, State
from synthkd.kernels import implementation

EXCHANGED = CutMixSpec(every=1, last_clean=1, scope="any")
ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="minutes of compiling on a CPU")


class Small(nn.Module):
    """A prior of few layers, which are traced in a second: a denoiser with a norm, a decoder that doubles."""

    scheduler_config: Mapping[str, Any] = {
        "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon", "timestep_spacing": "leading",
        "steps_offset": 1, "set_alpha_to_one": False,
    }  # fmt: skip
    dtype = torch.float32

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)
        self.up = nn.Conv2d(4, 3, 3, padding=1)
        self.number, self.decoder = 1.0, SmallDecoder(self.up)
        self.to(device)

    @property
    def device(self) -> torch.device:
        return self.up.weight.device

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 4, height // 2, width // 2

    def check_prompts(self, prompts: Iterable[str], negative_prompt: str) -> None:
        pass

    def conditions(self, prompts: Sequence[str], negative: str, scale: float, size: tuple[int, int]) -> Any:
        told = torch.tensor([[float(len(p))] for p in prompts], device=self.device)
        return {"told": told}, {"told": torch.zeros_like(told)}

    def denoise(self, z: Tensor, t: Tensor, cond: Any, uncond: Any) -> tuple[Tensor, Tensor | None]:
        def run(told: Tensor) -> Tensor:
            out: Tensor = self.last(torch.relu(self.norm(self.first(z * self.number))) + 0.01 * told[:, :, None, None])
            return z + 0.1 * out + t / 1e6

        return run(cond["told"]), None if uncond is None else run(uncond["told"])

    def modules(self, *args: Any, **kwargs: Any) -> Any:
        return super().modules(*args, **kwargs)

    def settings(self) -> dict[str, Any]:
        return {}


class SmallDecoder:
    """Nearest doubling and a convolution."""

    settings: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(self.module(nn.functional.interpolate(latents, scale_factor=2.0)))


@pytest.fixture
def made(recipe: Callable[..., Any], guide: Callable[..., Any], device: torch.device) -> Iterator[Any]:
    """A Synthesizer over a small prior with the real teacher guidance, on the device that runs kernels."""

    def make(
        compile: Any = "off", prior: Any = None, momentum: float = 0.0, micro_batch: Any = "auto", **changes: Any
    ) -> Synthesizer:
        parts: dict[str, Any] = {"compile": compile, "micro_batch": micro_batch, "fuse": "off"}
        return Synthesizer(prior or Small(device), recipe(**changes), guide(bn_momentum=momentum), **parts)

    yield make
    torch._dynamo.reset()


def groups(synth: Synthesizer, count: int) -> list[Tensor]:
    return [b.images.short().cpu() for b in synth.stream(Request(num_samples=6 * count))]


def test_a_run_compiles_once_per_kind_of_call_and_never_again(made: Any) -> None:
    """Guided or not, CFG or not, exchange or not: five kinds in six calls, whatever the class, prompt or group."""
    changes = {
        "steps": 6,
        "guidance": GuidanceSpec(scale=0.3, every=2, schedule="polyak", looks=2),
        "cfg_stop": 0.5,
        "cutmix": CutMixSpec(every=3, last_clean=2),
    }
    synth = made("aot_eager", momentum=0.5, **changes)
    kinds = {(i % 2 == 0, i < 3, i == 2) for i in range(6)}
    got = groups(synth, 1)
    assert synth.graphs == len(kinds)
    later = list(synth.stream(Request(num_samples=18)))[1:]
    got += [b.images.short().cpu() for b in later]
    assert synth.graphs == len(kinds)
    assert all("step" in b.seconds and "compile" not in b.seconds for b in later)
    for ours, eager in zip(got, groups(made("off", momentum=0.5, **changes), 3), strict=True):
        assert (ours - eager).abs().max() <= 1


def test_a_run_that_recompiled_would_be_seen(made: Any, device: torch.device) -> None:
    """A number that a graph bakes in is compiled again when it changes; the count says so."""
    prior = Small(device)
    synth = made("aot_eager", prior, steps=2, guidance=GuidanceSpec(scale=0.0))
    groups(synth, 1)
    assert synth.graphs == 1
    prior.number = 2.0
    groups(synth, 1)
    assert synth.graphs == 2


def test_a_group_in_parts_compiles_its_denoiser_once_per_size(made: Any) -> None:
    """Six samples, four at a time: graphs for four and for two, with CFG; the later groups compile nothing."""
    changes = {"steps": 2, "guidance": GuidanceSpec(scale=0.3)}
    synth = made("aot_eager", micro_batch=4, **changes)
    got = groups(synth, 2)
    assert synth.graphs == 2
    for ours, eager in zip(got, groups(made("off", **changes), 2), strict=True):
        assert (ours - eager).abs().max() <= 1


def test_a_diffusers_pipeline_is_one_graph(
    pipeline: Any, recipe: Callable[..., Any], guide: Callable[..., Any], device: torch.device
) -> None:
    """The real UNet, VAE and taps: nothing in them breaks the graph, and the images are the eager ones."""
    wanted = recipe(steps=1, guidance=GuidanceSpec(scale=0.3))
    parts: dict[str, Any] = {"guidance": guide(), "fuse": "off"}
    here = pipeline.to(device)
    synth = Synthesizer.from_pipeline(here, wanted, compile="aot_eager", **parts)
    (got,), (want,) = (groups(s, 1) for s in (synth, Synthesizer.from_pipeline(here, wanted, compile="off", **parts)))
    pipeline.to("cpu")
    torch._dynamo.reset()
    assert synth.graphs == 1
    assert (got - want).abs().max() <= 1


def test_a_break_in_the_graph_is_an_error(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fullgraph`: what cannot be traced is refused, not run between two graphs."""

    def broken(*arguments: Any) -> Any:
        torch._dynamo.graph_break()
        return step_size(*arguments)

    monkeypatch.setattr(sampler, "step_size", broken)
    with pytest.raises(SynthkdError, match=r"cannot be made one graph .* use --compile off"):
        groups(made("aot_eager", steps=1, guidance=GuidanceSpec(scale=0.3)), 1)


def _call(synth: Synthesizer) -> tuple[tuple[Any, ...], Tensor]:
    """Arguments of one guided call with an exchange, and z."""
    unit = synth.stream(Request(num_samples=6)).plan.unit(0)
    steer, tables, r = synth._steering(unit, 0, 0), synth._tables, synth.recipe
    setup = Setup(steer.loss, steer.decode, r.guidance, 3.0, 0.0, tables.prediction_type, True, steer.chunks)
    z = synth.initial_latents(unit.ids, 0)
    call = Call(
        tables.timesteps[1], tables.at(1), steer.sizes[1], steer.targets[1], steer.maps[1], None, tuple(steer.looks[1])
    )
    prompted = Prompted(synth.model, *synth._conditions(synth.prompts(unit, 0)))
    return (setup, prompted, State(z, None, steer.memory), call, torch.zeros_like(z).requires_grad_(), True), z


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "references"])
@pytest.mark.parametrize("gradient", ["x0", "unet"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("default", marks=ON_A_GPU)])
def test_the_compiled_call_has_the_eager_gradient(
    made: Any, request: pytest.FixtureRequest, kernels: bool, gradient: str, backend: Any
) -> None:
    """Traced autograd through every op: a gradient of zeros, which some ways of tracing give in silence, fails.

    The shifted clean latent minus the unguided one is the step along the gradient: of planned size in every sample.
    """
    if kernels:
        request.getfixturevalue("kernels_on")
    synth = made("off", guidance=GuidanceSpec(scale=0.3, gradient=gradient), cutmix=EXCHANGED, steps=3)
    arguments, z = _call(synth)
    advance = CompiledCall(backend, z.device).advance
    loss: Any = synth.guidance
    with frozen([*synth.model.modules(), *loss.modules()]), loss.attached():
        with implementation("reference"):
            want = sampler.one_call(*arguments, lambda _: nullcontext())
        eager = sampler.one_call(*arguments, lambda _: nullcontext())
        got = advance(*arguments, lambda _: nullcontext())
        still = sampler.one_call(*arguments[:4], None, True, lambda _: nullcontext())
    assert want[2] is not None
    moved = (want[2] - still[2]).square().mean(dim=(1, 2, 3)).sqrt()
    assert moved.min() > 0.01  # no sample's gradient is zero
    near = {"rtol": 1e-4, "atol": 1e-5}
    for one, other, oracle in zip((got[0].z, got[2]), (eager[0].z, eager[2]), (want[0].z, want[2]), strict=True):
        torch.testing.assert_close(one, other, **near)
        torch.testing.assert_close(one, oracle, **near)
    torch.testing.assert_close(got[1]["ce"], want[1]["ce"], **near)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(SynthkdError, match="compile 'fast'"):
        CompiledCall("fast", torch.device("cpu"))  # type: ignore[arg-type]


def test_auto_leaves_cpus_and_small_images_alone() -> None:
    assert CompiledCall("auto", torch.device("cpu")).advance is None
    assert CompiledCall("auto", torch.device("cuda"), 512).choice == "default"
    assert CompiledCall("auto", torch.device("cuda"), 64).choice == "off"
