"""A Synthesizer with fused networks: the same images, the pipeline as it was, and an environment key that says so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from synthkd import kernels
from synthkd.engine import GuidanceSpec, Request, Synthesizer, SynthkdError
from synthkd.engine.environment import environment
from synthkd.engine.fusion import fuse, is_fused
from synthkd.kernels import implementation

GUIDED = {"guidance": GuidanceSpec(scale=0.3)}


@pytest.fixture
def made(pipeline: Any, recipe: Callable[..., Any], guide: Callable[..., Any]) -> Callable[..., Synthesizer]:
    """A guided Synthesizer over the tiny pipeline."""

    def make(choice: Any, pipe: Any = pipeline, **changes: Any) -> Synthesizer:
        return Synthesizer.from_pipeline(pipe, recipe(**GUIDED, **changes), guidance=guide(), fuse=choice)

    return make


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry per call of `group_norm_silu`."""
    calls: list[bool] = []
    op = kernels.group_norm_silu

    def spy(*args: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return op(*args)

    monkeypatch.setattr(kernels, "group_norm_silu", spy)
    return calls


def image(synth: Synthesizer) -> torch.Tensor:
    """The first group."""
    return next(iter(synth.stream(Request(num_samples=6)))).images


def state(pipe: Any) -> dict[str, Any]:
    """Every module and tensor by identity, and every tensor's bytes."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    found: dict[str, Any] = {}
    for part, network in parts.items():
        for name, m in network.named_modules():
            found[f"{part}.{name}"] = (id(m), m.training, sorted(vars(m)), list(m._forward_hooks), list(m._buffers))
        for name, x in network.state_dict(keep_vars=True).items():
            found[f"{part}.{name}?"] = (id(x), x.data_ptr(), x.requires_grad, x.detach().numpy().tobytes())
    return found


@pytest.mark.parametrize(
    ("name", "choice"), [("sd1", "decoder"), ("sdxl", "decoder"), ("dit", "decoder"), ("sd1", "all"), ("sdxl", "all")]
)
def test_a_guided_run_agrees(
    pipelines: Any, made: Callable[..., Synthesizer], counted: list[bool], name: str, choice: str
) -> None:
    pipe, told = pipelines[name], {"prompts": ("{class}",)} if name == "dit" else {}
    before = state(pipe)
    plain = image(made("off", pipe, **told))
    assert not counted
    synth = made(choice, pipe, **told)
    digest = synth.identity(0)["model_sha256"]
    first, again = image(synth), image(synth)
    assert True in counted  # guidance looks through it
    assert False in counted  # and so do the images
    assert state(pipe) == before
    assert torch.equal(first, again)
    off = (first.int() - plain.int()).abs()
    assert off.max() <= 1
    assert (off > 0).float().mean() <= 1e-3
    assert digest == made("off", pipe, **told).identity(0)["model_sha256"]


def test_all_of_a_prior_without_a_unet_is_refused(pipelines: Any, made: Callable[..., Synthesizer]) -> None:
    with pytest.raises(SynthkdError, match="fuse 'all': this prior has no UNet2DConditionModel; use 'decoder'"):
        made("all", pipelines["dit"], prompts=("{class}",))


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_the_key_knows_what_the_owner_fused(pipeline: Any, made: Callable[..., Synthesizer], choice: str) -> None:
    """Its stand-ins stay in, so the images are a fused decoder's whatever was asked for."""
    with fuse(pipeline.vae):
        assert made(choice, pipeline).fused == "decoder"
        image(made(choice, pipeline))
        assert is_fused(pipeline.vae)
    assert made(choice, pipeline).fused == ""


def test_a_tiny_decoder_of_guidance_is_fused_too(
    pipeline: Any, build: Any, recipe: Callable[..., Any], guide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from synthkd.engine.decoders import VaeDecoder

    seen: list[Any] = []
    tiny = build.tiny_autoencoder().eval()
    tiny.register_forward_pre_hook(lambda *_: None)
    op = kernels.upsample2x_conv3x3
    monkeypatch.setattr(kernels, "upsample2x_conv3x3", lambda *a: (seen.append(a[1].shape), op(*a))[1])
    look = VaeDecoder(tiny, 1.0)
    synth = Synthesizer.from_pipeline(pipeline, recipe(**GUIDED), guidance=guide(), decoder=look, fuse="decoder")
    image(synth)
    assert len(seen) == 4 + 1  # four guided calls through the tiny one, one image through the prior's
    assert not is_fused(tiny)


class PlantedError(Exception):
    """Raised inside a group."""


@pytest.mark.parametrize("error", [PlantedError, KeyboardInterrupt])
def test_an_exception_inside_a_group_undoes(
    pipeline: Any, made: Callable[..., Synthesizer], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    before = state(pipeline)
    synth = made("all")

    def fail(*args: Any) -> Any:
        assert is_fused(pipeline.vae)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "upsample2x_conv3x3", fail)
        with pytest.raises(error):
            image(synth)
    assert state(pipeline) == before
    image(synth)


def test_auto_follows_the_kernels(made: Callable[..., Synthesizer], counted: list[bool]) -> None:
    """On a CPU nothing is fused and the key is as ever; where ops run Triton the decoder is."""
    synth = made("auto")
    image(synth)
    assert not counted
    assert synth.fused == ""
    assert synth.stream(Request(num_samples=6)).environment["backend"] == "eager"
    pytest.importorskip("triton", reason="Triton runs on Linux only")
    with implementation("triton"):
        assert synth.stream(Request(num_samples=6)).environment["backend"] == "triton, fused decoder"
        assert made("off").stream(Request(num_samples=6)).environment["backend"] == "triton"


def test_the_key_says_what_is_fused(made: Callable[..., Synthesizer]) -> None:
    cpu = torch.device("cpu")
    assert made("decoder").fused == "decoder"
    assert made("all").fused == "decoder and denoiser"
    assert environment(cpu, 6, fused="decoder")["backend"] == "eager, fused decoder"
    assert environment(cpu, 6)["backend"] == "eager"


def test_a_wrong_choice_names_the_right_ones(made: Callable[..., Synthesizer]) -> None:
    with pytest.raises(SynthkdError, match="fuse 'vae': expected one of auto, off, decoder, all"):
        made("vae")


def test_what_its_owner_has_fused_stays(pipeline: Any, made: Callable[..., Synthesizer]) -> None:
    with fuse(pipeline.vae):
        image(made("decoder"))
        assert is_fused(pipeline.vae)
    assert not is_fused(pipeline.vae)


def test_changed_weights_are_seen_by_the_next_group(
    build: Any, made: Callable[..., Synthesizer], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As when a LoRA is fused into a live pipeline between groups."""
    pipe = build.sd(tmp_path_factory.mktemp("changed"))
    synth = made("decoder", pipe)
    before = image(synth)
    for x in pipe.vae.decoder.up_blocks[0].upsamplers.parameters():
        x.data *= 1.5
    off = (image(synth).int() - image(made("off", pipe)).int()).abs()
    assert not torch.equal(before, image(synth))
    assert off.max() <= 1
