"""New priors: words as single tokens, a settled autoencoder that says the same, a pipeline that anyone can load."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.engine import Recipe, Request, Synthesizer, SynthkdError
from synthkd.engine.declared import write_declaration
from synthkd.engine.models import load_model
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

WORDS = ("a", "an", "and", "ant", "s", "t", "banana", "bananas", "man", "woman", "antman", "supercalifragilistic")


def shape(**changes: Any) -> PriorShape:
    """A tiny one: 16x8 pixels, captions of at most four words."""
    fields: dict[str, Any] = {"height": 16, "width": 8, "words": WORDS, "length": 6, "vae_widths": (16, 16)}
    return PriorShape(**{**fields, "unet_widths": (16, 16), "text_width": 16, **changes})


def test_every_word_is_one_token_whatever_it_shares_with_others() -> None:
    for words in (WORDS, WORDS[::-1]):
        tokenizer = new_tokenizer(shape(words=words))
        singles = [tokenizer(word).input_ids for word in words]
        assert all(len(ids) == 3 for ids in singles)
        assert len({ids[1] for ids in singles}) == len(words)
        told = tokenizer("an antman and bananas").input_ids
        assert told[1:-1] == [tokenizer(word).input_ids[1] for word in ("an", "antman", "and", "bananas")]


def test_what_an_unknown_word_is() -> None:
    """Of unknown letters it is like no caption at all; of known ones it falls into pieces that no caption has."""
    tokenizer = new_tokenizer(shape(words=("red", "green")))
    nothing, unknown, pieces, known = token_ids(tokenizer, ["", "xyzzy", "deer", "red"])
    assert torch.equal(nothing, unknown)
    assert not torch.equal(nothing, pieces)
    assert not set(pieces[1:-1].tolist()) & {int(known[1])}


def test_captions_may_be_longer_than_clip_has_places_for() -> None:
    many = tuple(f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst")
    one = shape(words=many, length=len(many) + 2)
    tokenizer = new_tokenizer(one)
    ids = token_ids(tokenizer, [" ".join(many)])
    assert ids.shape == (1, 102)
    assert len(set(ids[0].tolist())) == 102
    assert new_text_encoder(one, tokenizer)(ids)[0].shape == (1, 102, 16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"height": 12}, "height is 12; this network needs a multiple of 8"),
        ({"width": 24, "unet_widths": (16, 16, 16, 16)}, "width is 24; this network needs a multiple of 16"),
        ({"height": 0}, "height is 0"),
        ({"vae_widths": (16, 24)}, "vae_widths is [16, 24]; expected multiples of 16"),
        ({"unet_widths": ()}, "unet_widths is []"),
        ({"words": ()}, "the captions have no word"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SynthkdError) as error:
        shape(**changes)
    assert words in str(error.value)


def test_settling_changes_no_reconstruction() -> None:
    """In float64: centred, levelled latents of deviation 1, the same images, a posterior of deviation 0.05."""
    torch.manual_seed(3)
    vae = new_vae(shape()).double().eval()
    with torch.no_grad():
        vae.quant_conv.weight.mul_(torch.linspace(0.2, 3, 8, dtype=torch.float64).view(-1, 1, 1, 1))
        vae.quant_conv.bias.add_(torch.linspace(-2, 2, 8, dtype=torch.float64))
    images = torch.rand(12, 3, 16, 8, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        before = mean_latents(vae, images)
        told = decoded(vae, before)
        settle_vae(vae, before)
        after = mean_latents(vae, images)
        assert (decoded(vae, after) - told).abs().max() < 1e-10
        posterior = vae.encode(images).latent_dist
    assert (before.mean((0, 2, 3)).abs() > 0.1).any()
    assert after.mean((0, 2, 3)).abs().max() < 1e-10
    assert (after.std((0, 2, 3)) - 1).abs().max() < 1e-10
    assert (posterior.mean - after).abs().max() < 1e-12
    assert (posterior.std - 0.05).abs().max() < 1e-10
    assert vae.config.scaling_factor == 1.0


def test_settling_takes_latents_of_the_host_to_the_autoencoder() -> None:
    """As `fit-prior` has them on a GPU; here it is `meta`, where mixing devices raises too."""
    vae = new_vae(shape()).to("meta")
    settle_vae(vae, torch.randn(5, 4, 8, 4))
    assert vae.config.scaling_factor == 1.0


def test_weights_that_are_not_those_declared_are_not_loaded(saved: Path, tmp_path: Path) -> None:
    """A folder whose denoiser was exchanged says nothing of the new one."""
    folder = tmp_path / "p"
    shutil.copytree(saved, folder)
    write_declaration(folder, ["glyphs"], "")
    load_model(str(folder), device="cpu", dtype=torch.float32)
    next((folder / "unet").glob("*.safetensors")).write_bytes(b"other")
    with pytest.raises(SynthkdError, match=r"unet/.* not the file that it declares"):
        load_model(str(folder), device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, Any, Any]:
    """An untrained denoiser, text encoder, autoencoder and tokenizer."""
    torch.manual_seed(0)
    one = shape()
    tokenizer = new_tokenizer(one)
    return new_unet(one), new_text_encoder(one, tokenizer), new_vae(one), tokenizer


@pytest.fixture(scope="module")
def saved(parts: tuple[Any, Any, Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a pipeline's folder."""
    folder = tmp_path_factory.mktemp("new") / "pipeline"
    assert save_pipeline(*parts, folder, lambda fresh: (fresh / "note").write_text("said")) == 4
    return folder


def test_a_pipeline_holds_no_path_of_this_machine(saved: Path) -> None:
    for path in saved.rglob("*.json"):
        assert "_name_or_path" not in path.read_text()
    assert (saved / "note").read_text() == "said"
    assert sorted(p.name for p in saved.parent.iterdir()) == ["pipeline"]


def test_stock_diffusers_draws_it_at_its_own_size(saved: Path, parts: tuple[Any, Any, Any, Any]) -> None:
    """Without a word about sizes, not square as it is; and its tokenizer is the one that was trained with."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("an antman", num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 16, 8)
    captions = ["an antman", "a man and bananas", ""]
    assert torch.equal(token_ids(pipe.tokenizer, captions), token_ids(parts[3], captions))


def test_the_engine_draws_what_diffusers_draws(saved: Path, recipe: Callable[..., Recipe]) -> None:
    """From the same noise, at the same calls: within one grey level."""
    from diffusers import StableDiffusionPipeline

    one = recipe(height=16, width=8, classes=("man", "ant", "banana"), prompts=("a {class}",), steps=5)
    synth = Synthesizer(load_model(str(saved), device="cpu", dtype=torch.float32), one)
    unit = synth.stream(Request(num_samples=6)).plan.unit(0)
    batch = synth.run(unit, 0)
    pipe = StableDiffusionPipeline.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        list(synth.prompts(unit, 0)), latents=synth.initial_latents(unit.ids, 0).clone(), num_inference_steps=5,
        guidance_scale=one.guidance_scale, output_type="pt",
    ).images  # fmt: skip
    ours = batch.images.float() / 255
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max() <= 1.01 / 255


def test_samples_hang_on_seed_caption_and_scale(saved: Path) -> None:
    def drawn(**changes: Any) -> Tensor:
        given: dict[str, Any] = {"seed": 1, "steps": 3, "scale": 4.0, "device": "cpu"}
        return draw_samples(saved, ["a man", "an ant"], **{**given, **changes})

    first = drawn()
    assert first.dtype == torch.uint8
    assert first.shape == (2, 3, 16, 8)
    assert torch.equal(first, drawn())
    assert not torch.equal(first, drawn(seed=2))
    assert not torch.equal(first, drawn(scale=1.0))


def test_a_weight_too_large_for_half_precision_is_refused(parts: tuple[Any, Any, Any, Any], tmp_path: Path) -> None:
    unet, text, vae, tokenizer = parts
    with torch.no_grad():
        kept, unet.conv_in.bias[0] = unet.conv_in.bias[0].clone(), 1e6
    try:
        with pytest.raises(SynthkdError, match="a weight of the unet is not finite in float16"):
            save_pipeline(unet, text, vae, tokenizer, tmp_path / "p", lambda _: None)
    finally:
        with torch.no_grad():
            unet.conv_in.bias[0] = kept


def test_a_full_disk_leaves_the_pipeline_of_before(parts: tuple[Any, Any, Any, Any], tmp_path: Path) -> None:
    def full(fresh: Path) -> None:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "p"
    save_pipeline(*parts, folder, lambda _: None)
    before = json.loads((folder / "model_index.json").read_text())
    with pytest.raises(SynthkdError, match=r"cannot be written .*No space left on device.*; free space"):
        save_pipeline(*parts, folder, full)
    assert json.loads((folder / "model_index.json").read_text()) == before
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
