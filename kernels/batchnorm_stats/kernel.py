"""Triton kernels of `batchnorm_stats`: moments in one read, and their gradient in one read and one write."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from synthkd.kernels.launch import launch
from synthkd.kernels.layout import Rows, rows
from synthkd.kernels.moments import (
    FEW_STEPS,
    merged,
    partial_moments,
    place,
    run_of,
    runs_of,
    tile_at,
    tile_mask,
    tiles,
)


@triton.jit
def _backward(
    x, mean, to_mean, to_m2, out, n, s, c, stride_n, stride_c, stride_s, blocks, share,
    STEPS: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    run, c0 = run_of(c, BC)
    at, in_c = c0 + tl.arange(0, BC), c0 + tl.arange(0, BC) < c
    m = tl.load(mean + at, mask=in_c)[None, :]
    a = (tl.load(to_mean + at, mask=in_c).to(tl.float32) * share)[None, :]
    b = (tl.load(to_m2 + at, mask=in_c).to(tl.float32) * 2.0)[None, :]
    for k in range(STEPS):
        sample, block = place(run, k, blocks, 0, True, STEPS)
        base, local, _ = tile_at(sample, block, n, s, c0, stride_n, stride_c, stride_s, BS, BC)
        mask = tile_mask(sample, block, n, s, c0, c, BS, BC)
        v = tl.load(x + base + local, mask=mask).to(tl.float32)
        tl.store(out + base + local, a + b * (v - m), mask=mask)


def _pooled(x: Tensor) -> Rows:
    """Rows with samples and positions as one axis where memory allows it."""
    r = rows(x)
    if r.stride_c == 1:
        return r._replace(n=1, s=r.n * r.s, stride_n=r.n * r.stride_n)
    return r


def forward(x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and M2 [C] in float32 of x [N,C,*], contiguous or channels_last."""
    mean, m2 = merged(partial_moments(_pooled(x), across=True, shift=shift), 1, x.shape[1], shift=shift)
    return mean.view(-1), m2.view(-1)


def backward(x: Tensor, mean: Tensor, to_mean: Tensor, to_m2: Tensor) -> Tensor:
    """Gradient like x, from those of mean and M2 [C]."""
    r = _pooled(x)
    t, out = tiles(r), torch.empty_like(r.x)
    k, runs = runs_of(r, t, across=True, most=FEW_STEPS)
    launch(
        _backward, (runs * t.c_blocks,), r.x, mean, to_mean, to_m2, out,
        r.n, r.s, r.c, r.stride_n, r.stride_c, r.stride_s, t.blocks, x.shape[1] / x.numel(),
        STEPS=k, BS=t.bs, BC=t.bc,
    )  # fmt: skip
    return out
