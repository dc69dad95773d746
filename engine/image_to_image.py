"""A group that starts from given images instead of noise: encoded, noised to the level of a later call, drawn on."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from synthkd.engine.config import Recipe
from synthkd.engine.errors import SynthkdError
from synthkd.engine.guidance import parts_of
from synthkd.engine.latent_model import LatentModel
from synthkd.engine.schedule import Tables


@dataclass(frozen=True)
class Start:
    """What a group starts from (SDEdit, arXiv 2108.01073).

    images: uint8 [B,3,H,W], of the recipe's size, one for each id of the unit; strength: share of the run that is done,
    above 0 up to 1, as diffusers has it: of n calls the last int(n strength). At 1 nothing of the images is left, and
    the group is the one without a start.
    """

    images: Tensor
    strength: float

    def __post_init__(self) -> None:
        """Raise SynthkdError for a strength outside its range, and for images that are no bytes of three channels."""
        if not (math.isfinite(self.strength) and 0 < self.strength <= 1):
            raise SynthkdError(f"strength is {self.strength}; expected a share above 0, at most 1")
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or self.images.shape[1] != 3:
            found = f"{str(self.images.dtype).removeprefix('torch.')} {list(self.images.shape)}"
            raise SynthkdError(f"start: images are {found}; expected uint8 [B,3,H,W]")


@runtime_checkable
class Encoder(Protocol):
    """A prior's decoder that knows the way back as well."""

    def encode(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in [0,1] -> latents [B,C,h,w] as the denoiser sees them."""
        ...


def first_call(start: Start | None, recipe: Recipe, size: int) -> int:
    """The denoiser call at which a group of `size` samples begins, 0 without a start.

    Raises SynthkdError where no call is left, none that the recipe guides or previews, and for images of another count
    or size.
    """
    if start is None:
        return 0
    wanted = (size, 3, recipe.height, recipe.width)
    if tuple(start.images.shape) != wanted:
        raise SynthkdError(f"start: images are {list(start.images.shape)}; this group needs {list(wanted)}")
    first = begins_at(start.strength, recipe)
    early = [share for share in recipe.previews if recipe.preview_call(share) < first]
    if early:
        raise SynthkdError(f"recipe: previews {early[0]} lies before the start at strength {start.strength}")
    return first


def begins_at(strength: float, recipe: Recipe) -> int:
    """The first denoiser call of a run that starts from images; raises SynthkdError where nothing is left to do."""
    first = recipe.steps - min(int(recipe.steps * strength), recipe.steps)
    if first == recipe.steps:
        raise SynthkdError(f"strength is {strength}: of {recipe.steps} steps none is left; raise one of them")
    left = range(first, recipe.steps)
    if recipe.guidance.scale > 0 and not any(recipe.guidance.active(i, recipe.steps) for i in left):
        raise SynthkdError(f"strength is {strength}: none of the last {len(left)} calls is guided; move guidance.stop")
    return first


@torch.no_grad()
def encoded(model: LatentModel, images: Tensor, chunk: int = 0) -> Tensor:
    """Clean latents [B,C,h,w] of uint8 images [B,3,H,W], in the prior's dtype; chunk: at a time, 0 for all.

    Raises SynthkdError for a prior that only decodes.
    """
    decoder = model.decoder
    if not isinstance(decoder, Encoder):
        raise SynthkdError("model: this prior has no encoder, so a group cannot start from images")
    pixels = images.to(model.device).float() / 255
    return torch.cat([decoder.encode(pixels[part]).to(model.dtype) for part in parts_of(len(pixels), chunk)])


def noised(clean: Tensor, noise: Tensor, tables: Tables, first: int) -> Tensor:
    """z = alpha x0 + sigma n at the level of call `first`, all [B,C,h,w] (arXiv 2006.11239, eq. 4)."""
    c = tables.at(first)
    return (c.alpha * clean + c.sigma * noise).to(noise.dtype)
