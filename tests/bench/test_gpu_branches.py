"""What the benchmarks do on a GPU only, line by line on a CPU: stand-ins for events and compiling."""

import copy
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from synthkd.bench import backends, engine_cases, gpu, kernels, record, timing
from synthkd.engine import Recipe, random_models
from synthkd.kernels.case import Case, Suite, Tolerance

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")


class OnTheCpu(TorchFunctionMode):
    """Whatever names a device is given the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def here(value: Any) -> Any:
            return torch.device("cpu") if isinstance(value, torch.device) else value

        return func(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})


class Event:
    """A clock's reading."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "Event") -> float:
        return (end.at - self.at) * 1e3 + 1e-6


class Generator(torch.Generator):
    """One of the CPU, wherever it was to be."""

    def __new__(cls, device: Any = None) -> Any:
        return super().__new__(cls)


def _square(x: Tensor) -> Tensor:
    return x * x


def _breaking(x: Tensor) -> Tensor:
    raise RuntimeError("does not compile")


SUITE = Suite(
    name="square",
    op=_square,
    reference=lambda x: x * x,
    cases=(Case(name="a", arguments=lambda m: {"x": m.randn(3, 5)}, differentiable=("x",), measured="gpu"),),
    tolerances={d: Tolerance(rtol=2**-7, atol=1e-6, reason="one rounding") for d in (torch.float32, torch.bfloat16)},
)


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine that seems to have a GPU; rows go to the folder that is returned."""
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name, value in {"is_available": True, "get_device_name": "a GPU"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(timing, "_FLUSH", 1024)
    monkeypatch.setattr(kernels, "copy_ceiling", lambda device: 10.0)
    monkeypatch.setattr(kernels, "SUITES", (SUITE,))
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "STATE", tmp_path / "done.json")
    with OnTheCpu():
        yield tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """`python -m synthkd.bench.gpu` with these words."""
    monkeypatch.setattr(sys, "argv", ["gpu", *words])
    gpu.main()


def test_kernel_rows(as_gpu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Kernel, reference and compiled reference each way; a compiler that fails is told, and a kernel has no time."""
    monkeypatch.setitem(kernels.STOCK, "square", _breaking)
    gpu.kernels_part("square", ("bfloat16", "float32"))
    rows = [json.loads(line) for line in (as_gpu / "kernels.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    for row in rows:
        assert row["device"] == "cuda"
        assert row["machine"].endswith("a GPU")
        assert row["speed"].keys() == row["warm_up_seconds"].keys() == {"kernel", "reference", "compiled"}
        assert row["times_faster_than"].keys() == {"reference", "compiled"}
        assert row["failed"] == {"stock": "RuntimeError: does not compile"}
    assert "stock: FAILED" in capsys.readouterr().out
    work = kernels.workloads(torch.device("cuda"))[0]
    monkeypatch.setattr(kernels, "contenders", lambda *_: {"kernel": _breaking, "reference": _square})
    found = kernels._speed(work, "forward", torch.device("cuda"), 10.0, 1)
    assert found.keys() == {"warm_up_seconds", "failed"}


def _tiny_sdxl(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDXL's code path at a thousandth of its size, 2 calls of the denoiser, images of 64x128."""
    made = random_models.ARCHITECTURES["sdxl"]
    small = {"unet": (32, 32, 32), "vae": (32, 32, 32, 32)}
    networks = {
        part: (made.networks[part][0], {**made.networks[part][1], "block_out_channels": widths, "layers_per_block": 1})
        for part, widths in small.items()
    }
    networks["unet"][1].update(attention_head_dim=(2, 2, 2), transformer_layers_per_block=1)
    monkeypatch.setattr(random_models, "ARCHITECTURES", {"sdxl": replace(made, networks=networks)})
    case = replace(engine_cases.CASES["sdxl-1024"], height=64, width=128)
    monkeypatch.setattr(engine_cases, "CASES", {"sdxl-1024": case})
    monkeypatch.setattr(engine_cases, "Recipe", partial(Recipe, steps=2))
    monkeypatch.setattr(backends, "_PART", 2)
    twin = lambda model, *_: copy.deepcopy(next(iter(model.modules())))  # noqa: E731
    monkeypatch.setattr("synthkd.engine.backends.denoiser_twin", twin)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def test_backends_parts(as_gpu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole runs against the bar of an H200, a role on its backends; what is not installed is skipped, unloaded."""
    _tiny_sdxl(monkeypatch)
    parts = gpu.backends_parts()
    for name in ("run fp8", "run compile", "vae compile", "unet flash + cudnn + xformers", "unet onnx-tensorrt"):
        parts[f"backends: sdxl-1024 {name}"]()
    rows = [json.loads(line) for line in (as_gpu / "backends.jsonl").read_text().splitlines()]
    named = [(r["role"], r["backend"]) for r in rows]
    assert named[:6] == [("run", "eager"), ("run", "fp8"), ("run", "eager"), ("run", "compiled"), ("vae", "eager"),
                         ("vae", "compile")]  # fmt: skip
    for row in rows[:6]:
        assert row["failed"] is row["skipped"] is None
        assert (row["dtype"], row["device"], row["batch"]) == ("bfloat16", "cuda", 2)
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"]["median"], rel=1e-3)
        assert row["max_abs_diff"] == 0  # the twin is a copy, and nothing is compiled
    assert [r.get("bar_images_per_second") for r in rows[:6]] == [2.4] * 4 + [None] * 2
    assert [r["bar_reached"] for r in rows[:4]] == [r["images_per_second"] > 2.4 for r in rows[:4]]
    flash = next(r for r in rows if r["backend"] == "flash")
    assert "found cpu" in flash["failed"]
    assert "TensorrtExecutionProvider" in rows[-1]["skipped"] or "not installed" in rows[-1]["skipped"]
    assert "bar 2.4: " in capsys.readouterr().out


def test_parts_are_processes(as_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails is told at the end, by its name and by the exit code; the others have run."""
    ran: list[str] = []

    def run(command: list[str], check: bool, timeout: float) -> None:
        assert command[:3] == [sys.executable, "-m", "synthkd.bench.gpu"]
        call(monkeypatch, *command[3:])

    def part(name: str) -> None:
        ran.append(name)
        if name == "a":
            raise ValueError("wrong")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu, "parts", lambda: {name: lambda name=name: part(name) for name in "ab"})
    with pytest.raises(SystemExit, match="FAILED: a"):
        call(monkeypatch, "--minutes", "1")
    assert ran == ["a", "b"]
    assert json.loads((as_gpu / "done.json").read_text()) == {"a": False, "b": True}


def test_a_part_that_needs_several_calls_is_left_and_has_not_failed(tmp_path: Path) -> None:
    """Exit code 75 says so; any other one is a failure."""

    def ends_with(code: int) -> None:
        raise subprocess.CalledProcessError(code, ["part"])

    parts = {"long": partial(ends_with, gpu.TRY_AGAIN), "broken": partial(ends_with, 1), "good": lambda: None}
    left = gpu.run_parts(parts, tmp_path / "done.json", 9.0)
    assert left == gpu.Left(["long", "broken"], ["broken"])


def test_methods_of_presets_without_their_files_are_no_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CIFAR-10's are there where SYNTHKD_DATA has it."""
    monkeypatch.setenv("SYNTHKD_DATA", str(tmp_path))
    names = gpu.methods_parts()
    assert "methods: digits mosaickd seed 0" in names
    assert not any("cifar10" in name for name in names)
