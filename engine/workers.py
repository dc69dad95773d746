"""How many processes draw on this machine, and with how many threads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

MOST_WORKERS = 8  # each holds a copy of the prior


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(device: str) -> int:
    """One process per core on a CPU, eight at most; one in all on a GPU."""
    return 1 if device == "cuda" else min(cores(), MOST_WORKERS)


@contextmanager
def one_thread(device: str | torch.device) -> Iterator[None]:
    """On a CPU one thread inside, as every worker has: the count decides last bits, and so what is trained on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if torch.device(device).type == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
