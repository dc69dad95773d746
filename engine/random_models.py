"""Published architectures with random weights, as priors for benchmarks: speed and memory do not depend on weights.

Prompts are not encoded: conditions are random embeddings of the right shapes, so the text encoders are neither built
nor timed (their states are kept for each prompt, and class prompts are few).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from synthkd.engine import rng
from synthkd.engine.errors import SynthkdError, suggest
from synthkd.engine.latent_model import Conditioning, LatentModel
from synthkd.engine.priors import StableDiffusion, StableDiffusionXL

_TOKENS = 77  # of CLIP's text encoders
_SCHEDULER: Mapping[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
_VAE: Mapping[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
_SD15: Mapping[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,  # the number of heads, as diffusers reads it here
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
_SDXL: Mapping[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}


@dataclass(frozen=True)
class Architecture:
    """pipeline: diffusers' class; networks: part -> class and config; text: embedding of a prompt, name -> shape."""

    pipeline: str
    networks: Mapping[str, tuple[str, Mapping[str, Any]]]
    text: Mapping[str, tuple[int, ...]]
    scheduler: Mapping[str, Any] = field(default_factory=lambda: _SCHEDULER)
    flags: dict[str, Any] = field(default_factory=dict)


# SDXL's autoencoder as its published repair for half precision declares it: the original decodes in float32 there.
ARCHITECTURES: Mapping[str, Architecture] = {
    "sd15": Architecture(
        "StableDiffusionPipeline",
        {
            "unet": ("UNet2DConditionModel", _SD15),
            "vae": ("AutoencoderKL", {**_VAE, "sample_size": 512, "scaling_factor": 0.18215}),
        },
        {"encoder_hidden_states": (1, _TOKENS, 768)},
        flags={"safety_checker": None, "feature_extractor": None},
    ),
    "sdxl": Architecture(
        "StableDiffusionXLPipeline",
        {
            "unet": ("UNet2DConditionModel", _SDXL),
            "vae": ("AutoencoderKL", {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": False}),
        },
        {"encoder_hidden_states": (1, _TOKENS, 2048), "text_embeds": (1, 1280)},
    ),
}


def architecture(name: str) -> Architecture:
    """By name; raises SynthkdError with the known ones."""
    if name not in ARCHITECTURES:
        raise SynthkdError(f"architecture {name!r}: {suggest(name, ARCHITECTURES)}")
    return ARCHITECTURES[name]


def draw_weights(network: nn.Module, device: torch.device, seed: int = 0) -> nn.Module:
    """A network on the meta device -> frozen on `device`: weights N(0, 1 / fan_in), biases 0, norms' weights 1.

    With that sigma activations keep their size from layer to layer (arXiv 1502.01852, section 2.2, without its 2).
    """
    network = network.eval().requires_grad_(False)
    if device.type == "meta":
        return network
    network.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in network.named_parameters():
        if weight.dim() > 1:
            weight.normal_(0.0, 1.0 / math.sqrt(weight[0].numel()), generator=generator)
        else:
            weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return network


class _RandomText(StableDiffusion):
    """A prior whose prompts have random embeddings: N(0, 1), a function of the prompt."""

    text: Mapping[str, tuple[int, ...]]

    def _encode(self, prompt: str) -> Conditioning:
        return {name: self._embedding(prompt, name, shape) for name, shape in self.text.items()}

    def _embedding(self, prompt: str, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(rng.normal(0, 0, f"{name} of {prompt}", math.prod(shape))).view(shape)


class _RandomSD(_RandomText):
    text = ARCHITECTURES["sd15"].text


class _RandomXL(_RandomText, StableDiffusionXL):
    text = ARCHITECTURES["sdxl"].text


def random_prior(
    name: str, *, device: str | torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
) -> LatentModel:
    """A prior of a published architecture with random weights: `sd15` or `sdxl` (see `models.random_pipeline`)."""
    from synthkd.engine.models import random_pipeline

    pipe = random_pipeline(name, device=device, dtype=dtype, seed=seed)
    return {"sd15": _RandomSD, "sdxl": _RandomXL}[name](pipe)
