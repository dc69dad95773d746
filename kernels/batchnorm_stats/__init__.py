"""Mergeable batch statistics of a BatchNorm layer's input."""

from synthkd.kernels.batchnorm_stats.reference import BatchNormStats, batchnorm_stats, merge_stats

__all__ = ["BatchNormStats", "batchnorm_stats", "merge_stats"]
