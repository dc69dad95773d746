"""Channel moments in one read of a tensor: Triton kernels shared by `batchnorm_stats` and `group_norm_silu`.

A tensor [N,C,*] is walked in tiles of BS positions by BC channels, whichever lies innermost in memory. A program takes
a run of STEPS tiles of one block of channels and leaves one partial (count, mean, M2) per channel; a second kernel
merges the partials (Chan, Golub and LeVeque 1979, eq. 2.1) in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from synthkd.kernels.launch import cdiv, launch, next_power_of_2
from synthkd.kernels.layout import Rows

PROGRAMS = 2048  # several waves of 132 multiprocessors; fewer programs would leave a long tail
TILE = 2048  # values in a tile: 16 per thread, two 16-byte loads of a half precision
MAX_STEPS = 32
FEW_STEPS = 4  # of an elementwise pass: what is read per channel is read once for them


@triton.jit
def run_of(c, BC: tl.constexpr):
    """Run of this program and the first channel of its block; in int32, as divisions of int64 are slow."""
    pid, c_blocks = tl.program_id(0), tl.cdiv(c, BC)
    run = pid // c_blocks
    return run, (pid - run * c_blocks) * BC


@triton.jit
def place(run, k, blocks, runs, ACROSS: tl.constexpr, STEPS: tl.constexpr):
    """Sample and position block of tile k of a run; with ACROSS a run goes on into the next sample."""
    if ACROSS:
        sample = (run * STEPS + k) // blocks
        block = run * STEPS + k - sample * blocks
    else:
        sample = run // runs
        block = (run - sample * runs) * STEPS + k
    return sample, block


@triton.jit
def tile_at(sample, block, n, s, c0, stride_n, stride_c, stride_s, BS: tl.constexpr, BC: tl.constexpr):
    """Offset of a tile (int64), those within it (int32), and the count of its positions that exist."""
    s0 = block * BS
    base = sample.to(tl.int64) * stride_n + s0.to(tl.int64) * stride_s + c0.to(tl.int64) * stride_c
    local = tl.arange(0, BS)[:, None] * stride_s + tl.arange(0, BC)[None, :] * stride_c
    count = tl.where(sample < n, tl.minimum(tl.maximum(s - s0, 0), BS), 0)
    return base, local, count


@triton.jit
def tile_mask(sample, block, n, s, c0, c, BS: tl.constexpr, BC: tl.constexpr):
    """Which values of a tile exist [BS,BC]."""
    in_s = (block * BS + tl.arange(0, BS) < s) & (sample < n)
    return in_s[:, None] & (c0 + tl.arange(0, BC) < c)[None, :]


@triton.jit
def _load(x, residual, total, at, mask, ADD: tl.constexpr):
    """Values in float32; with ADD those of x + residual as rounded, which is stored too."""
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        r = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        rounded = (v + r).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=mask)
        v = rounded.to(tl.float32)
    return v


@triton.jit
def _partials(
    x, residual, total, shift, mean, m2, count, n, s, c, stride_n, stride_c, stride_s, blocks, runs,
    SHIFT: tl.constexpr, ADD: tl.constexpr, ACROSS: tl.constexpr,
    STEPS: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    run, c0 = run_of(c, BC)
    in_c = c0 + tl.arange(0, BC) < c
    sample, block = place(run, 0, blocks, runs, ACROSS, STEPS)
    base, local, valid = tile_at(sample, block, n, s, c0, stride_n, stride_c, stride_s, BS, BC)
    mask = tile_mask(sample, block, n, s, c0, c, BS, BC)
    v = _load(x, residual, total, base + local, mask, ADD)
    near = tl.zeros((BC,), tl.float32)
    if SHIFT:
        near = tl.load(shift + c0 + tl.arange(0, BC), mask=in_c, other=0.0).to(tl.float32)
        v = tl.where(mask, v - near[None, :], 0.0)
    # d is taken from the first tile's mean: (mean - first)^2 <= variance * STEPS, so that little can cancel below
    found = valid.to(tl.float32)
    first = tl.sum(v, axis=0) / found
    d = tl.where(mask, v - first[None, :], 0.0)
    one, two = d, d * d
    for k in range(1, STEPS):
        sample, block = place(run, k, blocks, runs, ACROSS, STEPS)
        base, local, valid = tile_at(sample, block, n, s, c0, stride_n, stride_c, stride_s, BS, BC)
        mask = tile_mask(sample, block, n, s, c0, c, BS, BC)
        v = _load(x, residual, total, base + local, mask, ADD)
        if SHIFT:
            v = v - near[None, :]
        d = tl.where(mask, v - first[None, :], 0.0)
        one += d
        two += d * d
        found += valid.to(tl.float32)
    off = tl.sum(one, axis=0) / found
    to = run.to(tl.int64) * c + c0 + tl.arange(0, BC)
    tl.store(mean + to, first + off, mask=in_c)
    tl.store(m2 + to, tl.maximum(tl.sum(two, axis=0) - found * off * off, 0.0), mask=in_c)
    tl.store(count + run, found, mask=c0 == 0)


@triton.jit
def _merge(
    mean, m2, count, shift, out_mean, out_second, runs, c, groups, d, eps,
    SHIFT: tl.constexpr, RSTD: tl.constexpr, BE: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    g_blocks = tl.cdiv(groups, BG)
    sample = pid // g_blocks
    g = (pid % g_blocks).to(tl.int32) * BG + tl.arange(0, BG)
    total = 0.0
    centre, spread = tl.zeros((BG,), tl.float32), tl.zeros((BG,), tl.float32)
    start = 0
    while start < runs * d:
        e = start + tl.arange(0, BE)
        inside = (e < runs * d)[:, None] & (g < groups)[None, :]
        row = sample * runs + e // d
        at = (row * c + e % d)[:, None] + (g * d)[None, :]
        w = tl.load(count + row, mask=e < runs * d, other=0.0)
        m = tl.load(mean + at, mask=inside, other=0.0)
        q = tl.load(m2 + at, mask=inside, other=0.0)
        n = tl.sum(w, axis=0)
        here = tl.sum(w[:, None] * m, axis=0) / n
        off = m - here[None, :]
        within = tl.sum(q + w[:, None] * off * off, axis=0)
        delta, share = here - centre, n / (total + n)
        centre += delta * share
        spread += within + delta * delta * (total * share)
        total += n
        start += BE
    second = spread
    if RSTD:
        second = 1.0 / tl.sqrt(spread / total + eps)
    if SHIFT:
        centre += tl.load(shift + g, mask=g < groups, other=0.0).to(tl.float32)
    tl.store(out_mean + sample * groups + g, centre, mask=g < groups)
    tl.store(out_second + sample * groups + g, second, mask=g < groups)


class Tiles(NamedTuple):
    """A tensor's walk: tiles of bs positions by bc channels, `blocks` of them along the positions of a sample."""

    bs: int
    bc: int
    blocks: int
    c_blocks: int


def tiles(r: Rows) -> Tiles:
    """Tiles of about TILE values, long along the innermost axis, with few that are partly empty."""
    if r.stride_c == 1:
        bs = min(next_power_of_2(r.s), TILE // min(next_power_of_2(r.c), 128 if r.c % 128 == 0 else 64))
    else:
        sizes = [b for b in (2048, 1024, 512, 256) if b <= next_power_of_2(r.s)] or [next_power_of_2(r.s)]
        bs = next((b for b in sizes if cdiv(r.s, b) * b * 16 <= r.s * 17), sizes[-1])
    bc = min(next_power_of_2(r.c), TILE // bs)
    return Tiles(bs, bc, cdiv(r.s, bs), cdiv(r.c, bc))


def runs_of(r: Rows, t: Tiles, *, across: bool = False, most: int = MAX_STEPS) -> tuple[int, int]:
    """Tiles of a run, a power of two up to `most`, that leave PROGRAMS; and runs, of a sample or, across, of all."""
    tiles, k = r.n * t.blocks if across else t.blocks, 1
    while k < min(most, tiles) and r.n * t.blocks * t.c_blocks >= 2 * k * PROGRAMS:
        k *= 2
    return k, cdiv(tiles, k)


class Partials(NamedTuple):
    """Partial means and M2 [P,C] and counts [P], P = samples x runs, all float32."""

    mean: Tensor
    m2: Tensor
    counts: Tensor
    runs: int


def partial_moments(
    r: Rows, *, across: bool, shift: Tensor | None = None, residual: Tensor | None = None, total: Tensor | None = None
) -> Partials:
    """Moments of x, or of x + residual, which goes to `total`; across: runs may span samples, as P = runs then."""
    t = tiles(r)
    k, runs = runs_of(r, t, across=across)
    parts = runs if across else r.n * runs
    mean = torch.empty((parts, r.c), dtype=torch.float32, device=r.x.device)
    m2, count = torch.empty_like(mean), torch.empty((parts,), dtype=torch.float32, device=r.x.device)
    launch(
        _partials, (parts * t.c_blocks,), r.x, r.x if residual is None else residual, r.x if total is None else total,
        mean if shift is None else shift, mean, m2, count,
        r.n, r.s, r.c, r.stride_n, r.stride_c, r.stride_s, t.blocks, runs,
        SHIFT=shift is not None, ADD=residual is not None, ACROSS=across, STEPS=k, BS=t.bs, BC=t.bc,
        num_warps=4 if residual is None else 8,  # two inputs in flight: fewer values a thread, or they spill
    )  # fmt: skip
    return Partials(mean, m2, count, runs)


def merged(
    p: Partials, samples: int, groups: int, *, shift: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and M2, or with eps 1 / sqrt(M2 / count + eps), each [samples, groups] in float32."""
    c = p.mean.shape[1]
    d = c // groups
    bg = min(next_power_of_2(groups), max(1, 8 // d))  # 32 bytes of a row at least
    be = min(next_power_of_2(p.runs * d), TILE // bg)
    mean = torch.empty((samples, groups), dtype=torch.float32, device=p.mean.device)
    second = torch.empty_like(mean)
    launch(
        _merge, (samples * cdiv(groups, bg),), p.mean, p.m2, p.counts, p.mean if shift is None else shift, mean, second,
        p.runs, c, groups, d, 0.0 if eps is None else eps,
        SHIFT=shift is not None, RSTD=eps is not None, BE=be, BG=next_power_of_2(bg),
    )  # fmt: skip
    return mean, second
