"""AOTInductor: a graph compiled ahead of time into a .pt2 package of machine code."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from synthkd.export.errors import ExportError
from synthkd.export.graph import first_line

FILE = "model.pt2"


def unavailable() -> str:
    """Why nothing can be compiled here, in one line; empty where it can."""
    home = str(Path(torch.__file__).parent)
    if any(c.isspace() for c in home):
        return f"aoti: torch lies in {home!r}: its compiler cannot link where a path has a space; install it elsewhere"
    return ""


def compile_program(program: ExportedProgram, folder: Path) -> None:
    """Write FILE into a folder; takes half a minute and more. Raises ExportError where the compiler fails."""
    if why_not := unavailable():
        raise ExportError(why_not)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own remarks about itself
            torch._inductor.aoti_compile_and_package(program, package_path=str(folder / FILE))
    except Exception as error:  # a compiler raises anything
        raise ExportError(f"aoti: the graph cannot be compiled ({first_line(error)})") from error


def load(folder: Path) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Flat tensors in and out. It is machine code: see `artifacts.check_maker`."""
    try:
        package = torch._inductor.aoti_load_package(str(folder / FILE))
    except Exception as error:
        raise ExportError(f"aoti: {FILE} cannot be loaded ({first_line(error)})") from error

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        out = package(*tensors)
        return [out] if isinstance(out, Tensor) else list(out)

    return run
