"""What only a GPU can show: the guided run there, in half precision, against float32."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from synthkd.dfkd.job import SynthJob
from synthkd.engine import GuidanceSpec, Recipe, Request

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def job(folder: Path, card: Path, **changes: Any) -> SynthJob:
    """A guided job on the tiny pipeline."""
    recipe = Recipe(
        classes=("cat", "dog", "bird"),
        height=16,
        width=16,
        steps=6,
        guidance_scale=3.0,
        guidance=GuidanceSpec(scale=0.2),
        classes_per_group=3,
        **changes,
    )
    return SynthJob(model=str(folder), teacher=str(card), recipe=recipe, device="cuda")


def draw(one: SynthJob) -> Any:
    """The first batch."""
    return next(iter(one.build().stream(Request(num_samples=6))))


def test_cuda_agrees_with_the_cpu(pipeline_folder: Path, teacher_card: Path) -> None:
    """float32 without TF32: the same pictures within one grey level on 99.9 % of the values."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    one = job(pipeline_folder, teacher_card)
    a, b = draw(one), draw(replace(one, device="cpu"))
    difference = (a.images.cpu().int() - b.images.int()).abs()
    assert (difference > 1).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("gradient", ["x0", "unet"])
def test_half_precision_guides(pipeline_folder: Path, teacher_card: Path, dtype: str, gradient: str) -> None:
    """Finite images, and the class term falls over the run as in float32."""
    spec = GuidanceSpec(scale=0.2, gradient=gradient)
    one = job(pipeline_folder, teacher_card, dtype=dtype)
    batch = draw(replace(one, recipe=replace(one.recipe, guidance=spec)))
    assert batch.images.device.type == "cuda"
    assert sum(batch.curves["ce"][-1]) < sum(batch.curves["ce"][0])


def test_twice_is_the_same(pipeline_folder: Path, teacher_card: Path) -> None:
    """One card, one recipe: byte-identical images."""
    one = job(pipeline_folder, teacher_card)
    assert torch.equal(draw(one).images, draw(one).images)
