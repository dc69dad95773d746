"""A float16 autoencoder that would overflow is found by its layers and decodes in a wider dtype; others are left."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from synthkd.engine import Recipe, Request, Synthesizer
from synthkd.engine.models import wrap_pipeline
from synthkd.export.numerics import (
    HALF_MAX,
    half_overflow,
    largest_activation,
    probe_latents,
    square_overflow,
    wide_dtype,
)

LOUD = "decoder.up_blocks.0.resnets.0"  # a residual block: what follows it normalises, so the image is as before


def loud(vae: Any, gain: float = 3e5) -> Any:
    """The autoencoder with one block that is `gain` times louder, whose weights float16 still holds."""
    block = vae.get_submodule(LOUD)
    with torch.no_grad():
        for weight in (block.conv2.weight, block.conv2.bias):
            weight.mul_(gain)
    return vae


def decode(vae: Any) -> Callable[[Tensor], Tensor]:
    return lambda z: vae.decode(z, return_dict=False)[0]


def test_the_probe_names_the_layer(build: Any) -> None:
    """The image alone, and the images of a float32 run, say nothing; hooks are gone afterwards."""
    torch.manual_seed(0)
    vae, z = build.autoencoder().eval(), probe_latents(4)
    assert half_overflow(vae, decode(vae), (z,)) is None
    found = half_overflow(loud(vae), decode(vae), (z,))
    assert found is not None
    assert found.layer == f"{LOUD}.conv2"
    assert found.value > HALF_MAX
    assert 0 < found.margin < 1
    assert found.layer in str(found)
    image = decode(vae)(z)
    assert image.abs().max() < 100  # planted: a probe of the output alone, here of a module without layers, is blind
    assert half_overflow(nn.Identity(), decode(vae), (z,)) is None
    assert not any(m._forward_hooks for m in vae.modules())


def test_float16_does_overflow_there(build: Any) -> None:
    """The oracle: the same decode in float16 is not finite, and with a quiet block it is."""
    torch.manual_seed(0)
    vae, z = build.autoencoder().eval(), probe_latents(4, side=4)
    assert torch.isfinite(decode(vae.half())(z.half())).all()
    assert not torch.isfinite(decode(loud(vae.float()).half())(z.half())).all()


def test_hooks_go_with_an_error() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="shapes"):
        largest_activation(net, net, (torch.ones(1, 3),))
    assert not any(m._forward_hooks for m in net.modules())


def test_layers_and_their_calls() -> None:
    """A layer that runs twice counts with its larger value; NaN counts as inf; nested outputs are searched."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.Identity()

        def forward(self, x: Tensor) -> Any:
            return {"a": (self.same(-3 * x), [self.same(x)]), "b": torch.ones(1, dtype=torch.int64)}

    net = Twice()
    assert largest_activation(net, net, (torch.tensor([2.0]),)) == {"": 6.0, "same": 6.0}
    assert largest_activation(net, net, (torch.tensor([float("nan")]),))["same"] == float("inf")
    assert largest_activation(net, net, (torch.tensor([2.0]),), taken=True)["same"] == 6.0


def test_the_margin_is_kept() -> None:
    """A value within a factor of two of the limit is not trusted."""
    net = nn.Sequential(nn.Identity())
    assert half_overflow(net, net, (torch.tensor([HALF_MAX / 2]),)) is None
    assert half_overflow(net, net, (torch.tensor([HALF_MAX / 1.9]),)) is not None
    assert half_overflow(net, net, (torch.tensor([HALF_MAX / 1.9]),), safety=1.0) is None


def test_norms_that_square_are_reported_apart() -> None:
    """|x| = 300 fits float16, its square does not: no reason to leave float16 where moments are float32 sums."""
    net = nn.Sequential(nn.Identity(), nn.GroupNorm(1, 2))
    x = torch.tensor([300.0, -1.0]).view(1, 2, 1, 1)
    assert half_overflow(net, net, (x,)) is None
    found = square_overflow(net, net, (x,))
    assert found is not None
    assert (found.layer, found.value) == ("1", 300.0)
    assert square_overflow(net, net, (x / 2,)) is None


def test_probe_latents_are_always_the_same() -> None:
    state = torch.get_rng_state()
    a, b = probe_latents(4), probe_latents(4)
    assert torch.equal(a, b)
    assert torch.equal(state, torch.get_rng_state())
    assert a.shape == (4, 4, 16, 16)
    assert a[0].abs().max() == 0
    assert 0.9 < a[2].std() < 1.1


def test_what_takes_float16s_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 where the GPU computes it itself: emulated, as before compute capability 8.0, it would be slow."""
    asked: dict[str, Any] = {}

    def supported(**how: Any) -> bool:
        asked.update(how)
        return native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    native = True
    assert wide_dtype(torch.device("cuda")) == torch.bfloat16
    assert asked == {"including_emulation": False}
    native = False
    assert wide_dtype(torch.device("cuda")) == torch.float32
    assert wide_dtype(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_an_overflowing_autoencoder_decodes_wide(
    build: Any, tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture, recipe: Callable[..., Recipe]
) -> None:
    """Said once; images are finite; the live pipeline keeps its autoencoder as it was."""
    flags = {"force_upcast": False} if family == "sdxl" else {}
    pipe = getattr(build, family)(tmp_path, **flags)
    loud(pipe.vae)
    pipe.to(dtype=torch.float16)
    before = {name: x.clone() for name, x in pipe.vae.state_dict().items()}
    with caplog.at_level(logging.INFO, "synthkd"):
        synth = Synthesizer.from_pipeline(pipe, recipe(steps=1, guidance_scale=1.0))
        (batch,) = synth.stream(Request(num_samples=6))
    (line,) = [r.getMessage() for r in caplog.records if "float16" in r.getMessage()]
    assert f"{LOUD}.conv2" in line
    assert "decodes in float32" in line
    assert "\n" not in line
    assert {p.dtype for p in synth.model.decoder.module.parameters()} == {torch.float32}
    assert all(torch.equal(x, before[name]) and x.dtype == torch.float16 for name, x in pipe.vae.state_dict().items())
    assert len(batch.images) == 6


def test_bfloat16_is_taken_where_it_is_native(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synthkd.engine.precision.wide_dtype", lambda device: torch.bfloat16)
    pipe = build.sd(tmp_path)
    loud(pipe.vae)
    prior = wrap_pipeline(pipe.to(dtype=torch.float16))
    assert prior.decoder(torch.randn(1, 4, 4, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_harmless_autoencoder_is_left_alone(
    build: Any, tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The live one itself decodes, nothing is said, and no probe runs above float16 or on the meta device."""
    flags = {"force_upcast": False} if family == "sdxl" else {}
    pipe = getattr(build, family)(tmp_path, **flags)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert wrap_pipeline(pipe.to(dtype=dtype)).decoder.module is pipe.vae
    pipe.vae.to("meta", torch.float16)
    assert wrap_pipeline(pipe).decoder.module is pipe.vae
    assert not [r for r in caplog.records if r.name == "synthkd"]
