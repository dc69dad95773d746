"""A small segmentation task made here: real handwritten digits on textured grounds, and letters as its pool.

Scenes are a function of (glyphs, seed, count): 48x48, one glyph or two that do not touch, lighter than their ground.
"""

import string
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from synthkd.dfkd.data import labelled_arrays, real_digits
from synthkd.dfkd.dense import DenseImages
from synthkd.engine import rng
from synthkd.engine.errors import SynthkdError, suggest

PREFIX, POOL = "segments:", "segments:pool"
SIDE = 48
_COUNTS = {"train": 2000, "test": 500, "pool": 2000}
_SEEDS = {"train": 48_001, "test": 48_002, "pool": 48_003}
_DRAWN, _GRID = 40, 6  # random numbers of a scene, and cells a side of its noise
# Letters whose shape is, or in some hand may be, a digit's.
_LOOK_ALIKE = set("OoQDIilLjJtTZzSsBbGgqpyY")
LETTERS = tuple(letter for letter in string.ascii_letters if letter not in _LOOK_ALIKE)
Field = Callable[[NDArray[np.float32]], Tensor]


def load_dense_set(reference: str, classes: tuple[str, ...]) -> DenseImages:
    """Labelled scenes: `segments:test`, `segments:train`, or an .npz of x uint8 [N,H,W,3] and y integers [N,H,W].

    Raises SynthkdError for another reference, and for labels that the network does not have.
    """
    if reference.startswith(PREFIX):
        part = reference.removeprefix(PREFIX)
        if part not in ("test", "train"):
            raise SynthkdError(f"data {reference!r}: {suggest(part, ('test', 'train'))}")
        if len(classes) != 11:
            raise SynthkdError(f"data {reference!r}: has 11 classes, the network {len(classes)}")
        return digit_scenes(part)
    if Path(reference).suffix != ".npz":
        raise SynthkdError(f"data {reference!r}: expected segments:test, or an .npz of x and label maps y")
    images, masks = labelled_arrays(Path(reference))
    if masks.ndim != 3:
        raise SynthkdError(f"data {reference}: y has shape {masks.shape}; expected label maps [N,H,W] for this network")
    return DenseImages(images, torch.from_numpy(masks), classes)


@lru_cache(maxsize=2)
def digit_scenes(part: str) -> DenseImages:
    """2,000 scenes of scikit-learn's train digits (`train`) or 500 of its test digits (`test`); label 0 is the ground.

    Digits of the one are never in the other, nor is a ground.
    """
    glyphs, labels, names = digit_glyphs(part)
    images, masks = scenes(glyphs, labels, _COUNTS[part], _SEEDS[part], waves)
    return DenseImages(images, masks, names)


def digit_glyphs(part: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Coverage float32 [M,1,32,32] in [0,1] of real digits, labels int64 [M] from 1 on, and names, the ground first."""
    digits = real_digits(part)
    return digits.images[:, :1].float() / 255, digits.labels + 1, ("ground", *digits.classes)


@lru_cache(maxsize=1)
def letter_scenes() -> Tensor:
    """The pool: 2,000 scenes of letters on grounds of other patterns, uint8 [N,3,48,48]."""
    glyphs = letter_glyphs()
    return scenes(glyphs, torch.ones(len(glyphs), dtype=torch.long), _COUNTS["pool"], _SEEDS["pool"], tiles)[0]


def letter_glyphs() -> Tensor:
    """Coverage float32 [M,1,32,32] of letters of Pillow's font, blurred as digits are: by way of 8x8 pixels.

    Letters that look like a digit are left out. Raises SynthkdError where Pillow was built without FreeType.
    """
    from PIL import Image, ImageDraw, ImageFont

    try:
        font = ImageFont.load_default(120)
    except (ImportError, TypeError, OSError) as error:
        raise SynthkdError("the segments pool needs Pillow >= 10.1 with FreeType: pip install -U pillow") from error
    found = []
    for letter in LETTERS:
        page = Image.new("L", (160, 160))
        ImageDraw.Draw(page).text((80, 80), letter, fill=255, font=font, anchor="mm", stroke_width=4)
        left, top, right, bottom = page.getbbox() or (0, 0, 160, 160)
        width, height = (right - left) * 32 // (bottom - top), 32
        drawn = page.crop((left, top, right, bottom)).resize((max(8, min(32, width)), height), Image.Resampling.BOX)
        square = Image.new("L", (32, 32))
        square.paste(drawn, ((32 - drawn.width) // 2, 0))
        found.append(torch.from_numpy(np.array(square, np.float32) / 255))
    small = F.avg_pool2d(torch.stack(found)[:, None], 4)
    return F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)


def scenes(glyphs: Tensor, labels: Tensor, count: int, seed: int, ground: Field) -> tuple[Tensor, Tensor]:
    """Images uint8 [N,3,48,48] and label maps int64 [N,48,48] (0: ground).

    glyphs: coverage [M,1,h,w]; labels: int64 [M]; ground: random numbers [N,8] -> a field [N,1,48,48] in [0,1].
    """
    u = rng.uniform(seed, 0, "scenes", count * _DRAWN).astype(np.float32).reshape(count, _DRAWN)
    cover, names = _placed(glyphs, labels, u[:, :16])
    dark, bright = torch.from_numpy(u[:, 16:28]), torch.from_numpy(u[:, 28:31])
    field = 0.6 * ground(u[:, 32:40]) + 0.4 * _noise(seed, count)
    low, high = (0.55 * dark[:, i : i + 3, None, None] for i in (0, 3))
    ink = (0.75 + 0.25 * bright)[:, :, None, None]
    images = ((1 - field) * low + field * high) * (1 - cover) + ink * cover
    grain = rng.normal(seed, 0, "grain", images.numel()).reshape(images.shape)
    images = (images + 0.02 * torch.from_numpy(grain)).clamp(0, 1)
    return images.mul(255).round().to(torch.uint8), names


def _placed(glyphs: Tensor, labels: Tensor, u: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """Coverage [N,1,48,48] and label maps [N,48,48]; half of the scenes have two glyphs, either side of the middle."""
    two, upright = u[:, 0] < 0.5, u[:, 1] < 0.5
    cover, names = torch.zeros(len(u), 1, SIDE, SIDE), torch.zeros(len(u), SIDE, SIDE, dtype=torch.long)
    for which in range(2):
        v = u[:, 2 + 7 * which : 9 + 7 * which]
        side = np.where(two, 0.36 + 0.1 * v[:, 0], 0.45 + 0.4 * v[:, 0])  # in shares of the picture's
        room = 1 - side
        at = np.stack([room * (2 * v[:, 1] - 1), room * (2 * v[:, 2] - 1)], 1)  # centre, in -1..1
        half = (0.5 - side) * (2 * v[:, 3] - 1) + (0.5 if which else -0.5)
        at[:, 0], at[:, 1] = np.where(two & ~upright, half, at[:, 0]), np.where(two & upright, half, at[:, 1])
        index = torch.from_numpy(np.minimum((v[:, 4] * len(glyphs)).astype(np.int64), len(glyphs) - 1))
        drawn = _drawn(glyphs[index], side, at, 0.5 * v[:, 5] - 0.25, 0.4 * v[:, 6] - 0.2)
        drawn *= torch.from_numpy(two | (which == 0))[:, None, None, None]
        names = torch.where(drawn[:, 0] > 0.5, labels[index][:, None, None], names)
        cover = torch.maximum(cover, drawn)
    return cover, names


def _drawn(
    glyphs: Tensor, side: NDArray[np.float32], at: NDArray[np.float32], turn: NDArray[np.float32],
    slant: NDArray[np.float32],
) -> Tensor:  # fmt: skip
    """Glyphs [N,1,h,w] at `side` (share of the picture), centred `at` (right, down), turned and slanted (radians)."""
    c, s = np.cos(turn) / side, np.sin(turn) / side
    linear = np.stack([np.stack([c + slant * s, -s + slant * c], 1), np.stack([s, c], 1)], 1)
    theta = np.concatenate([linear, -linear @ at[:, :, None]], 2).astype(np.float32)
    grid = F.affine_grid(torch.from_numpy(theta), [len(glyphs), 1, SIDE, SIDE], align_corners=False)
    found = F.grid_sample(glyphs, grid, padding_mode="zeros", align_corners=False)
    return (1.8 * found - 0.3).clamp(0, 1)  # ink, where the scan is half grey


def _noise(seed: int, count: int) -> Tensor:
    """Smooth noise [N,1,48,48] in [0,1]."""
    cells = rng.uniform(seed, 1, "scenes", count * _GRID**2).astype(np.float32).reshape(count, 1, _GRID, _GRID)
    return F.interpolate(torch.from_numpy(cells), size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)


def waves(v: NDArray[np.float32]) -> Tensor:
    """Stripes of any direction, 5 to 16 pixels apart: the digits' ground. v: [N,8] -> [N,1,48,48] in [0,1]."""
    along, _ = _turned(v[:, 0])
    pace = (SIDE / (5 + 11 * torch.from_numpy(v[:, 1])))[:, None, None]
    return (0.5 + 0.5 * torch.sin(torch.pi * pace * along + 6.3 * torch.from_numpy(v[:, 2])[:, None, None]))[:, None]


def tiles(v: NDArray[np.float32]) -> Tensor:
    """Chequers with soft edges, 4 to 10 pixels a field: the letters' ground. v: [N,8] -> [N,1,48,48] in [0,1]."""
    along, across = _turned(0.25 * v[:, 0])
    pace = (SIDE / (4 + 6 * torch.from_numpy(v[:, 1])))[:, None, None]
    shift = 6.3 * torch.from_numpy(v[:, 2])[:, None, None]
    waves_both = torch.sin(torch.pi * pace * along / 2 + shift) * torch.sin(torch.pi * pace * across / 2 + shift)
    return (0.5 + 1.5 * waves_both).clamp(0, 1)[:, None]


def _turned(share: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """Coordinates [N,48,48] in about -1..1 along a direction (share of half a turn), and across it."""
    line = torch.linspace(-1, 1, SIDE)
    angle = (torch.pi * torch.from_numpy(share))[:, None, None]
    y, x = line[None, :, None], line[None, None, :]
    return torch.cos(angle) * x + torch.sin(angle) * y, torch.cos(angle) * y - torch.sin(angle) * x
