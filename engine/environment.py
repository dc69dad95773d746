"""The environment key: on a CPU, images are byte-identical where it is equal."""

import hashlib
import importlib.metadata
import json
import platform
from typing import Any

import torch

from synthkd.kernels.dispatch import backend

_LIBRARIES = ("torch", "numpy", "pillow", "diffusers", "transformers", "synthkd")
_RUNTIMES = (
    "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "xformers",
)  # fmt: skip


def versions(*more: str) -> dict[str, str]:
    """Installed versions of the libraries that take part in drawing an image, and of `more`."""
    found = {}
    for name in (*_LIBRARIES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment(
    device: torch.device,
    micro_batch: int | str,
    threads: int | None = None,
    fused: str = "",
    compiled: str = "",
    roles: str = "",
) -> dict[str, Any]:
    """What the bits of an image may depend on: processor, libraries, threads, micro-batch, backend.

    fused: which networks run this project's ops in place of their own (`Synthesizer.fused`), compiled: how calls are
    compiled (`Synthesizer.compiled`), roles: those with a backend of their own (`Synthesizer.roles`); "" for none.
    """
    cuda = device.type == "cuda"
    processor = torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability()
    return {
        "machine": platform.machine(),
        "device": f"{device.type}: {processor}",
        "threads": 0 if cuda else threads or torch.get_num_threads(),
        "micro_batch": micro_batch,
        "backend": _backend(device, fused, compiled),
        "versions": versions("triton") if backend(device) == "triton" else versions(),
        **({"roles": roles, "runtimes": versions(*_RUNTIMES)} if roles else {}),
    }


def _backend(device: torch.device, fused: str, compiled: str) -> str:
    ops = "triton" if backend(device) == "triton" else "eager"
    return ops + (f", fused {fused}" if fused else "") + (f", compiled {compiled}" if compiled else "")


def environment_key(detail: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits of an environment."""
    return hashlib.sha256(json.dumps(detail, sort_keys=True).encode()).hexdigest()[:16]
