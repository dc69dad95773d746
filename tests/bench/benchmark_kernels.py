"""The cases of `synthkd bench kernels` in pytest-benchmark; run by `make bench`, not collected by `make test`."""

from typing import Any

import pytest
import torch

from synthkd.bench.kernels import DIRECTIONS, Workload, call_of, checked, contenders, workloads
from synthkd.kernels.case import Outcome

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PARAMETERS = [
    pytest.param(work, direction, name, id=f"{work}, {direction}, {name}")
    for work in workloads(DEVICE)
    for direction in DIRECTIONS[: 2 if work.case.differentiable else 1]
    for name in (("kernel", "reference", "compiled") if DEVICE.type == "cuda" else ("reference",))
]
_CHECKS: dict[str, Outcome] = {}


@pytest.mark.parametrize(("work", "direction", "name"), PARAMETERS)
def test_speed(benchmark: Any, work: Workload, direction: str, name: str) -> None:
    """A case whose check fails is not timed."""
    outcome = _CHECKS.get(str(work)) or _CHECKS.setdefault(str(work), checked(work, DEVICE))
    assert outcome.passed, f"{outcome.where}: {outcome.worst:.3g} times the tolerance"
    arguments = work.case.made(DEVICE, work.dtype)
    call = call_of(contenders(work.suite, arguments, DEVICE)[name], work.case, arguments, direction)

    def once() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{work}, {direction}"
    benchmark(once)
