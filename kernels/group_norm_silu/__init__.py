"""GroupNorm and SiLU in one pass over the statistics and one over the values, forward and backward."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from synthkd.kernels.dispatch import refuse_empty, runs_kernel
from synthkd.kernels.group_norm_silu.reference import add_group_norm_silu as add_reference
from synthkd.kernels.group_norm_silu.reference import group_norm_silu as reference
from synthkd.kernels.layout import dense, like

__all__ = ["add_group_norm_silu", "add_reference", "group_norm_silu", "reference"]


def group_norm_silu(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """silu(u) with u = (x - mean) / sqrt(var + eps) weight + bias and silu(u) = u / (1 + exp(-u)).

    mean and biased variance are those of a sample's group of C / num_groups channels (arXiv 1803.08494, eq. 1 to 4;
    1710.05941). x: [N,C,*], contiguous or channels_last (others are copied); weight, bias: [C], of any float dtype.
    Half precision is computed in float32. Returns the dtype and layout of x. Differentiable in x, weight and bias.
    torch.compile makes a graph per value of eps.

    Three launches, two reads and one write of x (one of each would do if a group stayed on the chip); backward three
    launches, four reads and one write.
    Raises ValueError for an empty tensor, for groups that do not divide C, and for weight or bias not [C].
    """
    _refuse("group_norm_silu", x, num_groups, weight, bias)
    if not runs_kernel(x, weight, bias):
        return reference(x, num_groups, weight, bias, eps)
    return _op(x, weight, bias, num_groups, float(eps))[0]


def add_group_norm_silu(
    x: Tensor, residual: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`group_norm_silu` of total = x + residual, and total, rounded to the dtype of x.

    residual: like x; another layout is brought to that of x first. Differentiable in x, residual, weight and bias.
    Three launches, three reads and two writes; backward three launches, five reads and one write, which the gradients
    of x and residual share.
    Raises ValueError as `group_norm_silu`, and for a residual of another shape.
    """
    _refuse("add_group_norm_silu", x, num_groups, weight, bias)
    if residual.shape != x.shape:
        found = f"residual is {tuple(residual.shape)}, x {tuple(x.shape)}"
        raise ValueError(f"add_group_norm_silu: {found}; expected the same shape")
    if residual.dtype != x.dtype or not runs_kernel(x, residual, weight, bias):
        return add_reference(x, residual, num_groups, weight, bias, eps)
    return _add_op(x, residual, weight, bias, num_groups, float(eps))[:2]


def _refuse(name: str, x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> None:
    refuse_empty(name, x)
    c = x.shape[1]
    if num_groups < 1 or c % num_groups:
        raise ValueError(f"{name}: {num_groups} groups; expected a divisor of the {c} channels")
    for label, value in (("weight", weight), ("bias", bias)):
        if tuple(value.shape) != (c,):
            raise ValueError(f"{name}: {label} is {tuple(value.shape)}; expected ({c},)")


def _statistics(x: Tensor, num_groups: int) -> Tensor:
    return x.new_empty((x.shape[0], num_groups), dtype=torch.float32)


@torch.library.custom_op("synthkd::group_norm_silu", mutates_args=())
def _op(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from synthkd.kernels.group_norm_silu import kernel

    out, _, mean, rstd = kernel.forward(dense(x), None, num_groups, weight.contiguous(), bias.contiguous(), eps)
    return out, mean, rstd


@_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(dense(x)), _statistics(x, num_groups), _statistics(x, num_groups)


@torch.library.custom_op("synthkd::group_norm_silu_backward", mutates_args=())
def _op_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from synthkd.kernels.group_norm_silu import kernel

    x = dense(x)
    return kernel.backward(like(grad, x), None, x, mean, rstd, weight.contiguous(), bias.contiguous())


def _sums(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1]), dtype=torch.float32)


@_op_backward.register_fake
def _(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(dense(x)), _sums(x), _sums(x)


@torch.library.custom_op("synthkd::add_group_norm_silu", mutates_args=())
def _add_op(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from synthkd.kernels.group_norm_silu import kernel

    x = dense(x)
    return kernel.forward(x, like(residual, x), num_groups, weight.contiguous(), bias.contiguous(), eps)


@_add_op.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = torch.empty_like(dense(x))
    return out, torch.empty_like(out), _statistics(x, num_groups), _statistics(x, num_groups)


@torch.library.custom_op("synthkd::add_group_norm_silu_backward", mutates_args=())
def _add_op_backward(
    grad: Tensor, grad_total: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from synthkd.kernels.group_norm_silu import kernel

    total = dense(total)
    g, more = like(grad, total), like(grad_total, total)
    return kernel.backward(g, more, total, mean, rstd, weight.contiguous(), bias.contiguous())


@_add_op_backward.register_fake
def _(
    grad: Tensor, grad_total: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(dense(total)), _sums(total), _sums(total)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, *_ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    x, mean, rstd, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _op_backward(grad, x, mean, rstd, weight, bias)
    _, for_weight, for_bias, *_ = ctx.needs_input_grad
    return dx, _pooled(dweight, weight, for_weight), _pooled(dbias, bias, for_bias), None, None


def _keep_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, bias, *_ = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(total, mean, rstd, weight, bias)


def _backward_add(ctx: Any, grad: Tensor, grad_total: Tensor, *_: Tensor) -> tuple[Any, ...]:
    total, mean, rstd, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = _add_op_backward(grad, grad_total, total, mean, rstd, weight, bias)
    _, _, for_weight, for_bias, *_ = ctx.needs_input_grad
    return dx, dx, _pooled(dweight, weight, for_weight), _pooled(dbias, bias, for_bias), None, None


def _pooled(per_sample: Tensor, pattern: Tensor, needed: bool) -> Tensor | None:
    return per_sample.sum(dim=0).to(pattern.dtype) if needed else None


_op.register_autograd(_backward, setup_context=_keep)
_add_op.register_autograd(_backward_add, setup_context=_keep_add)


@register_flop_formula(torch.ops.synthkd.group_norm_silu)
def _flops(x: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Twelve per value: four for moments, four to normalise, four for silu."""
    return int(torch.Size(x).numel()) * 12


@register_flop_formula(torch.ops.synthkd.add_group_norm_silu)
def _flops_add(x: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """One more than without the sum."""
    return int(torch.Size(x).numel()) * 13


@register_flop_formula(torch.ops.synthkd.group_norm_silu_backward)
def _flops_backward(grad: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Thirty per value: twice four for u and eight through silu, two sums of three, five to combine."""
    return int(torch.Size(grad).numel()) * 30


@register_flop_formula(torch.ops.synthkd.add_group_norm_silu_backward)
def _flops_add_backward(grad: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """One more than without the sum."""
    return int(torch.Size(grad).numel()) * 31
