"""A group in parts: the same images as the group at once, whatever the parts, for every term and mode."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from synthkd.dfkd.methods.diffdfkd import TeacherGuidance
from synthkd.dfkd.teachers import Teacher
from synthkd.engine import CutMixSpec, GuidanceSpec, Request, Synthesizer, SynthkdError
from synthkd.engine.augment import Look
from synthkd.engine.batch import Batch
from synthkd.engine.guidance import chunked_gradient, guidance_gradient
from synthkd.engine.memory import MemoryPlan

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


def test_large_half_precision_gradients_of_many_views_stay_finite() -> None:
    """Views are summed in float32, as the whole group's are divided before the loss scale."""
    zero = torch.zeros(4, 3, 4, 4, dtype=torch.float16).requires_grad_()
    looks = [Look(torch.zeros(4, 2), torch.zeros(4, dtype=torch.bool))] * 7
    arguments = (torch.full((4, 1), 20.0), looks, None)
    want = guidance_gradient(Slope(), lambda x: x.float(), zero + 0.5, zero, *arguments)  # type: ignore[arg-type]
    got = chunked_gradient(Slope(), lambda x: x.float(), lambda part, z: z + 0.5, zero, *arguments, 2)  # type: ignore[arg-type]
    assert want.grad.isfinite().all()
    torch.testing.assert_close(got.grad, want.grad)


class Slope:
    """A loss of known slope: targets times the images' sum."""

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.judge([self.look(images)], targets, None)[:2]

    def look(self, images: Tensor) -> Tensor:
        return images.flatten(1).sum(dim=1)

    def judge(self, seen: Any, targets: Tensor, memory: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
        return (targets[:, 0] * torch.cat(list(seen))).sum(), {}, memory


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


@pytest.mark.parametrize("compile", ["off", "aot_eager"])
def test_a_plan_that_checkpoints_draws_the_same(
    pipeline: Any, recipe: Callable[..., Any], guide: Callable[..., Any], compile: str
) -> None:
    """Compiled, it is the denoiser alone: no graph holds a checkpoint."""
    wanted = recipe(guidance=GuidanceSpec(scale=0.3), steps=2)
    whole = drawn(pipeline, wanted, guide())
    synth = Synthesizer.from_pipeline(pipeline, wanted, guidance=guide(), compile=compile)  # type: ignore[arg-type]
    synth.memory = MemoryPlan(6, 6, 6, 6, True, 0, 0)
    got = next(iter(synth.stream(Request(num_samples=6))))
    torch._dynamo.reset()
    assert synth.graphs == (0 if compile == "off" else 1)
    assert (got.images.short() - whole.images.short()).abs().max() <= 1


def test_short_memory_takes_parts_and_says_so(
    pipeline: Any, recipe: Callable[..., Any], guide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from synthkd.engine import memory

    wanted = recipe(guidance=GuidanceSpec(scale=0.3), steps=2)
    whole = drawn(pipeline, wanted, guide())
    monkeypatch.setattr(memory, "free_memory", lambda *_: 1_500_000)
    synth = Synthesizer.from_pipeline(pipeline, wanted, guidance=guide())
    got = next(iter(synth.stream(Request(num_samples=6))))
    assert not synth.memory.whole
    views = Synthesizer.from_pipeline(pipeline, replace(wanted, guidance=GuidanceSpec(looks=4)), guidance=guide())
    assert views.memory.guide < synth.memory.guide  # all views of a call are held at once
    assert "at once" in synth.memory.describe()
    assert (got.images.short() - whole.images.short()).abs().max() <= 1


class _Crossed(nn.Module):
    """Layers that are called in another order than they are registered in."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early, self.last = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Linear(3, 3)
        for i, norm in enumerate((self.late, self.early)):
            norm.running_mean = torch.full((3,), float(i))
            norm.running_var = torch.full((3,), 1.0 + i)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.late(self.early(x)).mean(dim=(2, 3)))


def test_each_layer_remembers_its_own_statistics() -> None:
    """With momentum next to 1 the first distance is next to 0, whatever the order of the layers."""
    teacher = Teacher(_Crossed(), mean=[0.0] * 3, std=[1.0] * 3, input_size=(8, 8), classes=["a", "b", "c"])
    terms = TeacherGuidance(teacher, bn_momentum=0.999)(torch.rand(2, 3, 8, 8), torch.eye(3)[:2])[1]
    assert terms["bn"] < 0.05


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm2d(3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.norm(x)).mean(dim=(2, 3)))


def test_a_layer_that_is_used_twice_has_no_memory() -> None:
    teacher = Teacher(_Net(), mean=[0.0] * 3, std=[1.0] * 3, input_size=(8, 8), classes=["a", "b", "c"])
    loss = TeacherGuidance(teacher, bn_momentum=0.5)
    with pytest.raises(SynthkdError, match="uses each BatchNorm layer once"):
        loss(torch.rand(2, 3, 8, 8), torch.eye(3)[:2])
