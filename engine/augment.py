"""Latent CutMix plans: which sample each latent position comes from (arXiv 2504.00870; boxes as in 1905.04899).

And the augmented views that a guidance may see beside the plain image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthkd.engine import rng
from synthkd.engine.config import CutMixSpec, GuidanceSpec


def partners(classes: Sequence[int], spec: CutMixSpec, seed: int, group: int, event: int, attempt: int) -> list[int]:
    """For each sample the position of another one: of its own class, or any; a cycle through a random order."""
    order = rng.permutation(seed, group, f"cutmix partners {event}", len(classes), attempt)
    rings: dict[int, list[int]] = {}
    for position in order:
        rings.setdefault(classes[position] if spec.scope == "class" else 0, []).append(int(position))
    out = [0] * len(classes)
    for ring in rings.values():
        for here, there in zip(ring, ring[1:] + ring[:1], strict=True):
            out[here] = there
    return out


def box(u: NDArray[np.float64], alpha: float, height: int, width: int) -> tuple[int, int, int, int]:
    """A box (top, bottom, left, right) of about area 1 - lambda with lambda ~ Beta(alpha, alpha) (1905.04899, eq. 2).

    u: at least 3 uniforms, 4 for alpha != 1, and more pairs up to alpha = 1/2, where pairs are tried until one fits.
    """
    keep = float(u[2]) if alpha == 1.0 else _beta(u[2:], alpha)
    share = float(np.sqrt(1.0 - keep))
    tall, wide = round(height * share), round(width * share)
    y, x = int(u[0] * height), int(u[1] * width)
    top, left = max(0, y - tall // 2), max(0, x - wide // 2)
    return top, min(height, y + (tall + 1) // 2), left, min(width, x + (wide + 1) // 2)


def _beta(u: NDArray[np.float64], alpha: float) -> float:
    """Beta(alpha, alpha) from uniforms: Ulrich 1984 above 1/2 (exact, two of them), Johnk 1964 up to there."""
    if alpha > 0.5:
        return float(0.5 + 0.5 * np.sqrt(1.0 - u[0] ** (2.0 / (2.0 * alpha - 1.0))) * np.cos(2.0 * np.pi * u[1]))
    for a, b in u[: len(u) // 2 * 2].reshape(-1, 2):
        x, y = a ** (1 / alpha), b ** (1 / alpha)
        if 0 < x + y <= 1:
            return float(x / (x + y))
    return 0.5


def event_map(
    classes: Sequence[int],
    spec: CutMixSpec,
    height: int,
    width: int,
    *,
    seed: int,
    group: int,
    event: int,
    attempt: int = 0,
) -> Tensor:
    """Source map of one exchange, int64 [B,H,W]: the partner's position inside the sample's box, its own outside."""
    chosen = partners(classes, spec, seed, group, event, attempt)
    out = torch.arange(len(classes)).view(-1, 1, 1).repeat(1, height, width)
    for position, partner in enumerate(chosen):
        u = rng.uniform(seed, group * 65536 + position, f"cutmix box {event}", 66, attempt)
        top, bottom, left, right = box(u, spec.alpha, height, width)
        out[position, top:bottom, left:right] = partner
    return out


def compose(so_far: Tensor, event: Tensor) -> Tensor:
    """Source map after one more exchange: whoever gave the box gave what it had itself received, int64 [B,H,W]."""
    return torch.gather(so_far, 0, event)


def area_targets(source: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Label of each sample as the area its classes hold in the composed map: float32 [B,K], rows sum to 1."""
    flat = classes[source].flatten(1)
    counts = torch.zeros(len(flat), num_classes).scatter_add_(1, flat, torch.ones(flat.shape))
    return counts / flat.shape[1]


class Look(NamedTuple):
    """One random view of a group: shift [B,2], down and right as shares of the size, and mirror [B], booleans."""

    shift: Tensor
    mirror: Tensor

    def part(self, samples: slice) -> "Look":
        """The view of some of the samples."""
        return Look(self.shift[samples], self.mirror[samples])


def look(
    ids: Sequence[int], spec: GuidanceSpec, device: torch.device, *, seed: int, call: int, view: int, attempt: int
) -> Look:
    """A random view of a group's images: shifted by up to spec.look_shift and perhaps mirrored, per sample."""
    u = torch.from_numpy(np.stack([rng.uniform(seed, i, f"look {call} {view}", 3, attempt) for i in ids]))
    shift = ((2 * u[:, :2] - 1) * spec.look_shift).float().to(device)
    return Look(shift, ((u[:, 2] < 0.5) & spec.look_flip).to(device))


def viewed(images: Tensor, look: Look) -> Tensor:
    """images [B,3,H,W] as a view shows them: shifted, edges repeating, and mirrored."""
    height, width = images.shape[-2:]
    rows = _moved(height, look.shift[:, 0])
    columns = _moved(width, look.shift[:, 1])
    columns = torch.where(look.mirror[:, None], columns.flip(1), columns)
    out = images.gather(2, rows[:, None, :, None].expand_as(images))
    return out.gather(3, columns[:, None, None, :].expand_as(images))


def _moved(size: int, share: Tensor) -> Tensor:
    """Source index [B,size] of each position under a shift by a share [B] of the size."""
    positions = torch.arange(size, device=share.device)
    return (positions + (share * size).round().long()[:, None]).clamp(0, size - 1)
