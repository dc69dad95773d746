"""What a prior of our own learns from: the objectives of its two stages, their batches, and words before images."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthkd.dfkd.prior_loop import generator_of
from synthkd.dfkd.prior_spec import PriorSpec
from synthkd.dfkd.training import Stopped
from synthkd.engine.errors import SynthkdError
from synthkd.engine.new_prior import decoded, mean_latents, new_scheduler

WORD_STEPS = 1200
_WORD_BATCH, _WORD_RATE = 64, 2e-3
_MAX_SNR, _LEAST_WEIGHT = 5.0, 0.3


class Autoencoding(nn.Module):
    """The autoencoder's objective: what comes back of noised means, in squares and absolute values."""

    def __init__(self, vae: Any, noise: float) -> None:
        super().__init__()
        self.vae, self._noise = vae, noise

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """images [B,3,H,W] of -1..1, noise [B,C,h,w] -> the loss."""
        latents = mean_latents(self.vae, images).float()
        back = decoded(self.vae, latents + self._noise * noise).float()
        return F.mse_loss(back, images) + 0.3 * F.l1_loss(back, images) + 3e-4 * latents.square().mean()


class Denoising(nn.Module):
    """The v-prediction objective (arXiv 2202.00512), weighted by min-SNR-5 (arXiv 2303.09556, sec. 3.4), at least 0.3.

    The floor keeps the noisiest timesteps, where an image's layout is decided, from being left out.
    """

    def __init__(self, unet: Any, text: Any) -> None:
        super().__init__()
        self.unet, self.text = unet, text
        alphas: Tensor = new_scheduler().alphas_cumprod
        self.register_buffer("alphas_cumprod", alphas.float(), persistent=False)

    def forward(self, clean: Tensor, noise: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
        """clean, noise [B,C,h,w], steps int64 [B], token ids int64 [B,L] -> the loss."""
        a = self.get_buffer("alphas_cumprod")[steps].view(-1, 1, 1, 1)
        noisy, target = a.sqrt() * clean + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * clean
        states = self.text(ids)[0]
        found = self.unet(noisy.contiguous(memory_format=torch.channels_last), steps, states, return_dict=False)[0]
        snr = (a / (1 - a)).flatten()
        weight = (snr.clamp(max=_MAX_SNR) / (snr + 1)).clamp_min(_LEAST_WEIGHT)
        return ((found.float() - target).square().mean((1, 2, 3)) * weight).mean()


@dataclass(frozen=True)
class Drawn:
    """Of one step: rows, sides (mirrored or not), timesteps, noise [B,C,h,w], and whose caption is left out."""

    rows: Tensor
    sides: Tensor
    steps: Tensor
    noise: Tensor
    dropped: Tensor

    def __getitem__(self, part: slice) -> "Drawn":
        """A part of the batch."""
        return Drawn(self.rows[part], self.sides[part], self.steps[part], self.noise[part], self.dropped[part])


def draw(
    random: torch.Generator,
    rows: Tensor,
    sides: int,
    spec: PriorSpec,
    latent: tuple[int, int, int],
    every: bool = False,
) -> Drawn:
    """A batch of `rows`; sides: how many there are; every: take each row once, and keep every caption."""
    count = len(rows) if every else spec.batch_size
    chosen = rows if every else rows[torch.randint(len(rows), (count,), generator=random)]
    even = (torch.arange(count) + torch.rand(count, generator=random)) / count  # one timestep in each of `count` parts
    steps = (even * 1000).long().clamp_max(999)
    return Drawn(
        rows=chosen,
        sides=torch.randint(sides, (count,), generator=random),
        steps=steps,
        noise=torch.randn(count, *latent, generator=random),
        dropped=torch.rand(count, generator=random) < (0.0 if every else spec.dropout),
    )


def learn_words(
    text: nn.Module, ids: Tensor, seed: int, should_stop: Callable[[], bool] = lambda: False, steps: int = WORD_STEPS
) -> float:
    """Warm a text encoder up: its mean state tells which words a caption holds. Returns the last loss.

    ids: int64 [K,L]. Without it the denoiser learns to do without the words before the encoder tells them apart.
    Raises Stopped where `should_stop` says so; it is short, and begins anew.
    """
    vocabulary = text.get_input_embeddings().num_embeddings  # type: ignore[operator]
    width = text.get_input_embeddings().embedding_dim  # type: ignore[operator]
    head = nn.Linear(width, vocabulary)
    optimizer = torch.optim.AdamW([*text.parameters(), *head.parameters()], lr=_WORD_RATE)
    random, loss = generator_of(seed, "words", 0), torch.zeros(())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _WORD_RATE * min(1.0, (step + 1) / 50) * (1 - step / steps)
        rows = ids[torch.randint(len(ids), (_WORD_BATCH,), generator=random)]
        present = torch.zeros(_WORD_BATCH, vocabulary).scatter_(1, rows, 1.0)
        loss = F.binary_cross_entropy_with_logits(head(text(rows)[0].mean(1)), present)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if should_stop():
            raise Stopped
    found = float(loss.detach())
    if not math.isfinite(found):
        raise SynthkdError("fit-prior: the text encoder's loss is not finite")
    return found
