"""The TensorRT backend without TensorRT: against a stand-in (see there) made of the real bindings' signatures."""

import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.export import tensorrt, tensorrt_engine
from synthkd.export.build import build
from synthkd.export.errors import ExportError
from synthkd.export.spec import Options, Signature, TensorSpec

VERSIONS = ("10.9", "10.16", "11.4")


def _stand_in() -> Any:
    """tests/export/tensorrt_stand_in.py; under --import-mode=importlib no test module can import another."""
    spec = importlib.util.spec_from_file_location("tensorrt_stand_in", Path(__file__).with_name("tensorrt_stand_in.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STAND_IN = _stand_in()
Fake = Any


@pytest.fixture
def fake_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Fake]:
    """Installs the stand-in of a version."""
    return partial(STAND_IN.install, monkeypatch)


@pytest.fixture
def fake(fake_of: Callable[[str], Fake]) -> Fake:
    """The latest."""
    return fake_of("11.4")


def signature(dynamic: bool = True, scalar: bool = True, batch: int = 2, most: int = 4) -> Signature:
    """A latent of 3 x 5, and a timestep."""
    inputs = [TensorSpec("z", (batch, 3, 5), torch.float32, batched=True)]
    inputs += [TensorSpec("t", (), torch.int64)] if scalar else []
    outputs = (TensorSpec("out", (batch, 3, 5), torch.float32, batched=True),)
    return Signature(inputs=tuple(inputs), outputs=outputs, batch=batch, most=most, dynamic=dynamic)


def onnx_file(folder: Path, one: Signature, **more: Any) -> Path:
    """What the stand-in parses in place of ONNX."""
    names = {dtype: name for name, dtype in STAND_IN.DTYPES.items()}

    def rows(specs: tuple[TensorSpec, ...]) -> list[Any]:
        return [[s.name, s.at(-1) if one.dynamic else s.shape, names[s.dtype]] for s in specs]

    path = folder / "model.onnx"
    path.write_text(json.dumps({"inputs": rows(one.inputs), "outputs": rows(one.outputs), **more}))
    return path


def built(folder: Path, one: Signature, say: Callable[[str], None] = lambda line: None, **more: Any) -> Path:
    """An engine file."""
    path = folder / more.pop("name", "model.engine")
    options = more.pop("options", Options())
    tensorrt.build_engine(onnx_file(folder, one, **more), path, one, options, folder / "timings", say)
    return path


def engine(folder: Path, one: Signature, **more: Any) -> tensorrt_engine.Engine:
    """Built and loaded."""
    kept = {key: more.pop(key) for key in ("arena", "cuda_graph") if key in more}
    return tensorrt_engine.Engine(built(folder, one, **more), one, "cpu", **kept)


# --- is it there


def test_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line that names the extra; the backend's functions raise it."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(sys, "meta_path", [Missing("tensorrt", ModuleNotFoundError("none", name="tensorrt"))])
    monkeypatch.delitem(sys.modules, "tensorrt")
    assert tensorrt.unavailable() == "TensorRT is not installed; pip install 'synthkd[tensorrt]'"
    with pytest.raises(ExportError, match="not installed; pip install"):
        built(tmp_path, signature())


class Missing:
    """An import that fails in a way of ours."""

    def __init__(self, name: str, error: ImportError) -> None:
        self.name, self.error = name, error

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Raise for that name; nothing else is imported meanwhile."""
        if name == self.name:
            raise self.error
        return None


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libnvinfer.so.10: cannot open shared object file: No such file or directory\nmore"),
        ModuleNotFoundError("No module named 'tensorrt_bindings'", name="tensorrt_bindings"),
    ],
)
def test_installed_but_not_loading(monkeypatch: pytest.MonkeyPatch, error: ImportError) -> None:
    """The reason in one line, and no advice to install what is installed."""
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Missing("tensorrt", error), *sys.meta_path])
    line = tensorrt.unavailable()
    assert line == "TensorRT does not load: " + str(error).split("\n")[0]


def test_too_old_and_no_device(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in one line; with neither, it is there."""
    assert tensorrt.unavailable() == ""
    assert tensorrt.unavailable(torch.device("cpu")).endswith("lie on cpu")
    assert tensorrt.version() == "11.4.0.106"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA device" in tensorrt.unavailable()
    fake.module.__version__ = "10.8.0"  # type: ignore[attr-defined]
    assert tensorrt.unavailable() == "TensorRT is 10.8.0; expected 10.9 or later"


# --- building


@pytest.mark.parametrize("version", VERSIONS)
def test_builds_loads_and_runs(fake_of: Callable[[str], Fake], tmp_path: Path, version: str) -> None:
    """From file to tensors, at the least, the best and the largest batch, from slices and transposed tensors too."""
    fake = fake_of(version)
    said: list[str] = []
    one = signature()
    run = engine(tmp_path, one, say=said.append, options=Options(builder_level=2, workspace=99), scratch=1000)
    assert said == [f"Building: {percent} %" for percent in range(10, 101, 10)]
    assert fake.of("IBuilderConfig.builder_optimization_level") == [{"value": 2}]
    assert fake.of("IBuilderConfig.set_memory_pool_limit")[0]["pool_size"] == 99
    for batch in (1, 2, 4):
        z = torch.randn(batch, 5, 3).mT  # not contiguous
        steps = torch.tensor([3, 4, 5])
        (out,) = run([z, steps[1]])  # an element is not aligned
        assert torch.equal(out, 2 * z + 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.engine", "model.onnx", "timings"]


@pytest.mark.parametrize(("dynamic", "scalar"), [(False, True), (True, False), (True, True)])
def test_profile(fake: Fake, tmp_path: Path, dynamic: bool, scalar: bool) -> None:
    """Bounds of the inputs with an open batch, and of those only; none for a fixed batch."""
    built(tmp_path, signature(dynamic, scalar))
    wanted = {"input": "z", "min": (1, 3, 5), "opt": (2, 3, 5), "max": (4, 3, 5)}
    assert fake.of("IOptimizationProfile.set_shape") == ([wanted] if dynamic else [])
    assert len(fake.of("IBuilderConfig.add_optimization_profile")) == dynamic


@pytest.mark.parametrize("old", [b"", b"torn", b"timings of 9.0", b"timings of 11.4.0.106"])
def test_timing_cache(fake: Fake, tmp_path: Path, old: bytes) -> None:
    """Used if it fits, passed over if not, written back in any case."""
    (tmp_path / "timings").write_bytes(old)
    built(tmp_path, signature())
    assert (tmp_path / "timings").read_bytes() == b"timings of 11.4.0.106"
    tried = [call["serialized_timing_cache"] for call in fake.of("IBuilderConfig.create_timing_cache")]
    assert tried == ([old] if old in (b"", b"timings of 11.4.0.106") else [old, b""])


def test_parser_errors(fake: Fake, tmp_path: Path) -> None:
    """The first, in one line: node, operator, reason."""
    with pytest.raises(ExportError) as caught:
        built(tmp_path, signature(), errors=[["/up/0", "Resize", "no such\n mode"], ["b", "c", "d"]])
    assert str(caught.value) == "TensorRT's parser refuses model.onnx at node '/up/0' (Resize): no such mode"
    with pytest.raises(ExportError, match=r"refuses model.onnx: no reason given"):
        built(tmp_path, signature(), silent=True)


def test_failed_build_leaves_nothing(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT gives up, the user interrupts, the disk is full: no engine, no timing cache, no temporary file."""
    fake.fails = "out of memory\nbacktrace"
    with pytest.raises(ExportError, match=r"builds no engine from model.onnx: out of memory$"):
        built(tmp_path, signature())
    fake.fails = None

    def interrupted(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, signature(), say=interrupted)

    def full(number: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(tensorrt.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        built(tmp_path, signature())
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("inputs", "line"),
    [
        ([["y", [2, 3, 5], "FLOAT"]], "the graph has a tensor 'y'; the signature has z, t"),
        ([["z", [2, 3, 5], "HALF"]], "the graph's tensor 'z' is HALF; expected float32"),
        ([["z", [2, 3, 6], "FLOAT"]], r"the graph's input 'z' is \[2, 3, 6\]; expected \[2, 3, 5\]"),
    ],
)
def test_graph_of_another_signature(fake: Fake, tmp_path: Path, inputs: list[Any], line: str) -> None:
    """Refused before anything is built."""
    path = onnx_file(tmp_path, signature(dynamic=False))
    path.write_text(json.dumps({**json.loads(path.read_text()), "inputs": inputs}))
    with pytest.raises(ExportError, match=line):
        tensorrt.build_engine(path, tmp_path / "e", signature(dynamic=False), Options(), tmp_path / "timings")
    assert not fake.of("Builder.build_serialized_network")


def test_fixed_graph_for_any_batch(fake: Fake, tmp_path: Path) -> None:
    """A graph with the example's batch baked in does not pass for one that takes any."""
    path = onnx_file(tmp_path, signature(dynamic=False))
    with pytest.raises(ExportError, match=r"input 'z' is \[2, 3, 5\]; expected \[1, 3, 5\] to \[4, 3, 5\]"):
        tensorrt.build_engine(path, tmp_path / "e", signature(), Options(), tmp_path / "timings")


# --- running


@pytest.mark.parametrize(
    ("tensors", "line"),
    [
        ([torch.zeros(2, 3, 5)], "1 tensors given; the engine takes 2"),
        ([torch.zeros(5, 3, 5), torch.tensor(1)], "batch is 5; the engine takes 1 to 4"),
        ([torch.zeros(2, 3, 6), torch.tensor(1)], r"input 'z' is float32 \[2, 3, 6\] on cpu; expected .* \[2, 3, 5\]"),
        ([torch.zeros(2, 3, 5).half(), torch.tensor(1)], r"input 'z' is float16 .*; expected float32"),
        ([torch.zeros(2, 3, 5), torch.tensor([1])], r"input 't' is int64 \[1\] on cpu; expected int64 \[\] on cpu"),
        ([torch.zeros(2, 3, 5, device="meta"), torch.tensor(1)], r"on meta; expected float32 \[2, 3, 5\] on cpu"),
    ],
)
def test_wrong_tensors(fake: Fake, tmp_path: Path, tensors: list[Tensor], line: str) -> None:
    """One line: what was found, what was expected."""
    with pytest.raises(ExportError, match=line) as caught:
        engine(tmp_path, signature())(tensors)
    assert "\n" not in str(caught.value)


def test_engines_share_memory(fake: Fake, tmp_path: Path) -> None:
    """One buffer of the largest need; an engine that had its address before it grew gets the new one."""
    arena, one = tensorrt_engine.Arena("cpu"), signature(scalar=False)
    runs = [engine(tmp_path, one, arena=arena, scratch=n, name=f"{n}.engine") for n in (1000, 5000, 0)]
    z = torch.randn(2, 3, 5)
    for run in (*runs, *runs):
        assert torch.equal(run([z])[0], 2 * z)
    assert arena.size == 5000
    assert arena.generation == 2
    given = fake.of("IExecutionContext.set_device_memory")
    assert [call["size"] for call in given] == [1000, 5000, 5000, 5000]  # the first one twice
    assert given[-1]["memory"] == arena.reserve(0)


def test_recorded_run(fake: Fake, tmp_path: Path) -> None:
    """Recorded once after one warm-up run, replayed for new inputs; results stay; anew when the memory has moved."""
    arena, one = tensorrt_engine.Arena("cpu"), signature(dynamic=False)
    run = engine(tmp_path, one, arena=arena, cuda_graph=True, scratch=10)
    z, t = torch.randn(2, 3, 5), torch.tensor(1)
    first, second = run([z, t])[0], run([z + 1, t + 1])[0]
    assert torch.equal(first, 2 * z + 1)
    assert torch.equal(second, 2 * (z + 1) + 2)
    assert len(fake.of("IExecutionContext.execute_async_v3")) == 2
    arena.reserve(1 << 20)
    assert torch.equal(run([z, t])[0], first)
    assert len(fake.of("IExecutionContext.execute_async_v3")) == 4
    with pytest.raises(ExportError, match="cuda_graph needs a fixed batch"):
        engine(tmp_path, signature(), cuda_graph=True)


def test_foreign_engines(fake_of: Callable[[str], Fake], tmp_path: Path) -> None:
    """Of another version, dtype or output: refused while loading, with the reason."""
    fake_of("10.16")
    path = built(tmp_path, signature())
    fake_of("11.4")
    with pytest.raises(ExportError, match=r"does not load with TensorRT 11.4.*; export it again \(the plan is"):
        tensorrt_engine.Engine(path, signature(), "cpu")
    path, half = built(tmp_path, signature()), TensorSpec("z", (2, 3, 5), torch.float16, batched=True)
    other = Signature(inputs=(half, signature().inputs[1]), outputs=signature().outputs, batch=2, most=4, dynamic=True)
    with pytest.raises(ExportError, match=r"engine model.engine's tensor 'z' is FLOAT; expected float16"):
        tensorrt_engine.Engine(path, other, "cpu")
    more = (*signature().outputs, TensorSpec("norm", (), torch.float32))
    with pytest.raises(ExportError, match=r"engine model.engine lacks output norm"):
        tensorrt_engine.Engine(
            path, Signature(inputs=signature().inputs, outputs=more, batch=2, most=4, dynamic=True), "cpu"
        )


def test_export_build(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, on a real ONNX graph: traced, checked, built, compared with eager, kept, and loaded again."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # torch's exporter would look for the device
    monkeypatch.setattr(tensorrt, "unavailable", lambda device=None: "")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.GroupNorm(2, 4), torch.nn.SiLU()).eval()
    example = (torch.randn(2, 3, 5, 7),)
    for _ in range(2):
        compiled = build(net, example, backend="tensorrt", store=tmp_path)
    assert len(fake.of("Builder.build_serialized_network")) == 1
    assert compiled.manifest is not None
    with torch.no_grad():
        for batch in (1, 4, 5):  # the largest is 4: the last one is cut in two
            x = torch.randn(batch, 3, 5, 7)
            torch.testing.assert_close(compiled(x), net(x))


# --- the real one


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [True, False])
def test_real_engine_agrees_with_torch(tmp_path: Path, dynamic: bool) -> None:
    """A convolution and a timestep on TensorRT itself: every batch, a moved arena, a recorded run for a fixed batch."""
    if why := tensorrt.unavailable():
        pytest.skip(why)
    pytest.importorskip("onnxscript")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = torch.nn.Conv2d(4, 8, 3, padding=1)

        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            x = torch.nn.functional.silu(self.convolution(z) + t)
            return torch.nn.functional.interpolate(x, scale_factor=2.0)

    net, z, t = Net().cuda().half().eval(), torch.randn(2, 4, 9, 12).cuda().half(), torch.tensor(3).cuda()
    one = Signature(
        inputs=(TensorSpec("z", (2, 4, 9, 12), torch.float16, batched=True), TensorSpec("t", (), torch.int64)),
        outputs=(TensorSpec("out", (2, 8, 18, 24), torch.float16, batched=True),),
        batch=2,
        most=5,
        dynamic=dynamic,
    )
    shapes = ({0: torch.export.Dim.DYNAMIC}, None) if dynamic else None
    program = torch.onnx.export(
        net, (z, t), dynamo=True, dynamic_shapes=shapes, opset_version=21, input_names=["z", "t"], output_names=["out"]
    )
    assert program is not None
    program.save(tmp_path / "m.onnx")
    tensorrt.build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", one, Options(), tmp_path / "timings")
    arena = tensorrt_engine.Arena("cuda")
    run = tensorrt_engine.Engine(tmp_path / "m.engine", one, "cuda", arena, cuda_graph=not dynamic)
    for batch in (1, 2, 5, 2) if dynamic else (2, 2):
        given = torch.randn(batch, 4, 9, 12).cuda().half()
        with torch.no_grad():
            torch.testing.assert_close(run([given, t])[0], net(given, t), rtol=1e-2, atol=1e-2)
        arena.reserve(arena.size + 1)
