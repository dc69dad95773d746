"""One build: traced, written, loaded, compared with eager, kept."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from synthkd.export import aoti, onnx, tensorrt, tensorrt_engine
from synthkd.export.artifacts import CODE, Manifest, Slot, check_key, key_of, processor, write_manifest
from synthkd.export.errors import ExportError
from synthkd.export.gradient import exported_gradient
from synthkd.export.graph import Call, check_plain, exported
from synthkd.export.spec import OPSETS, Options, Signature, TensorSpec
from synthkd.export.tensorrt_operators import opset_for

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]
# Largest ||backend - eager|| / ||eager|| of any output that a build may have.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
# A gradient jumps where a value lies within rounding of a ReLU's or clamp's kink: then other inputs are tried.
_SCALES = (1.0, 0.97, 0.93)


def opset_of(options: Options, backend: str, device: torch.device) -> int:
    """23, which keeps attention whole, where the runtime has it: onnxruntime on a CPU, TensorRT from 10.14 on.

    onnxruntime has had Attention on CUDA since 2026 only (its issue 28025), and its TensorRT provider is older still.
    """
    if options.opset:
        return options.opset
    if backend == "tensorrt":
        return opset_for(tensorrt.version())
    return OPSETS[0] if device.type == "cuda" else OPSETS[-1]


def outputs_of(call: Call) -> tuple[tuple[TensorSpec, ...], Any, bool]:
    """What the function returns, its nesting, and whether each sample's result is its own.

    Found by running it at two batches. Raises ExportError where a result changes with the batch in another way than by
    its dimension 0.
    """
    size = call.batch
    less = size - 1 if size > 1 else size + 1
    with torch.no_grad():
        first = call.run(*call.tensors)
        structure = call.structure
        other = call.run(*call.at(less)) if any(call.batched) else first
    specs = []
    for i, (x, y) in enumerate(zip(first, other, strict=True)):
        batched = x.shape != y.shape
        if batched and not (x.shape[:1] == (size,) and y.shape == (less, *x.shape[1:])):
            raise ExportError(
                f"result {i} is {list(x.shape)} for a batch of {size} and {list(y.shape)} for {less}; expected the "
                "batch as its dimension 0, or not at all"
            )
        specs.append(TensorSpec(f"out{i}", tuple(x.shape), x.dtype, batched))
    both = min(size, less)
    pairs = [(y[:both], x[:both]) for spec, x, y in zip(specs, first, other, strict=True) if spec.batched]
    alone = all(spec.batched for spec in specs) and allowed(call) >= max(
        (compared([found], [wanted])["relative"] for found, wanted in pairs), default=0.0
    )
    return tuple(specs), structure, alone


def allowed(call: Call) -> float:
    """The loosest of what goes in and is computed with."""
    dtypes = [x.dtype for x in call.tensors]
    dtypes += [p.dtype for module in call.modules for p in module.parameters()]
    return max((TOLERANCE[d] for d in dtypes if d in TOLERANCE), default=TOLERANCE[torch.float32])


def compare(call: Call, run: Run, tensors: list[Tensor]) -> dict[str, float]:
    """A backend's result beside eager's."""
    with torch.no_grad():
        return compared(run(tensors), call.run(*tensors))


def judge(what: str, rows: Mapping[str, Mapping[str, float]], call: Call, most: float | None = None) -> None:
    """Raise ExportError where a row is off by more than `most`, by dtype if None."""
    limit = allowed(call) if most is None else most
    for batch, row in rows.items():
        if not row["relative"] <= limit:
            raise ExportError(
                f"{what} differs from eager by {row['relative']:.2g} of its size at {batch} (allowed: {limit:.2g}); "
                "nothing was kept"
            )


def loaded(folder: Path, backend: str, signature: Signature, options: Options, device: torch.device) -> Run:
    if backend == "aoti":
        return aoti.load(folder)
    if backend == "onnx":
        return onnx.Session(folder, signature, options, device)
    return tensorrt_engine.Engine(folder / tensorrt.FILE, signature, device, _arena(device), options.cuda_graph)


_ARENAS: dict[str, Any] = {}


def _arena(device: torch.device) -> Any:
    """Scratch memory of a device, one for all engines: they run one after another."""
    return _ARENAS.setdefault(str(device), tensorrt_engine.Arena(device))


class Build:
    """One build: traced, written, loaded, compared with eager, kept."""

    def __init__(
        self, call: Call, slot: Slot, device: torch.device, options: Options, dynamic: bool, most: int,
        gradient: bool, tolerance: float | None, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """See `build`."""
        self.call, self.slot, self.device, self.options = call, slot, device, options
        self.dynamic, self.most, self.gradient, self.tolerance = dynamic, most, gradient, tolerance
        self.say = say
        self.seconds: dict[str, float] = {}

    @contextmanager
    def _stage(self, stage: str) -> Iterator[None]:
        self.say(f"{self.slot.name} for {self.slot.backend}: {stage}")
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)

    def made(self, wrap: Callable[..., Any]) -> Manifest:
        """The manifest of the new artifact; wrap: makes a callable of what was built, for the comparison."""
        if self.slot.backend in CODE:
            check_key()
        with self.slot.building() as folder:
            with self._stage("trace"):
                outputs, structure, alone = outputs_of(self.call)
                alone = alone and not self.gradient
                program = (exported_gradient if self.gradient else exported)(self.call, self.dynamic)
                check_plain(program)
            signature = Signature(
                inputs=self.call.inputs(), outputs=outputs, batch=self.call.batch, most=self.most, dynamic=self.dynamic
            )
            self._written(program, folder, signature)
            with self._stage("load"):
                run = loaded(folder, self.slot.backend, signature, self.options, self.device)
            with self._stage("compare"):
                verified = self._verified(wrap(self.call, signature, structure, run, None, alone))
            del run
            return write_manifest(
                folder,
                Manifest(
                    name=self.slot.name,
                    backend=self.slot.backend,
                    key=self.slot.key,
                    parts=self.slot.parts,
                    signature=signature.to_dict(),
                    structure=structure,
                    seconds=self.seconds,
                    verified=verified,
                    samples=alone,
                ),
            )

    def _written(self, program: ExportedProgram, folder: Path, signature: Signature) -> None:
        backend = self.slot.backend
        if backend == "aoti":
            with self._stage("compile"):
                aoti.compile_program(program, folder)
            return
        with self._stage("convert"):
            onnx.write_model(program, folder, signature, opset_of(self.options, backend, self.device))
        if backend == "tensorrt":
            onnx.prepare_for_tensorrt(folder, tensorrt.version())
            with self._stage("compile"), torch.cuda.device(self.device):
                tensorrt.build_engine(
                    folder / onnx.FILE, folder / tensorrt.FILE, signature, self.options,
                    self.slot.store / f"timing-{tensorrt.version()}-{self._architecture()}.cache", self.say,
                )  # fmt: skip
            for name in (onnx.FILE, onnx.WEIGHTS):
                (folder / name).unlink(missing_ok=True)

    def _architecture(self) -> str:
        """For the timing cache's name: tactics of one GPU are of no use to another."""
        return key_of({"processor": processor(self.device)})[:8]

    def _verified(self, compiled: Any) -> dict[str, Any]:
        """Differences from eager at the example's batch and, where samples stand alone or any batch goes, at 1."""
        sizes = [self.call.batch]
        if any(self.call.batched) and self.call.batch > 1 and (self.dynamic or compiled.samples):
            sizes.append(1)
        rows = {}
        for batch in sizes:
            tried = [self._compared(compiled, batch, 1.0)]
            while self.gradient and tried[-1]["relative"] > self._most() and len(tried) < len(_SCALES):
                tried.append(self._compared(compiled, batch, _SCALES[len(tried)]))
            rows[f"batch {batch}"] = min(tried, key=lambda row: row["relative"])
        judge(f"{self.slot.name} for {self.slot.backend}", rows, self.call, self.tolerance)
        return rows

    def _compared(self, compiled: Any, batch: int, scale: float) -> dict[str, float]:
        """At the example, its first tensor scaled."""
        tensors = self.call.at(batch)
        tensors[0] = tensors[0] if scale == 1.0 else tensors[0] * scale
        return compare(self.call, lambda flat: compiled.flat(flat, batch), tensors)

    def _most(self) -> float:
        return allowed(self.call) if self.tolerance is None else self.tolerance


def compared(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> dict[str, float]:
    """max_abs, relative (largest ||found - wanted|| / ||wanted|| of any tensor) and psnr in dB, over flat results.

    psnr is of the first tensor against its own range. Not-a-number in both places counts as equal, in one as infinite.
    """
    max_abs = relative = 0.0
    psnr = math.inf
    for i, (x, y) in enumerate(zip(found, wanted, strict=True)):
        a, b = x.detach().double().cpu(), y.detach().double().cpu()
        if not a.numel():
            continue
        same = (torch.isnan(a) & torch.isnan(b)) | (torch.isinf(b) & (a == b))
        apart = torch.where(same | (a == b), 0.0, a - b)
        size, off = float(torch.where(same, 0.0, b).norm()), float(apart.norm())
        if not math.isfinite(off):
            return {"max_abs": math.inf, "relative": math.inf, "psnr": 0.0}
        max_abs = max(max_abs, float(apart.abs().max()))
        relative = max(relative, off / size if size else (math.inf if off > 1e-6 else 0.0))
        if i == 0 and off:
            span = float(b.max() - b.min())
            psnr = 20 * math.log10(max(span, 1e-30) / (off / math.sqrt(a.numel())))
    return {"max_abs": max_abs, "relative": relative, "psnr": round(min(psnr, 999.0), 2)}


