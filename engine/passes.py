"""What a step of a recipe computes, as functions that the memory planner measures."""

from collections.abc import Callable

import torch
from torch import Tensor

from synthkd.engine.augment import Look, viewed
from synthkd.engine.checkpointing import checkpointed
from synthkd.engine.config import Recipe
from synthkd.engine.decoders import Decoder
from synthkd.engine.guidance import GroupGuidance, Guidance
from synthkd.engine.latent_model import LatentModel, Prompted
from synthkd.engine.memory import MemoryPlan, Passes, plan_memory, small_group
from synthkd.engine.schedule import Tables
from synthkd.engine.workers import default_workers


def plan_group(
    model: LatentModel, recipe: Recipe, tables: Tables, look: Decoder, guidance: Guidance | None, told: Prompted,
    processes: int | None = None,
) -> MemoryPlan:  # fmt: skip
    """How much of a recipe's group to compute at once; networks are frozen, fused and tapped as for a group.

    told: the conditions of one sample; processes: those that draw and share the memory, None for as many as by default.
    """
    device, workers = model.device, processes or default_workers(model.device.type)
    pixels = recipe.group_size * recipe.height * recipe.width
    whole = small_group(recipe.group_size, pixels, device, workers)
    if whole is not None:
        return whole
    passes, splits = _passes(model, recipe, tables, look, guidance, told), isinstance(guidance, GroupGuidance)
    size = f"{recipe.height}x{recipe.width}"
    return plan_memory(passes, recipe.group_size, workers=workers, splits=splits, size=size)


def _every_view(guidance: Guidance, looks: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss over as many views as a call has: `guidance_gradient` holds them all at once."""

    def loss(images: Tensor, targets: Tensor) -> Tensor:
        still = Look(images.new_zeros(len(images), 2), images.new_zeros(len(images), dtype=torch.bool))
        views = [images, *(viewed(images, still) for _ in range(looks - 1))]
        return torch.stack([guidance(view, targets)[0] for view in views]).sum() / looks

    return loss


def _passes(
    model: LatentModel, recipe: Recipe, tables: Tables, look: Decoder, guidance: Guidance | None, told: Prompted
) -> Passes:
    t, cfg = tables.timesteps[0], any(recipe.cfg_active(i) for i in range(recipe.steps))
    guided = guidance is not None and recipe.guidance.scale > 0
    return Passes(
        denoise=lambda z: told.repeated(len(z))(z, t, cfg),
        decode=model.decoder,
        look=look if guided else None,
        look_checkpointed=checkpointed(look) if guided else None,
        loss=_every_view(guidance, recipe.guidance.looks) if guidance is not None else None,
        shape=model.latent_shape(recipe.height, recipe.width),
        classes=len(recipe.classes),
        device=model.device,
        dtype=model.dtype,
        through=recipe.guidance.gradient == "unet",
    )
