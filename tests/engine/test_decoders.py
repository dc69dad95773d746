"""What guidance looks through: a tiny autoencoder instead of the full VAE."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from synthkd.dfkd import TeacherGuidance, load_teacher
from synthkd.engine import GuidanceSpec, Recipe, Request, Synthesizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random AutoencoderTiny for 4-channel latents, one doubling."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(4)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    folder = tmp_path_factory.mktemp("tiny") / "vae"
    vae.save_pretrained(folder)
    return folder


def draw(folder: Path, recipe: Recipe, card: Path) -> Any:
    """The first group, guided."""
    guidance = TeacherGuidance(load_teacher(str(card)))
    synth = Synthesizer.from_pretrained(str(folder), recipe, guidance=guidance, device="cpu")
    return synth, next(iter(synth.stream(Request(num_samples=6))))


def test_guidance_through_a_tiny_autoencoder(
    pipeline_folder: Path, teacher_card: Path, tiny: Path, recipe: Callable[..., Recipe]
) -> None:
    """It steers (the class term falls), the final image comes from the full VAE, and the identity says so."""
    cheap = recipe(steps=8, guidance=GuidanceSpec(scale=0.3, decoder=f"tiny:{tiny}"))
    full = recipe(steps=8, guidance=GuidanceSpec(scale=0.3))
    synth, batch = draw(pipeline_folder, cheap, teacher_card)
    other, plain = draw(pipeline_folder, full, teacher_card)
    assert sum(batch.curves["ce"][-1]) < sum(batch.curves["ce"][0])
    assert batch.images.shape == plain.images.shape == (6, 3, 16, 16)
    assert not torch.equal(batch.images, plain.images)
    assert synth.identity(0)["model_sha256"] != other.identity(0)["model_sha256"]


def test_a_live_pipeline_takes_it_from_the_recipe(
    pipeline: Any, pipeline_folder: Path, teacher_card: Path, tiny: Path, recipe: Callable[..., Recipe]
) -> None:
    """`from_pipeline` and `from_pretrained` draw the same, up to the memory layout's rounding."""
    cheap = recipe(guidance=GuidanceSpec(scale=0.3, decoder=f"tiny:{tiny}"))
    guidance = TeacherGuidance(load_teacher(str(teacher_card)))
    live = next(iter(Synthesizer.from_pipeline(pipeline, cheap, guidance=guidance).stream(Request(num_samples=6))))
    _, loaded = draw(pipeline_folder, cheap, teacher_card)
    assert (live.images.int() - loaded.images.int()).abs().max() <= 1
