"""A small decoder fitted to a prior's own VAE: latents straight to images of the teacher's input size.

An artifact is a folder with `decoder.safetensors` and `decoder.json`: what the network is, what it was fitted to, how,
and how far it is off. `synthkd.dfkd.fit_decoder` makes one; guidance looks through it.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from synthkd.engine.decoders import Decoder, latent_layout
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import DECODER_FILES
from synthkd.engine.models import EMBEDDED, weights_digest
from synthkd.engine.rows import write_atomically
from synthkd.engine.untrusted import parse_note, read_plain

CARD, WEIGHTS = DECODER_FILES
FORMAT = 1
SMALL = 256  # latent positions of an image, up to which a small network will do
# Upper ends of the fields of a shape: 40 times the default's weights at the most, so that no file can ask for more.
_LARGEST = {"latent_channels": 128, "factor": 64, "height": 4096, "width": 4096, "hidden": 512, "blocks": 32}
_log = logging.getLogger("synthkd")


@dataclass(frozen=True, kw_only=True)
class FittedShape:
    """latent_channels, factor: of the prior's latents, pixels per position; height, width: of the images, in pixels.

    hidden, blocks: channels and residual blocks at latent resolution; shuffle: the head's images have so many pixels
    per latent position, before they are resized.
    """

    latent_channels: int
    factor: int
    height: int
    width: int
    hidden: int = 48
    blocks: int = 2
    shuffle: int = 4

    def __post_init__(self) -> None:
        """Raise SynthkdError for a field that is no whole number, or outside its range."""
        for f in fields(self):
            value, most = getattr(self, f.name), _LARGEST.get(f.name, self.factor)
            if type(value) is not int or not 1 <= value <= most:
                raise SynthkdError(f"fitted decoder: {f.name} is {value!r}; expected a whole number from 1 to {most}")


class FittedNet(nn.Module):
    """Residual 3x3 convolutions at latent resolution and a sub-pixel head (arXiv 1609.05158); no norm layers.

    All the work is done where the planes are smallest: per weight this is cheapest on a CPU and on a GPU alike. Each
    block also adds a linear map of its input's mean over the plane, for what a VAE's norms and attention do.
    """

    def __init__(self, shape: FittedShape) -> None:
        """Weights as torch draws them; each block starts near the identity, and the head at grey."""
        super().__init__()
        wide, pixels = shape.hidden, 3 * shape.shuffle**2
        self.shape = shape
        self.stem = nn.Conv2d(shape.latent_channels, wide, 3, padding=1)
        self.first = nn.ModuleList(nn.Conv2d(wide, wide, 3, padding=1) for _ in range(shape.blocks))
        self.second = nn.ModuleList(nn.Conv2d(wide, wide, 3, padding=1) for _ in range(shape.blocks))
        self.all_over = nn.ModuleList(nn.Linear(wide, wide) for _ in range(shape.blocks))
        self.head = nn.Conv2d(wide, pixels, 3, padding=1)
        with torch.no_grad():
            for conv in self.first:
                conv.get_parameter("weight").mul_(0.3)
            self.head.get_parameter("bias").fill_(0.5)

    def forward(self, z: Tensor) -> Tensor:
        """z [B,C,h,w] -> images [B,3,height,width], about [0,1]."""
        x = self.stem(z)
        for first, second, all_over in zip(self.first, self.second, self.all_over, strict=True):
            h = F.silu(x)
            x = x + second(F.silu(first(h) + all_over(h.mean(dim=(2, 3)))[:, :, None, None]))
        images = F.pixel_shuffle(self.head(F.silu(x)), self.shape.shuffle)
        return resized(images, (self.shape.height, self.shape.width))


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """images [B,C,H,W] at another size (height, width), bilinear and antialiased as a teacher resizes what it is shown.

    As two matrix products: the gradient is deterministic on a GPU too, and half precision works on a CPU.
    """
    height, width = images.shape[-2:]
    if height != size[0]:
        images = _resizing(height, size[0], images) @ images
    return images if width == size[1] else images @ _resizing(width, size[1], images).mT


def _resizing(have: int, want: int, like: Tensor) -> Tensor:
    """The matrix [want, have] of a resize along one axis."""
    lines = torch.eye(have, device=like.device)[None, None]
    matrix = F.interpolate(lines, size=[want, have], mode="bilinear", antialias=True, align_corners=False)
    return matrix[0, 0].to(like.dtype)


class FittedDecoder:
    """A FittedNet as what guidance looks through."""

    def __init__(self, net: FittedNet) -> None:
        """net: frozen or not, on any device."""
        self._net = net

    def __call__(self, latents: Tensor) -> Tensor:
        """latents [B,C,h,w] as the denoiser sees them -> images [B,3,height,width] around [0,1]."""
        images: Tensor = self._net(latents.to(self._net.stem.weight.dtype))
        return images

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self._net

    @property
    def settings(self) -> dict[str, Any]:
        """Its shape; the weights are all the rest."""
        return {"fitted": asdict(self._net.shape)}


def shape_for(
    latent: tuple[int, int, int], factor: int, size: tuple[int, int], hidden: int = 0, blocks: int = 0
) -> FittedShape:
    """The network for latents (C, h, w) and images of `size` (height, width).

    hidden, blocks: 0 for 48 and 2 up to SMALL latent positions, and 128 and 4 above, where a VAE costs far more. The
    head has the fewest pixels, by doublings, that cover the size, and at most the VAE's own.
    """
    channels, high, wide = latent
    small = high * wide <= SMALL
    shuffle = 1
    while shuffle * 2 <= factor and (shuffle * high < size[0] or shuffle * wide < size[1]):
        shuffle *= 2
    return FittedShape(
        latent_channels=channels,
        factor=factor,
        height=size[0],
        width=size[1],
        hidden=hidden or (48 if small else 128),
        blocks=blocks or (2 if small else 4),
        shuffle=shuffle,
    )


def vae_digest(decoder: Decoder) -> str:
    """SHA-256 over the tensors and the settings of a prior's own decoder, in the dtype that it has."""
    parts = weights_digest([decoder.module]) + json.dumps(decoder.settings, sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()


def save_fitted(net: FittedNet, folder: Path, about: Mapping[str, Any]) -> None:
    """Write an artifact, weights in float16; a kill leaves the folder without a card, or the old artifact, or this.

    about: plain values for the card: what it was fitted to, how, and its errors.
    Raises SynthkdError where a weight is not finite in float16.
    """
    state = {name: t.detach().to("cpu", torch.float16).contiguous() for name, t in net.state_dict().items()}
    if not all(bool(t.isfinite().all()) for t in state.values()):
        raise SynthkdError("fit-decoder: a weight is not finite; lower the learning rate")
    data = save(dict(sorted(state.items())))
    card = {"format": FORMAT, "shape": asdict(net.shape), "sha256": hashlib.sha256(data).hexdigest(), **about}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)  # without its card an artifact is none
    fresh = folder / f"{WEIGHTS}.tmp"
    fresh.write_bytes(data)
    fresh.replace(folder / WEIGHTS)
    write_atomically(folder / CARD, json.dumps(card, indent=2, sort_keys=True) + "\n")


def fitted_path(reference: str) -> Path:
    """The folder of an artifact; `embedded:NAME` is the one that comes with the package."""
    if not reference.startswith(EMBEDDED):
        return Path(reference)
    from synthkd.engine.assets import embedded_path

    return embedded_path(reference.removeprefix(EMBEDDED)) / "decoder"


def read_card(reference: str) -> tuple[FittedShape, dict[str, Any]]:
    """Shape and card of an artifact; reads no weights. Raises SynthkdError where there is none, or not a whole one."""
    path = fitted_path(reference) / CARD
    try:
        card = parse_note(read_plain(path, None))
    except OSError as error:
        raise _refusal(reference, f"no readable {CARD} there; expected what `synthkd fit-decoder` wrote") from error
    except (ValueError, RecursionError) as error:
        raise _refusal(reference, f"{CARD} is not valid JSON; fit it anew") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise _refusal(reference, f"{CARD} is not of format {FORMAT}, which this version reads; fit it anew")
    try:
        return FittedShape(**card["shape"]), card
    except (TypeError, KeyError, SynthkdError) as error:
        raise _refusal(reference, f"{CARD} has no shape of a decoder ({error}); fit it anew") from error


def load_fitted_decoder(
    reference: str, *, device: str | torch.device, dtype: torch.dtype, like: Decoder | None = None
) -> FittedDecoder:
    """An artifact of `synthkd fit-decoder` as a guidance decoder, frozen; safetensors only.

    like: the prior's own decoder. One of other latent channels or pixels per position is refused. Another VAE of the
    same layout is only warned of (its weights cannot be told from the same ones in another precision): whether the
    gradients agree is what a set's calibration finds out.
    Raises SynthkdError for a missing or damaged artifact and for weights that are not those of its card.
    """
    shape, card = read_card(reference)
    if like is not None:
        _check_layout(reference, shape, like)
        fitted_to = card.get("fitted_to")
        known = fitted_to.get("vae_sha256") if isinstance(fitted_to, Mapping) else None
        if known != vae_digest(like):
            _log.warning("guidance.decoder 'fitted:%s' was fitted to another VAE, or in another precision", reference)
    with torch.random.fork_rng(devices=[]):  # its first weights are thrown away
        net = FittedNet(shape)
    net.load_state_dict(_read_weights(reference, net, card))
    memory = torch.channels_last if torch.device(device).type == "cpu" else torch.preserve_format
    net.eval().requires_grad_(False).to(device=device, dtype=dtype)
    return FittedDecoder(net.to(memory_format=memory))  # type: ignore[call-overload]


def _check_layout(reference: str, shape: FittedShape, like: Decoder) -> None:
    found, wanted = (shape.latent_channels, shape.factor), latent_layout(like.module)
    for what, ours, theirs in zip(("latent channels", "pixels per latent"), found, wanted, strict=True):
        if ours != theirs:
            raise _refusal(reference, f"fitted to {ours} {what}; this model's vae has {theirs}")


def _read_weights(reference: str, net: FittedNet, card: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of an artifact as its network wants them; raises SynthkdError where they are others."""
    path, want = fitted_path(reference) / WEIGHTS, net.state_dict()
    try:
        size, most = path.stat().st_size, 4 * sum(math.prod(t.shape) for t in want.values()) + 2**16
        if size > most:
            raise _refusal(reference, f"{WEIGHTS} has {size} bytes; its card's network has at most {most}")
        data = path.read_bytes()
        have = load(data)
    except (OSError, SafetensorError) as error:
        raise _refusal(reference, f"{WEIGHTS} cannot be read ({' '.join(str(error).split())[:160]})") from error
    if hashlib.sha256(data).hexdigest() != card.get("sha256"):
        raise _refusal(reference, f"{WEIGHTS} does not match the digest in {CARD} (damaged or changed); fit it anew")
    for name in sorted(want.keys() | have.keys()):
        ours, theirs = (tuple(side[name].shape) if name in side else "no tensor" for side in (have, want))
        if ours != theirs:
            raise _refusal(reference, f"{name!r} in {WEIGHTS} is {ours}; its card's network has {theirs}")
        if not have[name].is_floating_point() or not bool(have[name].isfinite().all()):
            raise _refusal(reference, f"{name!r} in {WEIGHTS} is not finite; fit it anew")
    return {name: tensor.float() for name, tensor in have.items()}


def _refusal(reference: str, why: str) -> SynthkdError:
    return SynthkdError(f"guidance.decoder 'fitted:{reference}': {why}")
