"""Train the prior: a small conditional UNet and its text encoder, jointly, on latents of rendered glyphs."""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import glyphs
import numpy as np
import tokenizer as words
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from train_readers import DIGITS_FOLDER, JUDGE, real_digits
from train_vae import mean_latents, to_tensor, update_ema
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from synthkd.dfkd.nets import PlainCNN
from synthkd.engine.new_prior import tidy_configs
from synthkd.engine.declared import write_declaration

SEED = 23
HELD_OUT = 1_000
ITERATIONS = 10_000
MINUTES = 45.0
BATCH = 64
CAPTIONS = 6
WIDTH = 96
PEAK_RATE = 1e-3
CHECKPOINT_MINUTES = 8.0
PLAIN = "the digit {}"
GREY = "the digit {}, light on dark, grey"


def make_scheduler() -> DDIMScheduler:
    """Build the noise schedule; its end is noisy enough that no mean brightness leaks through."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.024,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_unet() -> UNet2DConditionModel:
    """Build the UNet."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        norm_num_groups=32,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the text encoder for the closed vocabulary."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=words.LENGTH,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@dataclass
class Prior:
    """The two trained networks."""

    unet: nn.Module
    text: nn.Module

    def parameters(self) -> list[nn.Parameter]:
        """List all weights."""
        return [*self.unet.parameters(), *self.text.parameters()]


def caption_ids(looks: list[glyphs.Look], tokenizer: CLIPTokenizer, folder: Path) -> torch.Tensor:
    """Write several captions of each glyph and tokenize them; cached."""
    target = folder / f"captions_{len(looks)}.npy"
    if not target.exists():
        rng = np.random.default_rng(SEED)
        texts = [glyphs.caption(look, rng) for look in looks for _ in range(CAPTIONS)]
        ids = np.array(words.word_ids(tokenizer, texts), dtype=np.int16)
        np.save(target, ids.reshape(len(looks), CAPTIONS, words.LENGTH))
    return torch.from_numpy(np.load(target)).long()


def learn_words(text: nn.Module, ids: torch.Tensor, steps: int = 1_200) -> float:
    """Warm the text encoder up: its pooled output must tell which words the caption holds."""
    nn.init.normal_(text.get_input_embeddings().weight, std=0.3)
    vocabulary = text.get_input_embeddings().num_embeddings
    head = nn.Linear(WIDTH, vocabulary)
    optimiser = torch.optim.AdamW([*text.parameters(), *head.parameters()], lr=2e-3)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1 - step / steps)
        rows = ids[torch.randint(len(ids), (64,)), torch.randint(CAPTIONS, (64,))]
        present = torch.zeros(64, vocabulary).scatter_(1, rows, 1.0)
        loss = nn.functional.binary_cross_entropy_with_logits(head(text(rows)[0].mean(1)), present)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    return float(loss.detach())


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encode all images to scaled latents."""
    vae = vae.to(memory_format=torch.channels_last)
    parts = [mean_latents(vae, b.contiguous(memory_format=torch.channels_last)) for b in images.split(250)]
    return torch.cat(parts).contiguous() * vae.config.scaling_factor


class Objective(nn.Module):
    """The weighted v-prediction loss."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        noisy: torch.Tensor,
        steps: torch.Tensor,
        context: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        """Give the training loss of one batch."""
        guess = self.unet(noisy, steps, context, return_dict=False)[0].float()
        return ((guess - target).square().mean((1, 2, 3)) * weight).mean()


def noised(latents: torch.Tensor, alphas: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Draw steps, half from the middle; give noisy latents, steps, the v target and the min-SNR-5 weight."""
    even = (torch.arange(len(latents)) + torch.rand(len(latents))) / len(latents)
    middle = 0.2 + 0.5 * torch.rand(len(latents))
    steps = (torch.where(torch.rand(len(latents)) < 0.5, even, middle) * len(alphas)).long()
    steps = steps.clamp_max(len(alphas) - 1)
    a = alphas[steps].view(-1, 1, 1, 1)
    noise = torch.randn_like(latents)
    noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
    target = a.sqrt() * noise - (1 - a).sqrt() * latents
    snr = alphas[steps] / (1 - alphas[steps])
    return noisy, steps, target, (snr.clamp(max=5.0) / (snr + 1)).clamp_min(0.4)


def rate(progress: float, step: int) -> float:
    """Warm up over 200 steps, then follow a cosine down to 2 %."""
    return PEAK_RATE * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def make_pipeline(prior: Prior, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """Join the parts into a pipeline."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=prior.text,
        tokenizer=tokenizer,
        unet=prior.unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def publish(pipe: StableDiffusionPipeline, target: Path) -> None:
    """Write the whole pipeline in fp16 next to the target, then swap."""
    fresh, old = target.with_name("pipeline.new"), target.with_name("pipeline.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    parts = {name: copy.deepcopy(getattr(pipe, name)).half() for name in ("unet", "text_encoder", "vae")}
    half = StableDiffusionPipeline(
        **parts,
        tokenizer=pipe.tokenizer,
        scheduler=pipe.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    half.save_pretrained(fresh, safe_serialization=True)
    words.write(fresh / "tokenizer")
    tidy_configs(fresh)
    write_declaration(fresh, ("glyphs",), "")
    for path in fresh.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def load_judge() -> tuple[nn.Module, tuple[float, float]]:
    """Load the glyph reader and its normalisation."""
    net = PlainCNN(num_classes=10, **JUDGE)
    net.load_state_dict(load_file(DIGITS_FOLDER / "judge.safetensors"))
    split = real_digits()
    return net.eval(), (round(split.mean, 6), round(split.std, 6))


@torch.no_grad()
def sample(
    pipe: StableDiffusionPipeline,
    template: str,
    per_class: int,
    seed: int = 5,
    steps: int = 20,
    scale: float = 3.0,
) -> torch.Tensor:
    """Sample images of 0..1, class after class."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [template.format(word) for word in glyphs.DIGITS for _ in range(per_class)]
    images = pipe(prompts, num_inference_steps=steps, guidance_scale=scale, generator=generator, output_type="pt")
    return images.images.float()


@torch.no_grad()
def read_rate(images: torch.Tensor) -> float:
    """Measure how many samples the judge reads as asked."""
    net, (mean, std) = load_judge()
    labels = torch.arange(10).repeat_interleave(len(images) // 10)
    return float((net((images - mean) / std).argmax(1) == labels).float().mean())


def light_on_dark_rate(images: torch.Tensor) -> float:
    """Measure how many samples are further above than below their border's brightness."""
    grey = images.mean(1)
    rim = torch.cat([grey[:, 0], grey[:, -1], grey[:, :, 0], grey[:, :, -1]], 1).median(1).values
    high, low = grey.flatten(1).quantile(0.97, 1), grey.flatten(1).quantile(0.03, 1)
    return float((high - rim > rim - low).float().mean())


def examine(pipe: StableDiffusionPipeline, folder: Path, per_class: int = 20) -> dict[str, float]:
    """Score samples of the plain and of the grey prompt and save sheets of them."""
    figures: dict[str, float] = {}
    for name, template in (("plain", PLAIN), ("grey", GREY)):
        images = sample(pipe, template, per_class)
        figures[f"read_{name}"] = round(read_rate(images), 4)
        pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
        glyphs.sheet(pixels, folder / f"samples_{name}.png", columns=per_class)
    figures["light_on_dark_grey"] = round(light_on_dark_rate(images), 4)
    return figures


@torch.no_grad()
def word_gap(prior: Prior, latents: torch.Tensor, looks: list[glyphs.Look], tokenizer: CLIPTokenizer) -> float:
    """Measure how much a wrong digit word raises the loss at a middle noise level, in per cent."""
    alpha = make_scheduler().alphas_cumprod[400]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    noisy, target = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, alpha.sqrt() * noise
    target = target - (1 - alpha).sqrt() * latents
    losses = []
    for offset in (0, 3):
        texts = [PLAIN.format(glyphs.DIGITS[(look.digit + offset) % 10]) for look in looks]
        context = prior.text(torch.tensor(words.word_ids(tokenizer, texts)))[0]
        losses.append(float((prior.unet(noisy, 400, context)[0] - target).square().mean()))
    return 100 * (losses[1] / losses[0] - 1)


class Trainer:
    """Hold the state of one training run."""

    def __init__(self, folder: Path, warm: Path | None = None) -> None:
        torch.manual_seed(SEED)
        self.folder = folder
        self.tokenizer = words.write(folder / "tokenizer")
        self.vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
        images, looks = glyphs.load()
        self.latents = encode(self.vae, to_tensor(images[HELD_OUT:]))
        self.held = encode(self.vae, to_tensor(images[:200])), looks[:200]
        self.ids = caption_ids(looks, self.tokenizer, folder)[HELD_OUT:]
        self.live = Prior(make_unet(), make_text_encoder(self.tokenizer))
        print(f"words known: loss {learn_words(self.live.text, self.ids):.4f}", flush=True)
        if warm:
            start = UNet2DConditionModel.from_pretrained(warm / "unet").state_dict()
            self.live.unet.load_state_dict(start, strict=False)
        self.ema = copy.deepcopy(self.live)
        for weights in self.ema.parameters():
            weights.requires_grad_(False)
        self.alphas = make_scheduler().alphas_cumprod
        self.objective = Objective(self.live.unet)
        groups = [
            {"params": list(self.live.unet.parameters())},
            {"params": list(self.live.text.parameters())},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-2)

    def step(self, lr: float, count: int) -> float:
        """Make one update and give its loss."""
        for group, factor in zip(self.optimiser.param_groups, (1.0, 0.3), strict=True):
            group["lr"] = lr * factor
        rows = torch.randint(len(self.latents), (BATCH,))
        ids = self.ids[rows, torch.randint(CAPTIONS, (BATCH,))]
        noisy, steps, target, weight = noised(self.latents[rows], self.alphas)
        with torch.autocast("cpu", torch.bfloat16):
            context = self.live.text(ids)[0]
            loss = self.objective(noisy, steps, context, target, weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.live.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        decay = min(0.999, (count + 1) / (count + 10))
        update_ema(self.ema.unet, self.live.unet, decay)
        update_ema(self.ema.text, self.live.text, decay)
        return float(loss.detach())

    def checkpoint(self) -> dict[str, float]:
        """Publish the averaged weights and score what was published."""
        publish(make_pipeline(self.ema, self.vae, self.tokenizer), DIGITS_FOLDER / "pipeline")
        pipe = StableDiffusionPipeline.from_pretrained(
            DIGITS_FOLDER / "pipeline", use_safetensors=True, torch_dtype=torch.float32
        )
        pipe.set_progress_bar_config(disable=True)
        return examine(pipe, self.folder)


def train(iterations: int, minutes: float, folder: Path, warm: Path | None = None) -> dict[str, float]:
    """Train to the end, publishing a whole pipeline every few minutes."""
    trainer = Trainer(folder, warm)
    print(
        f"unet {sum(p.numel() for p in trainer.live.unet.parameters()):,}, "
        f"text {sum(p.numel() for p in trainer.live.text.parameters()):,}",
        flush=True,
    )
    start, count, losses, due = time.time(), 0, [], 4.0
    while count < iterations and (spent := (time.time() - start) / 60) < minutes:
        losses.append(trainer.step(rate(max(count / iterations, spent / minutes), count), count))
        count += 1
        if count in (20, 50) or count % 100 == 0:
            print(f"{count} {(time.time() - start) / 60:.2f} min loss {np.mean(losses[-100:]):.4f}", flush=True)
        if count % 200 == 0:
            print(f"  word gap {word_gap(trainer.live, *trainer.held, trainer.tokenizer):.2f} %", flush=True)
        if spent > due:
            due = CHECKPOINT_MINUTES * (spent // CHECKPOINT_MINUTES + 1)
            print(f"  checkpoint {trainer.checkpoint()}", flush=True)
    figures = {
        "parameters_unet": sum(p.numel() for p in trainer.live.unet.parameters()),
        "parameters_text": sum(p.numel() for p in trainer.live.text.parameters()),
        "iterations": count,
        "batch": BATCH,
        "minutes": round((time.time() - start) / 60, 2),
        "loss": round(float(np.mean(losses[-300:])), 4),
        **trainer.checkpoint(),
    }
    (folder / "unet.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures), flush=True)
    return figures


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="training steps")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="wall-clock cap, which also paces the decay")
    parser.add_argument("--warm", type=Path, help="pipeline folder whose UNet to start from (default: from nothing)")
    args = parser.parse_args()
    train(args.iterations, args.minutes, glyphs.SCRATCH, args.warm)


if __name__ == "__main__":
    main()
