"""8-bit floats in a UNet: which layers, what they compute, that the live network is untouched, and what images lose."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from synthkd.engine import Recipe, Request, Synthesizer
from synthkd.engine.models import load_model, random_pipeline
from synthkd.export import fp8
from synthkd.export.errors import ExportError
from synthkd.export.fp8 import Float8Conv2d, Float8Linear, eligible, quality, quantise, quantized, why_left


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def denoised(unet: Any, batch: int = 2) -> Tensor:
    told = normal(batch, 5, unet.config.cross_attention_dim, seed=1)
    with torch.no_grad():
        return unet(normal(batch, 4, 8, 8), torch.full((batch,), 10), told, return_dict=False)[0]


def test_the_layers_of_stable_diffusion() -> None:
    """By name, and by what they are worth: 57 % of a UNet call's arithmetic at 512 pixels."""
    unet = random_pipeline("sd15", device="meta", dtype=torch.float16).unet
    left = {name: why_left(name, m) for name, m in unet.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    wide = "down_blocks.2.attentions.0.transformer_blocks.0"
    assert not left["down_blocks.2.resnets.1.conv1"]
    assert not left[f"{wide}.attn2.to_q"]
    assert not left[f"{wide}.ff.net.0.proj"]
    for name, why in {
        "conv_in": "first or last", "conv_out": "first or last", "time_embedding.linear_1": "once per image",
        "down_blocks.2.resnets.0.time_emb_proj": "once per image", "down_blocks.2.resnets.0.conv_shortcut": "shortcut",
        f"{wide}.attn2.to_k": "tokens of a prompt", "down_blocks.0.resnets.0.conv1": "320 channels, below 512",
    }.items():  # fmt: skip
        assert why in left[name], name
    with FlopCounterMode(display=False, depth=None) as counter, torch.no_grad(), torch.device("meta"):
        half = {"dtype": torch.float16}
        unet(torch.empty(1, 4, 64, 64, **half), torch.empty(()), torch.empty(1, 77, 768, **half))
    counts = counter.get_flop_counts()
    covered = sum(sum(counts[f"UNet2DConditionModel.{name}"].values()) for name, why in left.items() if not why)
    assert covered / sum(counts["Global"].values()) == pytest.approx(0.574, abs=0.005)


def test_what_fp8_cannot_do_is_left() -> None:
    """Odd channels, groups, dilation, another padding, a layer that is not exactly a Linear or Conv2d."""

    class Own(nn.Linear):
        pass

    for module in (
        Own(32, 32), nn.Linear(32, 24), nn.Conv2d(24, 32, 3), nn.Conv2d(32, 32, 3, groups=2), nn.Linear(32, 16),
        nn.ConvTranspose2d(32, 32, 3), nn.Conv2d(32, 32, 3, dilation=2), nn.Conv2d(32, 32, 3, padding="same"),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect"), Float8Linear(nn.Linear(32, 32)),
    ):  # fmt: skip
        assert not eligible("a", module, 32), module
    assert eligible("a", nn.Linear(32, 64), 32)
    assert eligible("a", nn.Conv2d(32, 64, 3, 2, (1, 0)), 32)


CONVS = [(3, 1, 1), (3, 2, 1), (3, 1, 0), (1, 1, 0), ((1, 3), (2, 1), (0, 1))]


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("form", CONVS)
def test_a_convolution(form: tuple[Any, Any, Any], emulate: bool) -> None:
    """As the rounded input and weight convolved in float32; the real product, which a CPU has too, in bfloat16."""
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, *form).requires_grad_(False)
    x = normal(3, 16, 7, 9) * torch.tensor([1.0, 100.0, 0.01]).view(-1, 1, 1, 1)
    ours = Float8Conv2d(conv, emulate)
    data, scale = quantise(x, (1, 2, 3))
    want = nn.functional.conv2d(data.float() * scale, ours.weight, conv.bias, conv.stride, conv.padding)
    got = ours(x)
    assert got.dtype == torch.float32
    peak = want.abs().amax((1, 2, 3), keepdim=True)
    assert ((got - want) / peak).abs().max() < (1e-5 if emulate else 2**-8)
    assert 1e-3 < ((got - conv(x)) / peak).abs().max() < 0.1  # it is rounded, and no more than e4m3's 2^-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_linear(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 48).to(dtype).requires_grad_(False)
    ours, x = Float8Linear(linear), normal(2, 5, 32).to(dtype)
    data, scale = quantise(x, (2,))
    want = (data.float() * scale) @ (ours.bytes8.view(torch.float8_e4m3fn).float() * ours.scale.T).T + linear.bias
    got = ours(x)
    assert got.dtype == dtype
    assert (got - want).abs().max() < want.abs().max() * 2**-7
    assert ours.weight.dtype == dtype
    assert ((ours.weight - linear.weight) / linear.weight.abs().amax(1, keepdim=True)).abs().max() < 2**-4


def test_rounding_is_e4m3s() -> None:
    """Within 2^-4 of each value of usual size, never out of range; zeros stay, and the scale is the declared one."""
    x = normal(4, 1000)
    data, scale = quantise(x, (1,))
    assert torch.equal(scale, x.abs().amax(1, keepdim=True) / 448)
    usual = x.abs() > scale * 2**-6
    assert ((data.float() * scale - x).abs() <= x.abs() * (2**-4 + 1e-6))[usual].all()
    assert torch.isfinite(data.float()).all()
    assert not quantise(torch.zeros(2, 4), (1,))[0].float().any()


def test_an_image_does_not_hang_on_its_neighbours(build: Any) -> None:
    """A loud sample in the batch changes nothing: planted, one scale over the batch does."""
    torch.manual_seed(0)
    conv, linear = Float8Conv2d(nn.Conv2d(16, 16, 3, padding=1)), Float8Linear(nn.Linear(16, 16))
    quiet, loud = normal(1, 16, 6, 6), 1e6 * normal(1, 16, 6, 6, seed=1)
    with torch.no_grad():
        both = linear(conv(torch.cat([quiet, loud])).permute(0, 2, 3, 1))
        alone = linear(conv(quiet).permute(0, 2, 3, 1))
    torch.testing.assert_close(both[:1], alone, rtol=1e-5, atol=1e-6)
    shared = quantise(torch.cat([quiet, loud]), (0, 1, 2, 3))[0].float()[:1]
    assert (shared == 0).float().mean() > 0.9


def test_the_live_network_is_untouched(build: Any) -> None:
    """The twin shares every tensor that is not quantised, copies none, and works under torch.compile."""
    torch.manual_seed(0)
    unet = build.denoiser(block_out_channels=(16, 32)).eval().requires_grad_(False)
    before, want = {name: (id(m), sorted(vars(m))) for name, m in unet.named_modules()}, denoised(unet)
    twin = quantized(unet, smallest=16, emulate=True)
    kinds = [type(m) for m in twin.modules()]
    assert kinds.count(Float8Conv2d) > 10
    assert kinds.count(Float8Linear) > 10
    own = {id(p) for p in unet.parameters()}
    assert all(id(p) in own for p in twin.parameters())
    got = denoised(twin)
    assert 1e-4 < (got - want).abs().max() / want.abs().max() < 0.2
    assert torch.equal(denoised(unet), want)
    assert before == {name: (id(m), sorted(vars(m))) for name, m in unet.named_modules()}
    block, x = twin.down_blocks[0].resnets[0], normal(2, 16, 8, 8)
    with torch.no_grad():
        args = x, normal(2, twin.time_embedding.linear_1.out_features)
        torch.testing.assert_close(torch.compile(block, backend="aot_eager", fullgraph=True)(*args), block(*args))
    assert twin.half().down_blocks[0].resnets[0].conv1.bytes8.dtype == torch.uint8


def test_errors_are_one_line(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = build.denoiser()
    with pytest.raises(ExportError, match=r"^fp8 needs a GPU of compute capability 8.9 or newer, found cpu$"):
        quantized(unet)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ExportError, match=r"8.9 or newer, found 8.6$"):
        fp8._refuse_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    fp8._refuse_device(torch.device("cuda"))
    with pytest.raises(ExportError, match="no layer of this UNet2DConditionModel has 512 channels"):
        quantized(unet, emulate=True)
    with pytest.raises(ExportError, match="no gradient"):
        Float8Linear(nn.Linear(16, 16))(torch.ones(1, 16, requires_grad=True))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ExportError, match=r"^torchao is not installed: pip install 'synthkd\[fp8\]'$"):
        fp8._torchao_linear(nn.Linear(16, 16), False)


def test_torchao_gets_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """It replaces a layer's weight in place: not the live layer's. Its real call needs a GPU."""
    told: list[Any] = []

    def replace(model: nn.Module, config: Any) -> None:
        told.append(config)
        model[0].weight = nn.Parameter(torch.zeros(16, 16))

    module: Any = ModuleType("torchao.quantization")
    module.PerRow, module.quantize_ = lambda: "row", replace
    module.Float8DynamicActivationFloat8WeightConfig = dict
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", module)
    linear = nn.Linear(16, 16).bfloat16()
    before = linear.weight
    made = fp8._torchao_linear(linear, False)
    assert told == [{"granularity": "row", "set_inductor_config": False}]
    assert not made.weight.any()
    assert linear.weight is before
    with pytest.raises(ExportError, match=r"needs bfloat16 weights on a GPU, found torch\.float16"):
        fp8._torchao_linear(linear.half(), False)


def test_what_images_lose(recipe: Callable[..., Recipe]) -> None:
    """The embedded model by emulated fp8, from the same noise. Planted: with scales twice too large it is refused."""
    prior: Any = load_model("embedded:digits", device="cpu", dtype=torch.float32)
    unet, asked = prior._denoiser, recipe(prompts=("{class}",), classes=("one", "two", "three"))

    def draw(denoiser: nn.Module) -> Tensor:
        prior._denoiser = denoiser
        (batch,) = Synthesizer(prior, asked, fuse="off", compile="off").stream(Request(num_samples=6))
        return batch.images

    want, twin = draw(unet), quantized(unet, smallest=64, emulate=True)
    found = quality(want, draw(twin))
    assert found["worst_psnr"] > 30
    assert found["cosine"] > 0.99
    for module in twin.modules():
        if isinstance(module, Float8Conv2d):
            module.scale *= 2
    assert quality(want, draw(twin))["psnr"] < fp8.PSNR


def test_quality_in_numbers() -> None:
    a = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) / 2
    same = quality(a, a)
    assert (same["psnr"], same["max_abs"]) == (120.0, 0.0)
    b = a.clone()
    b[1] += 0.1
    off = quality(a, b)
    assert off["worst_psnr"] == pytest.approx(20.0, abs=1e-3)
    assert off["psnr"] == pytest.approx(23.01, abs=1e-2)
    assert off["max_abs"] == pytest.approx(0.1)
    assert off["cosine"] < 1
    bytes8 = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert quality(bytes8, bytes8 - 51)["max_abs"] == pytest.approx(0.2)
    assert quality(a, a * float("nan"))["psnr"] == 0.0
    with pytest.raises(ExportError, match="images are"):
        quality(a, a[:1])
