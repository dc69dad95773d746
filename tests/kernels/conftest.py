"""Kernel tests: the device they run on, and poisoned memory."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils import deterministic

from synthkd.kernels import implementation


@pytest.fixture
def device() -> torch.device:
    """A GPU where there is one; else the CPU, where Triton interprets."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def kernels_on() -> Iterator[None]:
    """Ops run their Triton kernels, and fresh memory is NaN: what a kernel leaves out shows."""
    pytest.importorskip("triton", reason="Triton runs on Linux only")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert deterministic.fill_uninitialized_memory
    with implementation("triton"):
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
