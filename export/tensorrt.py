"""The native TensorRT backend (10.9 to 11), first half: is it there, and an ONNX file -> an engine file.

`tensorrt_engine.py` runs the file; `tensorrt_operators.py` knows what its parser takes.

Nothing in this file has run on TensorRT yet: every name of it used here is checked against the signatures of the real
bindings (`tests/export/tensorrt-*.json`), and the code runs end to end against a stand-in that has those names only.
`tensorrt` is imported by `unavailable` and `load` only.
"""

import contextlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch

from synthkd.export.errors import ExportError
from synthkd.export.graph import first_line
from synthkd.export.spec import Options, Signature, TensorSpec

# TensorRT's classes under their own names, as annotations: a test looks up what is done with each of them.
TensorRT: TypeAlias = Any
Builder: TypeAlias = Any
IBuilderConfig: TypeAlias = Any
ICudaEngine: TypeAlias = Any
IExecutionContext: TypeAlias = Any
IHostMemory: TypeAlias = Any
ILogger: TypeAlias = Any
INetworkDefinition: TypeAlias = Any
IOptimizationProfile: TypeAlias = Any
IProgressMonitor: TypeAlias = Any
ITensor: TypeAlias = Any
ITimingCache: TypeAlias = Any
OnnxParser: TypeAlias = Any
ParserError: TypeAlias = Any
Runtime: TypeAlias = Any
DataType: TypeAlias = Any

FILE = "model.engine"
OLDEST = (10, 9)  # the first whose parser takes GroupNormalization as opset 21 defines it
MISSING = "TensorRT is not installed; pip install 'synthkd[tensorrt]'"

Say = Callable[[str], None]


def unavailable(device: torch.device | None = None) -> str:
    """Why TensorRT cannot be used here, or on a device, in one line; empty where it can."""
    try:
        import tensorrt
    except ModuleNotFoundError as error:
        return MISSING if error.name == "tensorrt" else f"TensorRT does not load: {first_line(error)}"
    except (ImportError, OSError, RuntimeError) as error:
        return f"TensorRT does not load: {first_line(error)}"
    if numbers(tensorrt.__version__) < OLDEST:
        return f"TensorRT is {tensorrt.__version__}; expected 10.9 or later"
    if not torch.cuda.is_available():
        return "TensorRT needs a CUDA device; torch finds none"
    if device is not None and device.type != "cuda":
        return f"TensorRT needs a CUDA device; module and inputs lie on {device.type}"
    return ""


def version() -> str:
    """Of the installed TensorRT; raises ExportError where there is none."""
    return str(load().__version__)


def numbers(text: str) -> tuple[int, int]:
    """Major and minor number of a version."""
    found = [int(number) for number in re.findall(r"\d+", text)[:2]]
    return (found[0], found[1]) if len(found) == 2 else (found[0] if found else 0, 0)


def build_engine(
    model: Path,
    engine: Path,
    signature: Signature,
    options: Options,
    timing_cache: Path,
    say: Say = lambda line: None,
) -> None:
    """Build an ONNX file into an engine file for the current CUDA device, strongly typed: the graph's dtypes hold.

    Weights beside the model (external data) are found. The timing cache is read if it fits this TensorRT and GPU,
    and written back, so that the next build is faster and takes the same kernels. TF32 is off: float32 is float32.
    Both files appear whole or not at all. Raises ExportError for a graph, signature or GPU TensorRT refuses.
    """
    trt = load()
    logger = logger_of(trt)
    trt.init_libnvinfer_plugins(logger, "")
    with starting(logger):
        builder: Builder = trt.Builder(logger)
    network: INetworkDefinition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser: OnnxParser = trt.OnnxParser(network, logger)  # owns the weights: it must outlive the build
    _parse(parser, model, logger)
    config: IBuilderConfig = builder.create_builder_config()
    _configure(trt, config, options)
    _add_profile(trt, builder, network, config, signature)
    timings = _attach_timings(config, timing_cache)  # must outlive the build too
    monitor = _monitor(trt, say)
    config.progress_monitor = monitor
    logger.errors.clear()
    plan: IHostMemory = builder.build_serialized_network(network, config)
    if monitor.stopped_by is not None:
        raise monitor.stopped_by
    if plan is None:
        raise ExportError(f"TensorRT builds no engine from {model.name}: {logger.last()}")
    _write(engine, plan)
    if timings is not None:
        _write(timing_cache, timings.serialize())


def load() -> TensorRT:
    """The module; raises ExportError with the line of `unavailable`."""
    why = unavailable()
    if why:
        raise ExportError(why)
    import tensorrt

    return tensorrt


@cache
def logger_of(trt: TensorRT) -> ILogger:
    """The process's one logger (TensorRT keeps the first it is given): remembers the latest errors, prints nothing."""

    class Kept(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=20)

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)

        def last(self) -> str:
            return self.errors[-1].strip().split("\n")[0] if self.errors else "no reason given"

    return Kept()


@contextlib.contextmanager
def starting(logger: ILogger) -> Iterator[None]:
    """Around a constructor: the bindings raise a bare TypeError where TensorRT makes none, for want of a driver say."""
    try:
        yield
    except (TypeError, RuntimeError) as error:
        raise ExportError(f"TensorRT does not start: {logger.last()}") from error


def _monitor(trt: TensorRT, say: Say) -> IProgressMonitor:
    """Says every tenth of a build's outer phases. TensorRT must not see an exception: it is kept, the build ends."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.stopped_by: BaseException | None = None
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                steps = self.steps.get(phase_name, 0)
                if steps and 10 * (step + 1) // steps > 10 * step // steps:
                    say(f"{phase_name}: {100 * (step + 1) // steps} %")
            except BaseException as error:
                self.stopped_by = error
            return self.stopped_by is None

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def _parse(parser: OnnxParser, model: Path, logger: ILogger) -> None:
    """Raises ExportError with the parser's first error: its node, operator and reason."""
    if parser.parse_from_file(str(model)):
        return
    if not parser.num_errors:
        raise ExportError(f"TensorRT's parser refuses {model.name}: {logger.last()}")
    error: ParserError = parser.get_error(0)
    where = f"node {error.node_name()!r} ({error.node_operator()})"
    raise ExportError(f"TensorRT's parser refuses {model.name} at {where}: {' '.join(error.desc().split())}")


def _configure(trt: TensorRT, config: IBuilderConfig, options: Options) -> None:
    config.builder_optimization_level = options.builder_level
    config.clear_flag(trt.BuilderFlag.TF32)
    if options.workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)


def _add_profile(
    trt: TensorRT, builder: Builder, network: INetworkDefinition, config: IBuilderConfig, signature: Signature
) -> None:
    """Bounds for every input whose shape the graph leaves open; raises ExportError where the two do not agree."""
    specs = {spec.name: spec for spec in signature.inputs}
    profile: IOptimizationProfile = builder.create_optimization_profile()
    is_open = False
    for index in range(network.num_inputs):
        tensor: ITensor = network.get_input(index)
        spec = spec_of(trt, specs, tensor.name, tensor.dtype, "the graph")
        if tensor.is_shape_tensor:
            raise ExportError(f"the graph computes shapes from input {spec.name!r}; they must come from shapes alone")
        shape, (least, best, most) = tuple(tensor.shape), signature.profile(spec)
        if not _fits(shape, least) or not _fits(shape, most):
            wanted = f"{list(least)}" if least == most else f"{list(least)} to {list(most)}"
            raise ExportError(f"the graph's input {spec.name!r} is {list(shape)}; expected {wanted}")
        if -1 in shape:
            profile.set_shape(spec.name, min=least, opt=best, max=most)
            is_open = True
    if is_open and config.add_optimization_profile(profile) < 0:
        raise ExportError(f"TensorRT refuses the profile of batch 1 to {signature.most}")


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a shape with open dimensions (-1) covers another."""
    return len(shape) == len(wanted) and all(a in (-1, b) for a, b in zip(shape, wanted, strict=True))


def spec_of(trt: TensorRT, specs: dict[str, TensorSpec], name: str, dtype: DataType, whose: str) -> TensorSpec:
    """The spec of a tensor of that name and dtype; raises ExportError if there is none."""
    spec = specs.get(name)
    if spec is None:
        raise ExportError(f"{whose} has a tensor {name!r}; the signature has {', '.join(specs)}")
    if dtype != _dtypes(trt).get(spec.dtype):
        wanted = str(spec.dtype).removeprefix("torch.")
        raise ExportError(f"{whose}'s tensor {name!r} is {str(dtype).split('.')[-1]}; expected {wanted}")
    return spec


def _dtypes(trt: TensorRT) -> dict[torch.dtype, DataType]:
    return {
        torch.float32: trt.DataType.FLOAT,
        torch.float16: trt.DataType.HALF,
        torch.bfloat16: trt.DataType.BF16,
        torch.float8_e4m3fn: trt.DataType.FP8,
        torch.int64: trt.DataType.INT64,
        torch.int32: trt.DataType.INT32,
        torch.int8: trt.DataType.INT8,
        torch.uint8: trt.DataType.UINT8,
        torch.bool: trt.DataType.BOOL,
    }


def _attach_timings(config: IBuilderConfig, path: Path) -> ITimingCache | None:
    """The timing cache of a file, or an empty one where it is missing or of another TensorRT or GPU."""
    for data in ([path.read_bytes()] if path.is_file() else []) + [b""]:
        with contextlib.suppress(RuntimeError):
            timings: ITimingCache = config.create_timing_cache(data)
            if timings is not None and config.set_timing_cache(timings, ignore_mismatch=False):
                return timings
    return None


def _write(path: Path, data: Any) -> None:
    """Bytes to a file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
