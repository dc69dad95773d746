"""Views of images: crop, flip, affine, blend. Which one an image gets is a function of (seed, view, row) alone.

Crop and flip are made where an image is read, the rest on batches on the student's device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from synthkd.engine import rng

_RATIO = (3 / 4, 4 / 3)  # of a crop's height to its width
_COLUMNS = 12


@dataclass(frozen=True)
class ViewSpec:
    """The reach of each change; see `DistillSpec`."""

    crop: float = 1.0
    flip: bool = False
    shift: float = 0.0
    rotate: float = 0.0
    zoom: float = 0.0
    mix: float = 0.0

    @classmethod
    def of(cls, spec: Any) -> "ViewSpec":
        """The part of a DistillSpec that says what views look like."""
        return cls(spec.crop, spec.flip, spec.shift, spec.rotate, spec.zoom, spec.mix)


@dataclass(frozen=True)
class Views:
    """Views of B images.

    box: float32 [B,4], top, left, height and width of the crop in shares of the stored image; flip: bool [B];
    affine: float32 [B,4], angle (radians), zoom (1: none), and shift down and right in shares of half the image;
    partner: int64 [B], the row of the image it is blended with, its own where it is not; share: float32 [B] of its own.
    """

    box: NDArray[np.float32]
    flip: NDArray[np.bool_]
    affine: NDArray[np.float32]
    partner: NDArray[np.int64]
    share: NDArray[np.float32]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.flip)

    def take(self, index: Any) -> "Views":
        """Some of them: an index array, a mask or a slice."""
        return Views(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @property
    def blended(self) -> NDArray[np.bool_]:
        """bool [B]: which have a partner that counts."""
        found: NDArray[np.bool_] = self.share < 1
        return found

    @staticmethod
    def plain(rows: NDArray[np.int64]) -> "Views":
        """The whole images as they are."""
        n = len(rows)
        box = np.tile(np.array([0, 0, 1, 1], np.float32), (n, 1))
        affine = np.tile(np.array([0, 1, 0, 0], np.float32), (n, 1))
        return Views(box, np.zeros(n, bool), affine, rows.copy(), np.ones(n, np.float32))

    @staticmethod
    def cat(parts: "list[Views]") -> "Views":
        """Several one after the other."""
        return Views(*(np.concatenate([getattr(p, name) for p in parts]) for name in Views.__dataclass_fields__))


def draw_views(spec: ViewSpec, seed: int, view: int, rows: NDArray[np.int64], count: int) -> Views:
    """Views number `view` of some rows of a set of `count` images; a crop's side ratio is 3/4 to 4/3."""
    u = _table(seed, view, count)[rows]
    n = len(rows)
    area = spec.crop + (1 - spec.crop) * u[:, 0]
    side = np.exp(np.log(_RATIO[0]) + (np.log(_RATIO[1]) - np.log(_RATIO[0])) * u[:, 1]) if spec.crop < 1 else 1.0
    height, width = np.minimum(np.sqrt(area * side), 1), np.minimum(np.sqrt(area / side), 1)
    box = np.stack([u[:, 2] * (1 - height), u[:, 3] * (1 - width), height, width], 1).astype(np.float32)
    both = 2 * u[:, 5:9] - 1
    reach = np.array([spec.rotate, spec.zoom, 2 * spec.shift, 2 * spec.shift], np.float32)
    affine = (both * reach + np.array([0, 1, 0, 0])).astype(np.float32)
    mixed = u[:, 9] < spec.mix
    partner = np.where(mixed, np.minimum((u[:, 10] * count).astype(np.int64), count - 1), rows)
    share = np.where(mixed, u[:, 11], 1.0).astype(np.float32)
    flip = (u[:, 4] < 0.5) if spec.flip else np.zeros(n, bool)
    return Views(box, flip, affine, partner, share)


@lru_cache(maxsize=4)
def _table(seed: int, view: int, count: int) -> NDArray[np.float32]:
    """float32 [count, 12] in (0, 1): the randomness of one view of every image."""
    return rng.uniform(seed, view, "views", count * _COLUMNS).astype(np.float32).reshape(count, _COLUMNS)


def pixel_boxes(box: NDArray[np.float32], height: int, width: int) -> NDArray[np.int64]:
    """Crops [B,4] in shares of images of height x width -> whole pixels: top, left, height, width, at least 1x1."""
    size = np.array([height, width])
    extent = np.clip(np.rint(box[:, 2:] * size), 1, size).astype(np.int64)
    corner = np.minimum(np.floor(box[:, :2] * size).astype(np.int64), size - extent)
    return np.concatenate([np.maximum(corner, 0), extent], 1)


def is_affine(spec: ViewSpec) -> bool:
    """Whether the affine part does anything."""
    return bool(spec.shift or spec.rotate or spec.zoom)


def affine(x: Tensor, parameters: Tensor, mode: str = "bilinear") -> Tensor:
    """Images [B,C,H,W] turned, zoomed and shifted by [B,4] (see `Views`); the border repeats outwards (no black edges).

    mode: `nearest` for label maps.
    """
    angle, scale, down, right = parameters.to(x.dtype).unbind(1)
    c, s = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta = torch.stack([torch.stack([c, -s, right], 1), torch.stack([s, c, down], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode=mode, padding_mode="border", align_corners=False)


def looks(images: Tensor, views: Views, spec: ViewSpec, partners: Tensor | None = None) -> Tensor:
    """uint8 images [B,3,H,W] as read (cropped, mirrored) -> what networks see: float32 [B,3,H,W] in [0,1].

    partners: [B,3,H,W] uint8, the images they are blended with (anything where share is 1), after their own affine
    part, which is that of the image they are blended into.
    """
    turn = torch.from_numpy(views.affine).to(images.device, non_blocking=True) if is_affine(spec) else None
    x = _seen(images, turn)
    if partners is None:
        return x
    share = torch.from_numpy(views.share).to(images.device, non_blocking=True).view(-1, 1, 1, 1)
    return share * x + (1 - share) * _seen(partners, turn)


def _seen(images: Tensor, turn: Tensor | None) -> Tensor:
    x = images.float() / 255
    return x if turn is None else affine(x, turn)


def view_of_epoch(epoch: int, views: int) -> int:
    """Which view an epoch takes: its own, or the next of `views` in turn."""
    return epoch % views if views else epoch


def per_epoch(epochs: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """(epoch, where) for each epoch that a batch touches, ascending."""
    for epoch in np.unique(epochs):
        yield int(epoch), epochs == epoch
