"""Gradient hygiene: several looks, step schedules; and how many images of each class a set gets."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.engine import GuidanceSpec, Plan, Recipe, Request, Synthesizer, SynthkdError
from synthkd.engine.augment import Look, look, viewed
from synthkd.engine.guidance import guidance_gradient, step_size, step_sizes
from synthkd.kernels import sum_of_squares

CPU = torch.device("cpu")
IDS = range(40, 44)


def chosen(spec: GuidanceSpec, number: int = 1, call: int = 0, attempt: int = 0) -> Look:
    """One view of a group of four."""
    return look(IDS, spec, CPU, seed=3, call=call, view=number, attempt=attempt)


def view(spec: GuidanceSpec, **which: int) -> Callable[[Tensor], Tensor]:
    """The same as a function of images."""
    return lambda x: viewed(x, chosen(spec, **which))


def images(height: int = 6, width: int = 11) -> Tensor:
    """Four images whose every pixel differs."""
    return torch.arange(4 * 3 * height * width, dtype=torch.float64).view(4, 3, height, width)


@pytest.mark.parametrize("flip", [False, True])
def test_a_look_is_a_shift_with_repeated_edges(flip: bool) -> None:
    spec, x = GuidanceSpec(looks=2, look_shift=0.3, look_flip=flip), images()
    got, mirrored = view(spec)(x), 0
    for b in range(4):
        found = [
            (dy, dx, m)
            for dy in range(-2, 3)
            for dx in range(-4, 5)
            for m in ((False, True) if flip else (False,))
            if torch.equal(got[b], _moved(x[b], dy, dx, m))
        ]
        assert found, b
        mirrored += all(m for _, _, m in found)
    assert (mirrored > 0) == flip
    assert not torch.equal(got, x)


def _moved(x: Tensor, dy: int, dx: int, mirror: bool) -> Tensor:
    height, width = x.shape[1:]
    rows = [min(max(i + dy, 0), height - 1) for i in range(height)]
    columns = [min(max(j + dx, 0), width - 1) for j in range(width)]
    out = x[:, rows][:, :, columns]
    return out.flip(2) if mirror else out


def test_looks_are_functions_of_seed_id_call_view_and_attempt() -> None:
    spec, x = GuidanceSpec(looks=4, look_shift=0.5), images(32, 32)
    assert torch.equal(view(spec)(x), view(spec)(x))
    others = [view(spec, number=2), view(spec, call=1), view(spec, attempt=1)]
    assert all(not torch.equal(view(spec)(x), other(x)) for other in others)
    alone = look(IDS[1:2], spec, CPU, seed=3, call=0, view=1, attempt=0)
    assert torch.equal(viewed(x[1:2], alone), view(spec)(x)[1:2])  # the rest of the group has no say
    still = GuidanceSpec(looks=2, look_shift=0.0)
    assert torch.equal(view(still)(x), x)


class Quadratic:
    """A loss whose gradient is known: mean over the group of the squared distance to a ramp."""

    def __call__(self, x: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        ramp = torch.linspace(0.2, 0.8, x[0].numel(), dtype=x.dtype).view_as(x[0])
        value = (x - ramp).square().sum(dim=(1, 2, 3))
        return value.mean(), {"square": value}


def test_the_gradient_is_the_mean_over_the_looks() -> None:
    g = torch.Generator().manual_seed(0)
    x0 = (0.1 + 0.8 * torch.rand(4, 3, 6, 11, generator=g, dtype=torch.float64)).requires_grad_()
    spec, loss = GuidanceSpec(looks=3, look_shift=0.3, look_flip=True), Quadratic()
    views = [view(spec, number=n) for n in (1, 2)]
    looks = [chosen(spec, number=n) for n in (1, 2)]
    got, value, terms, _ = guidance_gradient(loss, lambda z: z, x0, x0, torch.zeros(4, 1), looks)  # type: ignore[arg-type]
    singles = [loss(v(x0), torch.zeros(4, 1))[0] for v in (lambda x: x, *views)]
    want = sum(torch.autograd.grad(s, x0)[0] for s in singles) / 3
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(value, sum(singles) / 3)  # type: ignore[arg-type]
    torch.testing.assert_close(terms["square"], loss(x0, torch.zeros(4, 1))[1]["square"])


def steps(spec: GuidanceSpec, loss: float = 2.0, calls: int = 8) -> list[Tensor]:
    """Step sizes over a run whose sigma falls from 0.9 to 0.2."""
    sumsq = torch.tensor([4.0, 1.0, 0.25])
    planned = step_sizes(spec, torch.linspace(0.9, 0.2, calls))
    return [step_size(spec, planned[i], torch.tensor(loss), sumsq, 100) for i in range(calls)]


def test_step_schedules() -> None:
    assert [float(s) for s in steps(GuidanceSpec(scale=0.5, schedule="constant"))] == [0.5] * 8
    sigma = torch.linspace(0.9, 0.2, 8)
    torch.testing.assert_close(torch.stack(steps(GuidanceSpec(scale=0.5, schedule="sigma"))), 0.5 * sigma)
    cosine = [0.5 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    torch.testing.assert_close(torch.stack(steps(GuidanceSpec(scale=0.5, schedule="cosine"))), torch.tensor(cosine))


def test_the_polyak_step_zeroes_a_linear_loss() -> None:
    """L(x) = <g, x - x*>: the step along g that ends at L = 0 is L / ||g||^2, shared by the group."""
    g = torch.Generator().manual_seed(0)
    grad = torch.randn(3, 2, 5, 9, generator=g, dtype=torch.float64)
    sumsq, loss = sum_of_squares(grad), torch.tensor(0.7, dtype=torch.float64)
    spec = GuidanceSpec(scale=1.0, schedule="polyak")
    step = step_size(spec, torch.tensor(9.0, dtype=torch.float64), loss, sumsq, grad[0].numel())
    shift = step.view(-1, 1, 1, 1) * grad / grad.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    assert float((grad * shift).sum()) == pytest.approx(0.7)
    capped = step_size(spec, torch.tensor(1e-4, dtype=torch.float64), loss, sumsq, grad[0].numel())
    assert float(capped.max()) == pytest.approx(1e-4)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-20])
def test_the_polyak_step_survives_no_gradient(size: float) -> None:
    sumsq = torch.tensor([size, 0.0])
    step = step_size(GuidanceSpec(schedule="polyak"), torch.tensor(0.05), torch.tensor(1.0), sumsq, 100)
    assert torch.isfinite(step).all()
    assert float(step.max()) <= 0.05 + 1e-6


@pytest.mark.parametrize("schedule", ["sigma", "constant", "cosine", "polyak"])
def test_every_schedule_draws_a_finite_group_that_moves(synthesizer: Callable[..., Synthesizer], schedule: str) -> None:
    plain = next(iter(synthesizer().stream(Request(num_samples=6))))
    spec = GuidanceSpec(scale=0.5, schedule=schedule, looks=2, look_flip=True)
    batch = next(iter(synthesizer(guidance=spec).stream(Request(num_samples=6))))
    assert not torch.equal(batch.images, plain.images)
    assert len(batch.curves["ce"]) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"looks": 0}, "guidance.looks is 0; expected 1 to 64"),
        ({"look_shift": 1.0}, "guidance.look_shift is 1.0"),
        ({"schedule": "polack"}, "did you mean 'polyak'"),
    ],
)
def test_settings_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SynthkdError, match=message):
        GuidanceSpec(**fields)


def counts(wanted: Recipe, samples: int) -> Counter[int]:
    """Images of each class in a plan."""
    plan = Plan(wanted, Request(num_samples=samples, seed=1))
    return Counter(c for u in plan.units() for c in u.classes[: u.kept])


def test_weights_are_proportions(recipe: Callable[..., Recipe]) -> None:
    wanted = recipe(class_weights=(3, 0, 1), classes_per_group=4, samples_per_class=2)
    assert counts(wanted, 80) == {0: 60, 2: 20}
    assert counts(recipe(class_weights=(2, 2, 2)), 60) == counts(recipe(), 60) == {0: 20, 1: 20, 2: 20}


def test_weights_leave_an_unweighted_plan_alone(recipe: Callable[..., Recipe]) -> None:
    plain, ones = (Plan(recipe(class_weights=w), Request(num_samples=60)) for w in ((), (1, 1, 1)))
    assert [u.classes for u in plain.units()] == [u.classes for u in ones.units()]


def test_words_stand_in_prompts_not_in_labels(synthesizer: Callable[..., Synthesizer]) -> None:
    synth = synthesizer(class_words=("tabby", "hound", "fowl"), prompts=("a {class}",))
    unit = synth.stream(Request(num_samples=6)).plan.unit(0)
    words = dict(zip(unit.classes, synth.prompts(unit, 0), strict=True))
    assert words == {0: "a tabby", 1: "a hound", 2: "a fowl"}
    assert synth.recipe.classes == ("cat", "dog", "bird")


def test_one_of_several_words_is_drawn_for_each_sample(synthesizer: Callable[..., Synthesizer]) -> None:
    synth = synthesizer(class_words=("tabby|tom cat", "hound", "fowl"), prompts=("a {class}",))
    units = list(synth.stream(Request(num_samples=60)).plan.units())
    drawn = [(c, i, p) for u in units for c, i, p in zip(u.classes, u.ids, synth.prompts(u, 0), strict=True)]
    cats = {i: prompt for c, i, prompt in drawn if c == 0}
    assert set(cats.values()) == {"a tabby", "a tom cat"}
    assert 4 <= list(cats.values()).count("a tabby") <= 16
    assert {prompt for c, _, prompt in drawn if c > 0} == {"a hound", "a fowl"}
    again = {i: p for u in reversed(units) for i, p in zip(u.ids, synth.prompts(u, 0), strict=True)}
    assert {i: again[i] for i in cats} == cats
    assert len(set(synth.recipe.words(0))) == 2
    assert synth.recipe.word(0) == "tabby"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_weights": (1, 2)}, "class_weights is 2; expected 3 numbers"),
        ({"class_weights": (0, 0, 0)}, "whole numbers 0 to 1000, not all of them 0"),
        ({"class_weights": (1, 1, -1)}, "whole numbers 0 to 1000"),
        ({"class_weights": (1, 1, 0)}, "classes_per_group is 3; expected at most the 2 classes that are drawn"),
        ({"class_words": ("a", "b")}, "class_words is 2; expected 3"),
        ({"class_words": ("a", "b", "")}, "no empty words"),
        ({"class_words": ("a", "b", "c||d")}, "no empty words"),
    ],
)
def test_targets_that_do_not_fit(recipe: Callable[..., Recipe], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SynthkdError, match=message):
        recipe(**fields)
