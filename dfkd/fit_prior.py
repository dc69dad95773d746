"""Trains a small text-conditional latent diffusion model on a captioned pool; killed anywhere, the same call goes on.

Two stages: an autoencoder, then a denoiser with its text encoder on the latents. Batches, noise and timesteps of a step
are a function of (seed, step), so a training that was stopped ends in the same weights, on a CPU to the bit.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthkd.dfkd.prior_data import Captioned
from synthkd.dfkd.prior_loop import StageLoop, StagePlan, autocast, checkpoint_of, generator_of
from synthkd.dfkd.prior_spec import PriorSpec
from synthkd.dfkd.progress import Progress, Silent
from synthkd.dfkd.tensor_files import read_tensors, write_tensors
from synthkd.engine.declared import write_declaration
from synthkd.engine.errors import SynthkdError
from synthkd.engine.models import weights_digest
from synthkd.engine.new_prior import (
    PriorShape,
    decoded,
    draw_samples,
    mean_latents,
    new_scheduler,
    new_text_encoder,
    new_tokenizer,
    new_unet,
    new_vae,
    save_pipeline,
    settle_vae,
    token_ids,
)
from synthkd.engine.rows import write_atomically

PIPELINE, LATENTS, RESULT, SHEET = "pipeline", "latents.safetensors", "prior.json", "samples.png"
_VAE = "vae.safetensors"
_WORD_STEPS, _WORD_BATCH, _WORD_RATE = 1200, 64, 2e-3
_TEXT_RATE = 0.3  # of the denoiser's: an encoder that moves fast leaves the denoiser behind
_ENCODE_AT_ONCE = 256
_SHEET_CAPTIONS, _SHEET_EACH = 12, 8


@dataclass(kw_only=True)
class PriorFit:
    """One training in a folder: `pipeline/`, `prior.json`, `log.jsonl`, `samples.png`; checkpoints until it is done."""

    data: Captioned
    spec: PriorSpec
    out: Path
    device: str = "cpu"
    progress: Progress = field(default_factory=Silent)
    should_stop: Callable[[], bool] = lambda: False

    def execute(self) -> dict[str, Any]:
        """Do what is left to do and return what prior.json says; raises Stopped where that is asked for.

        Raises SynthkdError where the folder holds another training, and for a loss that is not finite.
        """
        high, wide = self.data.images.shape[2:]
        if self.spec.held_out >= len(self.data):
            raise SynthkdError(f"fit-prior: held_out is {self.spec.held_out} of {len(self.data)} images; leave some")
        longest = max(len(caption.split()) for caption in self.data.captions)
        spec = self.spec
        self._shape = PriorShape(
            height=high, width=wide, words=self.data.words, length=longest + 2, vae_widths=spec.vae_widths,
            latent_channels=spec.latent_channels, unet_widths=spec.unet_widths, layers=spec.layers,
            text_width=spec.text_width,
        )  # fmt: skip
        self._identity = {"data": self.data.digest, **json.loads(json.dumps(asdict(spec)))}
        if (known := self._finished()) is not None:
            return known
        self.out.mkdir(parents=True, exist_ok=True)
        self._rows = torch.randperm(len(self.data), generator=generator_of(spec.seed, "held out", 0))
        self._held, self._taken = self._rows[: spec.held_out], self._rows[spec.held_out :]
        with torch.random.fork_rng(devices=[]):
            vae, figures = self._vae()
            latents = self._latents(vae)
            figures |= self._denoiser(vae, latents)
        return self._told(figures)

    def _finished(self) -> dict[str, Any] | None:
        """What an earlier call wrote at its end; raises SynthkdError where it is of other data or another spec."""
        path = self.out / RESULT
        if not path.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            same = found["identity"] == self._identity and (self.out / PIPELINE / "model_index.json").is_file()
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise SynthkdError(f"{path}: not readable; delete it and run the command again") from error
        if not same:
            raise SynthkdError(f"{self.out}: holds a prior of another pool or spec; choose another folder")
        return found

    def _pixels(self, rows: Tensor, flipped: Tensor | None = None) -> Tensor:
        """Images of rows as float32 [B,3,H,W] of -1..1 on the device, some mirrored."""
        images = self.data.images[rows].to(self.device).float() / 127.5 - 1
        if flipped is not None:
            images = torch.where(flipped.to(self.device).view(-1, 1, 1, 1), images.flip(3), images)
        return images.contiguous(memory_format=torch.channels_last)

    def _vae(self) -> tuple[Any, dict[str, Any]]:
        """The autoencoder, settled, and its figures."""
        spec = self.spec
        torch.manual_seed(spec.seed)
        vae = new_vae(self._shape)
        path = self.out / _VAE
        if path.is_file():
            tensors, note = read_tensors(path)
            self._check_same(path, note)
            vae.load_state_dict(tensors)
            vae.register_to_config(scaling_factor=1.0)
            return vae.to(self.device).eval().requires_grad_(False), note["figures"]
        plan = StagePlan("vae", spec.vae_steps, spec.vae_learning_rate, 100, 0.995, spec.vae_batch_size)
        net = _Autoencoding(vae, spec.latent_noise)
        loop = StageLoop(plan, net, self.out, self._identity, self.device, self.progress, self.should_stop)

        def loss(step: int) -> Tensor:
            random = generator_of(spec.seed, "vae", step)
            rows = self._taken[torch.randint(len(self._taken), (spec.vae_batch_size,), generator=random)]
            flipped = torch.rand(len(rows), generator=random) < 0.5 * spec.flip
            noise = torch.randn(len(rows), *self._shape.latent, generator=random).to(self.device)
            found: Tensor = loop.module(self._pixels(rows, flipped), noise)
            return found

        vae = loop.run(loss, lambda ema: {"psnr_held_out": self._psnr(ema.vae)}).vae
        sample = self._taken[: 8 * _ENCODE_AT_ONCE]
        settle_vae(vae, self._means(vae, sample))
        figures = {"vae": {**loop.figures, "psnr_held_out": self._psnr(vae)}}
        write_tensors(path, vae.state_dict(), {"identity": self._identity, "figures": figures})
        loop.forget()
        return vae, figures

    def _check_same(self, path: Path, note: dict[str, Any]) -> None:
        if note.get("identity") != self._identity:
            raise SynthkdError(f"{path}: is of another pool or spec; choose another folder, or delete this one")

    @torch.no_grad()
    def _means(self, vae: Any, rows: Tensor, flip: bool = False) -> Tensor:
        """Latents [N,C,h,w] of rows, unscaled, in float32 on the host."""
        out = []
        for part in torch.split(rows, _ENCODE_AT_ONCE):
            mirrored = torch.ones(len(part), dtype=torch.bool) if flip else None
            with autocast(self.device):
                out.append(mean_latents(vae, self._pixels(part, mirrored)).float().cpu())
        return torch.cat(out)

    @torch.no_grad()
    def _psnr(self, vae: Any) -> float:
        """Mean over held-out images, dB, of what comes back without noise."""
        found = []
        for part in torch.split(self._held, _ENCODE_AT_ONCE):
            images = self._pixels(part)
            back = decoded(vae, mean_latents(vae, images)).clamp(-1, 1)
            found.append(-10 * ((back - images).square().mean((1, 2, 3)) / 4).clamp_min(1e-8).log10())
        return round(float(torch.cat(found).mean()), 3)

    def _latents(self, vae: Any) -> Tensor:
        """float16 [F,N,C,h,w] of all images, as they are and, with `flip`, mirrored; kept in the folder."""
        path, note = self.out / LATENTS, {"vae": weights_digest([vae]), "data": self._identity["data"]}
        if path.is_file():
            tensors, found = read_tensors(path)
            if found == note:
                return tensors["latents"]
        every = torch.arange(len(self.data))
        sides = [self._means(vae, every, flip).half() for flip in ((False, True) if self.spec.flip else (False,))]
        latents = torch.stack(sides)
        write_tensors(path, {"latents": latents}, note)
        return latents

    def _denoiser(self, vae: Any, latents: Tensor) -> dict[str, Any]:
        """Train the denoiser and its text encoder, and save the pipeline; returns figures."""
        spec = self.spec
        torch.manual_seed(spec.seed + 1)
        tokenizer = new_tokenizer(self._shape)
        ids = token_ids(tokenizer, [*self.data.captions, ""])
        net = _Denoising(new_unet(self._shape), new_text_encoder(self._shape, tokenizer), spec.dropout)
        plan = StagePlan(
            "unet", spec.steps, spec.learning_rate, spec.warmup_steps, spec.ema, spec.batch_size, {"text.": _TEXT_RATE}
        )
        if not checkpoint_of(self.out, plan.name).is_file():
            learn_words(net.text, ids[:-1], spec.seed)
        loop = StageLoop(plan, net, self.out, self._identity, self.device, self.progress, self.should_stop)
        ids, labels = ids.to(self.device), self.data.labels.to(self.device)
        latents = latents.to(self.device)

        def loss(step: int) -> Tensor:
            random = generator_of(spec.seed, "unet", step)
            drawn = _draw(random, self._taken, len(latents), spec, self._shape.latent)
            found: Tensor = self._loss(loop.module, latents, labels, ids, drawn)
            return found

        held = _draw(generator_of(spec.seed, "held out loss", 0), self._held, 1, spec, self._shape.latent, True)
        ema = loop.run(loss, lambda ema: {"held_out_loss": self._held_loss(ema, latents, labels, ids, held)})
        save_pipeline(ema.unet, ema.text, vae, tokenizer, self.out / PIPELINE)
        self._draw_sheet()
        loop.forget()
        (self.out / LATENTS).unlink(missing_ok=True)
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in
                  (("unet", ema.unet), ("text_encoder", ema.text), ("vae", vae))}  # fmt: skip
        return {"unet": loop.figures, "parameters": counts}

    def _loss(self, module: Callable[..., Any], latents: Tensor, labels: Tensor, ids: Tensor, drawn: "_Drawn") -> Any:
        rows = drawn.rows.to(self.device)
        clean = latents[drawn.sides.to(self.device), rows].float()
        told = torch.where(drawn.dropped.to(self.device), len(ids) - 1, labels[rows])
        return module(clean, drawn.noise.to(self.device), drawn.steps.to(self.device), ids[told])

    @torch.no_grad()
    def _held_loss(self, ema: nn.Module, latents: Tensor, labels: Tensor, ids: Tensor, drawn: "_Drawn") -> float:
        with autocast(self.device):
            return round(float(self._loss(ema, latents, labels, ids, drawn)), 5)

    def _draw_sheet(self) -> None:
        """samples.png: some captions, a row each, drawn by diffusers' own loop."""
        from synthkd.dfkd.report_images import sheet_png

        count = min(_SHEET_CAPTIONS, len(self.data.captions))
        chosen = [self.data.captions[i * len(self.data.captions) // count] for i in range(count)]
        asked = [caption for caption in chosen for _ in range(_SHEET_EACH)]
        images = draw_samples(self.out / PIPELINE, asked, seed=self.spec.seed, steps=25, scale=2.0, device=self.device)
        pixels = {str(i): image.permute(1, 2, 0).numpy() for i, image in enumerate(images)}
        rows = [[str(_SHEET_EACH * r + c) for c in range(_SHEET_EACH)] for r in range(count)]
        (self.out / SHEET).write_bytes(sheet_png(pixels, rows)[0])

    def _told(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Write the declaration into the pipeline, and prior.json as the last file of all."""
        from synthkd.engine.environment import environment, versions

        sums = write_declaration(self.out / PIPELINE, self.data.trained_on, self.data.digest)
        told = {
            "identity": self._identity,
            "trained_on": list(self.data.trained_on),
            "images": len(self.data),
            "captions": list(self.data.captions),
            "size": [self._shape.height, self._shape.width],
            **figures,
            "sha256": sums,
            "device": environment(torch.device(self.device), 0)["device"],
            "versions": versions(),
        }
        write_atomically(self.out / RESULT, json.dumps(told, indent=2) + "\n")
        return told


class _Autoencoding(nn.Module):
    """The autoencoder's objective: what comes back of noised means, in squares and absolute values."""

    def __init__(self, vae: Any, noise: float) -> None:
        super().__init__()
        self.vae, self._noise = vae, noise

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """images [B,3,H,W] of -1..1, noise [B,C,h,w] -> the loss."""
        latents = mean_latents(self.vae, images).float()
        back = decoded(self.vae, latents + self._noise * noise).float()
        return F.mse_loss(back, images) + 0.3 * F.l1_loss(back, images) + 3e-4 * latents.square().mean()


class _Denoising(nn.Module):
    """The v-prediction objective (arXiv 2202.00512), weighted by min-SNR-5 (arXiv 2303.09556, sec. 3.4)."""

    def __init__(self, unet: Any, text: Any, dropout: float) -> None:
        super().__init__()
        self.unet, self.text, self._dropout = unet, text, dropout
        alphas: Tensor = new_scheduler().alphas_cumprod
        self.register_buffer("alphas_cumprod", alphas.float(), persistent=False)

    def forward(self, clean: Tensor, noise: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
        """clean, noise [B,C,h,w], steps int64 [B], token ids int64 [B,L] -> the loss."""
        a = self.get_buffer("alphas_cumprod")[steps].view(-1, 1, 1, 1)
        noisy, target = a.sqrt() * clean + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * clean
        states = self.text(ids)[0]
        found = self.unet(noisy.contiguous(memory_format=torch.channels_last), steps, states, return_dict=False)[0]
        snr = (a / (1 - a)).flatten()
        weight = (snr.clamp(max=5.0) / (snr + 1)).clamp_min(0.3)
        return ((found.float() - target).square().mean((1, 2, 3)) * weight).mean()


@dataclass(frozen=True)
class _Drawn:
    """Of one step: rows, sides (mirrored or not), timesteps, noise, and whose caption is left out."""

    rows: Tensor
    sides: Tensor
    steps: Tensor
    noise: Tensor
    dropped: Tensor


def _draw(
    random: torch.Generator,
    rows: Tensor,
    sides: int,
    spec: PriorSpec,
    latent: tuple[int, int, int],
    every: bool = False,
) -> _Drawn:
    """every: take each row once, and keep every caption."""
    count = len(rows) if every else spec.batch_size
    chosen = rows if every else rows[torch.randint(len(rows), (count,), generator=random)]
    even = (torch.arange(count) + torch.rand(count, generator=random)) / count  # one timestep in each of `count` parts
    steps = (even * 1000).long().clamp_max(999)
    return _Drawn(
        rows=chosen,
        sides=torch.randint(sides, (count,), generator=random),
        steps=steps,
        noise=torch.randn(count, *latent, generator=random),
        dropped=torch.rand(count, generator=random) < (0.0 if every else spec.dropout),
    )


def learn_words(text: nn.Module, ids: Tensor, seed: int, steps: int = _WORD_STEPS) -> float:
    """Warm a text encoder up: its mean state tells which words a caption holds. Returns the last loss.

    ids: int64 [K,L]. Without it the denoiser learns to do without the words before the encoder tells them apart.
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
    found = float(loss.detach())
    if not math.isfinite(found):
        raise SynthkdError("fit-prior: the text encoder's loss is not finite")
    return found
