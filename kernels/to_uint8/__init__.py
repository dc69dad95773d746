"""Images as bytes, as the writer wants them, in one pass."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from synthkd.kernels.dispatch import refuse_empty, runs_kernel
from synthkd.kernels.layout import dense
from synthkd.kernels.to_uint8.reference import to_uint8 as reference

__all__ = ["reference", "to_uint8"]

_INDEXED = 2**31 - 2**16  # values of one sample that 32-bit indices reach, with room for the last block


def to_uint8(images: Tensor) -> Tensor:
    """uint8 [B,C,H,W] in channels_last memory: 255 clamp(images, 0, 1), rounded half to even.

    images: [B,C,H,W] of any float dtype, contiguous or channels_last (else copied); half precision is widened to
    float32 before the product. Infinities are clamped; NaN becomes 0 where the kernel runs, and whatever the device's
    own conversion gives (0 on x86 and CUDA) in plain torch: finiteness is checked elsewhere. Not differentiable.
    Bit-equal with the reference on numbers. One launch.
    Raises ValueError for other than four dimensions and for an empty tensor.
    """
    if images.dim() != 4:
        raise ValueError(f"to_uint8: found {tuple(images.shape)}; expected [B,C,H,W]")
    refuse_empty("to_uint8", images)
    if not runs_kernel(images) or images.shape[1] * images.shape[2] * images.shape[3] > _INDEXED:
        return reference(images)
    return _op(images.detach())


@torch.library.custom_op("synthkd::to_uint8", mutates_args=())
def _op(images: Tensor) -> Tensor:
    from synthkd.kernels.to_uint8 import kernel

    return kernel.forward(dense(images))


@_op.register_fake
def _(images: Tensor) -> Tensor:
    return torch.empty(images.shape, dtype=torch.uint8, device=images.device, memory_format=torch.channels_last)


@register_flop_formula(torch.ops.synthkd.to_uint8)
def _flops(images: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two comparisons, a product and a rounding per value."""
    return int(torch.Size(images).numel()) * 4
