"""Groups that start from images: diffusers' own image-to-image, determinism, parts, guidance, refusals."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.engine import CutMixSpec, GuidanceSpec, Recipe, Request, Start, Synthesizer, SynthkdError
from synthkd.engine import synthesizer as synthesizer_module
from synthkd.engine.image_to_image import encoded, noised
from synthkd.engine.plan import WorkUnit


def pictures(count: int = 6, size: tuple[int, int] = (16, 16)) -> Tensor:
    """Smooth random images, uint8."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    fine = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return (fine * 255).round().to(torch.uint8)


def unit_of(synth: Synthesizer) -> WorkUnit:
    """The first group."""
    return synth.stream(Request(num_samples=synth.recipe.group_size)).plan.unit(0)


def latents_of(synth: Synthesizer, start: Start | None, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The final latents of the first group."""
    seen, inner = [], synthesizer_module.sample

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(inner(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(synthesizer_module, "sample", spy)
    synth.run(unit_of(synth), 5, start)
    monkeypatch.setattr(synthesizer_module, "sample", inner)
    latents: Tensor = seen[0].latents
    return latents


SOLVERS = {
    "ddim": ("DDIMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "euler": ("EulerDiscreteScheduler", {}),
}


@pytest.mark.parametrize("strength", [0.3, 0.75])
@pytest.mark.parametrize("sampler", SOLVERS)
def test_final_latents_are_those_of_diffusers(
    pipeline: Any, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, sampler: str, strength: float
) -> None:
    """The whole of its image-to-image pipeline, with our noise, and the mode of the VAE's distribution for a draw."""
    import diffusers
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as module

    kind, changes = SOLVERS[sampler]
    scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config, **changes)
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    synth = Synthesizer.from_pipeline(pipeline, recipe(steps=10, sampler=sampler))
    unit, images = unit_of(synth), pictures()
    noise = synth.initial_latents(unit.ids, 5)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: noise.clone())
    theirs = module.StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    with torch.no_grad():
        wanted = theirs(
            list(synth.prompts(unit, 5)), image=images.float() / 255, strength=strength, num_inference_steps=10,
            guidance_scale=3.0, output_type="latent",
        ).images  # fmt: skip
    ours = latents_of(synth, Start(images, strength), monkeypatch)
    assert wanted.std() > 0.1
    assert (ours - wanted).abs().max() <= 1e-4
    assert (ours - latents_of(synth, None, monkeypatch)).abs().max() > 0.05


@pytest.mark.parametrize("family", ["sd1", "sdxl", "dit"])
def test_encoding_undoes_the_scale_of_decoding(pipelines: Any, build: Any, tmp_path: Path, family: str) -> None:
    """The inverse of what stands before the decoder, so that z0 is what the denoiser was trained on."""
    from synthkd.engine.priors import wrap_pipeline

    pipe = pipelines[family]
    if family == "sdxl":
        pipe = build.sdxl(tmp_path / "sdxl", latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[2.0, 0.5, 1.0, 1.5])
    prior, images = wrap_pipeline(pipe), pictures(2)
    latents, seen = encoded(prior, images), []
    inner = prior.decoder.module.decode
    prior.decoder.module.decode = lambda z, **_: seen.append(z) or (z,)  # type: ignore[assignment]
    try:
        prior.decoder(latents)
    finally:
        prior.decoder.module.decode = inner  # type: ignore[assignment]
    with torch.no_grad():
        wanted = pipe.vae.encode(2 * images.float() / 255 - 1).latent_dist.mode()
    torch.testing.assert_close(seen[0], wanted, atol=1e-5, rtol=1e-5)


def test_strength_1_is_text_to_image(pipeline: Any, recipe: Callable[..., Recipe]) -> None:
    synth = Synthesizer.from_pipeline(pipeline, recipe())
    plain, unit = synth.run(unit_of(synth), 5), unit_of(synth)
    assert torch.equal(synth.run(unit, 5, Start(pictures(), 1.0)).images, plain.images)
    assert not torch.equal(synth.run(unit, 5, Start(pictures(), 0.5)).images, plain.images)


def test_less_strength_stays_closer(pipeline: Any, recipe: Callable[..., Recipe]) -> None:
    """In the noised latent that the run begins with."""
    synth = Synthesizer.from_pipeline(pipeline, recipe(steps=10))
    clean, noise = encoded(synth.model, pictures()), synth.initial_latents(range(6), 0)
    off = [float((noised(clean, noise, synth._tables, i) - clean).square().mean()) for i in (1, 5, 9)]
    assert off == sorted(off, reverse=True)
    assert off[2] < 0.1 * off[0]


def test_guided_runs_agree_in_parts_and_again(
    pipeline: Any, recipe: Callable[..., Recipe], guide: Callable[..., Any]
) -> None:
    """Whole and in parts, with Latent CutMix, a multistep solver and fresh looks; and the loss acts."""
    spec = GuidanceSpec(scale=0.4, looks=2)
    wanted = recipe(
        steps=8, sampler="dpmpp_2m", guidance=spec, cutmix=CutMixSpec(every=2, last_clean=1, scope="any"),
    )  # fmt: skip
    start = Start(pictures(), 0.6)

    def drawn(micro_batch: Any, recipe: Recipe) -> Any:
        synth = Synthesizer.from_pipeline(pipeline, recipe, guidance=guide(), micro_batch=micro_batch)
        return synth.run(unit_of(synth), 5, start)

    whole, again, parted = drawn(6, wanted), drawn(6, wanted), drawn(2, wanted)
    assert torch.equal(whole.images, again.images)
    assert torch.equal(whole.targets, again.targets)
    assert (whole.images.int() - parted.images.int()).abs().max() <= 1
    assert {len(curve) for curve in whole.curves.values()} == {4}  # the calls that were made: int(8 * 0.6)
    unguided = drawn(6, replace(wanted, guidance=GuidanceSpec(scale=0.0)))
    assert not torch.equal(whole.images, unguided.images)


def test_boxes_before_the_start_are_not_exchanged(pipeline: Any, recipe: Callable[..., Recipe]) -> None:
    """Labels follow the area of what was exchanged in the run, and of nothing else."""
    mixed = recipe(steps=8, cutmix=CutMixSpec(every=2, last_clean=4, scope="any"))  # after calls 1 and 3 alone
    synth = Synthesizer.from_pipeline(pipeline, mixed)
    assert synth.run(unit_of(synth), 5).targets.max(dim=1).values.min() < 1
    assert torch.equal(synth.run(unit_of(synth), 5, Start(pictures(), 0.5)).targets.sum(0), torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("changes", "strength", "images", "said"),
    [
        ({}, 0.0, pictures(), "strength is 0.0; expected a share above 0"),
        ({}, 0.1, pictures(), "of 4 steps none is left"),
        ({}, 0.5, pictures(5), "this group needs [6, 3, 16, 16]"),
        ({}, 0.5, pictures(6, (16, 14)), "this group needs [6, 3, 16, 16]"),
        ({}, 0.5, pictures().float(), "expected uint8"),
        ({"previews": (0.3,)}, 0.5, pictures(), "previews 0.3 lies before the start"),
        ({"guidance": GuidanceSpec(scale=0.2, stop=0.5)}, 0.5, pictures(), "none of the last 2 calls is guided"),
    ],
)
def test_what_cannot_start_says_so(
    pipeline: Any, recipe: Callable[..., Recipe], guide: Callable[..., Any], changes: dict[str, Any], strength: float,
    images: Tensor, said: str,
) -> None:  # fmt: skip
    synth = Synthesizer.from_pipeline(pipeline, recipe(**changes), guidance=guide())
    with pytest.raises(SynthkdError) as found:
        synth.run(unit_of(synth), 5, Start(images, strength))
    assert said in str(found.value)
    assert "\n" not in str(found.value)


def test_a_vae_without_encoder_is_one_line(build: Any, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    pipe = build.sd(tmp_path / "pipe")
    pipe.vae.encoder = None
    synth = Synthesizer.from_pipeline(pipe, recipe())
    assert synth.run(unit_of(synth), 5).images.shape == (6, 3, 16, 16)
    with pytest.raises(SynthkdError, match="its vae has no encoder"):
        synth.run(unit_of(synth), 5, Start(pictures(), 0.5))
