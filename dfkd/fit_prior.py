"""Trains a small text-conditional latent diffusion model on a captioned pool; killed anywhere, the same call goes on.

Two stages: an autoencoder, then a denoiser with its text encoder on the latents. Batches, noise and timesteps of a step
are a function of (seed, step), so a training that was stopped ends in the same weights, on a CPU to the bit where the
number of threads is the same.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synthkd.dfkd.prior_data import Captioned
from synthkd.dfkd.prior_latents import encode_all
from synthkd.dfkd.prior_loop import StageLoop, StagePlan, autocast, checkpoint_of, generator_of, is_of, moved
from synthkd.dfkd.prior_objective import Autoencoding, Denoising, Drawn, draw, learn_words
from synthkd.dfkd.prior_report import REPORT, write_report
from synthkd.dfkd.prior_spec import VAE_FIELDS, PriorSpec
from synthkd.dfkd.progress import Progress, Silent
from synthkd.dfkd.tensor_files import read_tensors, write_tensors
from synthkd.dfkd.training import Stopped
from synthkd.engine.declared import write_declaration
from synthkd.engine.errors import SynthkdError
from synthkd.engine.locks import folder_lock
from synthkd.engine.models import weights_digest
from synthkd.engine.new_prior import (
    PriorShape,
    decoded,
    draw_samples,
    mean_latents,
    new_text_encoder,
    new_tokenizer,
    new_unet,
    new_vae,
    save_pipeline,
    settle_vae,
    token_ids,
)
from synthkd.engine.rows import write_atomically

PIPELINE, RESULT, SHEET = "pipeline", "prior.json", "samples.png"
_VAE, _LATENTS = "vae.safetensors", "latents.safetensors"
_HALF_WRITTEN = re.compile(r"(vae|unet|latents)(\.checkpoint)?\.safetensors\.\d+\.tmp")
_TEXT_RATE = 0.3  # of the denoiser's: an encoder that moves fast leaves the denoiser behind
_SETTLE_ON = 2048  # images
_ENCODED_PIXELS, _ENCODE_AT_ONCE = 2**21, 256  # of a part of the images, and their number, at most
_SHEET_CAPTIONS, _SHEET_EACH = 12, 8


@dataclass(kw_only=True)
class PriorFit:
    """One training in a folder: `pipeline/`, `prior.json`, `log.jsonl`, `samples.png`, `training.html`.

    Checkpoints and latents are there until it is done.
    """

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
        if self.spec.held_out >= len(self.data):
            raise SynthkdError(f"fit-prior: held_out is {self.spec.held_out} of {len(self.data)} images; leave some")
        self._shape = self._shape_of(self.spec)
        self._identity = {"data": self.data.digest, **json.loads(json.dumps(asdict(self.spec)))}
        self._vae_identity = {name: self._identity[name] for name in ("data", *VAE_FIELDS)}
        self.out.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.out):
            return self._locked()

    def _shape_of(self, spec: PriorSpec) -> PriorShape:
        high, wide = self.data.images.shape[2:]
        longest = max(len(caption.split()) for caption in self.data.captions)
        return PriorShape(
            height=high, width=wide, words=self.data.words, length=longest + 2, vae_widths=spec.vae_widths,
            latent_channels=spec.latent_channels, unet_widths=spec.unet_widths, layers=spec.layers,
            text_width=spec.text_width,
        )  # fmt: skip

    def _locked(self) -> dict[str, Any]:
        for path in [path for path in self.out.iterdir() if _HALF_WRITTEN.fullmatch(path.name)]:
            path.unlink(missing_ok=True)
        told = self._finished()
        if told is None:
            for name in (SHEET, REPORT):  # of a training that was deleted
                (self.out / name).unlink(missing_ok=True)
            rows = torch.randperm(len(self.data), generator=generator_of(self.spec.seed, "held out", 0))
            self._held, self._taken = rows[: self.spec.held_out], rows[self.spec.held_out :]
            with torch.random.fork_rng(devices=[]):
                told = self._fitted()
            write_atomically(self.out / RESULT, json.dumps(told, indent=2) + "\n")
        if not (self.out / SHEET).is_file():
            self._draw_sheet()
        if not (self.out / REPORT).is_file():
            write_report(self.out, told, self._shown(), (self.out / SHEET).read_bytes())
        halves = [checkpoint_of(self.out, stage) for stage in ("vae", "latents", "unet")]
        for path in (*halves, self.out / _VAE, self.out / _LATENTS):
            path.unlink(missing_ok=True)
        return told

    def _fitted(self) -> dict[str, Any]:
        """Both stages, the pipeline and its sheet; what prior.json says."""
        vae, figures = self._vae()
        latents = self._latents(vae)
        ema, figures["unet"], tokenizer = self._denoiser(latents)
        del latents
        parts = {"unet": ema.unet, "text_encoder": ema.text, "vae": vae}
        figures["parameters"] = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        sums = save_pipeline(ema.unet, ema.text, vae, tokenizer, self.out / PIPELINE, self._declare)
        self._draw_sheet()
        return self._told(figures, sums)

    def _declare(self, folder: Path) -> dict[str, str]:
        return write_declaration(folder, self.data.trained_on, self.data.digest)

    def _finished(self) -> dict[str, Any] | None:
        """What an earlier call wrote at its end; raises SynthkdError where it is of other data or another spec."""
        path = self.out / RESULT
        if not path.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            same = found["identity"] == self._identity
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise SynthkdError(f"{path}: not readable; delete it and run the command again") from error
        if not same:
            raise SynthkdError(f"{self.out}: holds a prior of another pool or spec; choose another folder")
        if not (self.out / PIPELINE / "model_index.json").is_file():
            raise SynthkdError(f"{path}: tells of a pipeline that is gone; delete it to train the prior again")
        return found

    def _pixels(self, rows: Tensor, flipped: Tensor | None = None) -> Tensor:
        """Images of rows as float32 [B,3,H,W] of -1..1 on the device, some mirrored."""
        images = moved(self.data.images[rows], self.device).float() / 127.5 - 1
        if flipped is not None:
            images = torch.where(moved(flipped, self.device).view(-1, 1, 1, 1), images.flip(3), images)
        return images.contiguous(memory_format=torch.channels_last)

    def _vae(self) -> tuple[Any, dict[str, Any]]:
        """The autoencoder, settled, and its figures; always as its file has it, so that a restart changes no bit."""
        path = self.out / _VAE
        torch.manual_seed(self.spec.seed)
        vae = new_vae(self._shape)
        if not path.is_file():
            self._train_vae(vae)
            torch.manual_seed(self.spec.seed)
            vae = new_vae(self._shape)
        checkpoint_of(self.out, "vae").unlink(missing_ok=True)
        tensors, note = read_tensors(path)
        if not is_of(note, self._vae_identity):
            raise SynthkdError(f"{path}: is of another pool or spec; choose another folder, or delete this one")
        try:
            vae.load_state_dict(tensors)
            figures = dict(note["figures"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise SynthkdError(f"{path}: does not fit; delete it and run the command again") from error
        return vae.to(self.device).eval().requires_grad_(False), figures

    def _train_vae(self, vae: Any) -> None:
        """Train an autoencoder, settle it, and write its file."""
        spec = self.spec
        plan = StagePlan("vae", spec.vae_steps, spec.vae_learning_rate, 100, 0.995, spec.vae_batch_size)
        net = Autoencoding(vae, spec.latent_noise)
        loop = StageLoop(plan, net, self.out, self._vae_identity, self.device, self.progress, self.should_stop)

        def loss(step: int) -> Tensor:
            random = generator_of(spec.seed, "vae", step)
            rows = self._taken[torch.randint(len(self._taken), (spec.vae_batch_size,), generator=random)]
            flipped = torch.rand(len(rows), generator=random) < 0.5 * spec.flip
            noise = torch.randn(len(rows), *self._shape.latent, generator=random)
            found: Tensor = loop.module(self._pixels(rows, flipped), moved(noise, self.device))
            return found

        trained = loop.run(loss, lambda ema: {"psnr_held_out": self._psnr(ema.vae)}).vae
        settle_vae(trained, torch.cat([self._means(trained, rows) for rows in self._parts(self._taken[:_SETTLE_ON])]))
        figures = {"vae": {**loop.figures, "psnr_held_out": self._psnr(trained)}}
        write_tensors(self.out / _VAE, trained.state_dict(), {"identity": self._vae_identity, "figures": figures})

    def _parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows in parts that a network takes at once: fewer where images are large."""
        high, wide = self.data.images.shape[2:]
        return torch.split(rows, max(1, min(_ENCODE_AT_ONCE, _ENCODED_PIXELS // (high * wide))))

    @torch.no_grad()
    def _means(self, vae: Any, rows: Tensor, flip: bool = False) -> Tensor:
        """Latents [N,C,h,w] of rows, unscaled, in float32 on the host."""
        mirrored = torch.ones(len(rows), dtype=torch.bool) if flip else None
        with autocast(self.device):
            means: Tensor = mean_latents(vae, self._pixels(rows, mirrored)).float().cpu()
        return means

    @torch.no_grad()
    def _psnr(self, vae: Any) -> float:
        """Mean over held-out images, dB, of what comes back without noise."""
        found = []
        for part in self._parts(self._held):
            images = self._pixels(part)
            back = decoded(vae, mean_latents(vae, images)).clamp(-1, 1)
            found.append(-10 * ((back - images).square().mean((1, 2, 3)) / 4).clamp_min(1e-8).log10())
        return round(float(torch.cat(found).mean()), 3)

    def _latents(self, vae: Any) -> Tensor:
        """float16 [F,N,C,h,w] of all images, as they are and, with `flip`, mirrored; kept in the folder."""
        sides = (False, True) if self.spec.flip else (False,)
        parts = [(rows, side) for side in sides for rows in self._parts(torch.arange(len(self.data)))]
        note = {"vae": weights_digest([vae]), "data": self._identity["data"]}
        found = encode_all(
            lambda rows, side: self._means(vae, rows, side).half(), parts, self.out / _LATENTS, note, self.progress,
            self.should_stop,
        )  # fmt: skip
        return found.view(len(sides), len(self.data), *found.shape[1:])

    def _denoiser(self, latents: Tensor) -> tuple[Any, dict[str, Any], Any]:
        """Train the denoiser and its text encoder; returns both averaged, figures, and the tokenizer."""
        spec = self.spec
        torch.manual_seed(spec.seed + 1)
        tokenizer = new_tokenizer(self._shape)
        ids = token_ids(tokenizer, [*self.data.captions, ""])
        net = Denoising(new_unet(self._shape), new_text_encoder(self._shape, tokenizer))
        plan = StagePlan(
            "unet", spec.steps, spec.learning_rate, spec.warmup_steps, spec.ema, spec.batch_size, {"text.": _TEXT_RATE}
        )
        if not checkpoint_of(self.out, plan.name).is_file():
            learn_words(net.text, ids[:-1], spec.seed, self.should_stop)
        loop = StageLoop(plan, net, self.out, self._identity, self.device, self.progress, self.should_stop)
        told = ids.to(self.device), self.data.labels.to(self.device), latents.to(self.device)

        def loss(step: int) -> Tensor:
            drawn = draw(generator_of(spec.seed, "unet", step), self._taken, len(latents), spec, self._shape.latent)
            found: Tensor = self._loss(loop.module, *told, drawn)
            return found

        held = draw(generator_of(spec.seed, "held out loss", 0), self._held, 1, spec, self._shape.latent, True)
        ema = loop.run(loss, lambda ema: {"held_out_loss": self._held_loss(ema, *told, held)})
        return ema, loop.figures, tokenizer

    def _loss(self, module: Callable[..., Any], ids: Tensor, labels: Tensor, latents: Tensor, drawn: Drawn) -> Any:
        rows, sides, steps, noise, dropped = (
            moved(t, self.device) for t in (drawn.rows, drawn.sides, drawn.steps, drawn.noise, drawn.dropped)
        )
        told = torch.where(dropped, len(ids) - 1, labels[rows])
        return module(latents[sides, rows].float(), noise, steps, ids[told])

    @torch.no_grad()
    def _held_loss(self, ema: nn.Module, ids: Tensor, labels: Tensor, latents: Tensor, drawn: Drawn) -> float:
        """Of every held-out image at one timestep, the same each time."""
        total = 0.0
        for at in range(0, len(drawn.rows), _ENCODE_AT_ONCE):
            part = drawn[at : at + _ENCODE_AT_ONCE]
            with autocast(self.device):
                total += float(self._loss(ema, ids, labels, latents, part)) * len(part.rows)
        return round(total / len(drawn.rows), 5)

    def _shown(self) -> list[str]:
        """The captions of the sheet's rows."""
        count = min(_SHEET_CAPTIONS, len(self.data.captions))
        return [self.data.captions[i * len(self.data.captions) // count] for i in range(count)]

    def _draw_sheet(self) -> None:
        """samples.png: some captions, a row each, drawn by diffusers' own loop."""
        from synthkd.dfkd.report_images import sheet_png

        shown = self._shown()
        asked = [caption for caption in shown for _ in range(_SHEET_EACH)]
        images = draw_samples(
            self.out / PIPELINE, asked, seed=self.spec.seed, steps=25, scale=2.0, device=self.device, at_step=self._heed
        )
        pixels = {str(i): image.permute(1, 2, 0).numpy() for i, image in enumerate(images)}
        rows = [[str(_SHEET_EACH * r + c) for c in range(_SHEET_EACH)] for r in range(len(shown))]
        (self.out / SHEET).write_bytes(sheet_png(pixels, rows)[0])

    def _heed(self) -> None:
        if self.should_stop():
            raise Stopped

    def _told(self, figures: dict[str, Any], sums: dict[str, str]) -> dict[str, Any]:
        """What prior.json says; sums: SHA-256 of the pipeline's weight files."""
        from synthkd.engine.environment import environment, versions

        return {
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
