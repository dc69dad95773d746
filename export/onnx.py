"""ONNX: a graph as a file, run by onnxruntime on a CPU, on CUDA or by its TensorRT provider."""

import importlib.metadata
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from synthkd.export.artifacts import own_cache
from synthkd.export.errors import ExportError
from synthkd.export.graph import first_line
from synthkd.export.spec import Options, Signature
from synthkd.export.tensorrt_operators import cast_around_resize, check_nodes, check_operators

FILE, WEIGHTS = "model.onnx", "model.onnx.data"
_INLINE = 1 << 30  # bytes of weights inside the file; a protobuf ends at 2 GiB
_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# onnx.TensorProto's numbers
_TYPES = {
    torch.float32: 1, torch.uint8: 2, torch.int8: 3, torch.int32: 6, torch.int64: 7, torch.bool: 9,
    torch.float16: 10, torch.float64: 11, torch.bfloat16: 16,
}  # fmt: skip
Runner = Callable[[Sequence[Tensor]], list[Tensor]]


def _runtime() -> Any:
    """The module `onnxruntime`; raises ExportError where it is missing, or twice there."""
    have = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if len(have) == 2:
        raise ExportError(
            "onnx: onnxruntime and onnxruntime-gpu are both installed and overwrite each other; pip uninstall both, "
            "then install synthkd[onnx] or synthkd[onnx-gpu]"
        )
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise ExportError(
            f"onnx: {error.name or 'onnxruntime'} is not installed; pip install 'synthkd[onnx]', or "
            "'synthkd[onnx-gpu]' for a GPU"
        ) from error
    del onnx, onnxscript
    return onnxruntime


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def check_installed() -> None:
    """Raise ExportError, one line, where something is missing."""
    _runtime()


def pick_provider(options: Options, device: torch.device) -> str:
    """`cpu`, `cuda` or `tensorrt`; raises ExportError for one that this onnxruntime or this device does not have."""
    found = options.provider
    if found == "auto":
        found = "cuda" if device.type == "cuda" else "cpu"
    if (found == "cpu") != (device.type == "cpu"):
        raise ExportError(f"onnx: provider {found!r} with tensors on {device.type}; they must be in one place")
    known = _runtime().get_available_providers()
    if _PROVIDERS[found] not in known:
        extra = "synthkd[onnx-gpu]" if found != "cpu" else "synthkd[onnx]"
        raise ExportError(f"onnx: this onnxruntime has no {_PROVIDERS[found]}; pip install '{extra}'")
    return found


def write_model(program: ExportedProgram, folder: Path, signature: Signature, opset: int) -> None:
    """Write FILE, and beside it WEIGHTS where there are more than fit in it.

    Raises ExportError where an operator cannot be translated.
    """
    _runtime()
    weights = sum(t.numel() * t.element_size() for t in (*program.state_dict.values(), *program.constants.values())
                  if isinstance(t, Tensor))  # fmt: skip
    try:
        with _quiet():
            model = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                optimize=True,
                verbose=False,
                input_names=[spec.name for spec in signature.inputs],
                output_names=[spec.name for spec in signature.outputs],
            )
            assert model is not None
            model.save(str(folder / FILE), external_data=weights > _INLINE)
    except Exception as error:  # a translator raises anything
        cause = error.__cause__ or error
        raise ExportError(f"onnx: the graph cannot be written ({first_line(cause)})") from error


def operators(folder: Path) -> dict[str, int]:
    """How many nodes of each operator a model has, those of its functions too; other domains as `domain::name`."""
    import onnx

    model = onnx.load(str(folder / FILE), load_external_data=False)
    counts: dict[str, int] = {}
    for node in (*_nodes(model.graph), *(n for f in model.functions for n in f.node)):
        name = f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        counts[name] = counts.get(name, 0) + 1
    return counts


def prepare_for_tensorrt(folder: Path, version: str) -> None:
    """Check a model against what a TensorRT's parser takes, and move Resizes of bfloat16 to float32, in the file.

    Raises ExportError for an operator or a node it does not take.
    """
    import onnx

    check_operators(operators(folder), version)
    model = onnx.load(str(folder / FILE), load_external_data=False)
    check_nodes(model)
    if cast_around_resize(model):
        onnx.save(model, str(folder / FILE))  # weights beside it stay where they are


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


class Session:
    """An onnxruntime session on flat tensors, which stay where they are: inputs and outputs are bound by address."""

    def __init__(self, folder: Path, signature: Signature, options: Options, device: torch.device) -> None:
        """Raises ExportError where the file cannot be loaded, or the provider does not take it."""
        ort = _runtime()
        self.signature, self.device = signature, device
        self.provider = pick_provider(options, device)
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._recorded = options.cuda_graph and self._stream is not None
        self._places: list[Tensor] = []
        self._out: list[Tensor] = []
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.use_deterministic_compute = True
        if device.type == "cpu":
            settings.intra_op_num_threads = torch.get_num_threads()
            settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = self._providers(folder, options)
        try:
            self._session = ort.InferenceSession(str(folder / FILE), settings, providers=providers)
        except Exception as error:
            raise ExportError(f"onnx: {FILE} cannot be loaded ({first_line(error)})") from error
        if self._session.get_providers()[0] != _PROVIDERS[self.provider]:
            raise ExportError(f"onnx: {_PROVIDERS[self.provider]} could not be started; onnxruntime's own log says why")
        self._takes = {entry.name for entry in self._session.get_inputs()}
        self._run_options = ort.RunOptions()
        if self._stream is not None:  # torch's streams keep the order, no host waits
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def _providers(self, folder: Path, options: Options) -> list[Any]:
        if self._stream is None:
            return [_PROVIDERS["cpu"]]
        number = self.device.index or 0
        cuda: dict[str, Any] = {
            "device_id": number,
            "user_compute_stream": str(self._stream.cuda_stream),
            "use_tf32": "0",  # float32 is float32
            "cudnn_conv_algo_search": "HEURISTIC",  # by timing, bits would differ from process to process
        }
        if options.cuda_graph:
            cuda["enable_cuda_graph"] = "1"
        providers: list[Any] = [(_PROVIDERS["cuda"], cuda), _PROVIDERS["cpu"]]
        if self.provider == "tensorrt":
            providers.insert(0, (_PROVIDERS["tensorrt"], self._tensorrt(folder, number, options)))
        return providers

    def _tensorrt(self, folder: Path, number: int, options: Options) -> dict[str, Any]:
        """Engines and tactics are kept beside the artifact; shapes as in its profile."""
        shapes = [(s.name, *self.signature.profile(s)) for s in self.signature.inputs if s.batched]
        told: Mapping[str, str] = {
            f"trt_profile_{name}_shapes": ",".join(f"{row[0]}:{'x'.join(map(str, row[i]))}" for row in shapes)
            for i, name in ((1, "min"), (2, "opt"), (3, "max"))
        }
        half = any(s.dtype == torch.float16 for s in self.signature.inputs)
        kept = str(own_cache() / "onnxruntime-tensorrt" / folder.name)  # machine code, and nobody else's
        return {
            "device_id": number,
            "user_compute_stream": str(self._stream.cuda_stream) if self._stream else "0",
            "trt_engine_cache_enable": True,
            "trt_engine_cache_path": kept,
            "trt_timing_cache_enable": True,
            "trt_timing_cache_path": kept,
            "trt_fp16_enable": half,
            "trt_builder_optimization_level": options.builder_level,
            **(told if self.signature.dynamic and shapes else {}),
        }

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Outputs are allocated by torch."""
        batch = next((len(x) for x, s in zip(tensors, self.signature.inputs, strict=True) if s.batched), 1)
        given = [x.detach().contiguous() for x in tensors]
        if self._recorded:  # a recorded run knows addresses
            out = self._same_places(given)
            given = self._places
        else:
            out = self._fresh(batch)
        self._run(given, out)
        return [x.clone() for x in out] if self._recorded else out

    def _fresh(self, batch: int) -> list[Tensor]:
        return [torch.empty(s.at(batch), dtype=s.dtype, device=self.device) for s in self.signature.outputs]

    def _same_places(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The outputs' places, after the inputs were copied into theirs."""
        if not self._places:
            self._places = [x.clone() for x in given]
            self._out = self._fresh(self.signature.batch)
        for place, x in zip(self._places, given, strict=True):
            place.copy_(x)
        return self._out

    def _run(self, given: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        binding, where = self._session.io_binding(), (self.device.type, self.device.index or 0)
        for spec, x in zip(self.signature.inputs, given, strict=True):
            if spec.name in self._takes:
                binding.bind_input(spec.name, *where, _TYPES[x.dtype], list(x.shape), x.data_ptr())
        for spec, x in zip(self.signature.outputs, out, strict=True):
            binding.bind_output(spec.name, *where, _TYPES[x.dtype], list(x.shape), x.data_ptr())
        with self._in_order([*given, *out]):
            try:
                self._session.run_with_iobinding(binding, self._run_options)
            except Exception as error:
                raise ExportError(f"onnx: a run failed ({first_line(error)})") from error

    @contextmanager
    def _in_order(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """After what torch has queued, and before what it queues next."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        yield
        current.wait_stream(self._stream)
        for x in tensors:
            x.record_stream(self._stream)


def describe(path: Path, metadata: Mapping[str, str]) -> None:
    """Write texts into a file's metadata, and call its open dimension 0 `batch`."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for name, text in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, text
    old = [value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input]
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param and dim.dim_param in old:
                dim.dim_param = "batch"
    onnx.save(model, str(path))


class OneFile:
    """A model that is one file with its weights inside: its metadata, and a callable on flat tensors by name.

    metadata: the file's own texts; inputs, outputs: names.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        """Raises ExportError for a missing package, a damaged file, and one whose weights lie in other files.

        A file may name any path of the machine as the place of its weights, so such a file is not opened.
        """
        ort = _runtime()
        provider = pick_provider(Options(), device)
        data = _alone(path)
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        if device.type == "cpu":
            settings.intra_op_num_threads = torch.get_num_threads()
            settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(data, settings, providers=[_PROVIDERS[provider]])
        except Exception as error:
            raise ExportError(f"onnx: {path.name} cannot be loaded ({first_line(error)})") from error
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.inputs = tuple(entry.name for entry in self._session.get_inputs())
        self.outputs = tuple(entry.name for entry in self._session.get_outputs())

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Inputs in order; outputs lie on the CPU. Raises ExportError where the run fails, for a wrong shape say."""
        given = {name: x.detach().cpu().numpy() for name, x in zip(self.inputs, tensors, strict=True)}
        try:
            return [torch.from_numpy(y) for y in self._session.run(None, given)]
        except Exception as error:
            raise ExportError(f"onnx: a run failed ({first_line(error)})") from error


def _alone(path: Path) -> bytes:
    """The bytes of a file that needs no other file."""
    import onnx

    data = path.read_bytes()
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # a parser raises anything
        raise ExportError(f"onnx: {path.name} is no ONNX file ({first_line(error)})") from error
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise ExportError(f"onnx: {path.name} keeps tensor {tensor.name!r} in another file; expected all in one")
    return data


def _tensors(message: Any) -> Iterator[Any]:
    """Every TensorProto inside a protobuf message, at any depth."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            many = value if hasattr(value, "__len__") and not hasattr(value, "ListFields") else [value]
            for part in many:
                yield from _tensors(part)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks about what it does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
