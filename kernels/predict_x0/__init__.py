"""Classifier-free guidance and the clean-latent estimate, as one op."""

from synthkd.kernels.predict_x0.reference import predict_x0

__all__ = ["predict_x0"]
