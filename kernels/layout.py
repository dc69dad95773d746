"""How an image-like tensor lies in memory."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """A tensor [N,C,*] as samples of C channels of S positions, all axes in elements of the same memory.

    x is dense: either S is contiguous (stride_s = 1) or C is (channels_last: stride_c = 1).
    """

    x: Tensor
    n: int
    c: int
    s: int
    stride_n: int
    stride_c: int
    stride_s: int


def is_channels_last(x: Tensor) -> bool:
    """Whether [N,C,*] lies as [N,*,C]; False where both orders are the same memory."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def rows(x: Tensor) -> Rows:
    """x [N,C,*] without a copy where it is contiguous or channels_last, else a contiguous copy."""
    n, c = x.shape[0], x.shape[1]
    s = x.numel() // max(n * c, 1)
    if is_channels_last(x) or (s == 1 and x.is_contiguous()):
        return Rows(x, n, c, s, c * s, 1, c)
    return Rows(x.contiguous(), n, c, s, c * s, s, 1)


def like(x: Tensor, pattern: Tensor) -> Tensor:
    """x in the memory layout of `pattern`, which is dense and of the same shape; a copy only where they differ."""
    if x.stride() == pattern.stride():
        return x
    return torch.empty_like(pattern, dtype=x.dtype).copy_(x)


def dense(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels_last, else a contiguous copy."""
    return x if is_channels_last(x) else x.contiguous()
