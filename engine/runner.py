"""Draws a plan on several processes of one machine; the caller's process stays the only writer.

Small networks scale badly over threads (two one-thread processes beat one with two), so on a CPU each worker
has one thread. Which worker draws a group cannot change it.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from synthkd.engine.batch import Batch
from synthkd.engine.environment import environment
from synthkd.engine.memory import plan_of
from synthkd.engine.plan import Plan, WorkUnit
from synthkd.engine.pool import Pool, Start
from synthkd.engine.synthesizer import Synthesizer
from synthkd.engine.workers import one_thread

Factory = Callable[[], Synthesizer]
_log = logging.getLogger("synthkd")


@dataclass(frozen=True)
class PoolStream:
    """A SampleStream drawn by worker processes; each builds its own Synthesizer by calling `factory`.

    factory: picklable. At most one group per worker is under way, and one more waits.
    deadline: seconds that a group may take, None for no limit.
    A worker that dies or hangs is replaced (see `engine.pool`).
    """

    factory: Factory
    plan: Plan
    workers: int
    threads: int = 1
    deadline: float | None = None

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
        pool = Pool(Start(self.factory, seed, self.threads, self._local.memory), self.workers, self.deadline)
        try:
            waiting.append(pool.submit(first))
            while waiting:
                while len(waiting) <= self.workers and (unit := next(todo, None)) is not None:
                    waiting.append(pool.submit(unit))
                batch = waiting.popleft().result()
                self._follow(batch, pool)
                yield batch
        finally:
            pool.close()

    def _follow(self, batch: Batch, pool: Pool) -> None:
        """Where memory ran out in a worker, say so, and give new ones the smaller parts; others go on as they are."""
        plan = self._local.memory
        drawn = plan_of(plan.group, batch.environment.get("micro_batch"))
        if drawn is not None and drawn.denoise + drawn.guide + drawn.decode < plan.denoise + plan.guide + plan.decode:
            _log.warning("group %d: memory ran out in a worker, which draws in parts of %s now", batch.group, drawn.key)
            self._local.memory = drawn
            pool.shrink(drawn)


def open_stream(factory: Factory, plan: Plan, workers: int, deadline: float | None = None) -> Any:
    """A stream in this process (workers = 1) or over a pool of one-thread workers.

    On a CPU this process is set to one thread either way, so that the worker count leaves the bits alone.
    deadline: seconds that a group may take; over it a worker is replaced, and this process ends with exit code 75.
    """
    if workers > 1:
        return PoolStream(factory, plan, workers, deadline=deadline)
    synthesizer = factory()
    synthesizer.processes = 1
    if synthesizer.model.device.type == "cpu":
        torch.set_num_threads(1)
    return replace(synthesizer.stream(plan.request), deadline=deadline)
