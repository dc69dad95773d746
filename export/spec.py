"""What is built and how, as plain values: tensors of a call, the batch, a backend's options."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from synthkd.export.errors import ExportError, suggest

BACKENDS = ("eager", "compile", "aoti", "onnx", "tensorrt")
PROVIDERS = ("auto", "cpu", "cuda", "tensorrt")
MODES = ("default", "reduce-overhead", "max-autotune")
OPSETS = (21, 23)  # 21 is the first with a GroupNormalization of channels, 23 the first with Attention


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a call: its shape in the example, its dtype, and whether dimension 0 is the batch."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: bool = False

    def at(self, batch: int) -> tuple[int, ...]:
        """The shape at another batch."""
        return (batch, *self.shape[1:]) if self.batched else self.shape

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.name, "shape": list(self.shape), "dtype": str(self.dtype), "batched": self.batched}


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Flat inputs and outputs of a call, in order; `batch` is that of the example and the one to be fastest at.

    dynamic: any batch from 1 to `most` goes in as it is; otherwise only `batch` does.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: int
    most: int
    dynamic: bool

    def profile(self, spec: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Least, best and largest shape of a tensor."""
        if not self.dynamic:
            return (spec.shape,) * 3
        return spec.at(1), spec.at(self.batch), spec.at(self.most)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "inputs": [spec.to_dict() for spec in self.inputs],
            "outputs": [spec.to_dict() for spec in self.outputs],
            "batch": self.batch,
            "most": self.most,
            "dynamic": self.dynamic,
        }


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a backend may be told beside its name; each field says whose it is.

    provider (onnx): `auto` takes CUDA for a module on a GPU, `tensorrt` onnxruntime's TensorRT provider.
    opset (onnx, tensorrt): 23 keeps attention whole, 21 is for parsers that do not know it (TensorRT before 10.14);
    0 picks.
    mode (compile): inductor's; cuda_graph (onnx on CUDA, tensorrt): replay a recorded run, for a fixed batch.
    builder_level (tensorrt): 0 to 5, how long tactics are searched; workspace (tensorrt): bytes of scratch memory
    while building, 0 for all.
    """

    provider: str = "auto"
    opset: int = 0
    mode: str = "default"
    cuda_graph: bool = False
    builder_level: int = 3
    workspace: int = 0

    def __post_init__(self) -> None:
        """Raise ExportError for a value outside its range."""
        for name, known in (("provider", PROVIDERS), ("mode", MODES)):
            if getattr(self, name) not in known:
                raise ExportError(f"{name} {getattr(self, name)!r}: {suggest(str(getattr(self, name)), known)}")
        if self.opset not in (0, *OPSETS):
            raise ExportError(f"opset is {self.opset}; expected one of {', '.join(map(str, OPSETS))}, or 0 to pick")
        if not 0 <= self.builder_level <= 5:
            raise ExportError(f"builder_level is {self.builder_level}; expected 0 to 5")
        if not (math.isfinite(self.workspace) and self.workspace >= 0):
            raise ExportError(f"workspace is {self.workspace}; expected bytes >= 0")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Options":
        """The inverse; raises ExportError for an unknown name."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise ExportError(f"option {name!r}: {suggest(name, known)}")
        return cls(**values)
