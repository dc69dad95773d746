"""Every case of every op: the kernel against the float64 reference, forward and backward, in poisoned memory."""

import pytest
import torch

from synthkd.kernels import implementation
from synthkd.kernels.case import Case, Maker, Suite, check, tensors_of
from synthkd.kernels.layout import is_channels_last
from synthkd.kernels.suites import SUITES

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = [
    pytest.param(suite, case, dtype, id=f"{suite.name}: {case.name}, {str(dtype).removeprefix('torch.')}")
    for suite in SUITES
    for case in suite.cases
    if not case.measured
    for dtype in DTYPES
    if dtype in suite.tolerances
]


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize(("suite", "case", "dtype"), CASES)
def test_kernel_agrees_with_the_float64_reference(
    suite: Suite, case: Case, dtype: torch.dtype, device: torch.device
) -> None:
    outcome = check(suite, case, device, dtype)
    assert outcome.passed, f"{outcome.where}: {outcome.worst:.3g} times the tolerance"


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize(("suite", "case"), [(p.values[0], p.values[1]) for p in CASES if p.values[2] is DTYPES[1]])
def test_dtypes_and_layout(suite: Suite, case: Case, device: torch.device) -> None:
    """Outputs have the reference's dtypes, and an output shaped like the first input its memory layout."""
    arguments = case.made(device, torch.float16)
    first = next(v for v in arguments.values() if isinstance(v, torch.Tensor))
    with implementation("reference"):
        want = tensors_of(suite.reference(**arguments))
    for got, other in zip(tensors_of(suite.op(**arguments)), want, strict=True):
        assert got.dtype == other.dtype
        if got.shape == first.shape and got.dtype == first.dtype and got.dim() > 2:
            assert is_channels_last(got) == is_channels_last(first)


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_an_empty_batch_is_refused(suite: Suite) -> None:
    """One line that names the op, whichever implementation would run."""
    arguments = suite.cases[0].arguments(Maker(torch.device("cpu"), torch.float32))
    batch = next(len(v) for v in arguments.values() if isinstance(v, torch.Tensor) and v.dim() > 1)
    empty = {
        name: value[:0] if isinstance(value, torch.Tensor) and value.dim() > 1 and len(value) == batch else value
        for name, value in arguments.items()
    }
    with pytest.raises(ValueError, match=r"^\w+: found an empty tensor"):
        suite.op(**empty)
