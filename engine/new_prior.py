"""A small text-conditional latent diffusion model, new and untrained, as a stock StableDiffusionPipeline.

Its words are few: the tokenizer knows those of its captions alone, each as one token.
"""

import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from synthkd.engine.errors import SynthkdError
from synthkd.engine.models import libraries

T = TypeVar("T")

_START, _END = "<|startoftext|>", "<|endoftext|>"
_Merge = tuple[str, str]
_TRAIN_STEPS = 1000
_STOCK = 8  # pixels: stock pipelines draw multiples of it
# Ends at a signal-to-noise ratio of 2.3e-4: little of a mean brightness leaks through (arXiv 2305.08891).
_BETAS = (0.00085, 0.02)


@dataclass(frozen=True, kw_only=True)
class PriorShape:
    """height, width: of images, pixels; words: of captions, lower case; length: of a caption in tokens, with both ends.

    vae_widths: channels of the autoencoder from full size down, each stage half as large as the one before, so that a
    latent position covers 2 ** (len(vae_widths) - 1) pixels a side; unet_widths: of the denoiser, likewise, with
    attention in the last stage; layers: residual blocks of each of its stages; text_width: of the text encoder.
    """

    height: int
    width: int
    words: tuple[str, ...]
    length: int
    vae_widths: tuple[int, ...] = (32, 64)
    latent_channels: int = 4
    unet_widths: tuple[int, ...] = (48, 96, 96)
    layers: int = 1
    text_width: int = 96

    def __post_init__(self) -> None:
        """Raise SynthkdError for a size that the halvings do not divide, and widths that groups of 16 do not."""
        step = max(_STOCK, self.factor * 2 ** (len(self.unet_widths) - 1))
        for name, value in (("height", self.height), ("width", self.width)):
            if value < step or value % step:
                raise SynthkdError(f"prior: {name} is {value}; this network needs a multiple of {step}")
        for name, widths in (("vae_widths", self.vae_widths), ("unet_widths", self.unet_widths)):
            if not widths or any(w < 16 or w % 16 for w in widths):
                raise SynthkdError(f"prior: {name} is {list(widths)}; expected multiples of 16")
        if not self.words:
            raise SynthkdError("prior: the captions have no word; expected at least one")

    @property
    def factor(self) -> int:
        """Pixels a side that a latent position covers."""
        return int(2 ** (len(self.vae_widths) - 1))

    @property
    def latent(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent."""
        return self.latent_channels, self.height // self.factor, self.width // self.factor


def new_scheduler() -> Any:
    """The noise schedule: scaled linear, v-prediction (arXiv 2202.00512)."""
    diffusers, _ = libraries()
    return diffusers.DDIMScheduler(
        num_train_timesteps=_TRAIN_STEPS, beta_schedule="scaled_linear", beta_start=_BETAS[0], beta_end=_BETAS[1],
        prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def new_vae(shape: PriorShape) -> Any:
    """An AutoencoderKL with random weights; its scaling factor is set by `settle_vae`."""
    diffusers, _ = libraries()
    stages = len(shape.vae_widths)
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=shape.latent_channels,
        sample_size=max(shape.height, shape.width), block_out_channels=shape.vae_widths,
        down_block_types=("DownEncoderBlock2D",) * stages, up_block_types=("UpDecoderBlock2D",) * stages,
        layers_per_block=1, norm_num_groups=16, scaling_factor=1.0, force_upcast=False,
    )  # fmt: skip


def new_unet(shape: PriorShape) -> Any:
    """A UNet2DConditionModel with random weights; the caption is attended to, and pooled beside the timestep."""
    diffusers, _ = libraries()
    plain, channels = len(shape.unet_widths) - 1, shape.latent_channels
    return diffusers.UNet2DConditionModel(
        sample_size=shape.latent[1:], in_channels=channels, out_channels=channels, layers_per_block=shape.layers,
        block_out_channels=shape.unet_widths, norm_num_groups=16, attention_head_dim=4,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * plain,
        cross_attention_dim=shape.text_width, addition_embed_type="text", addition_embed_type_num_heads=4,
    )  # fmt: skip


def new_text_encoder(shape: PriorShape, tokenizer: Any) -> Any:
    """A CLIPTextModel of two layers with random weights, and word embeddings far enough apart to be learned from."""
    _, transformers = libraries()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=shape.text_width, intermediate_size=2 * shape.text_width,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=shape.length,
        projection_dim=shape.text_width, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    encoder = transformers.CLIPTextModel(config)
    nn.init.normal_(encoder.get_input_embeddings().weight, std=0.3)
    return encoder


def new_tokenizer(shape: PriorShape) -> Any:
    """A CLIPTokenizer whose merges make one token of every word."""
    _, transformers = libraries()
    ranks = word_merges(shape.words)
    letters = sorted({c for word in shape.words for c in word})
    pieces = [_START, _END, *letters, *(f"{c}</w>" for c in letters), *(a + b for a, b in ranks)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    with tempfile.TemporaryDirectory() as place:
        Path(place, "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
        lines = ["#version: 0.2", *(f"{a} {b}" for a, b in ranks)]
        Path(place, "merges.txt").write_text("\n".join(lines) + "\n")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(place, model_max_length=shape.length)
    for word in shape.words:
        if (found := len(tokenizer(word).input_ids)) != 3:
            raise SynthkdError(f"prior: the word {word!r} is {found - 2} tokens; expected letters a to z alone")
    return tokenizer


def word_merges(words: Sequence[str]) -> dict[_Merge, int]:
    """Merges by rank, word by word until each one is a single token; later ones never disturb earlier words."""
    ranks: dict[_Merge, int] = {}
    for word in words:
        while len(parts := _split(word, ranks)) > 1:
            ranks[parts[0], parts[1]] = len(ranks)
    return ranks


def _split(word: str, ranks: Mapping[_Merge, int]) -> list[str]:
    """A word as byte-pair encoding splits it."""
    parts = [*word[:-1], word[-1] + "</w>"]
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(itertools.pairwise(parts)))
        if rank == len(ranks):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def token_ids(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """int64 [N,L], as a pipeline tokenizes them."""
    told = tokenizer(
        list(captions), padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
        return_tensors="pt",
    )  # fmt: skip
    ids: Tensor = told.input_ids
    return ids


def mean_latents(vae: Any, images: Tensor) -> Tensor:
    """images [B,3,H,W] of -1..1 -> the posterior's means [B,C,h,w], unscaled."""
    moments: Tensor = vae.quant_conv(vae.encoder(images))
    return moments.chunk(2, dim=1)[0]


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Unscaled latents [B,C,h,w] -> images [B,3,H,W] around -1..1."""
    images: Tensor = vae.decoder(vae.post_quant_conv(latents))
    return images


@torch.no_grad()
def settle_vae(vae: Any, latents: Tensor) -> None:
    """Centre and level the latents' channels, and set the scaling factor that gives them a deviation of 1.

    latents: [N,C,h,w], the means of many images, on any device. Both are folded into the 1x1 convolutions around the
    latents, so that reconstructions stay as they are; the posterior's deviation, which training did not use, becomes
    0.05.
    """
    channels, before, after = latents.shape[1], vae.quant_conv, vae.post_quant_conv
    latents = latents.to(before.weight.device)
    shift, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3)).clamp_min(1e-6)
    before.weight[:channels] /= spread.view(-1, 1, 1, 1)
    before.bias[:channels] = (before.bias[:channels] - shift) / spread
    before.weight[channels:], before.bias[channels:] = 0, 2 * math.log(0.05)
    after.bias += after.weight[:, :, 0, 0] @ shift
    after.weight *= spread.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)


def save_pipeline(
    unet: Any, text_encoder: Any, vae: Any, tokenizer: Any, folder: Path, declare: Callable[[Path], T]
) -> T:
    """Write a whole StableDiffusionPipeline in float16; a kill leaves the old folder, or none, or this one.

    declare: writes what belongs beside the weights into the folder before it is in its place; what it returns is
    returned. Raises SynthkdError for a weight that is not finite in float16, and where the disk is full.
    """
    diffusers, _ = libraries()
    pipe = diffusers.StableDiffusionPipeline(
        **_halves({"unet": unet, "text_encoder": text_encoder, "vae": vae}), tokenizer=tokenizer,
        scheduler=new_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        pipe.save_pretrained(fresh, safe_serialization=True)
        tidy_configs(fresh)
        told = declare(fresh)
        _to_disk(fresh)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        reason = " ".join(str(error).split())[:160]
        raise SynthkdError(f"{folder}: cannot be written ({reason}); free space or make it writable") from error
    _replace(folder, fresh)
    return told


def _halves(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Copies in float16 on the host; raises SynthkdError for a weight that is not finite there."""
    halves = {name: deepcopy(part).to("cpu").half() for name, part in parts.items()}
    for name, part in halves.items():
        if not all(bool(p.isfinite().all()) for p in part.parameters()):
            raise SynthkdError(f"prior: a weight of the {name} is not finite in float16; lower the learning rate")
    return halves


def _to_disk(folder: Path) -> None:
    """Force all files of a folder to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as f:
                os.fsync(f.fileno())


def _replace(folder: Path, fresh: Path) -> None:
    """Put a fresh folder in another one's place."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def tidy_configs(folder: Path) -> None:
    """Drop local paths from the configs, and let every part load in the same dtype."""
    for path in (*folder.glob("*.json"), *folder.glob("*/*config.json")):
        fields = json.loads(path.read_text())
        fields.pop("_name_or_path", None)
        if "dtype" in fields:
            fields["dtype"] = "float32"
        path.write_text(json.dumps(fields, indent=2) + "\n")


@torch.no_grad()
def draw_samples(
    folder: Path,
    captions: Sequence[str],
    *,
    seed: int,
    steps: int,
    scale: float,
    device: str,
    at_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """uint8 [N,3,H,W] by diffusers' own loop from a saved pipeline, one image for each caption.

    at_step: called after every denoiser call; what it raises ends the drawing.
    """
    diffusers, _ = libraries()

    def after(pipe: Any, index: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
        at_step()
        return state

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        folder, use_safetensors=True, dtype=torch.float32
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    size = pipe.unet.config.sample_size
    high, wide = (size, size) if isinstance(size, int) else size
    generator, out = torch.Generator().manual_seed(seed), []
    for at in range(0, len(captions), 64):
        part = list(captions[at : at + 64])
        made = pipe(
            part, num_inference_steps=steps, guidance_scale=scale, generator=generator, output_type="pt",
            height=high * pipe.vae_scale_factor, width=wide * pipe.vae_scale_factor, callback_on_step_end=after,
        )  # fmt: skip
        out.append((made.images.float().clamp(0, 1) * 255).round().to("cpu", torch.uint8))
    return torch.cat(out)
