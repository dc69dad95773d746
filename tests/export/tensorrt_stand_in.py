"""A stand-in for the module `tensorrt`, with the names and signatures of the real bindings of one version.

It is built from tests/export/tensorrt-*.json and refuses whatever is not there: methods, keywords, types, enumeration
members, properties nobody may set. What its methods do is ours: an "ONNX file" is a JSON file that names inputs,
outputs and scratch memory, its "engine" doubles the first input and adds the 0-d ones, at the addresses it was given;
a real ONNX file is run by onnxruntime. So it shows that the calls fit together and that memory is right, not that
TensorRT behaves so.
"""

import builtins
import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.export import tensorrt_engine

ALIGNED = 64  # bytes, of torch's tensors on a CPU; TensorRT wants 256, and on a GPU torch's have 512
DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "INT64": torch.int64}


class Bytes(bytes):
    """IHostMemory: pybind11 gives it a buffer, which no signature tells."""


class Behaviour:
    """What the stand-in's methods do, by `class_method`; one that is missing here is an AttributeError."""

    module: Any
    fails: str | None
    capturing: list[Callable[[], None]] | None

    def made(self, name: str, /, **state: Any) -> Any:
        """An object that TensorRT makes."""
        raise NotImplementedError

    def builder_create_network(self, this: Any, flags: int = 0) -> Any:
        assert flags == 1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return self.made("INetworkDefinition", num_inputs=0)

    def onnxparser_parse_from_file(self, this: Any, model: str) -> bool:
        graph = described(Path(model))
        this.state.errors = graph.get("errors", [])
        object.__setattr__(this, "num_errors", len(this.state.errors))
        network = this.state.network
        network.state.graph = graph
        network.state.inputs = [
            self.made("ITensor", name=n, shape=tuple(s), dtype=getattr(self.module.DataType, d), is_shape_tensor=False)
            for n, s, d in graph["inputs"]
        ]
        object.__setattr__(network, "num_inputs", len(network.state.inputs))
        return not graph.get("errors") and not graph.get("silent")

    def onnxparser_get_error(self, this: Any, index: int) -> Any:
        return self.made("ParserError", told=this.state.errors[index])

    def parsererror_node_name(self, this: Any) -> str:
        return str(this.state.told[0])

    def parsererror_node_operator(self, this: Any) -> str:
        return str(this.state.told[1])

    def parsererror_desc(self, this: Any) -> str:
        return str(this.state.told[2])

    def inetworkdefinition_get_input(self, this: Any, index: int) -> Any:
        return this.state.inputs[index]

    def builder_create_builder_config(self, this: Any) -> Any:
        return self.made("IBuilderConfig", profile={})

    def builder_create_optimization_profile(self, this: Any) -> Any:
        return self.made("IOptimizationProfile", shapes={})

    def ioptimizationprofile_set_shape(self, this: Any, input: str, min: Any, opt: Any, max: Any) -> None:
        this.state.shapes[input] = (min, opt, max)

    def ibuilderconfig_add_optimization_profile(self, this: Any, profile: Any) -> int:
        this.state.profile = profile.state.shapes
        return 0

    def ibuilderconfig_clear_flag(self, this: Any, flag: Any) -> None:
        assert flag is self.module.BuilderFlag.TF32

    def ibuilderconfig_set_memory_pool_limit(self, this: Any, pool: Any, pool_size: int) -> None:
        pass

    def ibuilderconfig_create_timing_cache(self, this: Any, serialized_timing_cache: bytes) -> Any:
        if serialized_timing_cache == b"torn":
            return None
        return self.made("ITimingCache", data=serialized_timing_cache)

    def ibuilderconfig_set_timing_cache(self, this: Any, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return cache.state.data in (b"", b"timings of " + self.module.__version__.encode())

    def itimingcache_serialize(self, this: Any) -> Bytes:
        return Bytes(b"timings of " + self.module.__version__.encode())

    def builder_build_serialized_network(self, this: Any, network: Any, config: Any) -> Bytes | None:
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 20)
        monitor.phase_start("Tactics", "Building", 3)
        try:
            going = [monitor.step_complete("Building", step) for step in range(20)]
        except BaseException as error:
            raise AssertionError("an exception would end the process inside TensorRT") from error
        monitor.phase_finish("Building")
        if self.fails:
            this.state.logger.log(self.module.ILogger.Severity.ERROR, self.fails)
        if self.fails or not all(going):
            return None
        graph = {**network.state.graph, "profile": config.state.profile, "version": self.module.__version__}
        return Bytes(json.dumps(graph).encode())

    def runtime_deserialize_cuda_engine(self, this: Any, serialized_engine: bytes) -> Any:
        plan = json.loads(serialized_engine)
        if plan["version"] != self.module.__version__:
            this.state.logger.log(self.module.ILogger.Severity.ERROR, "the plan is of another version\nbacktrace")
            return None
        io = {name: (shape, dtype) for name, shape, dtype in (*plan["inputs"], *plan["outputs"])}
        return self.made(
            "ICudaEngine", plan=plan, io=io, num_io_tensors=len(io), device_memory_size_v2=plan.get("scratch", 0)
        )

    def icudaengine_get_tensor_name(self, this: Any, index: int) -> str:
        return str(list(this.state.io)[index])

    def icudaengine_get_tensor_mode(self, this: Any, name: str) -> Any:
        is_input = name in [row[0] for row in this.state.plan["inputs"]]
        return self.module.TensorIOMode.INPUT if is_input else self.module.TensorIOMode.OUTPUT

    def icudaengine_get_tensor_dtype(self, this: Any, name: str) -> Any:
        return getattr(self.module.DataType, this.state.io[name][1])

    def icudaengine_get_tensor_shape(self, this: Any, name: str) -> Any:
        return tuple(this.state.io[name][0])

    def icudaengine_create_execution_context(self, this: Any, strategy: Any) -> Any:
        assert strategy is self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        shapes = {name: tuple(shape) for name, (shape, _) in this.state.io.items()}
        return self.made("IExecutionContext", plan=this.state.plan, shapes=shapes, addresses={}, memory=(0, -1))

    def iexecutioncontext_set_device_memory(self, this: Any, memory: int, size: int) -> None:
        this.state.memory = (memory, size)

    def iexecutioncontext_set_input_shape(self, this: Any, name: str, shape: Any) -> bool:
        least, _, most = this.state.plan["profile"][name]
        this.state.shapes[name] = shape
        for output, open_shape, _ in this.state.plan["outputs"]:
            this.state.shapes[output] = (shape[0], *open_shape[1:])
        return all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))

    def iexecutioncontext_get_tensor_shape(self, this: Any, name: str) -> Any:
        return tuple(this.state.shapes[name])

    def iexecutioncontext_set_tensor_address(self, this: Any, name: str, memory: int) -> bool:
        this.state.addresses[name] = memory
        return name in this.state.shapes

    def iexecutioncontext_execute_async_v3(self, this: Any, stream_handle: int) -> bool:
        assert stream_handle != 0
        assert this.state.memory[1] >= this.state.plan.get("scratch", 0)
        assert not any(address % ALIGNED for address in this.state.addresses.values())
        assert len(this.state.addresses) == len(this.state.shapes)
        addresses = dict(this.state.addresses)

        def run() -> None:
            given = {n: at(addresses[n], this.state.shapes[n], DTYPES[d]) for n, _, d in this.state.plan["inputs"]}
            values = computed(this.state.plan, given)
            for (name, _, dtype), value in zip(this.state.plan["outputs"], values, strict=True):
                at(addresses[name], this.state.shapes[name], DTYPES[dtype]).copy_(value)

        run() if self.capturing is None else self.capturing.append(run)
        return True


class Fake(Behaviour):
    """The module `tensorrt` of one version. `calls` are (class.method, arguments), `world` what the behaviour keeps."""

    def __init__(self, version: str) -> None:
        self.table = json.loads((Path(__file__).parent / f"tensorrt-{version}.json").read_text())
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails: str | None = None
        self.capturing: list[Callable[[], None]] | None = None
        self.module: Any = ModuleType("tensorrt")
        self.module.__spec__ = ModuleSpec("tensorrt", None)  # torch asks whether there is one
        for name, members in self.table["enums"].items():
            if "." not in name:
                setattr(self.module, name, self.enumeration(name, members))
        for name in self.table["classes"]:
            setattr(self.module, name, self.class_of(name))
        severity = self.enumeration("Severity", self.table["enums"]["ILogger.Severity"])
        self.module.ILogger.Severity = severity
        self.module.init_libnvinfer_plugins = lambda logger, namespace: True
        self.module.__version__ = self.table["version"]

    def enumeration(self, name: str, members: list[str]) -> Any:
        """Members compare by identity and have a number, as pybind11's do."""

        class Member:
            def __init__(self, label: str, number: int) -> None:
                self.label, self.number = label, number

            def __int__(self) -> int:
                return self.number

            def __repr__(self) -> str:
                return f"{name}.{self.label}"

        kind = type(name, (Member,), {})
        for number, member in enumerate(members):
            setattr(kind, member, kind(member, number))
        return kind

    def class_of(self, name: str) -> Any:
        """A class with the methods and properties of the table."""
        table, fake = self.table["classes"][name], self

        def assign(self: Any, key: str, value: Any) -> None:
            found = table["properties"].get(key)
            if found is not None:
                assert found["set"], f"{name}.{key} cannot be set"
                assert fake.accepts(found["type"], value), f"{name}.{key} = {value!r}"
                fake.calls.append((f"{name}.{key}", {"value": value}))
            else:
                assert type(self).__module__ != "fake" or key == "state", f"{name} has no {key}"
            object.__setattr__(self, key, value)

        members: dict[str, Any] = {"__setattr__": assign, "__module__": "fake"}
        for method, overloads in table["methods"].items():
            if not method.startswith("__") or method == "__init__":
                members[method] = self.method(name, method, overloads)
        return type(name, (), members)

    def method(self, name: str, method: str, overloads: list[dict[str, Any]]) -> Any:
        """Takes what some overload takes, records it, and does what `Behaviour` says."""

        def call(this: Any, *args: Any, **kwargs: Any) -> Any:
            bound = next((b for o in overloads if (b := self.bound(o["parameters"], args, kwargs)) is not None), None)
            assert bound is not None, f"{name}.{method} does not take {args} {kwargs}"
            self.calls.append((f"{name}.{method}", bound))
            if method == "__init__":
                object.__setattr__(this, "state", SimpleNamespace(**bound))
                return None
            return getattr(self, f"{name}_{method}".lower())(this, **bound)

        return call

    def bound(self, parameters: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Arguments by name, or None where they do not fit."""
        names = [p["name"] for p in parameters]
        if len(args) > len(names) or set(names[: len(args)]) & set(kwargs) or set(kwargs) - set(names):
            return None
        given = dict(zip(names, args, strict=False)) | kwargs
        if any(p["required"] and p["name"] not in given for p in parameters):
            return None
        fits = all(self.accepts(p["type"], given[p["name"]]) for p in parameters if p["name"] in given)
        return given if fits else None

    def accepts(self, kind: str, value: Any) -> bool:
        """Whether pybind11 would convert a value to a type."""
        if kind in ("int", "typing.SupportsInt"):
            return hasattr(value, "__int__")
        if kind in ("buffer", "typing_extensions.Buffer"):
            return isinstance(value, bytes)
        if kind == "Dims":
            return isinstance(value, tuple | list)
        known = getattr(self.module, kind, None) or getattr(builtins, kind)
        return isinstance(value, known)

    def made(self, name: str, /, **state: Any) -> Any:
        """An object that TensorRT makes; a property of its class is an attribute, other state is in `state`."""
        one = object.__new__(getattr(self.module, name))
        object.__setattr__(one, "state", SimpleNamespace(**state))
        for key in set(state) & set(self.table["classes"][name]["properties"]):
            object.__setattr__(one, key, state[key])
        return one

    def of(self, name: str) -> list[dict[str, Any]]:
        """The arguments of every call of a method."""
        return [arguments for called, arguments in self.calls if called == name]


def described(path: Path) -> dict[str, Any]:
    """A graph: of our JSON, or of an ONNX file, which onnxruntime then runs."""
    if path.read_bytes().startswith(b"{"):
        return dict(json.loads(path.read_text()))
    import onnx

    model = onnx.load(path)
    names = {1: "FLOAT", 7: "INT64", 10: "HALF"}

    def rows(values: Any) -> list[Any]:
        kinds = [(value.name, value.type.tensor_type) for value in values]
        return [[n, [-1 if d.dim_param else d.dim_value for d in k.shape.dim], names[k.elem_type]] for n, k in kinds]

    rest = {"inputs": rows(model.graph.input), "outputs": rows(model.graph.output)}
    return {**rest, "onnx": model.SerializeToString().hex()}


def computed(plan: dict[str, Any], given: dict[str, Tensor]) -> list[Tensor]:
    """What an engine of ours returns."""
    if "onnx" not in plan:
        first, *others = given.values()
        return [2 * first + sum(x for x in others if x.dim() == 0)] * len(plan["outputs"])
    import onnxruntime

    session = onnxruntime.InferenceSession(bytes.fromhex(plan["onnx"]), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(x) for x in session.run(None, {n: x.numpy() for n, x in given.items()})]


def at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor that lies at an address."""
    bytes_ = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * bytes_).from_address(address), dtype=dtype).view(shape)


class Stream:
    """A CUDA stream, by its number."""

    def __init__(self, number: Any = 0) -> None:
        self.cuda_stream = number if isinstance(number, int) else 7

    def wait_stream(self, other: "Stream") -> None:
        """In order anyway."""


class Graph:
    """A CUDA graph: what was run while it was recorded."""

    def __init__(self) -> None:
        self.runs: list[Callable[[], None]] = []

    def replay(self) -> None:
        """All of it again."""
        for run in self.runs:
            run()


def install(monkeypatch: pytest.MonkeyPatch, version: str) -> Fake:
    """Make a version's stand-in the installed TensorRT, and the CPU a CUDA device."""
    fake, current = Fake(version), [Stream(0)]

    @contextmanager
    def record(graph: Graph, **options: Any) -> Iterator[None]:
        fake.capturing, current[0] = graph.runs, Stream(3)
        yield
        fake.capturing, current[0] = None, Stream(0)

    monkeypatch.setitem(sys.modules, "tensorrt", fake.module)
    monkeypatch.setattr(tensorrt_engine, "ALIGNMENT", ALIGNED)
    for name, value in {
        "is_available": lambda: True,
        "device": lambda device: nullcontext(),
        "current_stream": lambda device: current[0],
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": record,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return fake
