"""The one place where kernels are launched; and a record of launches, for counting and for compiling ahead of time."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One launch: a `triton.jit` function, its grid, its arguments in order, its constexprs, and options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any]


_recording: list[Launch] | None = None
_dry = False


@contextmanager
def recorded(*, dry: bool = False) -> Iterator[list[Launch]]:
    """Every launch inside, in order; dry: the kernels do not run, and what they would write stays uninitialised."""
    global _recording, _dry
    before, _recording, _dry = (_recording, _dry), [], dry
    try:
        yield _recording
    finally:
        _recording, _dry = before


def launch(
    kernel: Any,
    grid: Sequence[int],
    *arguments: Any,
    num_warps: int = 4,
    exact: bool = False,
    **constexprs: Any,
) -> None:
    """Run `kernel[grid](*arguments, **constexprs)` on the device of the first tensor among the arguments.

    exact: multiplications and additions are not contracted, so that roundings are those of the reference.
    """
    options: dict[str, Any] = {"num_warps": num_warps, **({"enable_fp_fusion": False} if exact else {})}
    if _recording is not None:
        _recording.append(Launch(kernel, tuple(grid), arguments, constexprs, options))
        if _dry:
            return
    x = next(a for a in arguments if isinstance(a, Tensor))
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        kernel[tuple(grid)](*arguments, **constexprs, **options)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()
