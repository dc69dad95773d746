"""Eager oracle of `sum_of_squares`; runs in any float dtype, float64 included."""

import torch
from torch import Tensor


def sum_of_squares(x: Tensor) -> Tensor:
    """Per-sample sum of squares [B] of x [B,C,H,W], in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(dim=(1, 2, 3))
