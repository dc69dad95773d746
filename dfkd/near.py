"""Images that repeat an earlier one, among more of them than all pairs allow.

Up to EXACT images every pair is compared. Above, only those that fall into one cell of random hyperplanes (Charikar
2002, "Similarity estimation techniques from rounding algorithms"), and a pair counts by its true likeness: what is
found is real, what is counted is a lower bound.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from synthkd.dfkd.metrics import NEAR_COPY, NearCopy, nearest_earlier

EXACT = 10_000
_BANDS, _BITS, _NEIGHBOURS = 32, 24, 8


@dataclass(frozen=True)
class Near:
    """Images with a near-copy at an earlier position, the likest pairs, and whether every pair was compared."""

    count: int
    examples: list[NearCopy]
    exact: bool


def near_copies(vectors: Tensor, threshold: float = NEAR_COPY, examples: int = 6, exact: int = EXACT) -> Near:
    """Near-copies among unit vectors float32 [N,D], as `metrics.shapes` makes them of images.

    exact: up to how many all pairs are compared. Above it two vectors of likeness 0.99 share one of 32 cells of 24
    hyperplanes with a probability above 0.9999; within a cell the 8 next ones along a random direction are compared.
    """
    whole = len(vectors) <= exact
    pairs = list(nearest_earlier(vectors, 1024)) if whole else _banded(vectors, threshold)
    found = sorted((p for p in pairs if p.likeness >= threshold), key=lambda p: (-round(p.likeness, 5), p.later))
    return Near(len(found), found[:examples], whole)


def _banded(vectors: Tensor, threshold: float) -> list[NearCopy]:
    """The likest earlier vector that was looked at, for each that has one within the threshold."""
    count, generator = len(vectors), torch.Generator().manual_seed(0)
    best, where = torch.full((count,), -1.0), torch.zeros(count, dtype=torch.int64)
    powers = 2 ** torch.arange(_BITS, dtype=torch.int64)
    for _ in range(_BANDS):
        planes = torch.randn(vectors.shape[1], _BITS + 1, generator=generator)
        sides = torch.cat([block @ planes for block in torch.split(vectors, 4096)])
        cells = ((sides[:, :_BITS] > 0).long() * powers).sum(dim=1)
        along = sides[:, _BITS].argsort(stable=True)
        order = along[cells[along].argsort(stable=True)]
        for step in range(1, _NEIGHBOURS + 1):
            a, b = order[:-step], order[step:]
            same = cells[a] == cells[b]
            for earlier, later in ((a, b), (b, a)):  # in each of them a row is the later one once
                kept = same & (earlier < later)
                _compare(vectors, earlier[kept], later[kept], threshold, best, where)
    found = (best >= threshold).nonzero()[:, 0].tolist()
    return [NearCopy(int(where[i]), i, min(float(best[i]), 1.0)) for i in found]


def _compare(vectors: Tensor, earlier: Tensor, later: Tensor, threshold: float, best: Tensor, where: Tensor) -> None:
    """Put the likeness of pairs into `best` and `where` of the later one."""
    for one, other in zip(torch.split(earlier, 8192), torch.split(later, 8192), strict=True):
        likeness = (vectors[one] * vectors[other]).sum(dim=1)
        better = (likeness >= threshold) & (likeness > best[other])
        best[other[better]], where[other[better]] = likeness[better], one[better]
