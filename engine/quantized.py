"""A denoiser in 8-bit floats, and whether its images are still those of the prior."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from synthkd.engine.config import Recipe, Request
from synthkd.engine.errors import SynthkdError
from synthkd.engine.guidance import parts_of
from synthkd.engine.latent_model import LatentModel, Prompted
from synthkd.engine.plan import Plan
from synthkd.engine.roles import Parts, ReplaceableModel
from synthkd.engine.sampler import Chunks, sample
from synthkd.engine.steering import noise, steering
from synthkd.export import ExportError, fp8

QUANTIZE = ("", "fp8", "fp8-emulated")
_log = logging.getLogger("synthkd")


def denoiser_twin(model: LatentModel, recipe: Recipe, choice: str) -> nn.Module:
    """The denoiser in fp8, or with fp8's rounding in its own dtype (`fp8-emulated`, for any device).

    Raises SynthkdError for a prior whose denoiser cannot be replaced, guidance through the denoiser, and a device
    without fp8.
    """
    if not isinstance(model, ReplaceableModel):
        name = type(model).__name__
        raise SynthkdError(f"quantize {choice!r}: the denoiser of this prior ({name}) cannot be replaced")
    if recipe.guidance.scale > 0 and recipe.guidance.gradient == "unet":
        raise SynthkdError(f"quantize {choice!r}: an fp8 denoiser has no gradient; use guidance.gradient 'x0'")
    try:
        return fp8.quantized(next(iter(model.modules())), emulate=choice == "fp8-emulated")
    except ExportError as error:
        raise SynthkdError(f"quantize {choice!r}: {error}") from error


def check_quality(parts: Parts, twin: nn.Module) -> dict[str, float]:
    """Quality of one unguided group of the twin's beside the denoiser's own, from the same noise.

    Raises SynthkdError where its PSNR is below `fp8.PSNR`.
    """
    model: Any = parts.model
    own = _drawn(parts)
    with model.replaced(twin):
        found = fp8.quality(own, _drawn(parts))
    said = f"quantize: PSNR {found['psnr']:.1f} dB beside the denoiser as it is, {found['worst_psnr']:.1f} of the worst"
    if not found["psnr"] >= fp8.PSNR:
        raise SynthkdError(f"{said} image; at least {fp8.PSNR:.0f} are needed: leave quantize out for this prior")
    _log.info(f"{said} image")
    return found


def _drawn(parts: Parts) -> Tensor:
    """Images [B,3,H,W] in [0,1] of the recipe's first group, unguided, as much at a time as the memory plan says."""
    model, recipe, tables = parts.model, parts.recipe, parts.tables
    unit = Plan(recipe, Request(num_samples=recipe.group_size)).unit(0)
    shape, words = model.latent_shape(recipe.height, recipe.width), [recipe.word(c) for c in unit.classes]
    prompts = [recipe.prompts[0].replace("{class}", word) for word in words]
    size = (recipe.height, recipe.width)
    told: Any = Prompted(model, *model.conditions(prompts, recipe.negative_prompt, recipe.guidance_scale, size))
    steer = replace(steering(recipe, unit, 0, 0, tables, shape, model.dtype), chunks=Chunks(parts.memory.denoise, 0))
    z = noise(shape, unit.ids, 0, "latents", 0).to(device=model.device, dtype=model.dtype)
    with torch.no_grad():
        drawn = sample(z, told, tables, (recipe.guidance_scale, recipe.guidance_rescale), steer, _untimed)
        runs = [drawn.latents[part] for part in parts_of(len(z), parts.memory.decode)]
        return torch.cat([model.decoder(run).float().clamp(0, 1) for run in runs])


def _untimed(stage: str) -> Any:
    return nullcontext()
