"""Classifier-free guidance and the clean-latent estimate, as one op."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from synthkd.kernels.dispatch import refuse_empty, runs_kernel, together
from synthkd.kernels.layout import dense, like
from synthkd.kernels.predict_x0.reference import PREDICTION_TYPES
from synthkd.kernels.predict_x0.reference import predict_x0 as reference

__all__ = ["predict_x0", "reference"]


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

    With out = uncond + guidance_scale (cond - uncond) (arXiv 2207.12598, eq. 6, in the diffusers convention), whose
    standard deviation per sample is brought back by the share guidance_rescale towards that of cond (arXiv
    2305.08891, eq. 15 and 16); alpha = sqrt(alphas_cumprod), sigma = sqrt(1 - alphas_cumprod), 0-d tensors:
    epsilon: x0 = (z - sigma out) / alpha (arXiv 2010.02502, eq. 9);
    v_prediction: x0 = alpha z - sigma out (arXiv 2202.00512, app. D); sample: x0 = out.

    z, out_cond, out_uncond: [B,C,H,W], contiguous or channels_last, of one dtype; half precision is computed in
    float32. Returns the dtype and layout of z. Differentiable in all three. One launch; guidance_rescale above 0
    needs standard deviations first and takes the reference, as do alpha and sigma that require a gradient.
    torch.compile makes a graph per value of guidance_scale.
    Raises ValueError for an unknown prediction type, for shapes that differ, and for an empty latent.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type {prediction_type!r}: expected one of {', '.join(PREDICTION_TYPES)}")
    for name, x in (("out_cond", out_cond), ("out_uncond", out_uncond)):
        if x is not None and x.shape != z.shape:
            raise ValueError(f"predict_x0: {name} is {tuple(x.shape)}, z {tuple(z.shape)}; expected the same shape")
    refuse_empty("predict_x0", z)
    trained = torch.is_grad_enabled() and (alpha.requires_grad or sigma.requires_grad)
    plain = trained or (out_uncond is not None and guidance_rescale) or not together(z, alpha, sigma)
    if plain or not runs_kernel(z, out_cond, out_uncond):
        return reference(z, out_cond, out_uncond, guidance_scale, alpha, sigma, prediction_type, guidance_rescale)
    return _op(z, out_cond, out_uncond, alpha, sigma, float(guidance_scale), prediction_type)


@torch.library.custom_op("synthkd::predict_x0", mutates_args=())
def _op(
    z: Tensor, cond: Tensor, uncond: Tensor | None, alpha: Tensor, sigma: Tensor, scale: float, kind: str
) -> Tensor:
    from synthkd.kernels.predict_x0 import kernel

    z = dense(z)
    other = None if uncond is None else like(uncond, z)
    return kernel.forward(z, like(cond, z), other, alpha, sigma, scale, kind)


@_op.register_fake
def _(z: Tensor, cond: Tensor, uncond: Tensor | None, alpha: Tensor, sigma: Tensor, scale: float, kind: str) -> Tensor:
    return torch.empty_like(dense(z))


@torch.library.custom_op("synthkd::predict_x0_backward", mutates_args=())
def _op_backward(
    grad: Tensor, alpha: Tensor, sigma: Tensor, scale: float, kind: str, cfg: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from synthkd.kernels.predict_x0 import kernel

    return kernel.backward(dense(grad), alpha, sigma, scale, kind, cfg)


@_op_backward.register_fake
def _(grad: Tensor, alpha: Tensor, sigma: Tensor, scale: float, kind: str, cfg: bool) -> tuple[Tensor, Tensor, Tensor]:
    g = dense(grad)
    return torch.empty_like(g), torch.empty_like(g), torch.empty_like(g) if cfg else g.new_empty(0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cond, uncond, alpha, sigma, ctx.scale, ctx.kind = inputs
    ctx.cond_dtype, ctx.cfg = cond.dtype, uncond is not None
    ctx.save_for_backward(alpha, sigma)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    alpha, sigma = ctx.saved_tensors
    dz, dcond, duncond = _op_backward(grad, alpha, sigma, ctx.scale, ctx.kind, ctx.cfg)
    to_uncond = duncond.to(ctx.cond_dtype) if ctx.cfg else None
    return dz, dcond.to(ctx.cond_dtype), to_uncond, None, None, None, None


_op.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.synthkd.predict_x0)
def _flops(z: Any, cond: Any, uncond: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Three per value (scale, subtract, divide), and three for guidance."""
    return int(torch.Size(z).numel()) * (6 if uncond is not None else 3)


@register_flop_formula(torch.ops.synthkd.predict_x0_backward)
def _flops_backward(grad: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two products per value, and two for guidance."""
    return int(torch.Size(grad).numel()) * 4
