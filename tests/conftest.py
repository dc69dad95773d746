"""Shared: one thread, no hub, and pipelines and teachers small enough to build in a test."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)

WORDS = ["a", "photo", "of", "cat", "dog", "bird"]


def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = letters + [x + "</w>" for x in letters] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=16)


def build_pipeline(folder: Path, prediction_type: str = "epsilon", dtype: torch.dtype = torch.float32) -> Any:
    """A StableDiffusionPipeline of random weights: 16x16 images, f=2, latents 4x8x8."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = _tokenizer(folder / "tokens")
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, norm_num_groups=4, attention_head_dim=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16, scaling_factor=0.7,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype=dtype)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An epsilon-prediction pipeline in float32."""
    return build_pipeline(tmp_path_factory.mktemp("pipe"))


@pytest.fixture(scope="session")
def pipeline_folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pipeline, saved."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline64(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline in float64, for finite differences."""
    return build_pipeline(tmp_path_factory.mktemp("pipe64"), dtype=torch.float64)


@pytest.fixture
def recipe() -> Callable[..., Any]:
    """A Recipe for the tiny pipeline, fields overridable."""
    from synthkd.engine import GuidanceSpec, Recipe

    def make(**changes: Any) -> Recipe:
        fields: dict[str, Any] = {
            "classes": ("cat", "dog", "bird"),
            "prompts": ("a photo of a {class}", "a {class}"),
            "height": 16,
            "width": 16,
            "steps": 4,
            "guidance_scale": 3.0,
            "guidance": GuidanceSpec(scale=0.0),
            "classes_per_group": 3,
            "samples_per_class": 2,
            "groups_per_shard": 3,
        }
        return Recipe(**{**fields, **changes})

    return make


@pytest.fixture(scope="session")
def teacher_card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A card with a small random ResNet of three classes, its running statistics moved off their defaults."""
    from safetensors.torch import save_file

    from synthkd.dfkd.nets import build_net

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("teacher")
    args = {"widths": [8, 12], "blocks": [1, 1]}
    net = build_net("resnet", 3, args)
    net.train()
    for _ in range(20):
        net(torch.randn(16, 3, 16, 16) * 0.7 + 0.2)
    save_file(net.state_dict(), folder / "teacher.safetensors")
    (folder / "teacher.toml").write_text(
        'arch = "resnet"\nweights = "teacher.safetensors"\ninput_size = [16, 16]\nmean = [0.5, 0.5, 0.5]\n'
        'std = [0.25, 0.25, 0.25]\nclasses = ["cat", "dog", "bird"]\n[arch_args]\nwidths = [8, 12]\nblocks = [1, 1]\n'
    )
    return folder / "teacher.toml"
