"""Eager oracle of `to_uint8`."""

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """images [B,C,H,W] float, 0..1 -> uint8, clamped and rounded half to even, channels_last memory."""
    scaled = images.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return scaled.contiguous(memory_format=torch.channels_last)
