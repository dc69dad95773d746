"""Eager oracle of `guided_step`; runs in any float dtype, float64 included."""

import torch
from torch import Tensor


def gather_source(x: Tensor, src_map: Tensor) -> Tensor:
    """Latent CutMix as a gather: out[b, c, i, j] = x[src_map[b, i, j], c, i, j].

    x: [B,C,H,W] of any dtype; src_map: int64 [B,H,W] of sample positions in 0..B-1.
    """
    index = src_map.unsqueeze(1).expand(-1, x.shape[1], -1, -1)
    return torch.gather(x, 0, index)


def normalised_direction(grad: Tensor, sumsq: Tensor) -> Tensor:
    """grad scaled per sample to unit root-mean-square; exactly zero where the gradient is zero."""
    numel = grad[0].numel()
    least = numel * torch.finfo(sumsq.dtype).tiny  # below it the quotient would overflow; the shift shrinks to zero
    inverse = torch.where(sumsq > 0, (numel / sumsq.clamp_min(least)).sqrt(), 0.0)
    return grad.to(sumsq.dtype) * inverse.view(-1, 1, 1, 1)


def guided_step(
    z: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    alpha_next: Tensor,
    sigma_next: Tensor,
    *,
    grad: Tensor | None = None,
    sumsq: Tensor | None = None,
    step: Tensor | None = None,
    src_map: Tensor | None = None,
    rederive_eps: bool = False,
) -> Tensor:
    """One deterministic DDIM step (arXiv 2010.02502, eq. 12, eta = 0) from a shifted clean latent.

    x0' = x0 - step * grad / rms(grad) per sample; eps = (z - alpha x0) / sigma, from x0 (the shift is a
    correction of the clean latent alone, as in MPGD, arXiv 2311.16424) or, with rederive_eps, from x0';
    z_next = alpha_next x0' + sigma_next eps, gathered through src_map.

    z, x0, grad: [B,C,H,W]; sumsq: [B], the per-sample sum of squares of grad in at least float32; step and the
    four coefficients: 0-d tensors on z's device; src_map: int64 [B,H,W] or None. Returns [B,C,H,W], dtype of z.
    """
    work = torch.promote_types(z.dtype, torch.float32)
    zw, clean = z.to(work), x0.to(work)
    a, s, a_next, s_next = (c.to(work) for c in (alpha, sigma, alpha_next, sigma_next))
    shifted = clean
    if grad is not None and sumsq is not None and step is not None:
        shifted = clean - step.to(work) * normalised_direction(grad, sumsq).to(work)
    eps = (zw - a * (shifted if rederive_eps else clean)) / s
    out = (a_next * shifted + s_next * eps).to(z.dtype)
    return out if src_map is None else gather_source(out, src_map)
