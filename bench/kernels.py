"""Every op of `synthkd.kernels` against plain torch: checked first, then timed; no speed without a passed check.

A row holds one (op, case, dtype, direction). `speed` is null where the check failed; otherwise per contender the median
and quartiles in microseconds: `kernel` (on a GPU), `reference` (plain torch, eager), `compiled` (the reference under
torch.compile, on a GPU) and `stock` (what a model would run in its own dtype, where that differs).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from synthkd.bench.record import stamped
from synthkd.bench.timing import Call, Stopwatch, copy_ceiling, full_precision
from synthkd.engine.errors import SynthkdError, suggest
from synthkd.kernels import implementation
from synthkd.kernels.case import Arguments, Case, Outcome, Suite, check, tensors_of
from synthkd.kernels.launch import recorded
from synthkd.kernels.suites import SUITES

DIRECTIONS = ("forward", "forward+backward")
Op = Callable[..., Any]


def _stock_group_norm_silu(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps))


def _stock_add_group_norm_silu(
    x: Tensor, residual: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _stock_group_norm_silu(total, num_groups, weight, bias, eps), total


# what diffusers' modules run, in the dtype of the model; only for cases whose arguments they take
STOCK: dict[str, Op] = {
    "add_group_norm_silu": _stock_add_group_norm_silu,
    "group_norm_silu": _stock_group_norm_silu,
}


@dataclass(frozen=True)
class Workload:
    """One case of an op in one dtype."""

    suite: Suite
    case: Case
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.suite.name}: {self.case.name}, {dtype_name(self.dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, not `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def workloads(device: torch.device, ops: Sequence[str] = (), dtypes: Sequence[str] = ()) -> list[Workload]:
    """What this machine measures, by default all ops in all dtypes on a GPU, in float32 on a CPU.

    A CPU runs plain torch, whose roundings in half precision the kernels' tolerances are not made for.
    Raises SynthkdError for an unknown name.
    """
    names = [suite.name for suite in SUITES]
    known = sorted({dtype_name(dtype) for suite in SUITES for dtype in suite.tolerances})
    for option, given, choices in (("--op", ops, names), ("--dtype", dtypes, known)):
        for name in given:
            if name not in choices:
                raise SynthkdError(f"{option} {name!r}: {suggest(name, choices)}")
    kind = "gpu" if device.type == "cuda" else "cpu"
    dtypes = dtypes or (known if kind == "gpu" else ["float32"])
    return [
        Workload(suite, case, dtype)
        for suite in SUITES
        if not ops or suite.name in ops
        for case in suite.cases
        if case.measured == kind
        for dtype in suite.tolerances
        if dtype_name(dtype) in dtypes
    ]


def measure(todo: Sequence[Workload], device: torch.device, repeats: int = 30) -> Iterator[dict[str, Any]]:
    """Rows, one by one; the copy ceiling is measured before the first."""
    ceiling = copy_ceiling(device)
    for work in todo:
        with full_precision():
            outcome = checked(work, device)
        for direction in DIRECTIONS[: 2 if work.case.differentiable else 1]:
            row = _identity(work, direction, device, ceiling, outcome)
            if outcome.passed:
                with full_precision():
                    row |= _speed(work, direction, device, ceiling, repeats)
            yield stamped(row)


def checked(work: Workload, device: torch.device) -> Outcome:
    """Forward and backward against the float64 reference on this device; an op that raises has failed."""
    try:
        with implementation("auto"):
            return check(work.suite, work.case, device, work.dtype)
    except Exception as error:
        return Outcome(math.inf, _one_line(error))


def _identity(work: Workload, direction: str, device: torch.device, ceiling: float, outcome: Outcome) -> dict[str, Any]:
    forward, backward = work.case.traffic(work.dtype.itemsize)
    reason = None if outcome.passed else f"{outcome.where}: {outcome.worst:.3g} times the tolerance"
    worst = outcome.worst if math.isfinite(outcome.worst) else None  # JSON has no infinity
    return {
        "op": work.suite.name,
        "case": work.case.name,
        "dtype": dtype_name(work.dtype),
        "direction": direction,
        "device": device.type,
        "torch": torch.__version__,
        "bytes": forward + (backward if direction != "forward" else 0),
        "copy_gb_per_s": round(ceiling, 1),
        "check": {"passed": outcome.passed, "worst": worst, "where": outcome.where, "reason": reason},
        "launches": None,
        "speed": None,
        "gb_per_s": None,
        "percent_of_copy": None,
        "times_faster_than": None,
        "warm_up_seconds": None,
        "failed": {},
    }


def contenders(suite: Suite, arguments: Arguments, device: torch.device) -> dict[str, Op]:
    """What is timed on a device."""
    found: dict[str, Op] = {"reference": suite.reference}
    if device.type == "cuda":
        found = {"kernel": suite.op, **found, "compiled": torch.compile(suite.reference, dynamic=False)}
    stock = STOCK.get(suite.name)
    if stock is not None and arguments.keys() <= set(stock.__code__.co_varnames[: stock.__code__.co_argcount]):
        found["stock"] = stock
    return found


def call_of(op: Op, case: Case, arguments: Arguments, direction: str) -> Call:
    """A call without arguments, its inputs and upstream gradients made beforehand."""
    if direction == "forward":

        def forward() -> object:
            with torch.no_grad():
                return op(**arguments)

        return forward
    leaves = {name: arguments[name].detach().requires_grad_() for name in case.differentiable}
    given = {**arguments, **leaves}
    upstream = [torch.randn_like(x) for x in tensors_of(op(**given)) if x.requires_grad]

    def both() -> object:
        outputs = [x for x in tensors_of(op(**given)) if x.requires_grad]
        return torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)

    return both


def _speed(work: Workload, direction: str, device: torch.device, ceiling: float, repeats: int) -> dict[str, Any]:
    arguments = work.case.made(device, work.dtype)
    watch, calls, warm, failed = Stopwatch(device), {}, {}, {}
    if device.type == "cuda":
        torch._dynamo.reset()  # or the limit of recompilations is met
    for name, op in contenders(work.suite, arguments, device).items():
        try:
            call = call_of(op, work.case, arguments, direction)
            warm[name] = round(watch.warm_up(call), 3)
            calls[name] = call
        except Exception as error:  # a compiler may fail; the others are still timed
            failed[name] = _one_line(error)
    chief = "kernel" if device.type == "cuda" else "reference"
    if chief not in calls:
        return {"warm_up_seconds": warm, "failed": failed}
    found = watch.rounds(calls, repeats)
    ours = found[chief]
    moved = sum(work.case.traffic(work.dtype.itemsize)[: 1 if direction == "forward" else 2])
    rate = moved / ours.median / 1e3
    with recorded() as launches:
        calls[chief]()
    return {
        "launches": len(launches),
        "speed": {name: asdict(q) for name, q in found.items()},
        "gb_per_s": round(rate, 2),
        "percent_of_copy": round(100 * rate / ceiling, 1),
        "times_faster_than": {n: round(q.median / ours.median, 3) for n, q in found.items() if n != "kernel"}
        if "kernel" in found
        else None,
        "warm_up_seconds": warm,
        "failed": failed,
    }


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
