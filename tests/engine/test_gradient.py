"""The guidance gradient against central differences in float64, its effect over a run, and its scale-free ratio."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.dfkd.losses import bn_distance
from synthkd.engine import GuidanceSpec, Request, Synthesizer, guidance, sampler
from synthkd.engine.guidance import frozen, guidance_gradient
from synthkd.engine.schedule import solver_tables
from synthkd.kernels import predict_x0

TERMS = {"bn": (1.0, 0.0), "ce": (0.0, 1.0), "both": (0.3, 1.0)}
CALL = 7  # of 10 denoiser calls
CONTRAST = 0.3  # the random decoder ends in a group norm: less contrast keeps its images off the clamp's kinks


class Setting:
    """A float64 group of the tiny pipeline: the clean latent as a function of the leaf, and the loss behind it."""

    def __init__(self, pipe: Any, make_recipe: Callable[..., Any], loss: Any, gradient: str) -> None:
        synth = Synthesizer.from_pipeline(pipe, make_recipe(guidance=GuidanceSpec(scale=0.1)), guidance=loss)
        model, self.loss = synth.model, loss
        tables = solver_tables(model.scheduler_config, 10, model.device, model.dtype)
        unit = synth.stream(Request(num_samples=6)).plan.unit(0)
        cond, uncond = synth._conditions(synth.prompts(unit, 0))
        self.targets = synth._steering(unit, 0, 0).targets[0]
        self.start = synth.initial_latents(unit.ids, 0)
        alpha, sigma = tables.at(CALL)[:2]

        def through_unet(z: Tensor) -> Tensor:
            out = model.denoise(z, tables.timesteps[CALL], cond, uncond)
            return predict_x0(z, *out, 3.0, alpha, sigma, tables.prediction_type)

        self.look: Callable[[Tensor], Tensor] = lambda x0: 0.5 + CONTRAST * (model.decoder(x0) - 0.5)
        self.x0_of = through_unet if gradient == "unet" else lambda x0: x0 * 1.0

    def value(self, leaf: Tensor) -> float:
        """The loss, with no clamp: the images must lie inside (0, 1) for the comparison to mean anything."""
        with torch.no_grad():
            images = self.look(self.x0_of(leaf))
            assert 0.0 < images.min() < images.max() < 1.0
            return float(self.loss(images, self.targets)[0])

    def gradient(self) -> Tensor:
        """The engine's gradient at the start."""
        with torch.enable_grad():
            leaf = self.start.clone().requires_grad_()
            return guidance_gradient(self.loss, self.look, self.x0_of(leaf), leaf, self.targets)[0]


@pytest.mark.parametrize("gradient", ["x0", "unet"])
@pytest.mark.parametrize("term", TERMS)
def test_gradient_is_the_central_difference(
    pipeline64: Any, recipe: Callable[..., Any], guide: Callable[..., Any], term: str, gradient: str
) -> None:
    alpha, beta = TERMS[term]
    setting = Setting(pipeline64, recipe, guide(alpha=alpha, beta=beta, double=True), gradient)
    grad, h, g = setting.gradient(), 1e-6, torch.Generator().manual_seed(0)
    assert grad.dtype == torch.float64
    directions = [torch.randn(grad.shape, generator=g, dtype=grad.dtype) for _ in range(4)]
    for random in directions:  # along the gradient too: a derivative near zero would be lost in rounding
        v = random / random.norm() + grad / grad.norm()
        measured = (setting.value(setting.start + h * v) - setting.value(setting.start - h * v)) / (2 * h)
        want = float((grad * v).sum())
        assert abs(measured - want) <= 1e-5 * abs(want), (term, gradient)


def test_pixels_outside_the_range_have_no_say(
    pipeline64: Any, recipe: Callable[..., Any], guide: Callable[..., Any]
) -> None:
    setting = Setting(pipeline64, recipe, guide(double=True), "x0")
    inside = setting.look
    assert setting.gradient().any()
    setting.look = lambda x0: inside(x0) + 5.0
    assert not setting.gradient().any()


def _curves(synth: Synthesizer) -> dict[str, list[Any]]:
    return synth.run(synth.stream(Request(num_samples=6)).plan.unit(0), 0).curves


def _last(curves: dict[str, list[Any]], term: str) -> float:
    return float(torch.tensor(curves[term][-1]).mean())


@pytest.mark.parametrize("gradient", ["x0", "unet"])
@pytest.mark.parametrize("term", ["bn", "ce"])
@pytest.mark.parametrize("sign", [1, -1])
def test_each_term_alone_lowers_its_own_statistic(
    pipeline: Any,
    recipe: Callable[..., Any],
    guide: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    term: str,
    gradient: str,
    sign: int,
) -> None:
    """With the sign of the step flipped the same comparison must come out the other way."""
    alpha, beta = TERMS[term]
    inner = sampler.step_size
    monkeypatch.setattr(sampler, "step_size", lambda *args: sign * inner(*args))

    def run(scale: float) -> dict[str, list[Any]]:
        spec = GuidanceSpec(scale=scale, gradient=gradient, schedule="constant")
        wanted = recipe(guidance=spec, steps=8)
        return _curves(Synthesizer.from_pipeline(pipeline, wanted, guidance=guide(alpha=alpha, beta=beta)))

    guided, free = run(0.2), run(1e-9)
    first = float(torch.tensor(guided[term][0]).mean())
    fell = _last(guided, term) < min(first, 0.97 * _last(free, term))
    assert fell == (sign == 1)
    assert (_last(guided, term) < _last(free, term)) == (sign == 1)


def test_loss_and_ratio_do_not_know_the_group_size(
    pipeline64: Any, recipe: Callable[..., Any], guide: Callable[..., Any]
) -> None:
    ratios, losses = [], []
    for copies in (1, 4):
        norms = []
        for term in ("bn", "ce"):
            alpha, beta = TERMS[term]
            setting = Setting(pipeline64, recipe, guide(alpha=alpha, beta=beta, double=True), "x0")
            setting.start = setting.start[:4].repeat(copies, 1, 1, 1)
            setting.targets = setting.targets[:4].repeat(copies, 1)
            norms.append(float(setting.gradient().norm()))
            losses.append(setting.value(setting.start))
        ratios.append(norms[0] / norms[1])
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-9)
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-9)


def test_copies_move_as_the_originals_do(
    pipeline64: Any, recipe: Callable[..., Any], guide: Callable[..., Any]
) -> None:
    setting = Setting(pipeline64, recipe, guide(double=True), "x0")
    small = setting.gradient()
    setting.start, setting.targets = setting.start.repeat(3, 1, 1, 1), setting.targets.repeat(3, 1)
    torch.testing.assert_close(setting.gradient() * 3, small.repeat(3, 1, 1, 1), rtol=1e-9, atol=1e-15)


class Faint:
    """A loss whose gradient is below float16: only the loss scale keeps it."""

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (images.square() * images.new_tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)).sum() * 3e-9
        return loss, {"loss": loss}


def test_half_precision_loss_scale_keeps_the_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    x0 = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).half()

    def gradient(x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        # The loss itself is float32, as a teacher's is after its softmax; the gradient comes back in half precision.
        return guidance_gradient(Faint(), lambda z: z.float(), leaf, leaf, torch.zeros(2, 1))[0].float()  # type: ignore[arg-type]

    want = gradient(x0.float())
    got = gradient(x0)
    assert torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0) > 0.999
    monkeypatch.setattr(guidance, "HALF_LOSS_SCALE", 1.0)
    assert torch.nn.functional.cosine_similarity(gradient(x0).flatten(), want.flatten(), dim=0) < 0.99


def test_no_weight_gathers_a_gradient(pipeline: Any, recipe: Callable[..., Any], guide: Callable[..., Any]) -> None:
    loss = guide()
    synth = Synthesizer.from_pipeline(
        pipeline, recipe(guidance=GuidanceSpec(scale=0.2, gradient="unet")), guidance=loss
    )
    _curves(synth)
    modules = [*synth.model.modules(), *loss.modules()]
    assert all(p.grad is None for m in modules for p in m.parameters())


def test_frozen_restores_exactly_what_it_switched() -> None:
    net = torch.nn.Linear(2, 2)
    net.bias.requires_grad_(False)

    def fail() -> None:
        with frozen([net, net]):
            assert not net.weight.requires_grad
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert net.weight.requires_grad
    assert not net.bias.requires_grad


def test_a_teacher_without_batchnorm_has_distance_zero() -> None:
    assert float(bn_distance([])) == 0.0
