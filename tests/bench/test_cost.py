"""What a step costs, counted on the traced graph of the loop itself: an extra pass of a network fails here."""

import logging
from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

pytest.importorskip("diffusers", reason="priors are diffusers' own")

from synthkd.bench import flops
from synthkd.bench.engine_cases import CASES, random_drawer, random_guidance, resnet50
from synthkd.bench.flops import count, count_decode, count_step
from synthkd.engine import SynthkdError
from synthkd.engine.random_models import draw_weights, random_prior

SD15 = CASES["sd15-512"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """torch notes every tensor of a trace for whoever listens, which pytest does: half of the time."""
    trace = logging.getLogger("torch.__trace")
    before, trace.propagate = trace.propagate, False
    yield
    trace.propagate = before


@torch.library.custom_op("synthkd_test::denoiser", mutates_args=())
def _denoiser(z: Tensor) -> Tensor:
    return torch.empty_like(z)


@_denoiser.register_fake
def _(z: Tensor) -> Tensor:
    return torch.empty_like(z)


@register_flop_formula(torch.ops.synthkd_test.denoiser)
def _denoiser_flops(z: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(z[0]) * _unet_flops()


class Reader(nn.Sequential):
    """A ResNet-50's cost at 224 pixels in five convolutions: its 53 take seconds to trace."""

    def __init__(self) -> None:
        widths = (3, 64, 256, 512, 1024, 900)
        layers: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(c_in, c_out, 3 if i else 7, 1 if i == 4 else 2, 1 if i else 3), nn.BatchNorm2d(c_out)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(900, 1000))


@lru_cache(maxsize=1)
def _prior() -> tuple[Any, Any]:
    with mock.patch("synthkd.bench.engine_cases.resnet50", side_effect=lambda classes: Reader()):
        return random_prior("sd15", device="meta"), random_guidance(tuple(f"class {i}" for i in range(1000)))


@cache
def _drawer(variant: str) -> Any:
    return random_drawer(SD15, variant, *_prior(), group=1)


@lru_cache(maxsize=1)
def _unet_flops() -> int:
    """Of one evaluation, from the traced CFG step."""
    return count_step(_drawer("plain"), guided=False, cfg=True) // 2


@cache
def _step(variant: str, guided: bool, cfg: bool) -> float:
    """TFLOP of a step; where no gradient is kept one op of the UNet's cost stands for it: tracing it takes long."""
    unet = next(iter(_prior()[0].modules()))
    whole = unet.forward

    def forward(z: Tensor, t: Tensor, **told: Any) -> tuple[Tensor]:
        return whole(z, t, **told) if torch.is_grad_enabled() else (_denoiser(z),)

    _unet_flops()
    with mock.patch.object(unet, "forward", forward):
        return count_step(_drawer(variant), guided=guided, cfg=cfg) / 1e12


def test_networks_cost_what_they_are_known_to() -> None:
    """SD 1.5 at 512, forward: UNet 0.803 TFLOP, VAE 2.515, TAESD 0.141, a ResNet-50 at 224 0.0082."""
    assert _unet_flops() / 1e12 == pytest.approx(0.803, rel=0.01)
    assert _step("plain", False, True) == pytest.approx(2 * 0.803, rel=0.01)
    assert _step("plain", False, False) == pytest.approx(0.803, rel=0.01)
    assert count_decode(_drawer("plain")) / 1e12 == pytest.approx(2.515, rel=0.01)
    z = torch.empty(1, 4, 64, 64, device="meta")
    assert count(_drawer("tiny").look, z) / 1e12 == pytest.approx(0.141, rel=0.01)
    teacher, images = resnet50().to("meta").eval(), torch.empty(1, 3, 224, 224, device="meta")
    assert count(teacher, images) / 1e12 == pytest.approx(0.0082, rel=0.01)
    assert count(Reader().to("meta"), images) / 1e12 == pytest.approx(0.0082, rel=0.02)
    assert sum(p.numel() for p in teacher.parameters()) == 25_557_032


@pytest.mark.parametrize(
    ("variant", "most", "decode"),
    [("guided", 1.05, None), ("tiny", 1.2, 0.141), ("pooled:2", 1.9, 0.622), ("vae", 4.2, 2.515)],
)
def test_a_guided_step_costs_one_denoiser_pass_and_one_decode_with_its_gradient(
    variant: str, most: float, decode: float | None
) -> None:
    """Against the plain CFG step; the count itself leaves no room for another pass of anything."""
    plain, look = _step("plain", False, True), _drawer(variant).look
    once = decode or count(look, torch.empty(1, 4, 64, 64, device="meta")) / 1e12
    assert _step(variant, True, True) <= most * plain
    assert _step(variant, True, True) - plain == pytest.approx(2 * once + 2 * 0.0082, rel=0.02)


def test_as_published_costs_two_passes_and_a_gradient_through_everything() -> None:
    """Two CFG passes, the denoiser's gradient (1.726 - 0.803 a half), decode and its gradient."""
    wanted = 4 * 0.803 + 2 * (1.726 - 0.803) + 5.06 + 2 * 0.0082
    assert _step("as-published", True, True) == pytest.approx(wanted, rel=0.01)
    assert _step("as-published", True, True) >= 5 * _step("guided", True, True)


def test_the_default_recipe_costs_a_tenth_more_than_plain() -> None:
    """20 steps, the default guidance through a decoder fitted straight to 224, the final decode included."""
    recipe = _drawer("guided").recipe
    assert recipe.steps == 20
    calls = [(recipe.guidance.active(i, 20), recipe.cfg_active(i)) for i in range(20)]
    decode = count_decode(_drawer("plain")) / 1e12
    guided = sum(_step("guided", *kind) if kind[0] else _step("plain", *kind) for kind in calls) + decode
    plain = sum(_step("plain", False, cfg) for _, cfg in calls) + decode
    assert sum(kind[0] for kind in calls) >= 10
    assert guided <= 1.1 * plain


def test_random_priors_are_the_published_architectures() -> None:
    """Parameters in millions; nothing is allocated."""
    for name, millions in (("sd15", 859.5), ("sdxl", 2567.5)):
        prior = _prior()[0] if name == "sd15" else random_prior(name, device="meta")
        unet, vae, *rest = prior.modules()
        assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
        assert sum(p.numel() for p in vae.parameters()) / 1e6 == pytest.approx(83.65, abs=0.1)
        assert {p.device.type for p in unet.parameters()} == {"meta"}
        assert all(not list(part.parameters()) for part in rest)
        cond, uncond = prior.conditions(("a", "b"), "", 5.0, (512, 512))
        assert uncond is not None
        assert {n: x.shape for n, x in cond.items()} == {n: x.shape for n, x in uncond.items()}
    with pytest.raises(SynthkdError, match="architecture 'sd16'"):
        random_prior("sd16", device="meta")


def test_weights_are_drawn_by_fan_in_where_they_stay() -> None:
    """sigma = 1 / sqrt(fan_in), biases 0, norms 1, in the dtype asked for, the same for the same seed."""
    with torch.device("meta"):
        nets = [nn.Sequential(nn.Conv2d(8, 64, 3), nn.GroupNorm(4, 64), nn.Linear(64, 512)) for _ in range(2)]
    made, again = (draw_weights(net.to(torch.bfloat16), torch.device("cpu"), 3) for net in nets)
    conv, norm, linear = made
    assert conv.weight.float().std() * 72**0.5 == pytest.approx(1.0, abs=0.05)
    assert linear.weight.float().std() * 8 == pytest.approx(1.0, abs=0.05)
    assert not conv.bias.any()
    assert bool((norm.weight == 1).all())
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))


def test_attention_and_custom_ops_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op of this project by its own formula; one that has none is refused, not counted as nothing."""
    from synthkd.kernels import group_norm_silu
    from synthkd.kernels.dispatch import planned

    x, w = torch.empty(2, 8, 6, 10, device="meta"), torch.empty(8, device="meta")
    with planned():
        found = count(lambda x: group_norm_silu(x, 4, w, w, 1e-5), x)
        assert found == flops.flop_registry[torch.ops.synthkd.group_norm_silu](x, out_val=x) > 0
        monkeypatch.delitem(flops.flop_registry, torch.ops.synthkd.group_norm_silu)
        with pytest.raises(SynthkdError, match="group_norm_silu has no formula"):
            count(lambda x: group_norm_silu(x, 4, w, w, 1e-5), x)
    q = torch.empty(1, 2, 16, 8, device="meta")
    attention = nn.functional.scaled_dot_product_attention
    assert count(lambda q: attention(q, q, q), q) == 2 * (2 * 2 * 16 * 16 * 8)


def test_unknown_maths_is_refused() -> None:
    """An op that is named after a product and has no formula would count as nothing."""

    def run(x: Tensor) -> Tensor:
        return torch.ops.aten.dot(x, x)

    with pytest.raises(SynthkdError, match=r"aten\.dot has no formula"):
        count(run, torch.empty(4, device="meta"))
