"""The native TensorRT backend, second half: an engine file -> flat tensors in, flat tensors out.

Not run on TensorRT yet; how it is checked without it stands in `tensorrt.py`.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synthkd.export.errors import ExportError
from synthkd.export.spec import Signature, TensorSpec
from synthkd.export.tensorrt import (
    ICudaEngine,
    IExecutionContext,
    Runtime,
    TensorRT,
    load,
    logger_of,
    spec_of,
    starting,
)

ALIGNMENT = 256  # bytes, of every address TensorRT is given


class Arena:
    """Device memory that engines share, which is right as long as they run one after another on one stream.

    It grows to the largest need. `generation` counts its moves: who remembers an address compares it first.
    """

    def __init__(self, device: torch.device | str) -> None:
        """Empty."""
        self.device = torch.device(device)
        self.generation = 0
        self.buffer: Tensor | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return 0 if self.buffer is None else self.buffer.numel()

    def reserve(self, size: int) -> int:
        """Make sure of `size` bytes (at least one, so that there is an address); returns the address."""
        if self.buffer is None or self.buffer.numel() < size:
            self.buffer = None  # freed first; if there is not enough memory, nobody goes on with the old address
            self.generation += 1
            self.buffer = torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)
        return self.buffer.data_ptr()


class Engine:
    """A loaded engine: tensors in the signature's order in, fresh tensors out, without a host sync.

    Runs on torch's current stream; TensorRT synchronises the device on the default stream, so from there it runs on
    a stream of its own that waits for the default one and is waited for. One thread at a time.
    With `cuda_graph` the first call records a run, later ones copy their inputs in, replay it and copy the outputs.
    """

    def __init__(
        self,
        path: Path,
        signature: Signature,
        device: torch.device | str,
        arena: Arena | None = None,
        cuda_graph: bool = False,
    ) -> None:
        """Load; raises ExportError for a file of another TensorRT or GPU, or one that is not of this signature."""
        if cuda_graph and signature.dynamic:
            raise ExportError("cuda_graph needs a fixed batch, and this engine takes any; export it with a fixed one")
        self.signature = signature
        self.device = torch.empty(0, device=device).device  # with its index
        self.arena = arena or Arena(self.device)
        self.cuda_graph = cuda_graph
        self._stream: torch.cuda.Stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._batch = self._generation = -1
        self._recorded: tuple[Any, list[Tensor], list[Tensor]] | None = None
        trt = load()
        with torch.cuda.device(self.device):
            with starting(logger_of(trt)):
                self._runtime: Runtime = trt.Runtime(logger_of(trt))  # outlives its engines
            self._engine: ICudaEngine = _deserialize(trt, self._runtime, path)
            strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            self._context: IExecutionContext = self._engine.create_execution_context(strategy=strategy)
        if self._context is None:
            raise ExportError(f"TensorRT makes no execution context of {path.name}: {logger_of(trt).last()}")
        self.names = _io_names(trt, self._engine, signature, path.name)

    @property
    def scratch(self) -> int:
        """Bytes of the arena it needs, at its largest batch."""
        return int(self._engine.device_memory_size_v2)

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run once; raises ExportError for tensors the signature does not describe."""
        batch = batch_of(self.signature, tensors, self.device)
        with torch.cuda.device(self.device), torch.no_grad():
            self._attach()
            self._set_batch(batch)
            if self.cuda_graph:
                return self._replay(tensors)
            outputs = self._outputs(batch)
            self._run([_addressable(tensor) for tensor in tensors], outputs)
        return outputs

    def _attach(self) -> None:
        """Give the context the arena's address, if it is a new one; a recorded run has the old one in it."""
        address = self.arena.reserve(self.scratch)
        if self._generation != self.arena.generation:
            self._context.set_device_memory(address, self.arena.size)
            self._generation, self._recorded = self.arena.generation, None

    def _set_batch(self, batch: int) -> None:
        """Tell the context every shape that was left open, and compare what it makes of them with the signature."""
        if batch == self._batch:
            return
        self._batch = -1
        for spec in self._known(self.signature.inputs):
            wanted = spec.at(batch)
            if -1 in tuple(self._engine.get_tensor_shape(spec.name)) and not self._context.set_input_shape(
                spec.name, wanted
            ):
                raise ExportError(f"TensorRT refuses {list(wanted)} for input {spec.name!r}; export it again")
        for spec in self.signature.outputs:
            found = tuple(self._context.get_tensor_shape(spec.name))
            if found != spec.at(batch):
                raise ExportError(
                    f"the engine's output {spec.name!r} is {list(found)}; expected {list(spec.at(batch))}; export again"
                )
        self._batch = batch

    def _known(self, specs: Sequence[TensorSpec]) -> list[TensorSpec]:
        """Those the engine has: an input nothing depends on may be gone."""
        return [spec for spec in specs if spec.name in self.names]

    def _outputs(self, batch: int) -> list[Tensor]:
        return [torch.empty(s.at(batch), dtype=s.dtype, device=self.device) for s in self.signature.outputs]

    def _run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Enqueue one run; raises ExportError where TensorRT does not take it."""
        specs = (*self.signature.inputs, *self.signature.outputs)
        for spec, tensor in zip(specs, (*inputs, *outputs), strict=True):
            if spec.name in self.names and not self._context.set_tensor_address(spec.name, tensor.data_ptr()):
                raise ExportError(f"TensorRT refuses the address of tensor {spec.name!r}")
        with self._off_the_default_stream() as stream:
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise ExportError(f"TensorRT does not run the engine: {logger_of(load()).last()}")

    @contextlib.contextmanager
    def _off_the_default_stream(self) -> Iterator[torch.cuda.Stream]:
        current = torch.cuda.current_stream(self.device)
        if current.cuda_stream != 0:
            yield current
            return
        self._stream.wait_stream(current)
        yield self._stream
        current.wait_stream(self._stream)

    def _replay(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self._recorded is None:
            self._recorded = self._record(tensors)
        graph, inputs, outputs = self._recorded
        for kept, tensor in zip(inputs, tensors, strict=True):
            kept.copy_(tensor)
        graph.replay()
        return [output.clone() for output in outputs]

    def _record(self, tensors: Sequence[Tensor]) -> tuple[Any, list[Tensor], list[Tensor]]:
        """Record a run on buffers of its own, after one that leaves TensorRT nothing to prepare."""
        inputs = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
        outputs = self._outputs(self.signature.batch)
        self._run(inputs, outputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._run(inputs, outputs)
        return graph, inputs, outputs


def batch_of(signature: Signature, tensors: Sequence[Tensor], device: torch.device) -> int:
    """The batch of a call's tensors; raises ExportError for another number, batch, dtype, shape or device."""
    if len(tensors) != len(signature.inputs):
        raise ExportError(f"{len(tensors)} tensors given; the engine takes {len(signature.inputs)}")
    pairs = list(zip(signature.inputs, tensors, strict=True))
    batch = next((t.shape[0] for spec, t in pairs if spec.batched and t.dim()), signature.batch)
    least, most = (1, signature.most) if signature.dynamic else (signature.batch, signature.batch)
    if not least <= batch <= most:
        raise ExportError(f"batch is {batch}; the engine takes {least if least == most else f'{least} to {most}'}")
    for spec, tensor in pairs:
        found = (tensor.dtype, tuple(tensor.shape), tensor.device)
        wanted = (spec.dtype, spec.at(batch), device)
        if found != wanted:
            raise ExportError(f"input {spec.name!r} is {_told(*found)}; expected {_told(*wanted)}")
    return batch


def _told(dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device}"


def _addressable(tensor: Tensor) -> Tensor:
    """Contiguous and aligned as TensorRT wants it; a slice, or one element of a tensor of timesteps, often is not."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _deserialize(trt: TensorRT, runtime: Runtime, path: Path) -> ICudaEngine:
    """Raises ExportError for a file of another TensorRT version or GPU."""
    logger = logger_of(trt)
    trt.init_libnvinfer_plugins(logger, "")
    logger.errors.clear()
    engine: ICudaEngine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise ExportError(
            f"{path.name} does not load with TensorRT {trt.__version__} on this GPU; export it again ({logger.last()})"
        )
    return engine


def _io_names(trt: TensorRT, engine: ICudaEngine, signature: Signature, name: str) -> set[str]:
    """Names of its tensors; raises ExportError unless they are the signature's, by name, direction and dtype."""
    sides = {
        trt.TensorIOMode.INPUT: {spec.name: spec for spec in signature.inputs},
        trt.TensorIOMode.OUTPUT: {spec.name: spec for spec in signature.outputs},
    }
    found = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    for tensor in found:
        specs = sides[engine.get_tensor_mode(tensor)]
        spec_of(trt, specs, tensor, engine.get_tensor_dtype(tensor), f"engine {name}")
    missing = [spec.name for spec in signature.outputs if spec.name not in found]
    if missing:
        raise ExportError(f"engine {name} lacks output {', '.join(missing)}; export it again")
    return set(found)
