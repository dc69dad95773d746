"""Which implementation of an op runs: its Triton kernel or its plain torch reference."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

Implementation = Literal["auto", "triton", "reference"]
IMPLEMENTATIONS = ("auto", "triton", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_TRITON = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_chosen: str = "auto"  # of the process: dynamo guards on a global, and traces no context variable


def interpreted() -> bool:
    """Whether Triton was told to interpret its kernels on the CPU (TRITON_INTERPRET=1 before this was imported)."""
    return _INTERPRETED


@contextmanager
def implementation(name: Implementation) -> Iterator[None]:
    """Choose the implementation of every op inside the block.

    auto: kernels for CUDA tensors of float32, float16 and bfloat16 where Triton is installed, else the reference;
    triton: kernels, on a CPU under Triton's interpreter; reference: plain torch everywhere, for exports and oracles.
    float64 always takes the reference. The choice holds for the whole process, all threads alike.
    Raises ValueError for another name, RuntimeError for `triton` where it cannot run.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {name!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
    if name == "triton" and not (_TRITON and (torch.cuda.is_available() or interpreted())):
        why = "a CUDA device, or TRITON_INTERPRET=1 set before Python starts" if _TRITON else "the triton package"
        raise RuntimeError(f"implementation 'triton' needs {why}")
    with _choose(name):
        yield


@contextmanager
def planned() -> Iterator[None]:
    """Every op takes its kernel on any machine; only for launches that are recorded dry: they could not run."""
    with _choose("planned"):
        yield


@contextmanager
def _choose(name: str) -> Iterator[None]:
    global _chosen
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def runs_kernel(*tensors: Tensor | None) -> bool:
    """Whether an op on these tensors (None: an argument left out) runs its kernel; no wait for the device."""
    if _chosen == "reference" or not _TRITON:
        return False
    anywhere = _on_cpu()
    return all(x is None or (x.dtype in DTYPES and (x.is_cuda or anywhere)) for x in tensors)


def _on_cpu() -> bool:
    """Whether kernels take CPU tensors: interpreted, or on paper."""
    return _chosen == "planned" or (_chosen == "triton" and _INTERPRETED)


def together(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all lie on the device of x, as a kernel needs; plain torch also takes scalars from a CPU."""
    return all(y is None or y.device == x.device for y in others)


def backend(device: torch.device) -> str:
    """`triton` or `reference`: what ops on this device run, as it goes into an environment key."""
    on_device = device.type == "cuda" or _on_cpu()
    return "triton" if _TRITON and on_device and _chosen != "reference" else "reference"


def refuse_empty(name: str, x: Tensor) -> None:
    """Raise ValueError for a tensor without elements."""
    if x.numel() == 0:
        raise ValueError(f"{name}: found an empty tensor {tuple(x.shape)}; expected at least one element")
