"""How many processes draw on this machine."""

import os

MOST_WORKERS = 8  # each holds a copy of the prior


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(device: str) -> int:
    """One process per core on a CPU, eight at most; one in all on a GPU."""
    return 1 if device == "cuda" else min(cores(), MOST_WORKERS)
