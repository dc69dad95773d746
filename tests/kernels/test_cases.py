"""Every case of every op: the kernel against the float64 reference, forward and backward, in poisoned memory."""

import pytest
import torch

from synthkd.kernels.case import Case, Suite, check
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
