"""How a prior of our own is trained: sizes and steps, in two sizes by name."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from synthkd.dfkd.fields import ABOVE_ZERO, Kind, check_fields, is_number, is_whole, whole
from synthkd.engine.errors import SynthkdError, suggest

_WIDTHS = Kind(
    lambda v: isinstance(v, (list, tuple)) and bool(v) and all(is_whole(w, 16) and w % 16 == 0 for w in v),
    "a list of multiples of 16",
)
_KINDS: Mapping[str, Kind] = {
    "vae_widths": _WIDTHS,
    "unet_widths": _WIDTHS,
    "latent_channels": whole(1),
    "layers": whole(1),
    "text_width": Kind(lambda v: is_whole(v, 16) and v % 16 == 0, "a multiple of 16"),
    "vae_steps": whole(1),
    "vae_batch_size": whole(2),
    "vae_learning_rate": ABOVE_ZERO,
    "latent_noise": Kind(lambda v: is_number(v) and v >= 0, "a number >= 0"),
    "steps": whole(1),
    "batch_size": whole(2),
    "learning_rate": ABOVE_ZERO,
    "warmup_steps": whole(0),
    "ema": Kind(lambda v: is_number(v) and 0 <= v < 1, "0 <= ema < 1"),
    "dropout": Kind(lambda v: is_number(v) and 0 <= v < 1, "0 <= dropout < 1"),
    "flip": Kind(lambda v: isinstance(v, bool), "true or false"),
    "held_out": whole(2),
    "seed": Kind(lambda v: is_whole(v, 0, 2**63), "0 <= seed < 2**63"),
}


@dataclass(frozen=True, kw_only=True)
class PriorSpec:
    """Networks (see `engine.new_prior.PriorShape`), and the training of autoencoder and denoiser, one after the other.

    latent_noise: deviation of the noise on unscaled latents while the autoencoder learns; steps, batch_size,
    learning_rate, warmup_steps (then half a cosine): of the denoiser and its text encoder; ema: decay of the averaged
    weights, which are what is kept; dropout: share of captions that are left out, for classifier-free guidance;
    flip: mirror half of the images; held_out: images that are not trained on and tell how it goes.
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
    steps: int = 6000
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


SIZES: Mapping[str, PriorSpec] = {
    # 3 million weights: an hour or so of one core.
    "small": PriorSpec(),
    # 17 million weights, about 1e17 floating point operations for images of 32 pixels: for a GPU.
    "base": PriorSpec(
        vae_widths=(64, 128), unet_widths=(96, 192, 192), layers=2, text_width=192, vae_steps=10_000,
        vae_batch_size=128, steps=60_000, batch_size=256, learning_rate=5e-4, warmup_steps=1000, ema=0.9995,
    ),
}  # fmt: skip


def prior_spec(size: str, changes: Mapping[str, Any] | None = None) -> PriorSpec:
    """A size by name, with some fields changed; raises SynthkdError for an unknown size, field or value."""
    if size not in SIZES:
        raise SynthkdError(f"fit-prior: size {size!r}; {suggest(size, SIZES)}")
    check_fields("fit-prior", changes or {}, _KINDS)
    return replace(SIZES[size], **(changes or {}))
