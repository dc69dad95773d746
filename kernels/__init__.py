"""Ops of the guided denoising loop and the student loop: tensors in, tensors out; torch and triton only."""

from synthkd.kernels.batchnorm_stats import BatchNormStats, batchnorm_stats, merge_stats
from synthkd.kernels.dispatch import implementation
from synthkd.kernels.group_norm_silu import add_group_norm_silu, group_norm_silu
from synthkd.kernels.guided_step import guided_step
from synthkd.kernels.kd_loss import kd_loss
from synthkd.kernels.predict_x0 import predict_x0
from synthkd.kernels.sum_of_squares import sum_of_squares
from synthkd.kernels.to_uint8 import to_uint8
from synthkd.kernels.upsample2x_conv3x3 import fold_upsample_weight, upsample2x_conv3x3

__all__ = [
    "BatchNormStats",
    "add_group_norm_silu",
    "batchnorm_stats",
    "fold_upsample_weight",
    "group_norm_silu",
    "guided_step",
    "implementation",
    "kd_loss",
    "merge_stats",
    "predict_x0",
    "sum_of_squares",
    "to_uint8",
    "upsample2x_conv3x3",
]
