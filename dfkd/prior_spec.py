"""How a prior of our own is trained: sizes and steps, in two sizes by name."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from synthkd.dfkd.fields import ABOVE_ZERO, AMOUNT, SHARE, YES_NO, Kind, check_fields, is_whole, whole
from synthkd.engine.errors import SynthkdError, suggest

_WIDTHS = Kind(
    lambda v: isinstance(v, (list, tuple)) and bool(v) and all(is_whole(w, 16) and w % 16 == 0 for w in v),
    "a list of multiples of 16",
)
# What each field takes, and what it is, for `--help`.
_FIELDS: Mapping[str, tuple[Kind, str]] = {
    "vae_widths": (_WIDTHS, "channels of the autoencoder from full size down, each stage half as large"),
    "latent_channels": (whole(1), "channels of a latent"),
    "unet_widths": (_WIDTHS, "channels of the denoiser, likewise, with attention in the last stage"),
    "layers": (whole(1), "residual blocks of a stage of the denoiser"),
    "text_width": (Kind(lambda v: is_whole(v, 16) and v % 16 == 0, "a multiple of 16"), "of the text encoder"),
    "vae_steps": (whole(1), "training steps of the autoencoder"),
    "vae_batch_size": (whole(2), "its images a step"),
    "vae_learning_rate": (ABOVE_ZERO, "its highest learning rate"),
    "latent_noise": (AMOUNT, "deviation of the noise on latents while the autoencoder learns"),
    "steps": (whole(1), "training steps of denoiser and text encoder"),
    "batch_size": (whole(2), "their images a step"),
    "learning_rate": (ABOVE_ZERO, "the denoiser's highest learning rate"),
    "warmup_steps": (whole(0), "steps of a linear rise, before half a cosine"),
    "ema": (SHARE, "decay of the averaged weights, which are what is kept"),
    "dropout": (SHARE, "share of captions that are left out, for classifier-free guidance"),
    "flip": (YES_NO, "mirror half of the images"),
    "held_out": (whole(2), "images that are not trained on and tell how it goes"),
    "seed": (Kind(lambda v: is_whole(v, 0, 2**63), "0 <= seed < 2**63"), "of weights, batches and noise: see --seed"),
}
_KINDS = {name: kind for name, (kind, _) in _FIELDS.items()}


@dataclass(frozen=True, kw_only=True)
class PriorSpec:
    """Networks (see `engine.new_prior.PriorShape`), and the training of autoencoder and denoiser, one after the other.

    Each field is told in `_FIELDS`, and by `synthkd fit-prior --help`.
    """

    vae_widths: tuple[int, ...] = (32, 64)
    latent_channels: int = 4
    unet_widths: tuple[int, ...] = (48, 96, 96)
    layers: int = 1
    text_width: int = 96
    vae_steps: int = 1500
    vae_batch_size: int = 32
    vae_learning_rate: float = 1e-3
    latent_noise: float = 0.1
    steps: int = 4000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    ema: float = 0.999
    dropout: float = 0.1
    flip: bool = True
    held_out: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise SynthkdError for a value of the wrong type or outside its range."""
        check_fields("fit-prior", {f.name: getattr(self, f.name) for f in fields(self)}, _KINDS)
        for f in fields(self):
            value = getattr(self, f.name)
            object.__setattr__(self, f.name, tuple(value) if isinstance(value, list) else value)


# Of these the autoencoder is a function, beside the data; the others are the denoiser's.
VAE_FIELDS = (
    "vae_widths", "latent_channels", "vae_steps", "vae_batch_size", "vae_learning_rate", "latent_noise", "flip",
    "held_out", "seed",
)  # fmt: skip

SIZES: Mapping[str, PriorSpec] = {
    # 4.0 million weights, 4.2e14 floating point operations for images of 32 pixels: an hour or two of one core.
    "small": PriorSpec(),
    # 18.6 million weights, 9.4e16 floating point operations for images of 32 pixels: for a GPU.
    "base": PriorSpec(
        vae_widths=(64, 128), unet_widths=(128, 160, 160), layers=2, text_width=192, vae_steps=10_000,
        vae_batch_size=128, steps=60_000, batch_size=256, learning_rate=5e-4, warmup_steps=1000, ema=0.9995,
    ),
}  # fmt: skip


def prior_spec(size: str, changes: Mapping[str, Any] | None = None) -> PriorSpec:
    """A size by name, with some fields changed; raises SynthkdError for an unknown size, field or value."""
    if size not in SIZES:
        raise SynthkdError(f"fit-prior: size {size!r}; {suggest(size, SIZES)}")
    check_fields("fit-prior", changes or {}, _KINDS)
    return replace(SIZES[size], **(changes or {}))


def fields_help() -> str:
    """A paragraph a field for `--help`: its name, what it is, and what the sizes set it to."""
    lines = []
    for name, (_, about) in _FIELDS.items():
        values = [_shown(getattr(spec, name)) for spec in SIZES.values()]
        told = values[0] if len(set(values)) == 1 else ", ".join(f"{s} {v}" for s, v in zip(SIZES, values, strict=True))
        lines.append(f"{name}: {about} ({told})")
    return "\n\n".join(lines)


def _shown(value: Any) -> str:
    """A value as `--set` takes it."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)
