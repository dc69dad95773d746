"""What guidance looks through: latents -> images in [0,1] (not clamped), by a full VAE or a tiny autoencoder."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn


class Decoder(Protocol):
    """latents [B,C,h,w] -> images [B,3,H,W], 0..1 where the decoder keeps its range."""

    def __call__(self, latents: Tensor) -> Tensor:
        """Decode."""
        ...

    @property
    def module(self) -> nn.Module:
        """The network inside."""
        ...


class VaeDecoder:
    """The pipeline's own AutoencoderKL, or an AutoencoderTiny: both undo their scaling and give [-1,1]."""

    def __init__(self, vae: nn.Module, scaling_factor: float, shift_factor: float = 0.0) -> None:
        """vae: a module whose `decode(latents, return_dict=False)` gives a tuple with images in [-1,1]."""
        self._vae, self._scale, self._shift = vae, scaling_factor, shift_factor

    def __call__(self, latents: Tensor) -> Tensor:
        """latents [B,C,h,w] as the denoiser sees them -> images [B,3,H,W] around [0,1]."""
        decode: Callable[..., Any] = self._vae.decode  # type: ignore[assignment]
        image: Tensor = decode(latents / self._scale + self._shift, return_dict=False)[0]
        return image / 2 + 0.5

    @property
    def module(self) -> nn.Module:
        """The autoencoder."""
        return self._vae
