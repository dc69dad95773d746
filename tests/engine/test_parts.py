"""A group in parts: the same images as the group at once, whatever the parts, for every term and mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from synthkd.dfkd.methods.diffdfkd import TeacherGuidance
from synthkd.dfkd.teachers import Teacher
from synthkd.engine import CutMixSpec, GuidanceSpec, Request, Synthesizer, SynthkdError
from synthkd.engine.batch import Batch
from synthkd.engine.guidance import chunked_gradient, guidance_gradient

TERMS: dict[str, dict[str, Any]] = {
    "bn and ce": {},
    "statistics alone": {"alpha": 1.0, "beta": 0.0},
    "head and entropy": {"alpha": 0.1, "beta": 0.5, "head": 0.5, "entropy": 0.1},
    "statistics with a memory": {"alpha": 1.0, "beta": 0.1, "bn_momentum": 0.5},
}


def drawn(pipe: Any, recipe: Any, loss: Any, **how: Any) -> Batch:
    synth = Synthesizer.from_pipeline(pipe, recipe, guidance=loss, **how)
    return next(iter(synth.stream(Request(num_samples=6))))


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("gradient", ["x0", "unet"])
def test_parts_draw_what_the_whole_group_draws(
    pipeline64: Any, recipe: Callable[..., Any], guide: Callable[..., Any], terms: str, gradient: str
) -> None:
    """In float64, so that one part's rounding stays far below a grey level: 4 samples, then 2."""
    spec = GuidanceSpec(scale=0.3, gradient=gradient, looks=2, every=2)
    wanted = recipe(
        dtype="float64", guidance=spec, steps=3, cfg_stop=0.7, cutmix=CutMixSpec(every=2, last_clean=1), previews=(0.4,)
    )
    whole = drawn(pipeline64, wanted, guide(double=True, **TERMS[terms]))
    parts = drawn(pipeline64, wanted, guide(double=True, **TERMS[terms]), micro_batch=4)
    assert torch.equal(parts.images, whole.images)
    assert torch.equal(parts.previews[0].images, whole.previews[0].images)
    for name, curve in whole.curves.items():
        torch.testing.assert_close(torch.tensor(parts.curves[name]), torch.tensor(curve), rtol=1e-6, atol=1e-9)


def _two(guide: Callable[..., Any]) -> tuple[Any, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    images = 0.2 + 0.6 * torch.rand(7, 3, 16, 16, generator=g, dtype=torch.float64)
    return guide(double=True, alpha=1.0, beta=1.0), images, torch.eye(3).double()[torch.arange(7) % 3]


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_the_gradient_of_parts_is_exact(guide: Callable[..., Any], chunk: int) -> None:
    """And averaging the gradients of parts is not: their statistics are not the group's."""
    loss, images, targets = _two(guide)
    zero = torch.zeros_like(images).requires_grad_()
    want = guidance_gradient(loss, lambda x: x, images + zero, zero, targets)
    got = chunked_gradient(loss, lambda x: x, lambda part, z: images[part] + z, zero, targets, (), None, chunk)
    torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(got.loss, want.loss)
    naive = []
    for part in torch.arange(7).split(4):
        leaf = torch.zeros_like(images[part]).requires_grad_()
        found = guidance_gradient(loss, lambda x: x, images[part] + leaf, leaf, targets[part])
        naive.append(found.grad * len(part) / 7)
    assert (torch.cat(naive) - want.grad).norm() > 0.01 * want.grad.norm()


def test_half_precision_parts_survive_small_gradients(guide: Callable[..., Any]) -> None:
    """The loss scale is there in both passes: the gradient of parts is the whole one's, not zeros."""
    loss, images, targets = _two(guide)
    half = images.half()
    zero = torch.zeros_like(half).requires_grad_()

    def decode(x: Tensor) -> Tensor:
        return x.float()

    want = guidance_gradient(loss, decode, half + zero, zero, targets)
    got = chunked_gradient(loss, decode, lambda part, z: half[part] + z, zero, targets, (), None, 3)
    assert want.grad.dtype == got.grad.dtype == torch.float32
    torch.testing.assert_close(got.grad, want.grad, rtol=2e-3, atol=1e-7)


class Plain:
    """A guidance that sees whole groups only."""

    def __init__(self, inner: TeacherGuidance) -> None:
        self._inner = inner
        self.describe, self.annotate, self.modules = inner.describe, inner.annotate, inner.modules

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self._inner(images, targets)


def test_a_guidance_of_whole_groups_takes_no_parts(
    pipeline: Any, recipe: Callable[..., Any], guide: Callable[..., Any]
) -> None:
    wanted = recipe(guidance=GuidanceSpec(scale=0.3), steps=2)
    with pytest.raises(SynthkdError, match="sees whole groups only"):
        Synthesizer.from_pipeline(pipeline, wanted, guidance=Plain(guide()), micro_batch=2)
    whole = drawn(pipeline, wanted, guide())
    assert torch.equal(drawn(pipeline, wanted, Plain(guide())).images, whole.images)


def test_the_environment_says_what_was_computed_at_once(
    pipeline: Any, recipe: Callable[..., Any], guide: Callable[..., Any]
) -> None:
    def said(**how: Any) -> Any:
        synth = Synthesizer.from_pipeline(pipeline, recipe(), guidance=guide(), **how)
        return synth.stream(Request(num_samples=6)).environment["micro_batch"]

    assert said() == said(micro_batch=9) == 6
    assert said(micro_batch=4) == "4/4/4"
    for wrong in (0, "all", 1.5):
        with pytest.raises(SynthkdError, match="micro_batch is"):
            said(micro_batch=wrong)


def test_a_plan_that_checkpoints_draws_the_same(
    pipeline: Any, recipe: Callable[..., Any], guide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tenth of what the whole group needs free, the planner takes parts or checkpoints, and says so."""
    from synthkd.engine import memory

    wanted = recipe(guidance=GuidanceSpec(scale=0.3), steps=2)
    whole = drawn(pipeline, wanted, guide())
    monkeypatch.setattr(memory, "free_memory", lambda *_: 1_500_000)
    synth = Synthesizer.from_pipeline(pipeline, wanted, guidance=guide())
    got = next(iter(synth.stream(Request(num_samples=6))))
    assert not synth.memory.whole
    assert "at once" in synth.memory.describe()
    assert (got.images.short() - whole.images.short()).abs().max() <= 1


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm2d(3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.norm(x)).mean(dim=(2, 3)))


def test_a_layer_that_is_used_twice_has_no_memory() -> None:
    teacher = Teacher(_Net(), mean=[0.0] * 3, std=[1.0] * 3, input_size=(8, 8), classes=["a", "b", "c"])
    loss = TeacherGuidance(teacher, bn_momentum=0.5)
    with pytest.raises(ValueError, match="2 taps, 1 in memory"):
        loss(torch.rand(2, 3, 8, 8), torch.eye(3)[:2])
