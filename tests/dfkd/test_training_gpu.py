"""The student loop on a GPU: DALI's mixed decoder, copies beside the step, bfloat16, compiled steps, exact stops."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.feed import Order, ReadOptions, Request
from synthkd.dfkd.sets import open_set
from synthkd.dfkd.student import Hooks, Stopped, TrainOptions, distill
from synthkd.dfkd.teachers import Teacher, load_teacher
from synthkd.dfkd.training import sight_of

pytestmark = pytest.mark.gpu
SPEC = DistillSpec(
    arch_args={"widths": [8, 16], "blocks": [1, 1]}, steps=60, batch_size=16, crop=0.5, flip=True, mix=0.3, hard=0.2,
    ema=0.9,
)  # fmt: skip


@pytest.fixture
def teacher(teacher_card: Path, device: torch.device) -> Teacher:
    """Three classes, 16x16."""
    return load_teacher(str(teacher_card), device)


@pytest.fixture(params=["png", "jpg"])
def pictures(request: pytest.FixtureRequest, file_set: Any, tmp_path: Path) -> Path:
    """Fifty pictures of 24x20."""
    folder: Path = file_set(tmp_path / "set", 50, (24, 20), image_format=request.param)
    return folder


def test_every_reader_gives_the_same_batches(pictures: Path, device: torch.device) -> None:
    """DALI on the GPU, threads on the CPU, kept in memory and on the device: within 2 of 255."""
    spec, found = replace(SPEC, mix=0.0), {}
    for reader, cache in (("torch", "off"), ("dali", "off"), ("torch", "memory"), ("torch", "device")):
        if reader == "dali":
            pytest.importorskip("nvidia.dali")
        source, sight, order = open_set(pictures), sight_of(spec, 50), Order(50, 16, 0)
        made = source.reader((16, 16), ReadOptions(reader=reader, cache=cache, device=str(device)))
        requests = [Request(rows, sight.of(rows, epochs)) for rows, epochs in map(order.at, range(8))]
        found[reader, cache] = torch.cat([p.images.to(device) for p in made.read(requests)]).int()
        made.close()
    first = found["torch", "off"]
    for name, images in found.items():
        assert int((images - first).abs().max()) <= 2, name


@pytest.mark.parametrize("compile", ["off", "default", "reduce-overhead"])
def test_a_student_is_trained_and_stopped_and_goes_on(
    file_set: Any, teacher: Teacher, device: torch.device, tmp_path: Path, compile: str
) -> None:
    """Finite, under bfloat16 where there is a GPU; a training that was stopped ends near the undisturbed one."""
    source = open_set(file_set(tmp_path / "set", 80, (24, 20)))
    options = TrainOptions(device=str(device), compile=compile if device.type == "cuda" else "off")
    whole = distill(source, teacher, SPEC, options=options)
    seen: list[int] = []
    stop = Hooks(on_step=seen.append, should_stop=lambda: bool(seen) and seen[-1] == 37)
    with pytest.raises(Stopped):
        distill(source, teacher, SPEC, options=options, folder=tmp_path, hooks=stop)
    again = distill(source, teacher, SPEC, options=options, folder=tmp_path)
    assert np.isfinite([float(row["loss"] or 0) for row in whole.log]).all()
    assert again.log[-1]["loss"] == pytest.approx(whole.log[-1]["loss"], rel=0.1)


def test_float32_on_a_gpu_is_near_the_cpu(
    file_set: Any, teacher: Teacher, device: torch.device, tmp_path: Path
) -> None:
    """The same steps; the losses' difference is convolutions' rounding."""
    source = open_set(file_set(tmp_path / "set", 80, (24, 20)))
    here = distill(source, teacher, SPEC, options=TrainOptions(device=str(device), precision="float32", compile="off"))
    there = distill(source, teacher.to("cpu"), SPEC, options=TrainOptions(compile="off"))
    for a, b in zip(here.log, there.log, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)


def test_a_step_waits_for_nothing_on_a_gpu(
    file_set: Any, teacher: Teacher, device: torch.device, tmp_path: Path
) -> None:
    """torch's own check of synchronising calls raises within the steps between two log rows."""
    if device.type != "cuda":
        pytest.skip("CUDA reports synchronising calls, a CPU has none")
    source = open_set(file_set(tmp_path / "set", 80, (24, 20)))
    spec = replace(SPEC, steps=24, mix=0.0, crop=1.0)

    def watch(step: int) -> None:  # from the third epoch on, when the loader's thread has filled the store
        torch.cuda.set_sync_debug_mode("error" if 12 <= step < 23 else "default")

    try:
        distill(source, teacher, spec, options=TrainOptions(device=str(device), cache="device", compile="off"),
                hooks=Hooks(on_step=watch))  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
