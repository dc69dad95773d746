"""Every registered op: torch's own check of schema, fake, autograd and tracing; and it is traced as one node."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from synthkd.kernels.case import Case, Maker, Suite, evaluate
from synthkd.kernels.suites import SUITES

# tracing runs an op a dozen times, which the interpreter makes long: the larger cases leave it out
SMALL = 2000 if not torch.cuda.is_available() else 2**31
CHEAP = ("test_schema", "test_faketensor")
EVERYTHING = (*CHEAP, "test_autograd_registration", "test_aot_dispatch_dynamic")
CASES = [
    pytest.param(suite, case, id=f"{suite.name}: {case.name}")
    for suite in SUITES
    for case in suite.cases
    if not case.measured
]


class Seen(TorchDispatchMode):
    """Keeps every call of one of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Mapping[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "synthkd":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def calls_of(suite: Suite, case: Case, device: torch.device) -> list[tuple[Any, tuple[Any, ...], Mapping[str, Any]]]:
    """What a case's forward and backward call."""
    with Seen() as seen:
        evaluate(suite.op, case, case.arguments(Maker(device, torch.float32)))
    return seen.calls


def _fresh(value: Any, grad: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(grad and value.is_floating_point() and value.dim() > 1)


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize(("suite", "case"), CASES)
def test_opcheck(suite: Suite, case: Case, device: torch.device) -> None:
    """Schema, autograd registration, fake tensors, and AOT tracing with symbolic shapes."""
    torch.use_deterministic_algorithms(False)  # poison differs from run to run; the cases themselves are checked in it
    calls = calls_of(suite, case, device)
    assert calls, "the case ran no op of ours"
    for func, args, kwargs in calls:
        smooth = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "Autograd") and bool(case.differentiable)
        inputs = tuple(_fresh(a, smooth and "backward" not in func.name()) for a in args)
        small = sum(a.numel() for a in args if isinstance(a, Tensor)) <= SMALL
        torch.library.opcheck(func, inputs, dict(kwargs), test_utils=EVERYTHING if small else CHEAP)


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("suite", SUITES, ids=lambda s: s.name)
def test_every_op_counts_its_flops(suite: Suite, device: torch.device) -> None:
    """FlopCounterMode sees what is inside an op only where a formula is registered."""
    case = suite.cases[0]
    calls = calls_of(suite, case, device)
    for func in {func for func, _, _ in calls}:
        arguments = next((a, k) for f, a, k in calls if f is func)
        with FlopCounterMode(display=False) as counter:
            func(*arguments[0], **arguments[1])
        assert counter.get_total_flops() > 0, func
