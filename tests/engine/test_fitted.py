"""The fitted decoder: its network at any shape, its price, its artifact, and what is refused."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from synthkd.engine import SynthkdError
from synthkd.engine.calibration import Recorder
from synthkd.engine.fitted import (
    CARD,
    WEIGHTS,
    FittedDecoder,
    FittedNet,
    load_fitted_decoder,
    resized,
    save_fitted,
    shape_for,
)
from synthkd.engine.models import load_model


def network(latent: tuple[int, int, int] = (4, 8, 8), factor: int = 2, size: tuple[int, int] = (16, 16)) -> FittedNet:
    """One of random weights."""
    torch.manual_seed(0)
    return FittedNet(shape_for(latent, factor, size, hidden=8, blocks=1)).requires_grad_(False)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A saved one that fits the tiny pipeline."""
    save_fitted(network(), tmp_path / "decoder", {"fitted_to": {"vae_sha256": "of another"}})
    return tmp_path / "decoder"


def load(folder: Path | str, **options: Any) -> FittedDecoder:
    """On the CPU in float32."""
    return load_fitted_decoder(str(folder), **{"device": "cpu", "dtype": torch.float32, **options})


@pytest.mark.parametrize(
    ("latent", "factor", "size", "shuffle"),
    [
        ((4, 8, 8), 2, (16, 16), 2),
        ((4, 5, 7), 8, (33, 20), 8),
        ((16, 9, 6), 8, (5, 4), 1),
        ((4, 8, 8), 2, (64, 48), 2),
        ((4, 64, 64), 8, (224, 224), 4),
    ],
)
def test_any_latent_becomes_an_image_of_the_size(
    latent: tuple[int, int, int], factor: int, size: tuple[int, int], shuffle: int
) -> None:
    net = network(latent, factor, size)
    assert net.shape.shuffle == shuffle
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        z = torch.randn(2, *latent, dtype=dtype).requires_grad_()
        images = FittedDecoder(net.to(dtype))(z)
        assert images.shape == (2, 3, *size)
        (grad,) = torch.autograd.grad(images.float().square().sum(), z)
        assert grad.isfinite().all()
        assert (grad.flatten(1).abs().sum(1) > 0).all()


def test_resizing_is_that_of_a_teacher() -> None:
    images = torch.rand(2, 3, 21, 32)
    for size in ((9, 32), (21, 13), (40, 17), (21, 32)):
        wanted = F.interpolate(images, size=list(size), mode="bilinear", antialias=True, align_corners=False)
        torch.testing.assert_close(resized(images, size), wanted)


def test_the_price_at_512_pixels_is_a_hundredth_of_the_vae() -> None:
    """SD 1.5's latents to 224 pixels: at most 0.03 TFLOP forward, 0.06 with the latent's gradient (performance.md)."""
    with torch.device("meta"):
        net = FittedNet(shape_for((4, 64, 64), 8, (224, 224))).requires_grad_(False)
        z = torch.empty(1, 4, 64, 64, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            images = net(z)
        with FlopCounterMode(display=False) as both:
            torch.autograd.grad(net(z * 1).sum(), z)  # the counter hooks what enters a module
    assert images.shape == (1, 3, 224, 224)
    assert 0.005e12 < forward.get_total_flops() <= 0.03e12
    assert both.get_total_flops() <= 0.06e12


def test_an_artifact_comes_back_as_it_was_saved(artifact: Path) -> None:
    z, found = torch.randn(3, 4, 8, 8), load(artifact)
    torch.testing.assert_close(found(z), network()(z), atol=2e-3, rtol=0)  # float16 weights
    assert not any(p.requires_grad for p in found.module.parameters())
    assert found.settings["fitted"]["hidden"] == 8
    assert load(artifact, dtype=torch.bfloat16)(z).dtype == torch.bfloat16


def test_the_embedded_one_is_that_of_its_prior(caplog: pytest.LogCaptureFixture, recipe: Callable[..., Any]) -> None:
    prior = load_model("embedded:digits", device="cpu", dtype=torch.float32)
    found = load("embedded:digits", like=prior.decoder)
    assert "fitted to another VAE" not in caplog.text
    wanted = recipe(
        classes=("three", "eight"), prompts=("the digit {class}",), height=32, width=32, classes_per_group=2
    )
    for z in Recorder(prior, wanted)(seed=0, group=0).latents:
        error = (found(z).clamp(0, 1) - prior.decoder(z).clamp(0, 1)).square().mean().sqrt()
        assert float(error) < 0.05  # found: 0.03; without the maps of means: 0.09 and more


def test_another_vae_of_the_same_layout_is_warned_of(
    artifact: Path, pipeline_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prior = load_model(str(pipeline_folder), device="cpu", dtype=torch.float32)
    load(artifact, like=prior.decoder)
    assert "fitted to another VAE" in caplog.text


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])


def flip(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-3] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(data))


def swell(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + bytes(2**20))


def card(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = json.loads((folder / CARD).read_text())
        (folder / CARD).write_text(json.dumps({**found, **changes}))

    return change


def shape(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        card(shape={**json.loads((folder / CARD).read_text())["shape"], **changes})(folder)

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Other weights under a card that vouches for them."""

    def rewrite(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)
        card(sha256=hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest())(folder)

    return rewrite


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda f: (f / CARD).unlink(), "no readable decoder.json there"),
        (lambda f: (f / CARD).write_text("{"), "not valid JSON"),
        (card(format=9), "not of format 1"),
        (card(shape=[1]), "has no shape of a decoder"),
        (shape(hidden=10**6), "hidden is 1000000; expected a whole number from 1 to 512"),
        (shape(shuffle=4), "shuffle is 4; expected a whole number from 1 to 2"),
        (shape(blocks=True), "blocks is True"),
        (shape(pickle="x"), "unexpected keyword argument 'pickle'"),
        (lambda f: (f / WEIGHTS).unlink(), "cannot be read"),
        (cut, "cannot be read"),
        (flip, "does not match the digest"),
        (swell, "its card's network has at most"),
        (shape(hidden=9), "its card's network has"),
        (tensors(lambda t: t.update(extra=torch.ones(1))), "'extra' in decoder.safetensors is (1,)"),
        (tensors(lambda t: t["head.bias"].fill_(torch.nan)), "'head.bias' in decoder.safetensors is not finite"),
        (tensors(lambda t: t.update({"head.bias": t["head.bias"].int()})), "is not finite"),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_artifact_is_one_line(artifact: Path, harm: Callable[[Path], None], says: str) -> None:
    harm(artifact)
    with pytest.raises(SynthkdError) as refused:
        load(artifact)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("latent", "factor", "says"),
    [((5, 8, 8), 2, "fitted to 5 latent channels; this model's vae has 4"), ((4, 8, 8), 4, "4 pixels per latent")],
)
def test_other_latents_are_refused(
    latent: tuple[int, int, int], factor: int, says: str, tmp_path: Path, pipeline_folder: Path
) -> None:
    save_fitted(network(latent, factor), tmp_path, {})
    prior = load_model(str(pipeline_folder), device="cpu", dtype=torch.float32)
    with pytest.raises(SynthkdError, match=says):
        load(tmp_path, like=prior.decoder)


def test_weights_that_float16_cannot_hold_are_not_saved(tmp_path: Path) -> None:
    net = network()
    net.stem.weight.fill_(1e6)
    with pytest.raises(SynthkdError, match="not finite"):
        save_fitted(net, tmp_path, {})
    assert not (tmp_path / CARD).exists()
