"""On a GPU: every op can be captured in a CUDA graph, and its replay reads what the inputs hold by then."""

import pytest
import torch
from torch import Tensor

from synthkd.kernels.case import Case, Suite, evaluate, tensors_of
from synthkd.kernels.suites import SUITES

FIRST = [pytest.param(suite, case, id=f"{suite.name}: {case.name}") for suite in SUITES for case in suite.cases[-1:]]


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels_on")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("suite", "case"), FIRST)
def test_an_op_can_be_captured(suite: Suite, case: Case, device: torch.device) -> None:
    """A wait for the host inside a capture is an error; the graph's outputs follow new inputs."""
    torch.use_deterministic_algorithms(False)
    arguments = case.made(device, torch.bfloat16)
    suite.op(**arguments)  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tensors_of(suite.op(**arguments))
    fresh = case.made(device, torch.bfloat16, seed=7)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value.copy_(fresh[name])
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, tensors_of(suite.op(**fresh)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.usefixtures("kernels_on")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("suite", "case"), FIRST)
def test_twice_is_the_same(suite: Suite, case: Case, device: torch.device) -> None:
    """No atomics: outputs and gradients are equal to the bit from run to run."""
    first, again = (evaluate(suite.op, case, case.made(device, torch.bfloat16)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
