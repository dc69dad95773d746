"""A student to ship as one file: preprocessing, weights and what is needed to call it, inside."""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from synthkd.dfkd.nets import count_parameters
from synthkd.dfkd.teachers import Teacher
from synthkd.engine.environment import versions
from synthkd.engine.errors import SynthkdError, suggest
from synthkd.engine.rows import write_atomically
from synthkd.export import ExportError
from synthkd.export import onnx as onnx_file
from synthkd.export.graph import call_of, check_plain, exported
from synthkd.export.spec import Signature, TensorSpec
from synthkd.kernels import implementation

KINDS = ("onnx", "pt2")
OPSET = 18  # the exporter's own, and old enough for runtimes in use
TOLERANCE = 1e-4  # largest difference from eager, in units of the largest logit (of 1 where that is smaller)
_FORMAT = "synthkd student 1"
_ABOUT = "student.json"  # in a .pt2
_INLINE = 1 << 30  # bytes of weights; a protobuf ends at 2 GiB
_BATCHES = (1, 2, 5)
_LARGEST = 2**14  # pixels a side


class Graph(nn.Module):
    """A student with all of its preprocessing: uint8 [B,3,H,W], RGB -> logits float32 [B,K], or [B,K,h,w]."""

    def __init__(self, student: Teacher) -> None:
        """student: a network with its mean and standard deviation."""
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        """images: uint8 [B,3,H,W]."""
        logits: Tensor = self.student(images.float() / 255)
        return logits.float()


def export_student(
    student: Teacher, path: Path, kind: str, *, image_size: tuple[int, int] | None = None
) -> Path:
    """Write a student as one file of kind `onnx` or `pt2` (torch.export), and its contract beside it as .json.

    The file takes uint8 [B,3,H,W], RGB, any B, H x W fixed: the student's input size, or `image_size`, from which the
    graph then resizes (bilinear, antialiased). Scaling by 1/255, mean and standard deviation are in the graph; it
    returns logits float32 [B,K], of a dense network [B,K,h,w]. Class names, this contract and versions stand in the
    file (ONNX: metadata_props, JSON texts; pt2: the extra file student.json). Made on the CPU in float32; it counts,
    and gets its name, only after it was loaded and run on noise at batches 1, 2 and 5, within TOLERANCE of eager.
    Returns the path. Raises SynthkdError, one line, for another kind or suffix, for a missing
    package, a network that cannot be traced, more than 1 GiB of weights (ONNX), and results that differ.
    """
    if kind not in KINDS:
        raise SynthkdError(f"export: kind {kind!r}; {suggest(kind, KINDS)}")
    if path.suffix != f".{kind}":
        raise SynthkdError(f"export: {path} does not end in .{kind}; name the file so")
    graph = Graph(copy.deepcopy(student).cpu().float()).eval()
    about = contract(student, image_size or student.input_size)
    if kind == "onnx":
        with _one_line():
            onnx_file.check_installed()
        if (size := sum(p.numel() * 4 for p in graph.parameters())) > _INLINE:
            raise SynthkdError(f"export: {size / 2**30:.1f} GiB of weights; one ONNX file holds 1, choose pt2")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder, _one_line():
        draft = _written(_program(graph, about), Path(folder), kind, about)
        _check(load_shipped(draft, allow_code=True), graph, about)  # our own file, a moment old
        draft.replace(path)
    write_atomically(path.with_suffix(".json"), json.dumps(about, indent=2) + "\n")
    return path


def contract(student: Teacher, image_size: tuple[int, int]) -> dict[str, Any]:
    """What a caller has to know, as JSON's values."""
    return {
        "format": _FORMAT,
        "classes": list(student.classes),
        "input": {
            "name": "images", "dtype": "uint8", "shape": ["batch", 3, *image_size], "channels": "RGB",
            "preprocessing": "none: scaling, resizing, mean and standard deviation are in the graph",
        },
        "output": {"name": "logits", "dtype": "float32", "shape": ["batch", *_output(student)]},
        "network_input_size": list(student.input_size),
        "mean": student.get_buffer("mean").flatten().tolist(),
        "std": student.get_buffer("std").flatten().tolist(),
        "parameters": count_parameters(student.net) or sum(p.numel() for p in student.net.parameters()),
        "versions": versions("onnx", "onnxruntime"),
    }  # fmt: skip


def _output(student: Teacher) -> list[int]:
    """The shape of what is said of one image: K, or K, h and w of a dense network."""
    if not student.dense:
        return [len(student.classes)]
    with torch.no_grad():
        one = student(torch.zeros(1, 3, *student.input_size, device=student.get_buffer("mean").device))
    return list(one.shape[1:])


def _program(graph: Graph, about: Mapping[str, Any]) -> ExportedProgram:
    """The graph of any batch, in plain operators alone."""
    example = _noise(2, about)
    with implementation("reference"):
        program = exported(call_of(graph, (example,)), dynamic=True)
    check_plain(program)
    return program


def _written(program: ExportedProgram, folder: Path, kind: str, about: Mapping[str, Any]) -> Path:
    """A draft of the file."""
    if kind == "pt2":
        torch.export.save(program, folder / "student.pt2", extra_files={_ABOUT: json.dumps(about)})
        return folder / "student.pt2"
    height, width = about["input"]["shape"][2:]
    signature = Signature(
        inputs=(TensorSpec("images", (2, 3, height, width), torch.uint8, True),),
        outputs=(TensorSpec("logits", (2, *about["output"]["shape"][1:]), torch.float32, True),),
        batch=2, most=2, dynamic=True,
    )  # fmt: skip
    onnx_file.write_model(program, folder, signature, OPSET)
    onnx_file.describe(folder / onnx_file.FILE, {name: json.dumps(value) for name, value in about.items()})
    return (folder / onnx_file.FILE).replace(folder / "student.onnx")


def _check(shipped: "Shipped", graph: Graph, about: Mapping[str, Any]) -> None:
    """Raise SynthkdError where it differs from eager."""
    for batch in _BATCHES:
        images = _noise(batch, about)
        with torch.no_grad():
            wanted = graph(images)
        apart = float((shipped(images) - wanted).abs().max())
        limit = TOLERANCE * max(1.0, float(wanted.abs().max()))
        if not apart <= limit:
            raise SynthkdError(
                f"export: the file differs from the student by {apart:.2g} at batch {batch} (allowed: {limit:.2g}); "
                "nothing was written"
            )


def _noise(batch: int, about: Mapping[str, Any]) -> Tensor:
    shape = (batch, *about["input"]["shape"][1:])
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(batch))


class Shipped:
    """A student from its one file: images in, logits out.

    classes: names in label order; input_size: height and width of what the file takes; about: the whole contract.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], about: Mapping[str, Any]) -> None:
        """run: uint8 [B,3,H,W] -> logits."""
        self._run, self.about = run, dict(about)
        self.classes: tuple[str, ...] = tuple(about["classes"])
        height, width = about["input"]["shape"][2:]
        self.input_size: tuple[int, int] = (int(height), int(width))
        self.dense = len(about["output"]["shape"]) == 4  # logits are label maps'

    def __call__(self, images: Tensor) -> Tensor:
        """images: uint8 [B,3,h,w], resized (bilinear, antialiased, rounded) to `input_size` -> float32 [B,K], CPU."""
        if images.dtype != torch.uint8:
            raise SynthkdError(f"shipped student: images are {images.dtype}; expected torch.uint8 in 0..255")
        if tuple(images.shape[2:]) != self.input_size:
            resized = F.interpolate(images.float(), size=list(self.input_size), mode="bilinear", antialias=True)
            images = resized.round().clamp(0, 255).to(torch.uint8)
        with torch.no_grad(), _one_line():
            return self._run(images).cpu()


def load_shipped(path: Path, device: str = "cpu", *, allow_code: bool = False) -> Shipped:
    """A student from the file that `export_student` wrote.

    allow_code: needed for .pt2, whose reader (torch.export.load) unpickles parts of the file and hands others to
    SymPy's parser, so that a hostile one runs code; an .onnx runs none, and one that points to other files is refused.
    Raises SynthkdError, one line, for another file, one without a contract, and a missing package.
    """
    kind = path.suffix.removeprefix(".")
    if kind not in KINDS:
        raise SynthkdError(f"{path}: {kind!r} is no kind of shipped student; expected .onnx or .pt2")
    if not path.is_file():
        raise SynthkdError(f"{path}: not found; expected the file of an exported student")
    if kind == "pt2" and not allow_code:
        raise SynthkdError(f"{path}: a .pt2 can run code as it loads; pass --allow-code if you trust it, or use ONNX")
    with _one_line():
        run, texts = (_onnx if kind == "onnx" else _pt2)(path, torch.device(device))
    return Shipped(run, _contract_of(path, texts))


def _onnx(path: Path, device: torch.device) -> tuple[Callable[[Tensor], Tensor], Mapping[str, str]]:
    model = onnx_file.OneFile(path, device)
    return lambda images: model(images)[0], model.metadata


def _pt2(path: Path, device: torch.device) -> tuple[Callable[[Tensor], Tensor], Mapping[str, str]]:
    extra = {_ABOUT: ""}
    try:
        module = torch.export.load(path, extra_files=extra).module().to(device)
        about = json.loads(extra[_ABOUT])
    except Exception as error:  # torch raises anything for a damaged file
        reason = " ".join(str(error).split())[:160]
        raise SynthkdError(f"{path}: cannot be read as an exported student ({reason})") from error
    return lambda images: module(images.to(device))[0], {name: json.dumps(value) for name, value in about.items()}


def _contract_of(path: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    """A file's contract, checked."""
    try:
        about = {name: json.loads(text) for name, text in texts.items()}
        shape, classes, said = about["input"]["shape"], about["classes"], about["output"]["shape"]
        fits = about["format"] == _FORMAT and len(shape) == 4 and all(0 < int(n) <= _LARGEST for n in shape[2:])
        fits = fits and isinstance(classes, list) and all(isinstance(name, str) for name in classes) and bool(classes)
        fits = fits and isinstance(said, list)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, OverflowError):
        fits = False
    if not fits:
        hint = "expected a file of `synthkd distill --export`"
        raise SynthkdError(f"{path}: says nothing about its input and classes; {hint}")
    return about


@contextmanager
def _one_line() -> Iterator[None]:
    """What the exporter says, as an error of this package."""
    try:
        yield
    except ExportError as error:
        raise SynthkdError(f"export: {error}") from error
