"""Eager oracle of `guided_step`; runs in any float dtype, float64 included."""

import torch
from torch import Tensor


def gather_source(x: Tensor, src_map: Tensor) -> Tensor:
    """Latent CutMix as a gather: out[b, c, i, j] = x[src_map[b, i, j], c, i, j].

    x: [B,C,H,W] of any dtype; src_map: integers [B,H,W] of sample positions in 0..B-1.
    """
    index = src_map.long().unsqueeze(1).expand(-1, x.shape[1], -1, -1)
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
    to_x0: Tensor,
    to_eps: Tensor,
    *,
    noise: Tensor | None = None,
    to_noise: Tensor | None = None,
    before: Tensor | None = None,
    to_history: Tensor | None = None,
    grad: Tensor | None = None,
    sumsq: Tensor | None = None,
    step: Tensor | None = None,
    src_map: Tensor | None = None,
    rederive_eps: bool = False,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The equations of `kernels.guided_step`, term by term; half precision is computed in float32."""
    work = torch.promote_types(z.dtype, torch.float32)
    clean = x0.to(work)
    shifted = clean
    if grad is not None and sumsq is not None and step is not None:
        shifted = clean - step.to(work).view(-1, 1, 1, 1) * normalised_direction(grad, sumsq).to(work)
    eps = (z.to(work) - alpha.to(work) * (shifted if rederive_eps else clean)) / sigma.to(work)
    out = to_x0.to(work) * shifted + to_eps.to(work) * eps
    if before is not None and to_history is not None:
        out = out + to_history.to(work) * (shifted - before.to(work))
    if noise is not None and to_noise is not None:
        out = out + to_noise.to(work) * noise.to(work)
    kept = shifted.to(z.dtype) if keep else None
    return _gathered(out.to(z.dtype), src_map), None if kept is None else _gathered(kept, src_map)


def _gathered(x: Tensor, src_map: Tensor | None) -> Tensor:
    return x if src_map is None else gather_source(x, src_map)
