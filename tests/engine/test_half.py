"""bfloat16 on a CPU: finite, guided the right way, and near the float64 oracle."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from synthkd.dfkd import TeacherGuidance, load_teacher
from synthkd.engine import GuidanceSpec, Recipe, Request, Synthesizer
from synthkd.engine.batch import Batch


def draw(folder: Path, card: Path, recipe: Recipe) -> Batch:
    """The first group."""
    guidance = TeacherGuidance(load_teacher(str(card)))
    synth = Synthesizer.from_pretrained(str(folder), recipe, guidance=guidance, device="cpu")
    return next(iter(synth.stream(Request(num_samples=6))))


@pytest.mark.parametrize("gradient", ["x0", "unet"])
def test_bfloat16_against_float64(
    pipeline_folder: Path, teacher_card: Path, recipe: Callable[..., Recipe], gradient: str
) -> None:
    """The terms fall as in float64; the first call, before errors add up, agrees to bfloat16's three digits."""
    spec = GuidanceSpec(scale=0.2, gradient=gradient)
    half, oracle = (
        draw(pipeline_folder, teacher_card, recipe(steps=6, dtype=dtype, guidance=spec))
        for dtype in ("bfloat16", "float64")
    )
    assert torch.isfinite(half.notes["logits"]).all()
    first = [sum(b.curves["ce"][0]) for b in (half, oracle)]
    assert first[0] == pytest.approx(first[1], rel=0.05)
    for batch in (half, oracle):
        assert sum(batch.curves["ce"][-1]) < sum(batch.curves["ce"][0])


def test_float32_is_near_float64(pipeline_folder: Path, teacher_card: Path, recipe: Callable[..., Recipe]) -> None:
    """The same pictures within one grey level over a whole guided run."""
    spec = GuidanceSpec(scale=0.2)
    single, oracle = (
        draw(pipeline_folder, teacher_card, recipe(steps=4, dtype=dtype, guidance=spec))
        for dtype in ("float32", "float64")
    )
    assert ((single.images.int() - oracle.images.int()).abs() > 1).float().mean() < 1e-3
