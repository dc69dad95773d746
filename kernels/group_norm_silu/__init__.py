"""GroupNorm and SiLU in one pass over the statistics and one over the values, forward and backward."""

from synthkd.kernels.group_norm_silu.reference import add_group_norm_silu, group_norm_silu

__all__ = ["add_group_norm_silu", "group_norm_silu"]
