"""Mergeable batch statistics of a BatchNorm layer's input."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from synthkd.kernels.batchnorm_stats.reference import BatchNormStats, merge_stats
from synthkd.kernels.batchnorm_stats.reference import batchnorm_stats as reference
from synthkd.kernels.dispatch import refuse_empty, runs_kernel
from synthkd.kernels.layout import dense

__all__ = ["BatchNormStats", "batchnorm_stats", "merge_stats", "reference"]


def batchnorm_stats(x: Tensor, shift: Tensor | None = None) -> BatchNormStats:
    """Per-channel count, mean and M2 = sum (x - mean)^2 of x [N,C,*] over every axis but the channel.

    Partial moments of x - shift, merged (Chan, Golub and LeVeque 1979, eq. 2.1) in a fixed order. shift: [C], values
    near the channels' means, such as a BatchNorm layer's running mean, so that nothing cancels where the mean is far
    larger than the deviation; the result does not depend on it beyond rounding, and no gradient flows to it. The
    reference passes over x twice, needs no shift and ignores it: on a CPU its bits are the same with and without.

    x: contiguous or channels_last (others are copied); half precision sums in float32. Returns float32 (float64 for
    float64). Differentiable in x. Two launches and one read of x; backward one launch, one read and one write.
    Raises ValueError for an empty tensor and for a shift that is not [C].
    """
    refuse_empty("batchnorm_stats", x)
    if shift is not None and tuple(shift.shape) != (x.shape[1],):
        raise ValueError(f"batchnorm_stats: shift is {tuple(shift.shape)}; expected ({x.shape[1]},)")
    if not runs_kernel(x):
        return reference(x, shift)
    mean, m2 = _op(x, None if shift is None else shift.detach())
    return BatchNormStats(x.numel() // x.shape[1], mean, m2)


@torch.library.custom_op("synthkd::batchnorm_stats", mutates_args=())
def _op(x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    from synthkd.kernels.batchnorm_stats import kernel

    return kernel.forward(dense(x), None if shift is None else shift.contiguous())


@_op.register_fake
def _(x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    c = x.shape[1]
    return x.new_empty((c,), dtype=torch.float32), x.new_empty((c,), dtype=torch.float32)


@torch.library.custom_op("synthkd::batchnorm_stats_backward", mutates_args=())
def _op_backward(x: Tensor, mean: Tensor, grad_mean: Tensor, grad_m2: Tensor) -> Tensor:
    from synthkd.kernels.batchnorm_stats import kernel

    return kernel.backward(dense(x), mean, grad_mean.contiguous(), grad_m2.contiguous())


@_op_backward.register_fake
def _(x: Tensor, mean: Tensor, grad_mean: Tensor, grad_m2: Tensor) -> Tensor:
    return torch.empty_like(dense(x))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0])


def _backward(ctx: Any, grad_mean: Tensor, grad_m2: Tensor) -> tuple[Tensor, None]:
    x, mean = ctx.saved_tensors
    return _op_backward(x, mean, grad_mean, grad_m2), None


_op.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.synthkd.batchnorm_stats)
def _flops(x: Any, shift: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Four per value (subtract, add, multiply-add), and one for the shift."""
    return int(torch.Size(x).numel()) * (5 if shift is not None else 4)


@register_flop_formula(torch.ops.synthkd.batchnorm_stats_backward)
def _flops_backward(x: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Three per value: subtract, multiply-add."""
    return int(torch.Size(x).numel()) * 3
