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
    """Clean latent x0 [B,C,H,W] from a denoiser's output at the noisy latent z = alpha x0 + sigma eps.

    Classifier-free guidance (arXiv 2207.12598, eq. 6, in the diffusers convention):
    out = uncond + guidance_scale (cond - uncond), whose standard deviation per sample is brought back by the share
    guidance_rescale towards that of cond (arXiv 2305.08891, eq. 15 and 16). Then, with alpha = sqrt(alphas_cumprod) and
    sigma = sqrt(1 - alphas_cumprod) as 0-d tensors:
    epsilon: x0 = (z - sigma out) / alpha (arXiv 2010.02502, eq. 9);
    v_prediction: x0 = alpha z - sigma out (arXiv 2202.00512, app. D); sample: x0 = out.
    Half-precision inputs are computed in float32 and returned in the dtype of z.
    Raises ValueError for an unknown prediction type.
    """
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
