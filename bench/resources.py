"""What a GPU would need for every kernel: compiled ahead of time for three architectures, on any machine.

`python -m synthkd.bench.resources` rewrites bench/results/kernel_resources.jsonl. It needs Triton and no GPU, and a
process that does not interpret Triton's kernels. Launches come from the cases of `kernels.suites`, on fake tensors.
"""

import argparse
import ast
import hashlib
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from synthkd.bench.record import RESULTS
from synthkd.engine.errors import SynthkdError
from synthkd.engine.rows import write_atomically
from synthkd.kernels.case import Case, Maker, Suite, evaluate
from synthkd.kernels.dispatch import interpreted, planned
from synthkd.kernels.launch import Launch, recorded
from synthkd.kernels.suites import SUITES

TABLE = RESULTS / "kernel_resources.jsonl"
COMMAND = "python -m synthkd.bench.resources"
ARCHITECTURES = (80, 90, 100)
KERNELS = Path(__file__).parents[1] / "kernels"
MOST_SHARED, REGISTER_FILE = 232448, 65536  # bytes per block and registers per multiprocessor, sm_90 and sm_100

_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64",
    torch.uint8: "*u8", torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64",
    torch.bool: "*i1",
}  # fmt: skip
_WIDE = re.compile(r"\bld\.global[\w.:]*\.v(4\.[bfu]32|2\.[bfu]64|8\.[bfu]32|4\.[bfu]64)")


@dataclass(frozen=True)
class Build:
    """One compilation: a kernel for one set of argument types, constants and options."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    constexprs: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]


@dataclass
class Uses:
    """Where a build comes from."""

    cases: set[str] = field(default_factory=set)
    dtypes: set[str] = field(default_factory=set)


class _Bodies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs the bodies of registered ops on fake tensors, which would otherwise take their fake implementations."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "synthkd":
            return func(*args, **(kwargs or {}))
        with self:  # an op may call another
            return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))


@contextmanager
def _on_paper() -> Iterator[list[Launch]]:
    bodies = _Bodies()  # type: ignore[no-untyped-call]
    with FakeTensorMode(), bodies, planned(), recorded(dry=True) as launches:
        yield launches


def launches_of(suite: Suite, case: Case, dtype: torch.dtype) -> list[Launch]:
    """What a case's forward and backward launch; no tensor is allocated and nothing runs."""
    with _on_paper() as launches:
        evaluate(suite.op, case, case.arguments(Maker(torch.device("cpu"), dtype)))
    return launches


def chosen_cases(suite: Suite) -> list[Case]:
    """The cases that a GPU is measured on, one awkward one, and any more that reach a kernel which these do not."""
    dtype = next(iter(suite.tolerances))
    awkward = [c for c in suite.cases if not c.measured]
    found = [c for c in suite.cases if c.measured == "gpu"] + awkward[:2][-1:]
    reached = {x.kernel for c in found for x in launches_of(suite, c, dtype)}
    for case in awkward:
        kernels = {x.kernel for x in launches_of(suite, case, dtype)}
        if kernels - reached:
            found.append(case)
            reached |= kernels
    return found


def build_of(launch: Launch) -> Build:
    """A launch's arguments as Triton would specialise them: 1 is a constant, multiples of 16 are known as such."""
    names, free = list(launch.kernel.arg_names), getattr(launch.kernel, "do_not_specialize_on_alignment", None) or ()
    constexprs, signature, aligned = dict(launch.constexprs), {}, []
    for name, value in zip(names, launch.arguments, strict=False):
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            constexprs[name] = value
        elif isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            if name not in free and value.storage_offset() * value.element_size() % 16 == 0:
                aligned.append(name)
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(name)
        else:
            signature[name] = "fp32"
    signature |= dict.fromkeys(constexprs, "constexpr")
    ordered = tuple((name, signature[name]) for name in names)
    return Build(
        launch.kernel, ordered, tuple(aligned), tuple(sorted(constexprs.items())), tuple(sorted(launch.options.items()))
    )


def builds(suites: Iterable[Suite], dtypes: Iterable[torch.dtype] | None = None) -> dict[Build, Uses]:
    """Every different compilation that the suites ask for, with its uses."""
    found: dict[Build, Uses] = {}
    for suite in suites:
        for case in chosen_cases(suite):
            for dtype in dtypes or suite.tolerances:
                for launch in launches_of(suite, case, dtype):
                    uses = found.setdefault(build_of(launch), Uses())
                    uses.cases.add(f"{suite.name}: {case.name}")
                    uses.dtypes.add(str(dtype).removeprefix("torch."))
    return found


def resources(build: Build, arch: int) -> dict[str, Any]:
    """Compile for sm_ARCH; registers, stack, spills, shared memory, and whether loads are 16 bytes wide."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    source = ASTSource(
        fn=build.kernel,
        signature=dict(build.signature),
        constexprs={(names.index(name),): value for name, value in build.constexprs},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in build.aligned},
    )
    options = dict(build.options)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    said = _assembled(compiled.asm["ptx"], fused=options.get("enable_fp_fusion", True))
    usage = _usage(compiled.asm["cubin"])
    stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said).groups())  # type: ignore[union-attr]
    return {
        "arch": f"sm_{arch}",
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "spill_stores": stores,
        "spill_loads": loads,
        "shared_bytes": int(compiled.metadata.shared),
        "num_warps": int(compiled.metadata.num_warps),
        "wide_loads": bool(_WIDE.search(compiled.asm["ptx"])),
        "triton": triton.__version__,
    }


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def _assembled(ptx: str, *, fused: bool) -> str:
    """What the assembler that comes with Triton says about a kernel."""
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    assert target is not None
    blackwell = target[1].startswith(("sm_10", "sm_12"))
    tool = _tool("ptxas-blackwell")
    tool = tool if blackwell and Path(tool).exists() else _tool("ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(ptx)
        f.flush()
        flags = [] if fused else ["--fmad=false"]
        command = [tool, "-v", *flags, f"--gpu-name={target[1]}", f.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and the others of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        command = [_tool("cuobjdump"), "--dump-resource-usage", f.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


def faults(row: Mapping[str, Any]) -> list[str]:
    """Why a kernel of such needs is not to be shipped; empty where it is well."""
    registers = row["registers"] * row["num_warps"] * 32
    found = {
        f"{row['spill_stores']} bytes spilled": row["spill_stores"] or row["spill_loads"],
        f"{row['shared_bytes']} bytes of shared memory": row["shared_bytes"] > MOST_SHARED,
        f"{registers} registers a block": registers > REGISTER_FILE,
    }
    return [fault for fault, true in found.items() if true]


@cache
def source_hash(module: str) -> str:
    """SHA-256 of a kernel's module and of the modules of this package whose jit functions it uses."""
    path = Path(inspect.getfile(importlib.import_module(module)))
    text = path.read_text()
    shared = [p for p in sorted(KERNELS.glob("*.py")) if kernels_in(p) and p != path and p.stem in text]
    return hashlib.sha256(b"".join(p.read_bytes() for p in (path, *shared))).hexdigest()


def all_kernels() -> set[tuple[str, str]]:
    """(op, kernel) of every jit function under kernels/ that is launched; op: the folder, or a shared file's name."""
    return {
        (path.parent.name if path.name == "kernel.py" else path.stem, name)
        for path in KERNELS.rglob("*.py")
        for name in kernels_in(path)
    }


def kernels_in(path: Path) -> set[str]:
    """Names of the jit functions of a file that no other of them uses: those that are launched."""
    jits = [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    used = {n.id for f in jits for n in ast.walk(f) if isinstance(n, ast.Name)}
    return {f.name for f in jits} - used


def row_of(build: Build, uses: Uses, arch: int) -> dict[str, Any]:
    """A row of the table; op as in `all_kernels`."""
    module = build.kernel.fn.__module__
    return {
        "op": module.split(".")[2],
        "module": module,
        "cases": sorted(uses.cases),
        "dtypes": sorted(uses.dtypes),
        "kernel": build.kernel.fn.__name__,
        "constexprs": {name: _plain(value) for name, value in build.constexprs},
        "source_sha256": source_hash(module),
        **resources(build, arch),
    }


def _plain(value: Any) -> Any:
    """A constant as JSON has it; a dtype by its name."""
    return value if value is None or isinstance(value, int | float | str) else str(value)


def table(todo: Mapping[Build, Uses], architectures: Iterable[int] = ARCHITECTURES) -> list[dict[str, Any]]:
    """Rows in a fixed order."""
    pairs = [(build, uses, arch) for build, uses in todo.items() for arch in architectures]
    with ThreadPoolExecutor(2) as pool:  # the assembler is a process of its own
        rows = list(pool.map(lambda pair: row_of(*pair), pairs))
    return sorted(rows, key=lambda r: (r["op"], r["kernel"], r["arch"], json.dumps(r, sort_keys=True)))


def refuse_interpreter() -> None:
    """Raise SynthkdError where kernels are interpreted, so that there is nothing to compile, or Triton is missing."""
    if interpreted():
        raise SynthkdError("TRITON_INTERPRET=1 is set: kernels are interpreted; unset it to compile them")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise SynthkdError("triton is not installed: pip install 'synthkd[triton]'") from error


def main() -> int:
    """Rewrite the table; 1 where a kernel spills or asks for too much."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    try:
        refuse_interpreter()
    except SynthkdError as error:
        print(f"synthkd: {error}", file=sys.stderr)
        return error.exit_code
    rows = table(builds(SUITES))
    write_atomically(TABLE, "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    bad = [(row, faults(row)) for row in rows if faults(row)]
    for row, why in bad:
        print(f"{row['op']}: {row['kernel']} on {row['arch']}, {row['constexprs']}: {'; '.join(why)}", file=sys.stderr)
    print(f"{len(rows)} rows in {TABLE.name}; {len(bad)} with faults")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
