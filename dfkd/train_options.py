"""How a student is trained, as far as that is a matter of execution: readers, precision, compilation, checkpoints."""

from dataclasses import dataclass

import torch

from synthkd.dfkd.cached import CACHES
from synthkd.dfkd.feed import ReadOptions
from synthkd.dfkd.reader_choice import READERS
from synthkd.engine.errors import SynthkdError, suggest

COMPILES = ("auto", "off", "default", "reduce-overhead", "max-autotune")
PRECISIONS = ("auto", "float32", "bfloat16")
# Below so many operations of a whole training, compiling on a CPU takes longer than it saves (docs/distill.md).
_WORTH_COMPILING = 1e14
_STEPS_WORTH_COMPILING = 300  # on a GPU


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ReadOptions):
    """ReadOptions, and how the step runs.

    compile: auto compiles on a GPU where a training has 300 steps, on a CPU where it has 1e14 operations; precision: of
    the networks under autocast, auto is bfloat16 on a GPU that has it, float32 elsewhere; checkpoint_seconds between
    checkpoints (0: one a step; of several processes one a log row).
    """

    compile: str = "auto"
    precision: str = "auto"
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Raise SynthkdError for a value that is none of those known."""
        known = {"reader": READERS, "cache": CACHES, "compile": COMPILES, "precision": PRECISIONS}
        for name, choices in known.items():
            value = getattr(self, name)
            if value not in choices:
                raise SynthkdError(f"--{name} {value!r}: {suggest(value, choices)}")
        if not 0 <= self.threads <= 1024:
            raise SynthkdError(f"--threads is {self.threads}; expected 0 to 1024")
        if not 0 <= self.checkpoint_seconds < float("inf"):
            raise SynthkdError(f"--checkpoint-seconds is {self.checkpoint_seconds}; expected a number >= 0")

    @property
    def dtype(self) -> torch.dtype:
        """What networks compute in."""
        if self.precision != "auto":
            return torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        native = self.device.startswith("cuda") and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if native else torch.float32

    def compile_mode(self, operations: float, steps: int) -> str | None:
        """torch.compile's mode for a training of so many floating point operations in all; None: eager."""
        if self.compile != "auto":
            return None if self.compile == "off" else self.compile
        if self.device.startswith("cuda"):
            return "default" if steps >= _STEPS_WORTH_COMPILING else None
        return "default" if operations >= _WORTH_COMPILING else None
