"""Eager oracle of `group_norm_silu`; runs in any float dtype, float64 included."""

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """silu(u) with u = (x - mean) / sqrt(var + eps) weight + bias and silu(u) = u / (1 + exp(-u)).

    mean and biased variance are those of a sample's group of C / num_groups channels (arXiv 1803.08494, eq. 1 to 4;
    1710.05941). x: [N,C,*]; weight, bias: [C]. Half precision is computed in float32; returns the dtype of x.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    return F.silu(F.group_norm(x.to(work), num_groups, weight.to(work), bias.to(work), eps)).to(x.dtype)


def add_group_norm_silu(
    x: Tensor, residual: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`group_norm_silu` of x + residual, and that sum, rounded to the dtype of x."""
    total = (x + residual).to(x.dtype)
    return group_norm_silu(total, num_groups, weight, bias, eps), total
