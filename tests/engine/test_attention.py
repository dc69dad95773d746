"""Attention by name: pinned inside and as before outside, refused in one line where it cannot be, told once."""

import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend

from synthkd.engine import attention
from synthkd.engine.attention import ATTENTIONS, attending, check_attention
from synthkd.engine.errors import SynthkdError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def flags() -> tuple[Any, ...]:
    """What torch may use and in which order, and what its compile cache is told."""
    names = ("cudnn", "flash", "mem_efficient", "math")
    enabled = [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in names]
    return *enabled, torch._C._get_sdp_priority_order(), torch.compiler.config.cache_key_tag


def layers(network: nn.Module) -> list[Any]:
    return [m for m in network.modules() if type(m).__name__ == "Attention"]


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """xformers' one function as torch computes it, on [batch * heads, tokens, size]; shapes of its calls."""
    from diffusers.models import attention_processor

    calls: list[tuple[int, ...]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, op: Any, scale: float) -> Tensor:
        calls.append(tuple(q.shape))
        return F.scaled_dot_product_attention(q, k, v, attn_bias, scale=scale)

    ops = SimpleNamespace(memory_efficient_attention=attend)
    monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=ops), raising=False)
    monkeypatch.setattr(attention, "find_spec", lambda name: True)
    return calls


@pytest.mark.parametrize("choice", ATTENTIONS[1:])
def test_a_cpu_is_told_in_one_line(choice: str) -> None:
    for told in (lambda: check_attention([], choice, CPU), lambda: attending([], choice, CPU).__enter__()):
        with pytest.raises(SynthkdError, match=rf"^attention '{choice}': needs a CUDA GPU, found cpu; use .*'sdpa'$"):
            told()


def test_names_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SynthkdError, match="did you mean 'flash'"):
        check_attention([], "flsh", GPU)
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(SynthkdError, match=r"pip install 'synthkd\[xformers\]'"), attending([], "xformers", GPU):
        pass


def test_torchs_choice_changes_nothing(pipeline: Any) -> None:
    before = flags()
    assert check_attention([pipeline.unet], "sdpa", CPU) == ()
    with attending([pipeline.unet], "sdpa", CPU):
        assert flags() == before


@pytest.mark.parametrize("choice", ["cudnn", "flash"])
def test_a_kernel_comes_first_and_goes(choice: str) -> None:
    """And leaves the flags as they were, with an error inside too; calls it cannot do still run, here on a CPU."""
    before = flags()
    q = torch.randn(1, 2, 8, 4)
    for failing in (False, True):
        try:
            with attending([], choice, GPU):
                *_, order, tag = flags()
                assert order[0] == int(getattr(SDPBackend, f"{choice.upper()}_ATTENTION"))
                assert tag.endswith(f"attention {choice}")
                assert torch.isfinite(F.scaled_dot_product_attention(q, q, q)).all()
                if failing:
                    raise KeyError
        except KeyError:
            assert failing
        assert flags() == before


def test_a_pin_reaches_a_compiled_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced inside, the graph has the pinned kernel: shown with two that a CPU has."""
    q, seen = torch.randn(1, 2, 8, 4), []

    def keep(graph: Any, _: Any) -> Any:
        seen.append({str(node.target) for node in graph.graph.nodes})
        return graph

    for kernels in ([SDPBackend.FLASH_ATTENTION], [SDPBackend.MATH]):
        monkeypatch.setattr(attention, "_KERNELS", {"flash": kernels})

        def call(x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

        with attending([], "flash", GPU), torch.no_grad():
            torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(q)
        torch._dynamo.reset()
    fused, plain = (any("flash_attention" in name for name in names) for names in seen)
    assert fused
    assert not plain


def test_what_falls_back_is_told_once(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The decoder's one wide head; where nothing could be computed so, that is an error."""
    networks = [pipeline.unet, pipeline.vae, pipeline.unet]
    decoder = layers(pipeline.vae.decoder)
    monkeypatch.setattr(attention, "_usable", lambda choice, layer, device: layer not in decoder)
    with caplog.at_level(logging.INFO, "synthkd"):
        left = check_attention(networks, "flash", GPU)
    assert left == ("AutoencoderKL.decoder.mid_block.attentions.0",)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "synthkd"]
    assert line.startswith("attention 'flash': 1 of ")
    assert "AutoencoderKL.decoder.mid_block.attentions.0 (head size 8, float32" in line
    monkeypatch.setattr(attention, "_usable", lambda choice, layer, device: False)
    with pytest.raises(SynthkdError, match=r"none of the .* attention layers .*float16 or bfloat16"):
        check_attention(networks, "flash", GPU)


def test_torch_is_asked(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """About a call of the layer's heads and dtype, with the kernel enabled; a CPU can do neither."""
    layer = layers(pipeline.unet)[0]
    asked = []

    def can(params: Any, debug: bool) -> bool:
        asked.append((params.query.shape, params.query.dtype, torch.backends.cuda.cudnn_sdp_enabled()))
        return True

    assert not any(attention._usable(choice, layer, CPU) for choice in ("flash", "cudnn"))
    monkeypatch.setattr(attention, "can_use_cudnn_attention", can)
    assert attention._usable("cudnn", layer, CPU)
    assert asked == [((1, layer.heads, 64, layer.to_q.out_features // layer.heads), torch.float32, True)]


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "dit"])
def test_xformers_computes_the_same(
    pipelines: Mapping[str, Any], xformers: list[tuple[int, ...]], name: str
) -> None:
    """In denoiser and decoder, forward and the gradient; the very same processors come back, with an error too."""
    pipe = pipelines[name]
    denoiser = pipe.transformer if name == "dit" else pipe.unet
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before = [(m, m.processor) for part in (denoiser, pipe.vae) for m in layers(part)]

    def run() -> tuple[Tensor, ...]:
        image = pipe.vae.decode(z, return_dict=False)[0]
        (grad,) = torch.autograd.grad(image.square().mean(), z)
        return image.detach(), grad, _denoised(denoiser, name, z.detach())

    want = run()
    assert check_attention([denoiser, pipe.vae], "xformers", GPU) == ()
    with attending([denoiser, pipe.vae], "xformers", GPU):
        got = run()
    assert len(xformers) == len(before) - len(layers(pipe.vae.encoder))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(KeyError), attending([denoiser], "xformers", GPU):
        raise KeyError
    assert all(m.processor is processor for m, processor in before)


def _denoised(denoiser: Any, name: str, z: Tensor) -> Tensor:
    told: dict[str, Any] = {"class_labels": torch.tensor([0, 1])}
    if name != "dit":
        told = {"encoder_hidden_states": torch.ones(2, 5, denoiser.config.cross_attention_dim)}
    if name == "sdxl":
        told["added_cond_kwargs"] = {"text_embeds": torch.ones(2, 20), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        return denoiser(z, torch.full((2,), 10), **told, return_dict=False)[0]


def test_a_processor_of_the_users_own_stays(build: Callable[..., Any], xformers: list[tuple[int, ...]]) -> None:
    """It falls back, and is named."""

    class Own:
        def __call__(self, attn: Any, hidden_states: Tensor, **_: Any) -> Tensor:
            return hidden_states

    unet = build.denoiser()
    own = layers(unet)[0]
    own.processor = Own()
    (left,) = check_attention([unet], "xformers", GPU)
    assert unet.get_submodule(left.removeprefix("UNet2DConditionModel.")) is own
    with attending([unet], "xformers", GPU):
        assert type(own.processor) is Own
        assert {type(m.processor).__name__ for m in layers(unet)[1:]} == {"XFormersAttnProcessor"}
