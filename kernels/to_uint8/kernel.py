"""Triton kernel of `to_uint8`: bytes are written in the order of memory, values gathered for them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from synthkd.kernels.launch import cdiv, launch
from synthkd.kernels.layout import is_channels_last

BLOCK = 1024


@triton.jit
def _forward(images, out, each, blocks, C: tl.constexpr, PLANAR: tl.constexpr, BLOCK: tl.constexpr):
    """each: values of one sample (PLANAR) or of all; blocks: programs for them."""
    sample = tl.program_id(0) // blocks
    to = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = to < each
    if PLANAR:
        at = to % C * (each // C) + to // C
    else:
        at = to
    start = sample.to(tl.int64) * each
    x = tl.load(images + start + at, mask=inside).to(tl.float32)
    y = tl.minimum(tl.where(x > 0.0, x, 0.0), 1.0) * 255.0  # the comparison sends NaN to 0
    bits = (y + 8388608.0).to(tl.int32, bitcast=True)  # at 2^23 float32 has steps of 1: the sum rounds half to even
    tl.store(out + start + to, (bits & 255).to(tl.uint8), mask=inside)


def forward(images: Tensor) -> Tensor:
    """uint8 in channels_last memory of images [B,C,H,W], contiguous or channels_last."""
    out = torch.empty(images.shape, dtype=torch.uint8, device=images.device, memory_format=torch.channels_last)
    b, c, h, w = images.shape
    planar = c > 1 and not is_channels_last(images)
    each = c * h * w  # a whole sample per group of programs in both layouts: 32-bit indices suffice inside
    blocks = cdiv(each, BLOCK)
    launch(
        _forward, (b * blocks,), images, out, each, blocks, C=c, PLANAR=planar, BLOCK=BLOCK, exact=True,
    )  # fmt: skip
    return out
