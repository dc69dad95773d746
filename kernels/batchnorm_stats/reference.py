"""Eager oracle of `batchnorm_stats`; runs in any float dtype, float64 included."""

from typing import NamedTuple

import torch
from torch import Tensor


class BatchNormStats(NamedTuple):
    """count: number of values per channel; mean [C]; m2 [C], the sum of squared deviations from the mean."""

    count: int  # type: ignore[assignment]  # hides tuple.count
    mean: Tensor
    m2: Tensor

    @property
    def var(self) -> Tensor:
        """Biased variance [C]: m2 / count."""
        return self.m2 / self.count


def batchnorm_stats(x: Tensor, shift: Tensor | None = None) -> BatchNormStats:
    """Per-channel statistics of x [N,C,*] over every axis but the channel; half precision sums in float32.

    shift does not enter: squares are taken from the mean itself. Two plain means: torch.var_mean over several axes
    takes seven times as long on a CPU.
    """
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = [d for d in range(x.dim()) if d != 1]
    mean = work.mean(dim=dims, keepdim=True)
    return BatchNormStats(x.numel() // x.shape[1], mean.flatten(), (work - mean).square().sum(dim=dims))


def merge_stats(a: BatchNormStats, b: BatchNormStats) -> BatchNormStats:
    """Statistics of the union of two sets (Chan, Golub and LeVeque 1979, eq. 2.1): exact, order-free."""
    count = a.count + b.count
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    return BatchNormStats(count, mean, a.m2 + b.m2 + delta.square() * (a.count * b.count / count))
