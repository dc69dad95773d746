"""Eager oracle of `upsample2x_conv3x3`, and its fold and interleave in plain torch; in any float dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from synthkd.kernels.layout import is_channels_last


def upsample2x_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Every position of x [N,Ci,H,W] twice in both directions, then a 3x3 convolution with zeros around it.

    weight: [Co,Ci,3,3], not folded; bias: [Co]. Returns [N,Co,2H,2W].
    """
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def fold_upsample_weight(weight: Tensor) -> Tensor:
    """Weight [4Co,Ci,2,2] of the 2x2 convolution that does the work of weight [Co,Ci,3,3] behind a doubling.

    Output row 2i + p sees input rows i - 1 + p and i + p only, so rows w0, w1, w2 fold to (w0, w1 + w2) for p = 0 and
    to (w0 + w1, w2) for p = 1; columns likewise for q. Phase (p, q) is in channels (2p + q) Co and up. Sums are taken
    in float32 at least; returns the dtype of weight. Differentiable.
    Raises ValueError where the kernel is not 3x3.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"fold_upsample_weight: weight is {tuple(weight.shape)}; expected [Co,Ci,3,3]")
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    phases = [_folded(_folded(wide, 2, p), 3, q) for p in (0, 1) for q in (0, 1)]
    return torch.cat(phases).to(weight.dtype)


def _folded(w: Tensor, dim: int, phase: int) -> Tensor:
    """Three taps to two along one axis."""
    w0, w1, w2 = w.unbind(dim)
    return torch.stack([w0 + w1, w2] if phase else [w0, w1 + w2], dim)


def interleave2x(t: Tensor, bias: Tensor | None = None) -> Tensor:
    """out[n,co,2i+p,2j+q] = t[n,(2p+q)Co+co,i+p,j+q] + bias[co]; t: [N,4Co,H+1,W+1], returns [N,Co,2H,2W] like t."""
    h, w = t.shape[2] - 1, t.shape[3] - 1
    phases = t.chunk(4, dim=1)
    lines = [
        torch.stack([phases[2 * p + q][:, :, p : p + h, q : q + w] for q in (0, 1)], dim=-1).flatten(-2) for p in (0, 1)
    ]
    out = torch.stack(lines, dim=3).flatten(2, 3)
    if bias is not None:
        out = (out + bias.view(-1, 1, 1)).to(t.dtype)
    return out.contiguous(memory_format=torch.channels_last) if is_channels_last(t) else out
