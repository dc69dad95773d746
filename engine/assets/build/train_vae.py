"""Train the autoencoder (f=4, four latent channels) on rendered glyphs."""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path

import glyphs
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

SEED = 11
HELD_OUT = 1_000
ITERATIONS = 3_000
MINUTES = 15.0
BATCH = 32
NOISE = 0.1


def make_vae() -> AutoencoderKL:
    """Build the autoencoder."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=32,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=16,
        scaling_factor=1.0,
        force_upcast=False,
    )


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """Turn uint8 NHWC images into floats of -1..1, NCHW."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def mean_latents(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Encode to the posterior's mean."""
    return vae.quant_conv(vae.encoder(images)).chunk(2, dim=1)[0]


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Decode unscaled latents."""
    return vae.decoder(vae.post_quant_conv(latents))


class Objective(torch.nn.Module):
    """Reconstruction through mean latents with fixed noise."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Give the training loss of one batch."""
        latents = mean_latents(self.vae, images).float()
        rebuilt = decode(self.vae, latents + NOISE * noise).float()
        error = F.mse_loss(rebuilt, images) + 0.3 * F.l1_loss(rebuilt, images)
        return error + 3e-4 * latents.square().mean()


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Measure the mean PSNR over images of -1..1."""
    parts = [decode(vae, mean_latents(vae, batch)).clamp(-1, 1) - batch for batch in images.split(100)]
    per_image = torch.cat(parts).square().mean((1, 2, 3)) / 4
    return float((-10 * per_image.clamp_min(1e-8).log10()).mean())


def rate(progress: float, step: int, peak: float = 1e-3) -> float:
    """Warm up over 100 steps, then follow a cosine down to 3 %."""
    return peak * min(1.0, (step + 1) / 100) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@torch.no_grad()
def even_out(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Fold a per-channel centring and levelling of the latents into the two 1x1 convolutions."""
    shift, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) / latents.std()
    vae.quant_conv.weight[:4] /= spread.view(4, 1, 1, 1)
    vae.quant_conv.bias[:4] = (vae.quant_conv.bias[:4] - shift) / spread
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ shift
    vae.post_quant_conv.weight *= spread.view(1, 4, 1, 1)


@torch.no_grad()
def finish(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Even out the latents, set the scaling factor and make the unused log-variance a small constant."""
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias[4:] = 2 * math.log(0.05)
    even_out(vae, torch.cat([mean_latents(vae, batch) for batch in images.split(200)]))
    latents = torch.cat([mean_latents(vae, batch) for batch in images.split(200)])
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    return float(vae.config.scaling_factor)


def update_ema(ema: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Move the averaged weights towards the current ones."""
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - decay)


def train(iterations: int, minutes: float, folder: Path) -> dict[str, float]:
    """Train, log and save the autoencoder."""
    torch.manual_seed(SEED)
    images = to_tensor(glyphs.load()[0])
    held, images = images[:HELD_OUT], images[HELD_OUT:].contiguous(memory_format=torch.channels_last)
    vae = make_vae().to(memory_format=torch.channels_last)
    ema = copy.deepcopy(vae).requires_grad_(False)
    print(f"parameters {sum(p.numel() for p in vae.parameters()):,}", flush=True)
    objective = Objective(vae)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    start, step = time.time(), 0
    while step < iterations and (time.time() - start) / 60 < minutes:
        progress = max(step / iterations, (time.time() - start) / 60 / minutes)
        optimiser.param_groups[0]["lr"] = rate(progress, step)
        batch = images[torch.randint(len(images), (BATCH,))]
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(batch, torch.randn(BATCH, 4, 8, 8))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        update_ema(ema, vae, min(0.995, (step + 1) / (step + 10)))
        step += 1
        if step in (20, 50) or step % 100 == 0:
            print(f"{step} {(time.time() - start) / 60:.2f} min loss {loss.item():.4f}", flush=True)
        if step % 400 == 0:
            print(f"  held-out PSNR {psnr(ema, held[:200]):.2f}", flush=True)
            ema.save_pretrained(folder / "vae_partial")
    return save(ema, held, folder, step, (time.time() - start) / 60)


def save(vae: AutoencoderKL, held: torch.Tensor, folder: Path, steps: int, minutes: float) -> dict[str, float]:
    """Save the finished autoencoder, its figures and a sheet of reconstructions."""
    scaling = finish(vae, held)
    vae.save_pretrained(folder / "vae")
    figures = {
        "parameters": sum(p.numel() for p in vae.parameters()),
        "iterations": steps,
        "batch": BATCH,
        "minutes": round(minutes, 2),
        "psnr_held_out": round(psnr(vae, held), 2),
        "scaling_factor": scaling,
    }
    (folder / "vae.json").write_text(json.dumps(figures, indent=2) + "\n")
    with torch.no_grad():
        rebuilt = decode(vae, mean_latents(vae, held[:64])).clamp(-1, 1)
    rows = torch.stack([held[:64].view(4, 16, 3, 32, 32), rebuilt.view(4, 16, 3, 32, 32)], 1).flatten(0, 2)
    pixels = rows.add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    glyphs.sheet(pixels, folder / "vae.png")
    print(json.dumps(figures), flush=True)
    return figures


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="training steps")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="wall-clock cap, which also paces the decay")
    args = parser.parse_args()
    train(args.iterations, args.minutes, glyphs.SCRATCH)


if __name__ == "__main__":
    main()
