"""Triton kernels of `group_norm_silu`: moments, then one elementwise pass; backward: sums, then one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from synthkd.kernels.launch import launch, next_power_of_2
from synthkd.kernels.layout import rows
from synthkd.kernels.moments import (
    FEW_STEPS,
    TILE,
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
def _per_channel(mean, rstd, weight, bias, sample, c0, c, groups, d, BC: tl.constexpr):
    """Mean, rstd, weight and bias of a block of channels, [1,BC] each."""
    at = c0 + tl.arange(0, BC)
    g = sample * groups + at // d
    m, r = tl.load(mean + g, mask=at < c, other=0.0), tl.load(rstd + g, mask=at < c, other=0.0)
    w = tl.load(weight + at, mask=at < c, other=0.0).to(tl.float32)
    b = tl.load(bias + at, mask=at < c, other=0.0).to(tl.float32)
    return m[None, :], r[None, :], w[None, :], b[None, :]


@triton.jit
def _through_silu(g, u):
    """g times the derivative of silu at u."""
    gate = 1.0 / (1.0 + tl.exp(-u))
    return g * gate * (1.0 + u * (1.0 - gate))


@triton.jit
def _apply(
    x, mean, rstd, weight, bias, out, n, s, c, stride_n, stride_c, stride_s, runs, groups, d,
    STEPS: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    run, c0 = run_of(c, BC)
    m, r, w, b = _per_channel(mean, rstd, weight, bias, run // runs, c0, c, groups, d, BC)
    for k in range(STEPS):
        sample, block = place(run, k, 0, runs, False, STEPS)
        base, local, _ = tile_at(sample, block, n, s, c0, stride_n, stride_c, stride_s, BS, BC)
        mask = tile_mask(sample, block, n, s, c0, c, BS, BC)
        v = tl.load(x + base + local, mask=mask).to(tl.float32)
        u = (v - m) * r * w + b
        tl.store(out + base + local, u / (1.0 + tl.exp(-u)), mask=mask)


@triton.jit
def _sums(
    x, grad, mean, rstd, weight, bias, to_bias, to_weight, n, s, c, stride_n, stride_c, stride_s, runs, groups, d,
    STEPS: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    run, c0 = run_of(c, BC)
    m, r, w, b = _per_channel(mean, rstd, weight, bias, run // runs, c0, c, groups, d, BC)
    one, two = tl.zeros((BS, BC), tl.float32), tl.zeros((BS, BC), tl.float32)
    for k in range(STEPS):
        sample, block = place(run, k, 0, runs, False, STEPS)
        base, local, _ = tile_at(sample, block, n, s, c0, stride_n, stride_c, stride_s, BS, BC)
        mask = tile_mask(sample, block, n, s, c0, c, BS, BC)
        v = tl.load(x + base + local, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + base + local, mask=mask, other=0.0).to(tl.float32)
        xhat = (v - m) * r
        du = _through_silu(g, xhat * w + b)
        one += du
        two += du * xhat
    to = run.to(tl.int64) * c + c0 + tl.arange(0, BC)
    in_c = c0 + tl.arange(0, BC) < c
    tl.store(to_bias + to, tl.sum(one, axis=0), mask=in_c)
    tl.store(to_weight + to, tl.sum(two, axis=0), mask=in_c)


@triton.jit
def _coefficients(
    part_bias, part_weight, weight, to_bias, to_weight, c1, c2, runs, c, groups, d, share,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    sample, g = pid // groups, pid % groups
    at, in_d = g * d + tl.arange(0, BD), tl.arange(0, BD) < d
    one, two = tl.zeros((BR, BD), tl.float32), tl.zeros((BR, BD), tl.float32)
    start = 0
    while start < runs:
        row = start + tl.arange(0, BR)
        inside = (row < runs)[:, None] & in_d[None, :]
        part = ((sample * runs + row) * c)[:, None] + at[None, :]
        one += tl.load(part_bias + part, mask=inside, other=0.0)
        two += tl.load(part_weight + part, mask=inside, other=0.0)
        start += BR
    sum_du, sum_du_xhat = tl.sum(one, axis=0), tl.sum(two, axis=0)
    w = tl.load(weight + at, mask=in_d, other=0.0).to(tl.float32)
    tl.store(to_bias + sample * c + at, sum_du, mask=in_d)
    tl.store(to_weight + sample * c + at, sum_du_xhat, mask=in_d)
    tl.store(c1 + pid, tl.sum(w * sum_du, axis=0) * share)
    tl.store(c2 + pid, tl.sum(w * sum_du_xhat, axis=0) * share)


@triton.jit
def _backward(
    x, grad, grad_total, mean, rstd, weight, bias, c1, c2, out, n, s, c, stride_n, stride_c, stride_s, runs, groups, d,
    ADD: tl.constexpr, STEPS: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    run, c0 = run_of(c, BC)
    m, r, w, b = _per_channel(mean, rstd, weight, bias, run // runs, c0, c, groups, d, BC)
    at, in_c = c0 + tl.arange(0, BC), c0 + tl.arange(0, BC) < c
    g = (run // runs) * groups + at // d
    level = tl.load(c1 + g, mask=in_c, other=0.0)[None, :]
    slope = tl.load(c2 + g, mask=in_c, other=0.0)[None, :]
    for k in range(STEPS):
        sample, block = place(run, k, 0, runs, False, STEPS)
        base, local, _ = tile_at(sample, block, n, s, c0, stride_n, stride_c, stride_s, BS, BC)
        mask = tile_mask(sample, block, n, s, c0, c, BS, BC)
        v = tl.load(x + base + local, mask=mask).to(tl.float32)
        du = tl.load(grad + base + local, mask=mask).to(tl.float32)
        xhat = (v - m) * r
        dx = r * (w * _through_silu(du, xhat * w + b) - level - xhat * slope)
        if ADD:
            dx += tl.load(grad_total + base + local, mask=mask).to(tl.float32)
        tl.store(out + base + local, dx, mask=mask)


def forward(
    x: Tensor, residual: Tensor | None, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and sum (empty without a residual) like x; mean and rstd [N,G]. x is dense, residual in its layout."""
    r = rows(x)
    out, total = torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(x)
    parts = partial_moments(r, across=False, residual=residual, total=None if residual is None else total)
    mean, rstd = merged(parts, r.n, num_groups, eps=eps)
    t = tiles(r)
    k, runs = runs_of(r, t, most=FEW_STEPS)
    launch(
        _apply, (r.n * runs * t.c_blocks,), x if residual is None else total, mean, rstd, weight, bias, out,
        r.n, r.s, r.c, r.stride_n, r.stride_c, r.stride_s, runs, num_groups, r.c // num_groups,
        STEPS=k, BS=t.bs, BC=t.bc,
    )  # fmt: skip
    return out, total, mean, rstd


def _reduced(
    x: Tensor, grad: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over positions of du and du xhat [N,C], and the means over a group [N,G] of w du and w du xhat."""
    r, groups = rows(x), mean.shape[1]
    t, d = tiles(r), r.c // groups
    k, runs = runs_of(r, t)
    part_bias = torch.empty((r.n * runs, r.c), dtype=torch.float32, device=x.device)
    part_weight = torch.empty_like(part_bias)
    launch(
        _sums, (r.n * runs * t.c_blocks,), x, grad, mean, rstd, weight, bias, part_bias, part_weight,
        r.n, r.s, r.c, r.stride_n, r.stride_c, r.stride_s, runs, groups, d, STEPS=k, BS=t.bs, BC=t.bc,
    )  # fmt: skip
    to_bias = torch.empty((r.n, r.c), dtype=torch.float32, device=x.device)
    to_weight, c1, c2 = torch.empty_like(to_bias), torch.empty_like(mean), torch.empty_like(mean)
    bd = next_power_of_2(d)
    launch(
        _coefficients, (r.n * groups,), part_bias, part_weight, weight, to_bias, to_weight, c1, c2,
        runs, r.c, groups, d, 1.0 / (d * r.s), BR=min(next_power_of_2(runs), max(1, TILE // bd)), BD=bd,
    )  # fmt: skip
    return to_bias, to_weight, c1, c2


def backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient like x, and per sample those of weight and bias [N,C] in float32; gradients in the layout of x."""
    to_bias, to_weight, c1, c2 = _reduced(x, grad, mean, rstd, weight, bias)
    r, groups = rows(x), mean.shape[1]
    t, out = tiles(r), torch.empty_like(x)
    k, runs = runs_of(r, t, most=FEW_STEPS)
    launch(
        _backward, (r.n * runs * t.c_blocks,), x, grad, grad if grad_total is None else grad_total,
        mean, rstd, weight, bias, c1, c2, out, r.n, r.s, r.c, r.stride_n, r.stride_c, r.stride_s, runs, groups,
        r.c // groups, ADD=grad_total is not None, STEPS=k, BS=t.bs, BC=t.bc,
    )  # fmt: skip
    return out, to_weight, to_bias
