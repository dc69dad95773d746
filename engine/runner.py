"""Draws a plan on several processes of one machine; the caller's process stays the only writer.

Small networks scale badly over threads (two one-thread processes beat one with two), so on a CPU each worker
has one thread. Which worker draws a group cannot change it.
"""

import logging
import multiprocessing as mp
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import connection
from typing import Any

import torch

from synthkd.engine.batch import Batch
from synthkd.engine.environment import environment
from synthkd.engine.errors import WorkerLostError
from synthkd.engine.memory import MemoryPlan
from synthkd.engine.plan import Plan, WorkUnit
from synthkd.engine.synthesizer import Synthesizer
from synthkd.engine.workers import one_thread

Factory = Callable[[], Synthesizer]
_worker: Synthesizer | None = None


def follow_parent() -> None:
    """Make this worker end with its parent, however that ends, and leave interrupts to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = mp.parent_process()
    if parent is not None:
        watch = threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True)
        watch.start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _start(factory: Factory, threads: int, memory: MemoryPlan) -> None:
    global _worker
    follow_parent()
    logging.getLogger("synthkd").setLevel(logging.ERROR)  # the caller's own synthesizer has said it
    torch.set_num_threads(threads)
    _worker = factory()
    _worker.memory = memory  # one plan for all: it is in the environment key


def _run(unit: WorkUnit, seed: int) -> Batch:
    assert _worker is not None
    return _worker.run(unit, seed).cpu()


@dataclass(frozen=True)
class PoolStream:
    """A SampleStream drawn by worker processes; each builds its own Synthesizer by calling `factory`.

    factory: picklable. At most one group per worker is under way, and one more waits.
    """

    factory: Factory
    plan: Plan
    workers: int
    threads: int = 1

    @cached_property
    def _local(self) -> Synthesizer:
        made = self.factory()
        made.processes = self.workers
        return made

    @property
    def identity(self) -> dict[str, Any]:
        """See `SampleStream.identity`."""
        return self._local.identity(self.plan.request.seed)

    @property
    def environment(self) -> dict[str, Any]:
        """See `SampleStream.environment`; threads are those of a worker."""
        return environment(self._local.model.device, threads=self.threads, **self._local.how)

    def draw(self, units: Iterable[WorkUnit]) -> Iterator[Batch]:
        """One Batch per unit, in the given order; workers stop when the iterator is closed."""
        todo, seed = iter(units), self.plan.request.seed
        waiting: deque[Future[Batch]] = deque()
        first = next(todo, None)
        if first is None:
            return
        if self._local.routes.key:  # built here, once and told; every worker loads it
            with one_thread(self._local.model.device):
                self._local.prepare()
        pool = ProcessPoolExecutor(
            self.workers,
            mp.get_context("spawn"),
            initializer=_start,
            initargs=(self.factory, self.threads, self._local.memory),
        )
        try:
            waiting.append(pool.submit(_run, first, seed))
            while waiting:
                while len(waiting) <= self.workers and (unit := next(todo, None)) is not None:
                    waiting.append(pool.submit(_run, unit, seed))
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise WorkerLostError(
                "a worker process ended unasked (out of memory?); every finished group is safe: use fewer --workers "
                "and run the same command again"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def open_stream(factory: Factory, plan: Plan, workers: int) -> Any:
    """A stream in this process (workers = 1) or over a pool of one-thread workers.

    On a CPU this process is set to one thread either way, so that the worker count leaves the bits alone.
    """
    if workers > 1:
        return PoolStream(factory, plan, workers)
    synthesizer = factory()
    synthesizer.processes = 1
    if synthesizer.model.device.type == "cpu":
        torch.set_num_threads(1)
    return synthesizer.stream(plan.request)
