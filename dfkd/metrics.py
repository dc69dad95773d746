"""Figures about sets of images: how far apart their features lie, which images repeat, accuracy by class."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from synthkd.dfkd.teachers import Teacher

NEAR_COPY = 0.99
KERNEL_SAMPLES = 5000
_SIDE = 16


@torch.no_grad()
def set_features(net: Teacher, images: Tensor, batch_size: int = 256) -> Tensor:
    """What a network's last linear layer reads, [N,D] on the CPU, for uint8 images [N,3,H,W]."""
    device = next(net.parameters()).device
    return torch.cat([net.features(b.to(device).float() / 255).cpu() for b in torch.split(images, batch_size)])


def frechet_distance(a: Tensor, b: Tensor, block: int = 4096) -> float:
    """Squared 2-Wasserstein distance of Gaussian fits to features [N,D] and [M,D], in float64.

        d^2 = |m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    Heusel et al. 2017, arXiv 1706.08500, eq. 6; covariances divide by N - 1. With C_a = A^T A and C_b = B^T B the
    trace of the root is that of (G G^T)^(1/2), G = A B^T: one symmetric root, and a covariance may be singular
    (N < D). Few samples bias the distance upwards: two sets of one distribution are 0 apart only as N grows, so
    compare only distances between sets of about one size. `block` rows at a time bound the memory.
    """
    mean_a, root_a = _gaussian(a, block)
    mean_b, root_b = _gaussian(b, block)
    product_ab = root_a @ root_b.T
    gram = product_ab @ product_ab.T if len(root_a) <= len(root_b) else product_ab.T @ product_ab
    # Rounding leaves a singular gram with eigenvalues just below 0.
    cross = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(0.0, float(distance))


def _gaussian(rows: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Mean [D] of rows [N,D], N > 1, and a factor A [min(N,D),D] of their covariance A^T A."""
    mean = rows.mean(dim=0, dtype=torch.float64)
    factor = mean.new_empty(0, rows.shape[1])
    for part in torch.split(rows, block):
        factor = torch.cat([factor, part.double() - mean])
        factor = torch.linalg.qr(factor, mode="r").R if len(factor) > rows.shape[1] else factor
    return mean, factor / math.sqrt(len(rows) - 1)


def kernel_distance(a: Tensor, b: Tensor, block: int = 1024) -> float:
    """Unbiased squared maximum mean discrepancy of features [N,D] and [M,D] under k(x,y) = (x.y / D + 1)^3.

        MMD_u^2 = mean_{i != j} k(a_i,a_j) + mean_{i != j} k(b_i,b_j) - 2 mean k(a_i,b_j)

    Binkowski et al. 2018, arXiv 1801.01401, eq. 4, in float64 and over all pairs. Its expectation does not depend
    on the number of samples; two sets of one distribution may therefore give a value below 0. `block` rows at a
    time bound the memory.
    """
    a, b = a.double(), b.double()
    within_a, within_b = ((_kernel_sum(x, x, block) - _self_sum(x)) / (len(x) * (len(x) - 1)) for x in (a, b))
    return within_a + within_b - 2 * _kernel_sum(a, b, block) / (len(a) * len(b))


def _kernel_sum(a: Tensor, b: Tensor, block: int) -> float:
    blocks = product(torch.split(a, block), torch.split(b, block))
    return sum((float((x @ y.T / a.shape[1] + 1).pow(3).sum()) for x, y in blocks), 0.0)


def _self_sum(rows: Tensor) -> float:
    """Sum of k(x,x)."""
    return float((rows.square().mean(dim=1) + 1).pow(3).sum())


def set_distances(features: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Both distances of every pair of named sets [N,D], as `first_second` -> `frechet`, `kernel`.

    Empty where a feature is not finite or a set has fewer than two images. The kernel's cost is N x M: a set of
    more than 5,000 images enters it as a fixed random 5,000.
    """
    if any(len(f) < 2 or not torch.isfinite(f).all() for f in features.values()):
        return {}
    return {
        f"{one}_{other}": {
            "frechet": _rounded(frechet_distance(features[one], features[other])),
            "kernel": _rounded(kernel_distance(_thinned(features[one]), _thinned(features[other]))),
        }
        for one, other in combinations(features, 2)
    }


def _thinned(rows: Tensor) -> Tensor:
    # At random: every n-th row of a set whose classes take turns would be of one class.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows if len(rows) <= KERNEL_SAMPLES else rows[order[:KERNEL_SAMPLES]]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


class NearCopy(NamedTuple):
    """Positions of an image and of the earlier one it repeats, and their likeness (1: the same)."""

    earlier: int
    later: int
    likeness: float


@dataclass(frozen=True)
class NearCopies:
    """How many images repeat an earlier one, and the likest such pairs."""

    count: int
    examples: list[NearCopy]


def near_duplicates(images: Tensor, threshold: float = NEAR_COPY, examples: int = 4, block: int = 1024) -> NearCopies:
    """Redundant images among uint8 images [N,3,H,W]: those with a near-copy at an earlier position.

    Two images are near-copies where their likeness reaches `threshold`. The likeness is the cosine of their
    pixels, area-pooled to 16x16 RGB, each channel less its mean: brightness, contrast and small noise do not
    count, a moved or recoloured shape does. Images whose pooled channels vary by less than one grey level have
    no shape; they are all copies of one another. `block` rows at a time are compared, so the memory is
    N x 769 x 4 bytes and little more.
    """
    found = [copy for copy in nearest_earlier(shapes(images, block), block) if copy.likeness >= threshold]
    likest = sorted(found, key=lambda c: (-round(c.likeness, 5), c.later))
    return NearCopies(len(found), likest[:examples])


def shapes(images: Tensor, block: int) -> Tensor:
    """uint8 [N,3,H,W] -> unit vectors [N,769]: pooled, centred pixels, and a last axis for images without shape."""
    out = torch.zeros(len(images), 3 * _SIDE**2 + 1)
    for rows, part in zip(torch.split(out, block), torch.split(images, block), strict=True):
        pooled = F.adaptive_avg_pool2d(part.float(), _SIDE)
        centred = (pooled - pooled.mean(dim=(2, 3), keepdim=True)).flatten(1)
        flat = centred.square().mean(dim=1).sqrt() < 1.0  # grey level
        rows[:, :-1] = F.normalize(centred, dim=1) * ~flat[:, None]
        rows[:, -1] = flat.float()
    return out


def nearest_earlier(vectors: Tensor, block: int) -> Iterator[NearCopy]:
    """The likest earlier row of every row of [N,D] but the first."""
    for start in range(0, len(vectors), block):
        rows = vectors[start : start + block]
        best, where = torch.full((len(rows),), -math.inf), torch.zeros(len(rows), dtype=torch.int64)
        for other in range(0, start + 1, block):
            cosines = rows @ vectors[other : other + block].T
            if other == start:
                cosines.masked_fill_(torch.ones_like(cosines, dtype=torch.bool).triu(), -math.inf)
            top, at = cosines.max(dim=1)
            where = torch.where(top > best, at + other, where)
            best = torch.maximum(best, top)
        for i, (likeness, at) in enumerate(zip(best.tolist(), where.tolist(), strict=True)):
            if start + i:
                yield NearCopy(at, start + i, min(likeness, 1.0))


def per_class_accuracy(confusion: Sequence[Sequence[int]]) -> list[float | None]:
    """Percent of each class that is read right, from counts [K][K] (rows true); None for a class without images."""
    return [100 * row[i] / sum(row) if sum(row) else None for i, row in enumerate(confusion)]
