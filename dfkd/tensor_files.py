"""Named tensors and a JSON note in one safetensors file, written whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from synthkd.engine.errors import SynthkdError

_NOTE = "synthkd"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Replace a file as a whole: temporary file, fsync, rename. Raises SynthkdError where that fails."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two trainings may label one set
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, fresh,
                  metadata={_NOTE: json.dumps(note)})  # fmt: skip
        with fresh.open("rb+") as f:
            os.fsync(f.fileno())
        fresh.replace(path)
    except (OSError, SafetensorError) as error:
        fresh.unlink(missing_ok=True)
        raise SynthkdError(f"{path}: cannot be written ({error}); free space or make its folder writable") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors on the CPU, and the note. Raises SynthkdError for a file that is not one of ours."""
    try:
        with safe_open(path, framework="pt") as f:
            note = json.loads((f.metadata() or {})[_NOTE])
            if not isinstance(note, dict):
                raise TypeError("its note is no table")
            return {name: f.get_tensor(name) for name in f.keys()}, note  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise SynthkdError(f"{path}: not readable ({reason}); delete it and run the command again") from error
