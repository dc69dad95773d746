"""Guidance by a stock pipeline's step callback does what the engine's own loop does."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from synthkd.engine import GuidanceSpec, Recipe, Request, Synthesizer, SynthkdError
from synthkd.engine import synthesizer as synthesizer_module
from synthkd.engine.callback import GuidanceCallback

SCHEDULERS = {
    "ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}  # fmt: skip


def use(pipe: Any, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the pipeline a sampler's scheduler for one test."""
    import diffusers

    monkeypatch.setattr(pipe, "scheduler", getattr(diffusers, SCHEDULERS[sampler]).from_config(pipe.scheduler.config))


def by_the_loop(synth: Synthesizer, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, list[Any]]:
    """Final latents and terms of the engine."""
    seen, inner = [], synthesizer_module.sample
    monkeypatch.setattr(synthesizer_module, "sample", lambda *a, **k: seen.append(inner(*a, **k)) or seen[-1])  # type: ignore[func-returns-value]
    synth.run(synth.stream(Request(num_samples=6)).plan.unit(0), 3)
    return seen[0].latents, seen[0].log


def by_the_callback(pipe: Any, synth: Synthesizer, loss: Any, spec: GuidanceSpec) -> tuple[Tensor, list[Any]]:
    """The same by diffusers' loop with our callback."""
    unit, recipe = synth.stream(Request(num_samples=6)).plan.unit(0), synth.recipe
    targets = one_hot(torch.tensor(unit.classes), 3).float()
    with GuidanceCallback(pipe, loss, targets, spec) as callback:
        latents = pipe(
            list(synth.prompts(unit, 3)), latents=synth.initial_latents(unit.ids, 3).clone(), output_type="latent",
            num_inference_steps=recipe.steps, guidance_scale=recipe.guidance_scale, height=16, width=16,
            callback_on_step_end=callback,
        ).images  # fmt: skip
    return latents, callback.log


SPECS = {
    "all steps": GuidanceSpec(scale=0.3),
    "window": GuidanceSpec(scale=0.5, start=0.2, stop=0.8, every=2, schedule="cosine"),
    "rederived": GuidanceSpec(scale=0.3, rederive_eps=True, schedule="constant"),
    "polyak": GuidanceSpec(scale=0.3, schedule="polyak"),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_both_loops_end_in_the_same_latents(
    pipeline: Any,
    recipe: Callable[..., Recipe],
    guide: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    spec: GuidanceSpec,
) -> None:
    use(pipeline, sampler, monkeypatch)
    loss = guide()
    synth = Synthesizer.from_pipeline(pipeline, recipe(steps=6, sampler=sampler, guidance=spec), guidance=loss)
    want, terms = by_the_loop(synth, monkeypatch)
    got, log = by_the_callback(pipeline, synth, loss, spec)
    assert (got - want).abs().max() <= 1e-3 * want.abs().max()
    assert len(log) == len(terms) == sum(spec.active(i, 6) for i in range(6))
    for ours, theirs in zip(terms, log, strict=True):
        torch.testing.assert_close(theirs["ce"], ours["ce"], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_it_lowers_the_teachers_loss(
    pipeline: Any,
    recipe: Callable[..., Recipe],
    guide: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
) -> None:
    use(pipeline, sampler, monkeypatch)
    synth = Synthesizer.from_pipeline(pipeline, recipe(steps=6, guidance=GuidanceSpec(scale=0.3)), guidance=guide())
    loss, targets = guide(), one_hot(torch.tensor(synth.stream(Request(num_samples=6)).plan.unit(0).classes), 3).float()
    values = []
    for scale in (0.0, 1.0):
        torch.manual_seed(0)
        latents, _ = by_the_callback(pipeline, synth, loss, GuidanceSpec(scale=scale))
        with torch.no_grad():
            values.append(float(loss(synth.model.decoder(latents).clamp(0, 1), targets)[0]))
    assert values[1] < values[0] - 0.02


def test_the_pipeline_is_left_as_it_was(
    pipeline: Any, guide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(pipeline, "ddim", monkeypatch)

    def image(**kwargs: Any) -> Any:
        g = torch.Generator().manual_seed(1)
        return pipeline(
            "a cat", generator=g, num_inference_steps=3, height=16, width=16, output_type="np", **kwargs
        ).images  # fmt: skip

    wanted = inspect.signature(pipeline.scheduler.step)
    before, flags = image(), [p.requires_grad for p in pipeline.vae.parameters()]
    with GuidanceCallback(pipeline, guide(), torch.eye(3)[:1], GuidanceSpec(scale=0.3)) as callback:
        assert inspect.signature(pipeline.scheduler.step) == wanted  # what says that it takes eta and a generator
        moved = image(callback_on_step_end=callback)
    assert "step" not in vars(pipeline.scheduler)
    assert [p.requires_grad for p in pipeline.vae.parameters()] == flags
    assert (image() == before).all()
    assert (moved != before).any()


def test_wrong_uses_say_so(pipeline: Any, guide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    use(pipeline, "ddim", monkeypatch)
    callback = GuidanceCallback(pipeline, guide(), torch.eye(3), GuidanceSpec(scale=0.3))
    with pytest.raises(SynthkdError, match="inside its `with` block"):
        pipeline("a cat", num_inference_steps=2, height=16, width=16, callback_on_step_end=callback)
    with pytest.raises(SynthkdError, match="3 targets for 1 images"), callback:
        pipeline("a cat", num_inference_steps=2, height=16, width=16, callback_on_step_end=callback)
    with pytest.raises(SynthkdError, match="gradient 'x0'"):
        GuidanceCallback(pipeline, guide(), torch.eye(3), GuidanceSpec(gradient="unet"))
    from diffusers import PNDMScheduler

    monkeypatch.setattr(pipeline, "scheduler", PNDMScheduler())
    with pytest.raises(SynthkdError, match="PNDMScheduler is not supported; expected DDIMScheduler"):
        GuidanceCallback(pipeline, guide(), torch.eye(3), GuidanceSpec())


def test_after_its_block_it_refuses(pipeline: Any, guide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that was observed earlier must not stand in for this run's."""
    use(pipeline, "ddim", monkeypatch)
    callback = GuidanceCallback(pipeline, guide(), torch.eye(3)[:1], GuidanceSpec(scale=0.3))
    words: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    with callback:
        pipeline("a cat", callback_on_step_end=callback, **words)
    with pytest.raises(SynthkdError, match="inside its `with` block"):
        pipeline("a cat", callback_on_step_end=callback, **words)


def test_another_scheduler_within_the_block_is_given_back(
    pipeline: Any, guide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(pipeline, "ddim", monkeypatch)
    observed = pipeline.scheduler
    with GuidanceCallback(pipeline, guide(), torch.eye(3)[:1], GuidanceSpec(scale=0.3)):
        use(pipeline, "euler", monkeypatch)
    assert "step" not in vars(observed)


@pytest.mark.parametrize(
    "changes", [{"algorithm_type": "sde-dpmsolver++"}, {"solver_order": 3}, {"solver_type": "heun"}]
)
def test_other_solvers_of_the_same_class_are_refused(
    pipeline: Any, guide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    from diffusers import DPMSolverMultistepScheduler

    made = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **changes)
    monkeypatch.setattr(pipeline, "scheduler", made)
    with pytest.raises(SynthkdError, match=f"{next(iter(changes))} .* is not supported"):
        GuidanceCallback(pipeline, guide(), torch.eye(3), GuidanceSpec())


def test_timesteps_of_ones_own_are_refused(
    pipeline: Any, guide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(pipeline, "euler", monkeypatch)
    callback = GuidanceCallback(pipeline, guide(), torch.eye(3)[:1], GuidanceSpec(scale=0.3))
    with pytest.raises(SynthkdError, match="timesteps or sigmas of its own"), callback:
        pipeline("a cat", timesteps=[900, 500, 20], height=16, width=16, callback_on_step_end=callback)


def test_the_consistency_pipeline_decodes_the_guided_image(
    build: Any, guide: Callable[..., Any], tmp_path: Any
) -> None:
    """It decodes `denoised`, not the latents: the last call must not be lost."""
    pipe, last = build.lcm(tmp_path), GuidanceSpec(scale=0.5, start=0.75)

    def latents(**words: Any) -> Tensor:
        g = torch.Generator().manual_seed(1)
        out: Tensor = pipe(
            "a cat", generator=g, num_inference_steps=4, height=16, width=16, output_type="latent", **words
        ).images
        return out

    with GuidanceCallback(pipe, guide(), torch.eye(3)[:1], last) as callback:
        with pytest.raises(SynthkdError, match="decodes `denoised`; call it with"):
            latents(callback_on_step_end=callback)
        moved = latents(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents", "denoised"])
    shift = (moved - latents()).square().mean().sqrt()
    assert 0.1 < shift < 0.6
