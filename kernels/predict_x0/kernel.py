"""Triton kernels of `predict_x0`: one pass over the latent, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from synthkd.kernels.launch import cdiv, launch

BLOCK = 1024
KINDS = {"epsilon": 0, "v_prediction": 1, "sample": 2}


# views into tables: their alignment changes from call to call, which must not compile anew
_VIEWS = ["alpha", "sigma"]


@triton.jit(do_not_specialize_on_alignment=_VIEWS)
def _forward(z, cond, uncond, alpha, sigma, out, scale, n, KIND: tl.constexpr, CFG: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    eps = tl.load(cond + at, mask=inside).to(tl.float32)
    if CFG:
        base = tl.load(uncond + at, mask=inside).to(tl.float32)
        eps = base + scale * (eps - base)
    if KIND == 2:
        x0 = eps
    else:
        a, s = tl.load(alpha).to(tl.float32), tl.load(sigma).to(tl.float32)
        zt = tl.load(z + at, mask=inside).to(tl.float32)
        if KIND == 0:
            x0 = (zt - s * eps) / a
        else:
            x0 = a * zt - s * eps
    tl.store(out + at, x0, mask=inside)


@triton.jit(do_not_specialize_on_alignment=_VIEWS)
def _backward(
    grad, alpha, sigma, to_z, to_cond, to_uncond, scale, n,
    KIND: tl.constexpr, CFG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(grad + at, mask=inside).to(tl.float32)
    a, s = tl.load(alpha).to(tl.float32), tl.load(sigma).to(tl.float32)
    if KIND == 0:
        dz, deps = g / a, -s / a * g
    elif KIND == 1:
        dz, deps = a * g, -s * g
    else:
        dz, deps = 0.0 * g, g
    tl.store(to_z + at, dz, mask=inside)
    if CFG:
        tl.store(to_cond + at, scale * deps, mask=inside)
        tl.store(to_uncond + at, (1.0 - scale) * deps, mask=inside)
    else:
        tl.store(to_cond + at, deps, mask=inside)


def forward(
    z: Tensor, cond: Tensor, uncond: Tensor | None, alpha: Tensor, sigma: Tensor, scale: float, kind: str
) -> Tensor:
    """x0 in the layout and dtype of z; all tensors [B,C,H,W] of one layout."""
    out = torch.empty_like(z)
    second = cond if uncond is None else uncond
    launch(
        _forward, (cdiv(z.numel(), BLOCK),), z, cond, second, alpha, sigma, out, scale, z.numel(),
        KIND=KINDS[kind], CFG=uncond is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor, alpha: Tensor, sigma: Tensor, scale: float, kind: str, cfg: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of z, cond and uncond (empty without cfg), all like grad."""
    to_z, to_cond = torch.empty_like(grad), torch.empty_like(grad)
    to_uncond = torch.empty_like(grad) if cfg else grad.new_empty(0)
    launch(
        _backward, (cdiv(grad.numel(), BLOCK),), grad, alpha, sigma, to_z, to_cond, to_uncond, scale, grad.numel(),
        KIND=KINDS[kind], CFG=cfg, BLOCK=BLOCK,
    )  # fmt: skip
    return to_z, to_cond, to_uncond
