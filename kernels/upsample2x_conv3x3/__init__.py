"""A nearest doubling and the 3x3 convolution behind it, as one folded convolution and an interleave."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from synthkd.kernels.dispatch import refuse_empty, runs_kernel
from synthkd.kernels.layout import dense, is_channels_last
from synthkd.kernels.upsample2x_conv3x3.reference import fold_upsample_weight, interleave2x
from synthkd.kernels.upsample2x_conv3x3.reference import upsample2x_conv3x3 as reference

__all__ = ["fold_upsample_weight", "reference", "upsample2x_conv3x3"]


def upsample2x_conv3x3(x: Tensor, folded: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution (stride 1, padding 1) of x [N,Ci,H,W] doubled by nearest neighbour: [N,Co,2H,2W].

    folded: [4Co,Ci,2,2], `fold_upsample_weight` of the 3x3 weight; bias: [Co] or None. Sixteen products per input
    position and pair of channels instead of 36, and no doubled input in memory: a doubling followed by a convolution
    is a sub-pixel convolution (arXiv 1609.05158, 1609.07009). x: contiguous or channels_last; the result has the
    layout that the convolution (aten, with its own gradients) gives. Differentiable in all three.
    Raises ValueError for shapes that do not fit and for an empty x.
    """
    if folded.dim() != 4 or folded.shape[0] % 4 or folded.shape[2:] != (2, 2):
        raise ValueError(f"upsample2x_conv3x3: folded is {tuple(folded.shape)}; expected [4Co,Ci,2,2]")
    if x.dim() != 4 or x.shape[1] != folded.shape[1]:
        raise ValueError(f"upsample2x_conv3x3: x is {tuple(x.shape)}; expected [N,{folded.shape[1]},H,W]")
    if bias is not None and bias.shape != (folded.shape[0] // 4,):
        raise ValueError(f"upsample2x_conv3x3: bias is {tuple(bias.shape)}; expected [{folded.shape[0] // 4}]")
    refuse_empty("upsample2x_conv3x3", x)
    t = F.conv2d(x, folded, padding=1)
    return _op(t, bias) if runs_kernel(t, bias) else interleave2x(t, bias)


def _empty(like: Tensor, shape: tuple[Any, ...], channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _interleaved(t: Tensor) -> Tensor:
    """Room for the result of `interleave2x`, in the layout of t."""
    n, c, h, w = t.shape
    return _empty(t, (n, c // 4, 2 * h - 2, 2 * w - 2), is_channels_last(t))


def _deinterleaved(grad: Tensor) -> Tensor:
    """Room for the result of `deinterleave2x`, in the layout of grad."""
    n, c, h, w = grad.shape
    return _empty(grad, (n, 4 * c, h // 2 + 1, w // 2 + 1), is_channels_last(grad))


@torch.library.custom_op("synthkd::interleave2x", mutates_args=())
def _op(t: Tensor, bias: Tensor | None) -> Tensor:
    from synthkd.kernels.upsample2x_conv3x3 import kernel

    out = _interleaved(t)
    kernel.interleave(dense(t), None if bias is None else bias.contiguous(), out)
    return out


@_op.register_fake
def _(t: Tensor, bias: Tensor | None) -> Tensor:
    return _interleaved(t)


@torch.library.custom_op("synthkd::deinterleave2x", mutates_args=())
def _op_backward(grad: Tensor) -> Tensor:
    from synthkd.kernels.upsample2x_conv3x3 import kernel

    out = _deinterleaved(grad)
    kernel.deinterleave(dense(grad), out)
    return out


@_op_backward.register_fake
def _(grad: Tensor) -> Tensor:
    return _deinterleaved(grad)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    bias = inputs[1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    to_t = _op_backward(grad) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return to_t, None
    return to_t, grad.sum(dim=(0, 2, 3), dtype=torch.float32).to(ctx.bias_dtype)


def _twice(ctx: Any, grad: Tensor) -> Tensor:
    return _op(grad, None)


_op.register_autograd(_backward, setup_context=_keep)
_op_backward.register_autograd(_twice)


@register_flop_formula(torch.ops.synthkd.interleave2x)
def _flops(t: Any, bias: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """One addition per result value where there is a bias; the convolution is counted by itself."""
    n, c, h, w = t
    return n * c * (h - 1) * (w - 1) if bias is not None else 0


@register_flop_formula(torch.ops.synthkd.deinterleave2x)
def _flops_backward(grad: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """One selection per value."""
    return int(torch.Size(grad).numel())
