"""Stage times without stalling the device: host time on a CPU, events read at the end on a GPU."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class StageClock:
    """`with clock("denoise"): ...` adds up seconds per stage; `totals()` reads them (and waits for a GPU)."""

    def __init__(self, device: torch.device) -> None:
        """device: where the timed work runs."""
        self._cuda = device.type == "cuda"
        self._host: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time one stretch of a stage."""
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            yield
            end.record()
            self._events.append((stage, begin, end))
            return
        started = time.perf_counter()
        yield
        self._host[stage] += time.perf_counter() - started

    def totals(self) -> dict[str, float]:
        """Seconds per stage so far."""
        if self._events:
            torch.cuda.synchronize()
        for stage, begin, end in self._events:
            self._host[stage] += begin.elapsed_time(end) / 1e3
        self._events.clear()
        return dict(self._host)
