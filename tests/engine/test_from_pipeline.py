"""A live pipeline is left bit-identical and usable by a guided group, whatever its family and state."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from synthkd.engine import GuidanceSpec, Recipe, Request, Synthesizer

HOOKS = [n for n in vars(nn.Linear(1, 1)) if n.endswith(("_hooks", "_with_kwargs", "_always_called"))]


def parts(pipe: Any) -> dict[str, nn.Module]:
    """All networks of a pipeline."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def state(pipe: Any) -> dict[str, Any]:
    """Tensors with their identity, dtype, layout, flags; modes, hooks, own attributes of every module; configs."""
    out: dict[str, Any] = {"config": dict(pipe.config), "attributes": sorted(vars(pipe))}
    for part, network in parts(pipe).items():
        for name, x in (*network.named_parameters(), *network.named_buffers()):
            out[f"{part}.{name}"] = x.detach().clone()
            out[f"{part}.{name}?"] = (
                id(x),
                x.data_ptr(),
                x.dtype,
                x.device,
                x.stride(),
                x.requires_grad,
                x.grad is None,
            )
        for name, module in network.named_modules():
            out[f"{part}.{name}!"] = (id(module), module.training, sorted(vars(module)), hooks(module))
        out[f"{part} config"] = str(getattr(network, "config", None))
    return out | {"scheduler": dict(pipe.scheduler.config), "steps": scheduler_state(pipe.scheduler)}


def hooks(module: nn.Module) -> list[Any]:
    return [(name, dict(getattr(module, name))) for name in HOOKS]


def scheduler_state(scheduler: Any) -> dict[str, str]:
    return {name: repr(value) for name, value in vars(scheduler).items()}


def same(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, after[name]), name
        else:
            assert value == after[name], name


def image(name: str, pipe: Any) -> Tensor:
    """A fixed-seed image by the pipeline's own loop."""
    what: dict[str, Any] = {"class_labels": [0]} if name == "dit" else {"prompt": "a cat", "height": 16, "width": 16}
    generator = torch.Generator().manual_seed(3)
    out: Tensor = pipe(**what, generator=generator, num_inference_steps=3, guidance_scale=3.0, output_type="pt").images
    return out


@pytest.fixture
def unsettled(pipelines: Mapping[str, Any]) -> Iterator[Callable[[str], Any]]:
    """A pipeline in an awkward state: mixed flags and modes, channels_last, somebody's hooks; all undone at the end."""
    undo: list[Callable[[], Any]] = []

    def make(name: str) -> Any:
        pipe = pipelines[name]
        networks = list(parts(pipe).values())
        networks[0].to(memory_format=torch.channels_last)
        undo.append(lambda: networks[0].to(memory_format=torch.contiguous_format))
        for network in networks:
            weights = list(network.parameters())[::3]
            leaf = next(m for m in network.modules() if not list(m.children()))
            for p in weights:
                p.requires_grad_(False)
            leaf.train()
            undo.append(lambda w=weights: [p.requires_grad_(True) for p in w])
            undo.append(leaf.eval)
            undo.append(leaf.register_forward_hook(lambda *_: None).remove)
            undo.append(leaf.register_forward_pre_hook(lambda *_: None).remove)
            undo.append(leaf.register_full_backward_hook(lambda *_: None).remove)
        return pipe

    yield make
    for step in undo:
        step()


@pytest.mark.parametrize("gradient", ["x0", "unet"])
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "dit"])
def test_a_guided_group_leaves_no_trace(
    unsettled: Callable[[str], Any],
    recipe: Callable[..., Recipe],
    guide: Callable[..., Any],
    name: str,
    gradient: str,
) -> None:
    pipe, guidance = unsettled(name), guide()
    picture, before, rng = image(name, pipe), state(pipe), torch.get_rng_state()
    wanted = recipe(prompts=("{class}",), guidance=GuidanceSpec(scale=0.3, gradient=gradient))
    synth = Synthesizer.from_pipeline(pipe, wanted, guidance=guidance)
    (batch,) = synth.stream(Request(num_samples=6))
    synth.identity(0)
    assert len(batch.curves["ce"]) == 4
    same(before, state(pipe))
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(image(name, pipe), picture)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "dit"])
def test_a_scheduler_in_the_middle_of_a_run_keeps_its_place(
    pipelines: Mapping[str, Any], recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Drawing between two of the pipeline's own steps changes nothing."""
    from diffusers import DDIMScheduler

    pipe = pipelines[name]
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(7)
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    before = scheduler_state(scheduler)
    list(Synthesizer.from_pipeline(pipe, recipe(prompts=("{class}",), steps=3)).stream(Request(num_samples=6)))
    assert scheduler_state(scheduler) == before
    assert pipe.scheduler is scheduler


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "dit"])
def test_training_mode_draws_the_same_and_comes_back(
    pipelines: Mapping[str, Any], recipe: Callable[..., Recipe], name: str
) -> None:
    """A DiT in training mode drops a tenth of its labels; a group must not depend on that draw."""
    pipe, wanted = pipelines[name], recipe(prompts=("{class}",))
    want = next(iter(Synthesizer.from_pipeline(pipe, wanted).stream(Request(num_samples=6)))).images
    for part in parts(pipe).values():
        part.train()
    try:
        batch = next(iter(Synthesizer.from_pipeline(pipe, wanted).stream(Request(num_samples=6))))
        assert all(m.training for part in parts(pipe).values() for m in part.modules())
    finally:
        for part in parts(pipe).values():
            part.eval()
    assert torch.equal(batch.images, want)


def test_a_half_precision_sdxl_keeps_its_autoencoder(
    build: Any, tmp_path: Any, recipe: Callable[..., Recipe], guide: Callable[..., Any]
) -> None:
    """Guidance and decoding run through a float32 copy; transformers' own hooks, set at a first call, do not stay."""
    pipe = build.sdxl(tmp_path / "half", dtype=torch.bfloat16)
    before = state(pipe)
    synth = Synthesizer.from_pipeline(pipe, recipe(guidance=GuidanceSpec(scale=0.3), steps=6), guidance=guide())
    (batch,) = synth.stream(Request(num_samples=6))
    same(before, state(pipe))
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.bfloat16}
    assert sum(batch.curves["ce"][-1]) < sum(batch.curves["ce"][0])
    assert torch.isfinite(image("sdxl", pipe).float()).all()
