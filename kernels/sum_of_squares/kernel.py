"""Triton kernels of `sum_of_squares`: a sample's values in chunks, then the chunks of each sample in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from synthkd.kernels.launch import cdiv, launch

BLOCK, STEPS = 2048, 4
CHUNK = BLOCK * STEPS
PARTS = 256


@triton.jit
def _partial(x, out, n, parts, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    sample, first = program // parts, (program % parts) * (BLOCK * STEPS)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(STEPS):
        at = first + k * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + sample * n + at, mask=at < n, other=0.0).to(tl.float32)
        total += value * value
    tl.store(out + program, tl.sum(total))


@triton.jit
def _finish(partial, out, parts, PARTS: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    total = tl.zeros([PARTS], tl.float32)
    first = 0
    while first < parts:
        at = first + tl.arange(0, PARTS)
        total += tl.load(partial + sample * parts + at, mask=at < parts, other=0.0)
        first += PARTS
    tl.store(out + sample, tl.sum(total))


def sum_of_squares(x: Tensor) -> Tensor:
    """float32 [B] of x [B,...], each sample contiguous in memory; one launch up to CHUNK values a sample, else two."""
    samples = x.shape[0]
    n = x.numel() // samples
    parts = cdiv(n, CHUNK)
    partial = torch.empty(samples * parts, dtype=torch.float32, device=x.device)
    launch(_partial, (samples * parts,), x, partial, n, parts, BLOCK=BLOCK, STEPS=STEPS)
    if parts == 1:
        return partial
    out = torch.empty(samples, dtype=torch.float32, device=x.device)
    launch(_finish, (samples,), partial, out, parts, PARTS=PARTS, num_warps=1)
    return out
