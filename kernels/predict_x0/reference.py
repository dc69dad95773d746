"""Eager oracle of `predict_x0`; runs in any float dtype, float64 included."""

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def rescaled(guided: Tensor, cond: Tensor, share: float) -> Tensor:
    """guided [B,C,H,W] with its per-sample standard deviation moved by `share` towards that of cond."""
    if share == 0.0:
        return guided
    dims = list(range(1, guided.dim()))
    ratio = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return share * (guided * ratio) + (1 - share) * guided


def predict_x0(
    z: Tensor,
    out_cond: Tensor,
    out_uncond: Tensor | None,
    guidance_scale: float,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: str = "epsilon",
    guidance_rescale: float = 0.0,
) -> Tensor:
    """The equations of `kernels.predict_x0`; half precision is computed in float32, the dtype of z comes back."""
    work = torch.promote_types(z.dtype, torch.float32)
    out = out_cond.to(work)
    if out_uncond is not None:
        base = out_uncond.to(work)
        out = rescaled(base + guidance_scale * (out - base), out, guidance_rescale)
    zw, a, s = z.to(work), alpha.to(work), sigma.to(work)
    if prediction_type == "epsilon":
        x0 = (zw - s * out) / a
    elif prediction_type == "v_prediction":
        x0 = a * zw - s * out
    elif prediction_type == "sample":
        x0 = out
    else:
        raise ValueError(f"prediction_type {prediction_type!r}: expected one of {', '.join(PREDICTION_TYPES)}")
    return x0.to(z.dtype)
