"""What only a GPU can show: the guided run there, in half precision, against float32 and against plain torch."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.replay import replay_sample
from synthkd.dfkd.rounds import draw_set
from synthkd.dfkd.student import DistillSpec
from synthkd.engine import GuidanceSpec, Recipe, Request
from synthkd.kernels import implementation
from synthkd.kernels.launch import recorded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """float32 is float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def job(folder: Path, card: Path, **changes: Any) -> SynthJob:
    """A guided job on the tiny pipeline, not compiled: that takes longer than all that is tested with it."""
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
    return SynthJob(model=str(folder), teacher=str(card), recipe=recipe, device="cuda", compile="off")


def draw(one: SynthJob) -> Any:
    """The first batch."""
    return next(iter(one.build().stream(Request(num_samples=6))))


def test_cuda_agrees_with_the_cpu(pipeline_folder: Path, teacher_card: Path) -> None:
    """float32 without TF32: the same pictures within one grey level on 99.9 % of the values."""
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


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "dit"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_family_is_guided(
    pipeline_folders: Mapping[str, Path], teacher_card: Path, family: str, dtype: str
) -> None:
    """Finite images and a class term that falls, for each prior in each precision."""
    one = job(pipeline_folders[family], teacher_card, dtype=dtype, prompts=("{class}",))
    batch = draw(one)
    assert sum(batch.curves["ce"][-1]) < sum(batch.curves["ce"][0])


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler", "euler_ancestral", "lcm"])
def test_every_sampler_agrees_with_the_cpu(pipeline_folder: Path, teacher_card: Path, sampler: str) -> None:
    """The same fresh noise and the same tables: within one grey level on 99 % of the values."""
    one = job(pipeline_folder, teacher_card, sampler=sampler)
    a, b = draw(one), draw(replace(one, device="cpu"))
    assert ((a.images.cpu().int() - b.images.int()).abs() > 1).float().mean() < 1e-2


def test_rounds(pipeline_folder: Path, teacher_card: Path, tmp_path: Path) -> None:
    """The student between rounds is trained there; its checkpoint makes the second round repeatable."""
    student = DistillSpec(arch_args={"widths": [4], "blocks": [1]}, steps=4, batch_size=4)
    one = job(pipeline_folder, teacher_card, rounds=2, groups_per_shard=1)
    one = replace(one, gamma=1.0, round_student=student)
    draw_set(one, Request(num_samples=12), tmp_path / "set")
    _, verdict = replay_sample(tmp_path / "set", 7, tmp_path / "7.png", "cuda")
    assert verdict == "identical to the stored image"


def test_kernels_and_fused_decoder_agree_with_plain_torch(pipeline_folder: Path, teacher_card: Path) -> None:
    """By default both are on: float32 images within a grey level on 99.9 % of the values."""
    one = job(pipeline_folder, teacher_card)
    with recorded() as launches:
        a = draw(one)
    ops = {launch.kernel.fn.__module__.split(".")[2] for launch in launches}
    assert ops >= {"guided_step", "predict_x0", "to_uint8", "group_norm_silu", "upsample2x_conv3x3"}
    with implementation("reference"), recorded() as launches:
        b = draw(replace(one, fuse="off"))
    assert not launches
    assert ((a.images.int() - b.images.int()).abs() > 1).float().mean() < 1e-3


def test_bfloat16_through_kernels_is_finite(pipeline_folder: Path, teacher_card: Path) -> None:
    """Every term of every step, and images that are not flat."""
    batch = draw(job(pipeline_folder, teacher_card, dtype="bfloat16"))
    assert all(torch.isfinite(torch.tensor(curve)).all() for curve in batch.curves.values())
    assert batch.images.float().std() > 1


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler_ancestral"])
def test_a_second_group_compiles_nothing(
    pipeline_folder: Path, teacher_card: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """No argument that changes from step to step, or from group to group, is part of a kernel's specialisation."""
    from triton import knobs

    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **about: compiled.append(about["repr"]) and None)
    groups = iter(job(pipeline_folder, teacher_card, sampler=sampler).build().stream(Request(num_samples=12)))
    next(groups)
    first = len(compiled)
    next(groups)
    assert compiled[first:] == []


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_calls_agree_with_eager_ones(pipeline_folder: Path, teacher_card: Path, mode: Any) -> None:
    """inductor's own code, with CUDA graphs and without: a graph per kind of call, none for the second group."""
    one = job(pipeline_folder, teacher_card, cfg_stop=0.5)
    synth = replace(one, compile=mode).build()
    groups = iter(synth.stream(Request(num_samples=12)))
    a = next(groups)
    first = synth.graphs
    assert first == 2  # with classifier-free guidance and without
    assert "compile" not in next(groups).seconds
    assert synth.graphs == first
    b = draw(one)
    assert ((a.images.int() - b.images.int()).abs() > 1).float().mean() < 1e-2
    torch._dynamo.reset()


def test_parts_agree_with_the_whole_group(pipeline_folder: Path, teacher_card: Path) -> None:
    """Four samples, then two, of a group of six."""
    one = job(pipeline_folder, teacher_card)
    a, b = draw(replace(one, micro_batch=4)), draw(one)
    assert ((a.images.int() - b.images.int()).abs() > 1).float().mean() < 1e-2


def test_memory_is_planned_against_what_is_free(pipeline_folder: Path, teacher_card: Path) -> None:
    """The driver's own figure: a small group is drawn whole."""
    synth = job(pipeline_folder, teacher_card).build()
    assert synth.memory.whole
    assert synth.memory.free > 0
