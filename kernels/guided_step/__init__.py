"""Guidance update, solver step and Latent CutMix gather, as one op."""

from synthkd.kernels.guided_step.reference import gather_source, guided_step, normalised_direction

__all__ = ["gather_source", "guided_step", "normalised_direction"]
