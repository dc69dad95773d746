"""Triton kernel of `guided_step`: shift, solver update and source gather in one pass out of place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from synthkd.kernels.launch import cdiv, launch, next_power_of_2
from synthkd.kernels.layout import Rows, rows

TILE = 1024
WIDE_FROM = 2**31  # elements from which offsets take 64 bits; below, half the registers do
TINY = torch.finfo(torch.float32).tiny


# views into tables: their alignment changes from call to call, which must not compile anew
_VIEWS = ["alpha", "sigma", "to_x0", "to_eps", "to_noise", "to_history", "step"]


@triton.jit(do_not_specialize_on_alignment=_VIEWS)
def _guided_step(
    z, x0, noise, before, grad, sumsq, step, src_map, alpha, sigma, to_x0, to_eps, to_noise, to_history, out, kept,
    channels, positions, stride_n, stride_c, stride_s, least,
    NOISE: tl.constexpr, BEFORE: tl.constexpr, GRAD: tl.constexpr, STEPS: tl.constexpr, MAP: tl.constexpr,
    REDERIVE: tl.constexpr, KEEP: tl.constexpr, CHUNKS: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(positions, BS)
    sample = (tl.program_id(0) // blocks).to(INDEX)
    p = (tl.program_id(0) % blocks) * BS + tl.arange(0, BS)
    there = p < positions
    source = tl.full([BS], 0, INDEX) + sample
    if MAP:
        source = tl.load(src_map + sample * positions + p, mask=there, other=0).to(INDEX)
    a, s = tl.load(alpha).to(tl.float32), tl.load(sigma).to(tl.float32)
    by_x0, by_eps = tl.load(to_x0).to(tl.float32), tl.load(to_eps).to(tl.float32)
    if GRAD:
        # step / rms(grad) of the source sample; zero where the gradient is
        total = tl.load(sumsq + source, mask=there, other=0.0).to(tl.float32)
        size = tl.load(step + source, mask=there, other=0.0) if STEPS else tl.load(step)
        # at least: below it the quotient would overflow; the shift shrinks to zero
        length = tl.sqrt(channels * positions / tl.maximum(total, least))
        shift = tl.where(total > 0.0, size.to(tl.float32) * length, 0.0)
    for chunk in range(CHUNKS):
        c = chunk * BC + tl.arange(0, BC)
        inside = (c < channels)[:, None] & there[None, :]
        place = c.to(INDEX)[:, None] * stride_c + p.to(INDEX)[None, :] * stride_s
        at = source[None, :] * stride_n + place
        clean = tl.load(x0 + at, mask=inside).to(tl.float32)
        moved = clean
        if GRAD:
            moved = clean - shift[None, :] * tl.load(grad + at, mask=inside).to(tl.float32)
        eps = (tl.load(z + at, mask=inside).to(tl.float32) - a * (moved if REDERIVE else clean)) / s
        z_next = by_x0 * moved + by_eps * eps
        if BEFORE:
            past = tl.load(before + at, mask=inside).to(tl.float32)
            z_next += tl.load(to_history).to(tl.float32) * (moved - past)
        if NOISE:
            z_next += tl.load(to_noise).to(tl.float32) * tl.load(noise + at, mask=inside).to(tl.float32)
        here = sample * stride_n + place
        tl.store(out + here, z_next, mask=inside)
        if KEEP:
            tl.store(kept + here, moved, mask=inside)


def guided_step(
    z: Tensor,
    x0: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor, Tensor],
    noise: tuple[Tensor, Tensor] | None,
    history: tuple[Tensor, Tensor] | None,
    shift: tuple[Tensor, Tensor, Tensor] | None,
    src_map: Tensor | None,
    rederive_eps: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """z_next and x0' (empty unless kept), in the layout and dtype of z; all latents have the layout of z.

    coefficients: alpha, sigma, to_x0, to_eps; noise: values and their factor; history: the clean latent before and
    its factor; shift: gradient, its sum of squares [B], step [] or [B]; src_map: contiguous [B,H,W] of integers.
    """
    view = rows(z)
    out = torch.empty_like(z)
    kept = torch.empty_like(z) if keep else z.new_empty(0)
    bc = min(next_power_of_2(view.c), 16)
    bs = min(TILE // bc, next_power_of_2(view.s))
    grad, sumsq, step = shift or (z, z, z)  # never read where there is none
    alpha, sigma, to_x0, to_eps = coefficients
    launch(
        _guided_step, (view.n * cdiv(view.s, bs),),
        z, x0, noise[0] if noise else z, history[0] if history else z, grad, sumsq, step,
        z if src_map is None else src_map, alpha, sigma, to_x0, to_eps,
        noise[1] if noise else alpha, history[1] if history else alpha, out, kept,
        *_sizes(view), NOISE=noise is not None, BEFORE=history is not None, GRAD=shift is not None,
        STEPS=shift is not None and step.dim() > 0, MAP=src_map is not None, REDERIVE=rederive_eps, KEEP=keep,
        CHUNKS=cdiv(view.c, bc), BC=bc, BS=bs, INDEX=tl.int32 if z.numel() < WIDE_FROM else tl.int64,
    )  # fmt: skip
    return out, kept


def _sizes(view: Rows) -> tuple[int, int, int, int, int, float]:
    return view.c, view.s, view.stride_n, view.stride_c, view.stride_s, view.c * view.s * TINY
