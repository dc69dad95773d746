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
from synthkd.export.artifacts import Manifest, Slot, key_of, processor, write_manifest
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


def opset_of(options: Options, backend: str) -> int:
    """23, which keeps attention whole, but for a TensorRT that is too old, as onnxruntime's TensorRT provider's is."""
    if options.opset:
        return options.opset
    if backend == "tensorrt":
        return opset_for(tensorrt.version())
    return OPSETS[0] if backend == "onnx" and options.provider == "tensorrt" else OPSETS[-1]


def outputs_of(call: Call) -> tuple[tuple[TensorSpec, ...], Any]:
    """What the function returns, by running it at two batches: what differs between them is the batch."""
    with torch.no_grad():
        first = call.run(*call.tensors)
        structure = call.structure
        other = call.run(*call.at(call.batch + 1)) if any(call.batched) else first
    rows = enumerate(zip(first, other, strict=True))
    specs = [
        TensorSpec(f"out{i}", tuple(x.shape), x.dtype, x.dim() > 0 and x.shape != y.shape) for i, (x, y) in rows
    ]
    return tuple(specs), structure


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
        with self.slot.building() as folder:
            with self._stage("trace"):
                outputs, structure = outputs_of(self.call)
                program = (exported_gradient if self.gradient else exported)(self.call, self.dynamic)
                check_plain(program)
            signature = Signature(
                inputs=self.call.inputs(), outputs=outputs, batch=self.call.batch, most=self.most, dynamic=self.dynamic
            )
            self._written(program, folder, signature)
            with self._stage("load"):
                run = loaded(folder, self.slot.backend, signature, self.options, self.device)
            with self._stage("compare"):
                verified = self._verified(wrap(self.call, signature, structure, run, None, not self.gradient))
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
                ),
            )

    def _written(self, program: ExportedProgram, folder: Path, signature: Signature) -> None:
        backend = self.slot.backend
        if backend == "aoti":
            with self._stage("compile"):
                aoti.compile_program(program, folder)
            return
        with self._stage("convert"):
            onnx.write_model(program, folder, signature, opset_of(self.options, backend))
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
            while self.gradient and tried[-1]["relative"] > self._allowed() and len(tried) < len(_SCALES):
                tried.append(self._compared(compiled, batch, _SCALES[len(tried)]))
            rows[f"batch {batch}"] = min(tried, key=lambda row: row["relative"])
        self._judge(rows)
        return rows

    def _compared(self, compiled: Any, batch: int, scale: float) -> dict[str, float]:
        """At the example, its first tensor scaled."""
        tensors = self.call.at(batch)
        tensors[0] = tensors[0] if scale == 1.0 else tensors[0] * scale
        with torch.no_grad():
            return compared(compiled.flat(tensors, batch), self.call.run(*tensors))

    def _allowed(self) -> float:
        if self.tolerance is not None:
            return self.tolerance
        loosest = max((TOLERANCE.get(s.dtype, 0.0) for s in self.call.inputs()), default=0.0)
        return loosest or TOLERANCE[torch.float32]

    def _judge(self, rows: Mapping[str, Any]) -> None:
        most = self._allowed()
        for batch, row in rows.items():
            if not row["relative"] <= most:
                raise ExportError(
                    f"{self.slot.name} for {self.slot.backend} differs from eager by {row['relative']:.2g} of its size "
                    f"at {batch} (allowed: {most:.2g}); nothing was kept"
                )


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
        same = torch.isnan(a) & torch.isnan(b)
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


