"""Pipelines of random weights, one builder per family: 16x16 images, latents 4x8x8, well under a second each."""

import json
from pathlib import Path
from typing import Any

import torch

LABELS = {0: "cat", 1: "dog", 2: "bird, fowl", 3: "crane", 4: "Crane, derrick", 5: "Cheetah, chetah"}


def tokenizer(folder: Path, pad: str | None = None) -> Any:
    """A CLIPTokenizer over single letters, 16 tokens long."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = letters + [x + "</w>" for x in letters] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=16, **({"pad_token": pad} if pad else {}))


def text_config(tokens: Any, **changes: Any) -> Any:
    """A text encoder's config over the tokenizer."""
    from transformers import CLIPTextConfig

    fields = {
        "vocab_size": len(tokens), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 16, "eos_token_id": tokens.eos_token_id,
        "bos_token_id": tokens.bos_token_id,
    }  # fmt: skip
    return CLIPTextConfig(**{**fields, **changes})


def autoencoder(**changes: Any) -> Any:
    """An AutoencoderKL with one doubling."""
    from diffusers import AutoencoderKL

    fields: dict[str, Any] = {
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16,
        "scaling_factor": 0.7,
    }  # fmt: skip
    return AutoencoderKL(**{**fields, **changes})


def tiny_autoencoder(**changes: Any) -> Any:
    """An AutoencoderTiny with one doubling."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(4)
    fields: dict[str, Any] = {
        "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1), "latent_channels": 4,
    }  # fmt: skip
    return AutoencoderTiny(**{**fields, **changes})


def denoiser(**changes: Any) -> Any:
    """A UNet2DConditionModel of two levels."""
    from diffusers import UNet2DConditionModel

    fields: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 16, "norm_num_groups": 4,
        "attention_head_dim": 8,
    }  # fmt: skip
    return UNet2DConditionModel(**{**fields, **changes})


def schedule(**changes: Any) -> Any:
    """Stable Diffusion's DDIMScheduler."""
    from diffusers import DDIMScheduler

    fields: dict[str, Any] = {
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
        "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "epsilon",
    }  # fmt: skip
    return DDIMScheduler(**{**fields, **changes})


def sd(folder: Path, dtype: torch.dtype = torch.float32, **unet: Any) -> Any:
    """A StableDiffusionPipeline in the layout of 1.x; unet: changes to its config."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    tokens = tokenizer(folder / "tokens")
    pipe = StableDiffusionPipeline(
        unet=denoiser(**unet), vae=autoencoder(), text_encoder=CLIPTextModel(text_config(tokens)), tokenizer=tokens,
        scheduler=schedule(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return quiet(pipe, dtype)


def lcm(folder: Path) -> Any:
    """A LatentConsistencyModelPipeline: the guidance scale is embedded in its UNet."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    parts = sd(folder, time_cond_proj_dim=10).components
    parts["scheduler"] = LCMScheduler.from_config(parts["scheduler"].config)
    return quiet(LatentConsistencyModelPipeline(**parts, requires_safety_checker=False))


def sd2(folder: Path) -> Any:
    """A StableDiffusionPipeline in the layout of 2.x: v-prediction, linear projections, OpenCLIP's activation."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(2)
    tokens = tokenizer(folder / "tokens", pad="a")
    text = CLIPTextModel(text_config(tokens, hidden_act="gelu", num_hidden_layers=2, hidden_size=24))
    unet = denoiser(use_linear_projection=True, attention_head_dim=(1, 2), cross_attention_dim=24)
    pipe = StableDiffusionPipeline(
        unet=unet, vae=autoencoder(), text_encoder=text, tokenizer=tokens,
        scheduler=schedule(prediction_type="v_prediction"), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    return quiet(pipe)


def sdxl(folder: Path, dtype: torch.dtype = torch.float32, **vae: Any) -> Any:
    """A StableDiffusionXLPipeline: two text encoders of different widths; vae: changes to its config."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(3)
    tokens, tokens_2 = tokenizer(folder / "tokens"), tokenizer(folder / "tokens_2", pad="a")
    wide = text_config(tokens_2, num_hidden_layers=2, hidden_size=24, hidden_act="gelu", projection_dim=20)
    unet = denoiser(
        cross_attention_dim=16 + 24, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=20 + 6 * 8, use_linear_projection=True, attention_head_dim=(1, 2),
        transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        unet=unet, vae=autoencoder(**vae), scheduler=schedule(),
        text_encoder=CLIPTextModel(text_config(tokens, num_hidden_layers=2)), tokenizer=tokens,
        text_encoder_2=CLIPTextModelWithProjection(wide), tokenizer_2=tokens_2, add_watermarker=False,
    )  # fmt: skip
    return quiet(pipe, dtype)


def dit(classes: int = 1000) -> Any:
    """A DiTPipeline with a learned sigma; diffusers' own loop takes 1000 for the null class, whatever the model has."""
    from diffusers import DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(5)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=classes, norm_num_groups=4,
    )  # fmt: skip
    pipe = DiTPipeline(
        transformer=transformer, vae=autoencoder(), scheduler=schedule(beta_schedule="linear"), id2label=LABELS
    )
    pipe.register_to_config(id2label={str(n): text for n, text in LABELS.items()})
    return quiet(pipe)


def quiet(pipe: Any, dtype: torch.dtype = torch.float32) -> Any:
    """No progress bar, the given dtype, and evaluation mode, as after loading."""
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe.to(dtype=dtype)
