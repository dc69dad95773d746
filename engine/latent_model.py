"""What the engine needs of a prior."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from synthkd.engine.decoders import Decoder

Conditioning = dict[str, Tensor]


class LatentModel(Protocol):
    """A frozen latent denoiser with its conditioning and its decoder."""

    @property
    def decoder(self) -> Decoder:
        """Latents to images."""
        ...

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The noise schedule, in diffusers' vocabulary."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height and width of the latent of an image in pixels."""
        ...

    def check_prompts(self, prompts: Iterable[str], negative_prompt: str) -> None:
        """Raise SynthkdError for a prompt that `conditions` would refuse; cheap, no network runs."""
        ...

    def conditions(
        self, prompts: Sequence[str], negative_prompt: str, guidance_scale: float, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None]:
        """What the denoiser is told of B prompts, tensors [B,...] by name, and the same for the negative prompt.

        The second is None where classifier-free guidance is off (guidance_scale <= 1) or embedded in the denoiser.
        size: height and width of the image in pixels.
        """
        ...

    def denoise(
        self, z: Tensor, t: Tensor, cond: Conditioning, uncond: Conditioning | None
    ) -> tuple[Tensor, Tensor | None]:
        """The denoiser's conditional and unconditional outputs [B,C,h,w] at z [B,C,h,w] and timestep t (0-d)."""
        ...

    def modules(self) -> Iterable[nn.Module]:
        """All networks."""
        ...

    def settings(self) -> dict[str, Any]:
        """What beside weights and noise schedule decides an image, as plain values."""
        ...


@dataclass(frozen=True)
class Prompted:
    """A prior's denoiser with what it is told of a group."""

    model: LatentModel
    cond: Conditioning
    uncond: Conditioning | None

    def __call__(self, z: Tensor, t: Tensor, cfg: bool = True) -> tuple[Tensor, Tensor | None]:
        """See `LatentModel.denoise`; the unconditional half only where cfg is asked for."""
        return self.model.denoise(z, t, self.cond, self.uncond if cfg else None)

    def repeated(self, count: int) -> "Prompted":
        """What one sample is told, told to `count` of them."""
        cond, uncond = (
            {n: x[:1].expand(count, *x.shape[1:]) for n, x in told.items()} if told else None
            for told in (self.cond, self.uncond)
        )
        return Prompted(self.model, cond or {}, uncond)

    def part(self, samples: slice) -> "Prompted":
        """The same for some of the samples."""
        cond, uncond = ({n: x[samples] for n, x in told.items()} if told else None for told in (self.cond, self.uncond))
        return Prompted(self.model, cond or {}, uncond)
