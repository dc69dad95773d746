"""fuse: the same images and gradients, every op called as often as the architecture says, and a full way back."""

from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from synthkd import kernels
from synthkd.engine import SynthkdError
from synthkd.engine.fusion import Fused, fuse, is_fused, unfuse
from synthkd.engine.standins import StandIn
from synthkd.kernels import implementation

OPS = ("group_norm_silu", "add_group_norm_silu", "upsample2x_conv3x3")
SIZES = [(1, 1, 1), (3, 3, 5), (1, 7, 4)]


def three_levels(build: Any, **changes: Any) -> Any:
    """A decoder with every kind of seam: a shortcut, two doublings, attention."""
    torch.manual_seed(7)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    fields = {"block_out_channels": (4, 8, 8), "layers_per_block": 2, "norm_num_groups": 2, **blocks, **changes}
    return settled(build.autoencoder(**fields))


def settled(model: nn.Module) -> nn.Module:
    """In evaluation mode, frozen, with norms that do more than normalise."""
    g = torch.Generator().manual_seed(8)
    for m in model.modules():
        if isinstance(m, nn.GroupNorm):
            m.weight.data += 0.3 * torch.randn(m.weight.shape, generator=g)
            m.bias.data += 0.3 * torch.randn(m.bias.shape, generator=g)
    return model.eval().requires_grad_(False)


MODELS: dict[str, Callable[[Any], Any]] = {
    "kl": three_levels,
    "kl, no attention": lambda build: three_levels(build, mid_block_add_attention=False),
    "tiny": lambda build: settled(
        build.tiny_autoencoder(
            num_decoder_blocks=(1,) * 3, num_encoder_blocks=(1,) * 3, decoder_block_out_channels=(8,) * 3,
            encoder_block_out_channels=(8,) * 3,
        )
    ),
    # four channels a group: of two at one position a norm leaves only the sign, and no gradient
    "unet": lambda build: settled(build.denoiser(norm_num_groups=2)),
}  # fmt: skip


@pytest.fixture
def model(request: pytest.FixtureRequest, build: Any) -> Any:
    """A model of MODELS by its name."""
    torch.manual_seed(7)
    return MODELS[request.param](build)


def outcome(model: Any, size: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The output at a fixed latent, and the gradient of a fixed functional of it on that latent."""
    g = torch.Generator().manual_seed(9)
    batch, h, w = size
    z = torch.randn(batch, 4, h, w, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    if hasattr(model, "decode"):
        out = model.decode(z, return_dict=False)[0]
    else:
        told = torch.randn(batch, 6, 16, generator=g, dtype=torch.float64).to(dtype)
        out = model(z, torch.tensor(7), told, return_dict=False)[0]
    weight = torch.randn(out.shape, generator=g, dtype=torch.float64).to(dtype)
    return out.detach(), torch.autograd.grad((out * weight).sum(), z)[0]


def near(got: Tensor, want: Tensor, limit: float) -> None:
    """Largest difference over the largest value."""
    assert got.shape == want.shape
    assert want.abs().max() > 1e-3
    assert (got - want).abs().max() / want.abs().max() <= limit


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_same_output_and_gradient(
    model: Any, size: tuple[int, int, int], dtype: torch.dtype, limit: float, channels_last: bool
) -> None:
    model = model.to(dtype)
    want = outcome(model, size, dtype)
    with fuse(model, channels_last=channels_last):
        got = outcome(model, size, dtype)
    for found, expected in zip(got, want, strict=True):
        near(found, expected, limit)


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_kernels_give_the_same(model: Any) -> None:
    """Triton, forward and backward, inside the whole network."""
    pytest.importorskip("triton", reason="Triton runs on Linux only")
    want = outcome(model, (1, 3, 2), torch.float32)
    with fuse(model, channels_last=True), implementation("triton"):
        got = outcome(model, (1, 3, 2), torch.float32)
    for found, expected in zip(got, want, strict=True):
        near(found, expected, 2e-5)


def state(model: nn.Module) -> dict[str, Any]:
    """Modules and tensors by identity; flags, attributes and hooks."""
    found: dict[str, Any] = {
        name: (id(m), m.training, sorted(vars(m)), list(m._forward_hooks), list(m._forward_pre_hooks), list(m._buffers))
        for name, m in model.named_modules()
    }
    return found | {name: (id(x), x.data_ptr(), x.stride()) for name, x in model.state_dict(keep_vars=True).items()}


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_undo_leaves_no_trace(model: Any) -> None:
    before, want = state(model), outcome(model, (1, 3, 5), torch.float32)
    handle = fuse(model)
    names = list(model.state_dict())
    outcome(model, (1, 3, 5), torch.float32)
    handle.undo()
    handle.undo()
    assert state(model) == before
    assert names == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outcome(model, (1, 3, 5), torch.float32), want, strict=True))
    assert not any(isinstance(m, StandIn) for m in model.modules())
    with handle:
        assert state(model) != before
        assert sum(isinstance(m, StandIn) for m in model.modules()) == len(handle.replaced)
    assert state(model) == before


def test_an_exception_inside_undoes(build: Any) -> None:
    model = three_levels(build)
    before = state(model)
    with pytest.raises(KeyError), fuse(model):
        raise KeyError
    assert state(model) == before


def test_moves_flags_and_loading_reach_both(build: Any) -> None:
    """What happens to the module while it is fused is still so afterwards."""
    model, other = three_levels(build), settled(build.autoencoder(**dict(three_levels(build).config)))
    other.load_state_dict({name: x + 0.1 for name, x in other.state_dict().items()})
    handle = fuse(model)
    model.load_state_dict(other.state_dict())
    model.double().train()
    handle.refold()
    want = outcome(other.double(), (1, 2, 3), torch.float64)
    near(outcome(model, (1, 2, 3), torch.float64)[0], want[0], 1e-6)  # folded in float32, then moved
    handle.undo()
    assert all(m.training for m in model.modules())
    assert {x.dtype for x in model.parameters()} == {torch.float64}
    near(outcome(model.eval(), (1, 2, 3), torch.float64)[1], want[1], 1e-12)


def test_changed_weights_are_folded_anew(build: Any) -> None:
    model, other = three_levels(build), three_levels(build)
    with torch.no_grad():
        for x in other.parameters():
            x.mul_(1.2)
    with fuse(model):
        model.load_state_dict(other.state_dict())
        got = outcome(model, (1, 2, 3), torch.float32)[0]
    near(got, outcome(other, (1, 2, 3), torch.float32)[0], 1e-5)


def test_a_copy_of_a_fused_module_can_be_unfused(build: Any) -> None:
    model = three_levels(build)
    want = outcome(model, (1, 2, 3), torch.float32)[0]
    with fuse(model):
        copied = deepcopy(model)
        assert is_fused(copied)
        near(outcome(copied, (1, 2, 3), torch.float32)[0], want, 1e-5)
    assert unfuse(copied) is copied
    assert not is_fused(copied)
    assert not any(isinstance(m, StandIn) for m in copied.modules())
    assert torch.equal(outcome(copied, (1, 2, 3), torch.float32)[0], want)
    assert copied.state_dict().keys() == model.state_dict().keys()
    assert not {id(x) for x in copied.parameters()} & {id(x) for x in model.parameters()}


def test_weights_changed_through_data_need_refolding(build: Any) -> None:
    model = three_levels(build)
    handle = fuse(model)
    for name, x in model.named_parameters():
        if "upsamplers" in name:
            x.data *= 1.5
    stale = outcome(model, (1, 2, 3), torch.float32)[0]
    handle.refold()
    fresh = outcome(model, (1, 2, 3), torch.float32)[0]
    handle.undo()
    want = outcome(model, (1, 2, 3), torch.float32)[0]
    near(fresh, want, 1e-5)
    assert (stale - want).abs().max() > 1e-3
    for x in model.parameters():
        x.data *= 1.1
    with handle:  # `put` refolds
        got = outcome(model, (1, 2, 3), torch.float32)[0]
    near(got, outcome(model, (1, 2, 3), torch.float32)[0], 1e-5)


def test_a_trained_weight_keeps_its_gradient(build: Any) -> None:
    model, z = three_levels(build).double(), torch.randn(1, 4, 3, 2, dtype=torch.float64)
    weights = [x.requires_grad_() for x in model.decoder.parameters()]
    want = torch.autograd.grad(model.decode(z).sample.square().sum(), weights)
    with fuse(model):
        got = torch.autograd.grad(model.decode(z).sample.square().sum(), weights)
    for found, expected in zip(got, want, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_fusing_twice_is_refused(build: Any) -> None:
    model = three_levels(build)
    with fuse(model) as handle:
        handle.put()  # harmless
        with pytest.raises(SynthkdError, match="fused already"):
            fuse(model)
    fuse(model).undo()


@pytest.mark.parametrize("what", [nn.Linear(2, 2), nn.Sequential()])
def test_another_class_is_refused(what: nn.Module) -> None:
    with pytest.raises(SynthkdError, match="expected one of AutoencoderKL"):
        fuse(what)


def test_nothing_recognised_is_refused(build: Any) -> None:
    with pytest.raises(SynthkdError, match=r"no part of this AutoencoderTiny.*nearest"):
        fuse(build.tiny_autoencoder(upsample_fn="bilinear"))


def _hook(m: nn.Module) -> None:
    m.register_forward_hook(lambda *_: None)


def _dropout(m: Any) -> None:
    m.dropout.p = 0.5
    m.train()


def _plain_norm(m: Any) -> None:
    m.norm2 = nn.GroupNorm(2, m.norm2.num_channels, affine=False)


LEFT: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "activation": ("resnets.1", lambda m: setattr(m, "nonlinearity", nn.GELU()), "GELU"),
    "dropout": ("resnets.1", _dropout, "dropout"),
    "norm without weights": ("resnets.1", _plain_norm, "without weight"),
    "another norm": ("resnets.1", lambda m: setattr(m, "norm1", nn.InstanceNorm2d(8)), "InstanceNorm2d"),
    "post-norm": ("resnets.1", lambda m: setattr(m, "pre_norm", False), "behind"),
    "hook on the resnet": ("resnets.1", _hook, "hooks"),
    "hook on a norm": ("resnets.1", lambda m: _hook(m.norm1), "hooks"),
    "hook on a doubling's convolution": ("upsamplers.0", lambda m: _hook(m.conv), "hooks"),
    "no interpolation": ("upsamplers.0", lambda m: setattr(m, "interpolate", False), "not a nearest"),
    "padding of another kind": ("upsamplers.0", lambda m: setattr(m.conv, "padding_mode", "reflect"), "plain 3x3"),
    "hook on the block": ("", _hook, "hooks"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_not_known_is_left_and_listed(build: Any, case: str) -> None:
    """In a decoder and in its block, and the result is right all the same."""
    model = three_levels(build)
    inner, change, reason = LEFT[case]
    name = f"decoder.up_blocks.0.{inner}".rstrip(".")
    part = model.get_submodule(name)
    change(part)
    shape = case == "no interpolation"
    torch.manual_seed(3)
    want = None if shape else outcome(model, (1, 3, 5), torch.float32)
    with fuse(model) as handle:
        assert model.get_submodule(name) is part
        assert reason in handle.left[name]
        assert name not in handle.replaced
        torch.manual_seed(3)
        got = None if shape else outcome(model, (1, 3, 5), torch.float32)
    for found, expected in zip(got or (), want or (), strict=True):
        near(found, expected, 1e-5)


@pytest.mark.parametrize("style", ["scale_shift", "spatial"])
def test_other_kinds_of_resnet_are_left(build: Any, style: str) -> None:
    if style == "spatial":
        from diffusers.models.resnet import ResnetBlockCondNorm2D

        model = three_levels(build)
        model.decoder.mid_block.resnets[0] = ResnetBlockCondNorm2D(
            in_channels=32, temb_channels=8, groups=2, time_embedding_norm="spatial"
        )
        assert "ResnetBlockCondNorm2D" in fuse(model).left["decoder.mid_block.resnets.0"]
    else:
        model = build.denoiser(resnet_time_scale_shift=style)
        handle = fuse(model)
        assert style in handle.left["mid_block.resnets.0"]
        assert "conv_norm_out" in handle.replaced


def test_an_output_scale_is_divided_by(build: Any) -> None:
    model = three_levels(build).double()
    model.decoder.mid_block.resnets[1].output_scale_factor = 1.7
    model.decoder.up_blocks[1].resnets[1].output_scale_factor = 0.6
    want = outcome(model, (1, 3, 5), torch.float64)
    with fuse(model) as handle:
        assert "decoder.mid_block.resnets.1" in handle.replaced
        got = outcome(model, (1, 3, 5), torch.float64)
    for found, expected in zip(got, want, strict=True):
        near(found, expected, 1e-11)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each op was called."""
    counted: Counter[str] = Counter()

    def spy(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counted[name] += 1
            return op(*args)

        return call

    for name in OPS:
        monkeypatch.setattr(kernels, name, spy(name, getattr(kernels, name)))
    return counted


def test_every_norm_and_doubling_of_a_decoder_is_ours(build: Any, calls: Counter[str]) -> None:
    """Seams between resnets are carried: into the first up block, along each block, and into the last norm."""
    model = three_levels(build)
    levels, layers = len(model.config.block_out_channels), model.config.layers_per_block
    with fuse(model) as handle:
        assert not handle.left
        model.decode(torch.randn(1, 4, 2, 3))
    resnets = 2 + levels * (layers + 1)
    carried = 1 + levels * layers + 1
    assert calls["add_group_norm_silu"] == carried
    assert calls["group_norm_silu"] == 2 * resnets + 1 - carried
    assert calls["upsample2x_conv3x3"] == levels - 1
    calls.clear()
    model.decode(torch.randn(1, 4, 2, 3))
    assert not calls


def test_every_norm_and_doubling_of_a_unet_is_ours(build: Any, calls: Counter[str]) -> None:
    model = settled(build.denoiser())
    resnets = sum(type(m).__name__ == "ResnetBlock2D" for m in model.modules())
    with fuse(model) as handle:
        assert not handle.left
        outcome(model, (2, 4, 4), torch.float32)
        assert calls == {"group_norm_silu": 2 * resnets + 1, "upsample2x_conv3x3": 1}
        calls.clear()
        outcome(model, (2, 5, 3), torch.float32)  # an odd latent: the doubling has a size of its own
        assert calls == {"group_norm_silu": 2 * resnets + 1}


def test_checkpointing_goes_on(build: Any, calls: Counter[str]) -> None:
    """Switched on before or while fused; every block runs twice, and the gradient is the same."""
    model = three_levels(build).double()
    want = outcome(model, (1, 3, 5), torch.float64)
    with fuse(model):
        outcome(model, (1, 3, 5), torch.float64)
        once = calls["upsample2x_conv3x3"]
        model.enable_gradient_checkpointing()
        calls.clear()
        got = outcome(model, (1, 3, 5), torch.float64)
        assert calls["upsample2x_conv3x3"] == 2 * once
    assert model.decoder.gradient_checkpointing
    for found, expected in zip(got, want, strict=True):
        near(found, expected, 1e-11)


@pytest.fixture
def tracing() -> Iterator[None]:
    """Dynamo follows torch.autograd.grad."""
    pytest.importorskip("triton", reason="Triton runs on Linux only")
    before = torch._dynamo.config.trace_autograd_ops
    torch._dynamo.config.trace_autograd_ops = True
    yield
    torch._dynamo.config.trace_autograd_ops = before
    torch._dynamo.reset()


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("name", ["kl", "tiny"])
def test_compiled_decode_with_a_traced_gradient(build: Any, name: str) -> None:
    model = MODELS[name](build)
    if name == "kl":
        model = settled(build.autoencoder(layers_per_block=1))  # at batch 1 torch 2.13 cannot run the stock one either

    def gradient(z: Tensor) -> Tensor:
        return torch.autograd.grad(model.decode(z, return_dict=False)[0].square().mean(), z)[0]

    z = torch.randn(2, 4, 2, 3, generator=torch.Generator().manual_seed(2))
    z.requires_grad_()  # outside: torch 2.11 cannot trace it
    stock = gradient(z)
    with fuse(model), implementation("triton"):
        eager = gradient(z)
        compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")(z)
    near(eager, stock, 2e-5)
    near(compiled, eager, 1e-5)


def flops(model: Any, gradient: bool) -> int:
    """Of a decode of a 64x64 latent, on the meta device."""
    z = torch.empty(1, 4, 64, 64, device="meta", requires_grad=gradient)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradient):
        image = model.decode(z, return_dict=False)[0]
        if gradient:
            image.sum().backward()
    return counter.get_total_flops()


# 15.4 % but for the one row and column more of each phase; attention's backward, which is left, adds to the whole
@pytest.mark.parametrize(("gradient", "saved"), [(False, 0.152), (True, 0.151)])
def test_a_stable_diffusion_decoder_takes_15_percent_fewer_flops(build: Any, gradient: bool, saved: float) -> None:
    with torch.device("meta"):
        model = build.autoencoder(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ).requires_grad_(False)  # fmt: skip
    stock = flops(model, gradient)
    with fuse(model):
        fused = flops(model, gradient)
    assert 1 - fused / stock == pytest.approx(saved, abs=5e-4)


def test_a_changed_pipeline_is_looked_at_again(build: Any) -> None:
    """A handle kept over many groups finds new modules, and keeps the stand-ins of old ones."""
    model = three_levels(build)
    handle = fuse(model)
    standin = model.decoder
    handle.undo()
    _hook(model.decoder.up_blocks[0].resnets[1])
    with handle:
        assert model.decoder is standin
        assert "hooks" in handle.left["decoder.up_blocks.0.resnets.1"]
    assert isinstance(handle, Fused)
