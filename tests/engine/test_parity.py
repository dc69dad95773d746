"""Unguided, the engine is diffusers: the same final latents, and a pipeline it borrowed is left as it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.dfkd.presets import load_preset
from synthkd.engine import GuidanceSpec, Recipe, Request, Synthesizer, assets
from synthkd.engine import synthesizer as synthesizer_module

DIGITS = Path(assets.__file__).parent / "digits" / "pipeline"


def _final_latents(synth: Synthesizer, count: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The latents that the engine's own `run` decodes."""
    seen, inner = [], synthesizer_module.sample

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(inner(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(synthesizer_module, "sample", spy)
    synth.run(synth.stream(Request(num_samples=count)).plan.unit(0), seed)
    return seen[0][0]


def _reference(pipe: Any, synth: Synthesizer, count: int, seed: int) -> Tensor:
    """The same from the pipeline's own loop."""
    unit, recipe = synth.stream(Request(num_samples=count)).plan.unit(0), synth.recipe
    with torch.no_grad():
        latents: Tensor = pipe(
            list(synth.prompts(unit, seed)), latents=synth.initial_latents(unit.ids, seed).clone(), eta=0.0,
            num_inference_steps=recipe.steps, guidance_scale=recipe.guidance_scale, output_type="latent",
            height=recipe.height, width=recipe.width, negative_prompt=[recipe.negative_prompt] * len(unit.ids),
        ).images  # fmt: skip
    return latents


@pytest.fixture(scope="module")
def digits() -> Any:
    """The embedded prior as a plain diffusers pipeline."""
    from diffusers import StableDiffusionPipeline

    if not DIGITS.is_dir():
        pytest.skip("this checkout has no embedded:digits")
    pipe = StableDiffusionPipeline.from_pretrained(DIGITS, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _compare(pipe: Any, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    synth = Synthesizer.from_pipeline(pipe, recipe)
    ours = _final_latents(synth, recipe.group_size, 5, monkeypatch)
    theirs = _reference(pipe, synth, recipe.group_size, 5)
    assert ours.dtype == theirs.dtype == torch.float32
    assert theirs.std() > 0.1  # a comparison of something
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("guidance_scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("steps", [10, 20])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_final_latents_are_those_of_diffusers(
    pipeline: Any,
    recipe: Callable[..., Recipe],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    steps: int,
    guidance_scale: float,
) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=kind)
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    _compare(pipeline, recipe(steps=steps, guidance_scale=guidance_scale, negative_prompt="bird"), monkeypatch)


@pytest.mark.parametrize("guidance_scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("steps", [10, 20])
def test_the_embedded_prior_too(
    digits: Any, monkeypatch: pytest.MonkeyPatch, steps: int, guidance_scale: float
) -> None:
    base = load_preset("digits").job.recipe.to_dict()
    changes = {"steps": steps, "guidance_scale": guidance_scale, "classes_per_group": 4, "samples_per_class": 1}
    changes["cfg_start"] = 0.0  # a stock pipeline has classifier-free guidance at every call
    off: dict[str, Any] = {"guidance": {"scale": 0.0}, "cutmix": {"every": 0}}
    _compare(digits, Recipe.from_dict({**base, **changes, **off}), monkeypatch)


def _state(pipe: Any) -> dict[str, Any]:
    """Weights, gradients, flags, modes and hooks of all networks."""
    out: dict[str, Any] = {}
    for part in ("unet", "vae", "text_encoder"):
        module = getattr(pipe, part)
        out |= {f"{part}.{n}": v.clone() for n, v in module.state_dict().items()}
        out |= {f"{part}.{n}?": (p.requires_grad, p.grad is None) for n, p in module.named_parameters()}
        for name, child in module.named_modules():
            hooks = (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._backward_pre_hooks)
            out[f"{part}.{name}!"] = (child.training, [len(h) for h in hooks], "forward" in vars(child))
    return out


@pytest.mark.parametrize("gradient", ["none", "x0", "unet"])
def test_a_borrowed_pipeline_is_left_bit_identical(
    pipeline: Any, recipe: Callable[..., Recipe], guide: Callable[..., Any], gradient: str
) -> None:
    def image() -> Tensor:
        g = torch.Generator().manual_seed(3)
        return torch.from_numpy(
            pipeline("a cat", generator=g, num_inference_steps=3, height=16, width=16, output_type="np").images
        )

    frozen = pipeline.unet.conv_in.weight
    frozen.requires_grad_(False)  # a mixture of flags must come back as the same mixture
    before, picture, scheduler = _state(pipeline), image(), dict(pipeline.scheduler.config)
    spec = GuidanceSpec(scale=0.0) if gradient == "none" else GuidanceSpec(scale=0.3, gradient=gradient)
    synth = Synthesizer.from_pipeline(pipeline, recipe(guidance=spec), guidance=guide())
    list(synth.stream(Request(num_samples=12)))
    after = _state(pipeline)
    frozen.requires_grad_(True)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name], name
    assert torch.equal(image(), picture)
    assert dict(pipeline.scheduler.config) == scheduler


def test_flags_come_back_after_an_error(
    pipeline: Any, recipe: Callable[..., Recipe], guide: Callable[..., Any]
) -> None:
    guidance = guide()
    flags = [p.requires_grad for p in pipeline.unet.parameters()]

    class Broken(type(guidance)):  # type: ignore[misc]
        def __call__(self, images: Tensor, targets: Tensor) -> Any:
            raise RuntimeError("broken loss")

    guidance.__class__ = Broken
    synth = Synthesizer.from_pipeline(pipeline, recipe(guidance=GuidanceSpec(scale=0.3)), guidance=guidance)
    with pytest.raises(RuntimeError, match="broken loss"):
        list(synth.stream(Request(num_samples=6)))
    assert [p.requires_grad for p in pipeline.unet.parameters()] == flags
    assert any(flags)
