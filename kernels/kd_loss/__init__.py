"""Temperature-scaled distillation loss with its gradient, in one pass over the logits."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from synthkd.kernels.dispatch import refuse_empty, runs_kernel
from synthkd.kernels.kd_loss.reference import kd_loss as reference

__all__ = ["kd_loss", "reference"]


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Distillation loss, a scalar: T^2 KL(softmax(t/T) || softmax(s/T)), mean over the batch (arXiv 1503.02531).

    With p = softmax(t/T) and q = softmax(s/T): T^2 / B sum_bk p (log p - log q); its gradient in s is T (q - p) / B.
    student_logits s, teacher_logits t: [B,K] of any float dtype, rows contiguous or copied; temperature T > 0.
    Returns float32 (float64 for float64); half precision is computed in float32, the gradient has the dtype of s.
    torch.compile makes a graph per temperature.
    Differentiable once in s; teacher logits that require a gradient take the reference. One launch, and one for the
    backward pass, which scales the gradient that the forward pass left behind.
    Raises ValueError for shapes that differ or are not [B,K], for an empty batch and for a temperature <= 0.
    """
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        found = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"kd_loss: logits are {found}; expected [B,K] twice")
    if not temperature > 0:
        raise ValueError(f"kd_loss: temperature is {temperature}; expected a number above 0")
    refuse_empty("kd_loss", student_logits)
    grad_enabled = torch.is_grad_enabled()
    if not runs_kernel(student_logits, teacher_logits) or (grad_enabled and teacher_logits.requires_grad):
        return reference(student_logits, teacher_logits, temperature)
    want_grad = grad_enabled and student_logits.requires_grad
    losses, _ = _op(student_logits, teacher_logits, float(temperature), want_grad)
    return losses.mean()


@torch.library.custom_op("synthkd::kd_loss", mutates_args=())
def _op(s: Tensor, t: Tensor, temperature: float, want_grad: bool) -> tuple[Tensor, Tensor]:
    """Losses per row [B] in float32, and their gradients in s (empty unless wanted)."""
    from synthkd.kernels.kd_loss import kernel

    return kernel.forward(s.contiguous(), t.contiguous(), temperature, want_grad, _kept(s.dtype))


@_op.register_fake
def _(s: Tensor, t: Tensor, temperature: float, want_grad: bool) -> tuple[Tensor, Tensor]:
    losses = s.new_empty(s.shape[0], dtype=torch.float32)
    return losses, s.new_empty(s.shape if want_grad else 0, dtype=_kept(s.dtype))


def _kept(dtype: torch.dtype) -> torch.dtype:
    """What the gradient is kept in until the backward pass: float16 would lose small ones for good."""
    return torch.float32 if dtype == torch.float16 else dtype


@torch.library.custom_op("synthkd::kd_loss_backward", mutates_args=())
def _op_backward(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """grad [B,K] times upstream [B] in dtype; no derivative of its own, so a second backward pass is refused."""
    from synthkd.kernels.kd_loss import kernel

    return kernel.backward(grad.contiguous(), upstream.contiguous(), dtype)


@_op_backward.register_fake
def _(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.want_grad, ctx.dtype = inputs[3], inputs[0].dtype
    ctx.save_for_backward(output[1])


def _backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:
    if not ctx.want_grad:
        raise RuntimeError("synthkd::kd_loss was called without want_grad: it kept no gradient")
    (grad,) = ctx.saved_tensors
    return _op_backward(grad, upstream, ctx.dtype), None, None, None


_op.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.synthkd.kd_loss)
def _flops(s: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Per logit of each side: maximum, difference, scale, exponential, sum, quotient; and three for the loss."""
    return int(torch.Size(s).numel()) * 15


@register_flop_formula(torch.ops.synthkd.kd_loss_backward)
def _flops_backward(grad: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """One product per logit."""
    return int(torch.Size(grad).numel())
