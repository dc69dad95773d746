"""Latents -> images in [0,1] (not clamped), by a full VAE or a tiny autoencoder; and how a borrowed network is run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthkd.engine.errors import SynthkdError
from synthkd.engine.settings import settings_of


class Decoder(Protocol):
    """latents [B,C,h,w] -> images [B,3,H,W], 0..1 where the decoder keeps its range."""

    def __call__(self, latents: Tensor) -> Tensor:
        """Decode."""
        ...

    @property
    def module(self) -> nn.Module:
        """The network inside."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """What beside the network's tensors decides its images, as plain values."""
        ...


class VaeDecoder:
    """The pipeline's own AutoencoderKL, or an AutoencoderTiny: both undo their scaling and give [-1,1]; both ways."""

    def __init__(
        self,
        vae: nn.Module,
        scaling_factor: float,
        shift_factor: float = 0.0,
        moments: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        """vae: a module whose `decode(latents, return_dict=False)` gives a tuple with images in [-1,1].

        moments: mean and standard deviation of each latent channel, for a denoiser of standardised latents.
        """
        self._vae, self._scale, self._shift = vae, scaling_factor, shift_factor
        self._moments: tuple[Tensor, Tensor] | None = None
        if moments is not None:
            device = next(vae.parameters()).device
            mean, std = (torch.tensor(list(m), device=device).view(1, -1, 1, 1) for m in moments)
            self._moments = mean, std

    def __call__(self, latents: Tensor) -> Tensor:
        """latents [B,C,h,w] as the denoiser sees them -> images [B,3,H,W] around [0,1], in the autoencoder's dtype."""
        latents = latents.to(next((p.dtype for p in self._vae.parameters()), latents.dtype))
        if self._moments is not None:
            mean, std = (m.to(latents) for m in self._moments)
            latents = latents * std / self._scale + mean
        else:
            latents = latents / self._scale + self._shift
        decode: Callable[..., Any] = self._vae.decode  # type: ignore[assignment]
        with evaluating(self._vae):
            image: Tensor = decode(latents, return_dict=False)[0]
        return image / 2 + 0.5

    def encode(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in [0,1] -> latents [B,C,h,w] as the denoiser sees them, the mode where a VAE has several.

        Raises SynthkdError for an autoencoder that came without its encoder.
        """
        if getattr(self._vae, "encoder", None) is None:
            raise SynthkdError("model: its vae has no encoder, so a group cannot start from images")
        like = next((p for p in self._vae.parameters()), images)
        encode: Callable[..., Any] = self._vae.encode  # type: ignore[assignment]
        with evaluating(self._vae):
            found = encode(2 * images.to(like.device, like.dtype) - 1, return_dict=False)[0]
        latents: Tensor = found.mode() if hasattr(found, "mode") else found
        if self._moments is not None:
            mean, std = (m.to(latents) for m in self._moments)
            return (latents - mean) * self._scale / std
        return (latents - self._shift) * self._scale

    @property
    def module(self) -> nn.Module:
        """The autoencoder."""
        return self._vae

    @property
    def settings(self) -> dict[str, Any]:
        """Its config, and how latents are scaled before it."""
        moments = [m.flatten().tolist() for m in self._moments] if self._moments is not None else None
        return {**settings_of(self._vae), "scale": self._scale, "shift": self._shift, "moments": moments}


class PooledDecoder:
    """Another decoder on the latent averaged over factor x factor cells: a picture factor times smaller a side."""

    def __init__(self, inner: Decoder, factor: int) -> None:
        """factor: 2 or more; where it does not divide the latent, the last cells are smaller."""
        self._inner, self._factor = inner, factor

    def __call__(self, latents: Tensor) -> Tensor:
        """latents [B,C,h,w] -> images [B,3,H,W] of the inner decoder on [B,C,ceil(h/factor),ceil(w/factor)]."""
        return self._inner(F.avg_pool2d(latents, self._factor, ceil_mode=True, count_include_pad=False))

    @property
    def module(self) -> nn.Module:
        """The inner decoder's network."""
        return self._inner.module

    @property
    def settings(self) -> dict[str, Any]:
        """The inner decoder's, and the factor."""
        return {**self._inner.settings, "pooled": self._factor}


def latent_layout(vae: Any) -> tuple[int, int]:
    """Latent channels, and pixels per latent position, of an AutoencoderKL or AutoencoderTiny."""
    config = vae.config
    step = getattr(config, "upsampling_scaling_factor", 2)
    return int(config.latent_channels), int(step ** (len(config.block_out_channels) - 1))


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """A network that was left in training mode neither drops labels nor activations inside; restored on leaving."""
    switched = [m for m in network.modules() if m.training] if network.training else []
    for module in switched:
        module.training = False
    try:
        yield
    finally:
        for module in switched:
            module.training = True


@contextmanager
def unmarked(network: nn.Module) -> Iterator[None]:
    """Forward hooks and attributes that a call leaves behind are taken off again on leaving.

    transformers installs hooks for good at the first call that asks for hidden states.
    """
    before = [(m, set(m._forward_hooks), set(vars(m))) for m in network.modules()]
    try:
        yield
    finally:
        for module, hooks, names in before:
            for key in set(module._forward_hooks) - hooks:
                del module._forward_hooks[key]
            for name in set(vars(module)) - names:
                delattr(module, name)
