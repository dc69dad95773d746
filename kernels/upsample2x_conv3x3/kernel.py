"""Triton kernels of `upsample2x_conv3x3`: four phases [N,4Co,H+1,W+1] to one image [N,Co,2H,2W], and back.

Symbols: output row y = 2i + p and column x = 2j + q come from row a = i + p and column b = j + q of phase 2p + q, so
y = 2a - p and x = 2b - q; the other positions of a phase lie at its border and feed nothing.
"""

import triton
import triton.language as tl
from torch import Tensor

from synthkd.kernels.launch import cdiv, launch, next_power_of_2
from synthkd.kernels.layout import is_channels_last

BLOCK = 2048  # values a program


@triton.jit
def _interleave_planes(
    t, bias, out, co, h, w, size, across, down,
    BIAS: tl.constexpr, BY: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Contiguous: BY output rows of 2 BJ columns, in one plane of one sample."""
    pid = tl.program_id(0).to(tl.int64)
    plane = pid // (across * down)
    tile = (pid % (across * down)).to(tl.int32)
    n, c = plane // co, plane % co
    y = (tile // across) * BY + tl.arange(0, BY)[:, None]
    j = (tile % across) * BJ + tl.arange(0, BJ)[None, :]
    phase = n * 4 + 2 * (y % 2)
    at = ((y + 1) // 2) * (w + 1) + j
    inside = (y < 2 * h) & (j < w)
    even = tl.load(t + (phase * co + c) * size + at, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(t + ((phase + 1) * co + c) * size + at + 1, mask=inside, other=0.0).to(tl.float32)
    both = tl.interleave(even, odd)
    if BIAS:
        both += tl.load(bias + c).to(tl.float32)
    x = (tile % across) * (2 * BJ) + tl.arange(0, 2 * BJ)[None, :]
    tl.store(out + (plane * 2 * h + y) * (2 * w) + x, both, mask=(y < 2 * h) & (x < 2 * w))


@triton.jit
def _deinterleave_planes(grad, out, co, h, w, size, across, down, BY: tl.constexpr, BJ: tl.constexpr):
    """Contiguous: BY rows 2a + p of BJ columns, of both phases q, in one plane of one sample."""
    pid = tl.program_id(0).to(tl.int64)
    plane = pid // (across * down)
    tile = (pid % (across * down)).to(tl.int32)
    n, c = plane // co, plane % co
    r = (tile // across) * BY + tl.arange(0, BY)[:, None]
    a, p = r // 2, r % 2
    y = 2 * a - p
    x = (tile % across) * (2 * BJ) + tl.arange(0, 2 * BJ)[None, :]
    seen = (y >= 0) & (y < 2 * h) & (x < 2 * w)
    both = tl.load(grad + (plane * 2 * h + y) * (2 * w) + x, mask=seen, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(both, (BY, BJ, 2)))
    b = (tile % across) * BJ + tl.arange(0, BJ)[None, :]
    rows = r < 2 * h + 2
    zeroth = out + ((n * 4 + 2 * p) * co + c) * size + a * (w + 1)
    first = out + ((n * 4 + 2 * p + 1) * co + c) * size + a * (w + 1)
    tl.store(zeroth + b, even, mask=rows & (b < w))
    tl.store(first + b + 1, odd, mask=rows & (b < w))
    border = rows & (tile % across == 0)
    nothing = tl.zeros([BY, 1], dtype=tl.float32)
    tl.store(zeroth + w, nothing, mask=border)
    tl.store(first, nothing, mask=border)


@triton.jit
def _interleave_pixels(
    t, bias, out, co, h, w, across,
    BIAS: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """channels_last: BX columns of an output row, BC channels."""
    pid = tl.program_id(0).to(tl.int64)
    line, tile = pid // across, (pid % across).to(tl.int32)
    n, y = line // (2 * h), line % (2 * h)
    x = tile * BX + tl.arange(0, BX)[:, None]
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    at = (n * (h + 1) + (y + 1) // 2) * (w + 1) + (x + 1) // 2
    inside = (x < 2 * w) & (c < co)
    v = tl.load(t + (at * 4 + 2 * (y % 2) + x % 2) * co + c, mask=inside).to(tl.float32)
    if BIAS:
        v += tl.load(bias + c, mask=c < co).to(tl.float32)
    tl.store(out + (line * 2 * w + x) * co + c, v, mask=inside)


@triton.jit
def _deinterleave_pixels(grad, out, co, h, w, across, tiles, BX: tl.constexpr, BC: tl.constexpr):
    """channels_last: BX columns of a row of one phase, BC channels."""
    pid = tl.program_id(0).to(tl.int64)
    line, tile = pid // across, (pid % across).to(tl.int32)
    n, a = line // (h + 1), line % (h + 1)
    phase = tl.program_id(1) // tiles
    b = tile * BX + tl.arange(0, BX)[:, None]
    c = (tl.program_id(1) % tiles) * BC + tl.arange(0, BC)[None, :]
    y, x = 2 * a - phase // 2, 2 * b - phase % 2
    inside = (b < w + 1) & (c < co)
    seen = inside & (y >= 0) & (y < 2 * h) & (x >= 0) & (x < 2 * w)
    v = tl.load(grad + ((n * 2 * h + y) * (2 * w) + x) * co + c, mask=seen, other=0.0).to(tl.float32)
    tl.store(out + ((line * (w + 1) + b) * 4 + phase) * co + c, v, mask=inside)


def _blocks(length: int, most: int) -> tuple[int, int]:
    """A block of BLOCK values as (the other axis, this axis), this one at most `most` long."""
    inner = min(next_power_of_2(length), most)
    return BLOCK // inner, inner


def interleave(t: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """t [N,4Co,H+1,W+1] into out [N,Co,2H,2W], both contiguous or both channels_last."""
    n, co, h, w = out.shape[0], out.shape[1], out.shape[2] // 2, out.shape[3] // 2
    add, other = bias is not None, t if bias is None else bias
    if is_channels_last(t):
        bx, bc = _blocks(co, 128)
        bx = min(bx, next_power_of_2(2 * w))
        across = cdiv(2 * w, bx)
        grid = (n * 2 * h * across, cdiv(co, bc))
        launch(_interleave_pixels, grid, t, other, out, co, h, w, across, BIAS=add, BX=bx, BC=bc)
    else:
        by, bj = _blocks(w, 256)
        by = min(by // 2, next_power_of_2(2 * h))
        across, down = cdiv(w, bj), cdiv(2 * h, by)
        grid, size = (n * co * across * down, 1), (h + 1) * (w + 1)
        launch(_interleave_planes, grid, t, other, out, co, h, w, size, across, down, BIAS=add, BY=by, BJ=bj)


def deinterleave(grad: Tensor, out: Tensor) -> None:
    """grad [N,Co,2H,2W] into out [N,4Co,H+1,W+1], both contiguous or both channels_last."""
    n, co, h, w = grad.shape[0], grad.shape[1], grad.shape[2] // 2, grad.shape[3] // 2
    if is_channels_last(grad):
        bx, bc = _blocks(co, 128)
        bx = min(bx, next_power_of_2(w + 1))
        across, tiles = cdiv(w + 1, bx), cdiv(co, bc)
        grid = (n * (h + 1) * across, 4 * tiles)
        launch(_deinterleave_pixels, grid, grad, out, co, h, w, across, tiles, BX=bx, BC=bc)
    else:
        by, bj = _blocks(w, 256)
        by = min(by // 2, next_power_of_2(2 * h + 2))
        across, down = cdiv(w, bj), cdiv(2 * h + 2, by)
        grid, size = (n * co * across * down, 1), (h + 1) * (w + 1)
        launch(_deinterleave_planes, grid, grad, out, co, h, w, size, across, down, BY=by, BJ=bj)
