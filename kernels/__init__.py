"""Ops of the guided denoising loop: tensors in, tensors out; torch only, no config objects."""

from synthkd.kernels.batchnorm_stats import BatchNormStats, batchnorm_stats, merge_stats
from synthkd.kernels.guided_step import guided_step
from synthkd.kernels.predict_x0 import predict_x0

__all__ = ["BatchNormStats", "batchnorm_stats", "guided_step", "merge_stats", "predict_x0"]
