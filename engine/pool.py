"""Worker processes that draw groups: one that dies or hangs is replaced, and its group drawn again."""

import atexit
import logging
import multiprocessing as mp
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing import connection, resource_tracker
from typing import Any

import torch

from synthkd.engine.batch import Batch
from synthkd.engine.errors import WorkerLostError
from synthkd.engine.memory import MemoryPlan
from synthkd.engine.plan import WorkUnit

MOST_LOSSES = 3  # of one group, in a row
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_log = logging.getLogger("synthkd")


@dataclass(frozen=True)
class Start:
    """What a worker is made of. factory: a picklable maker of what has `run(unit, seed) -> Batch` and `memory`."""

    factory: Callable[[], Any]
    seed: int
    threads: int
    memory: MemoryPlan


class _Lost(Exception):  # noqa: N818 - told to nobody: the group is drawn again
    """A worker ended or hung; its words say how."""


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


def _serve(pipe: Any, start: Start) -> None:
    """A worker's life: build, then draw what it is told to. A stop of the whole process group is the parent's."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    follow_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    logging.getLogger("synthkd").setLevel(logging.ERROR)  # the caller's own synthesizer has said it
    torch.set_num_threads(start.threads)
    try:
        made = start.factory()
        made.memory = start.memory  # one plan for all: it is in the environment key
        pipe.send(None)
        while True:
            pipe.send(made.run(pipe.recv(), start.seed).cpu())
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        pipe.send(_portable(error))


def _portable(error: Exception) -> Exception:
    """An error with the worker's traceback as a note, of a type that crosses a pipe: others' may not."""
    if not type(error).__module__.startswith(("builtins", "synthkd.")):
        kind = OSError if isinstance(error, OSError) else RuntimeError
        error = kind(f"{type(error).__name__}: {error}")
    error.add_note("in a worker process:\n" + traceback.format_exc())
    return error


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, start: Start) -> None:
        """Signals are blocked in the new process until it ignores them: a stop may come while it starts."""
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process, self._built = context.Process(target=_serve, args=(theirs, start)), False
        resource_tracker.ensure_running()  # started later, it would unblock them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    def draw(self, unit: WorkUnit, deadline: float | None) -> Batch:
        """One group; raises _Lost, or what the worker raised. The deadline counts from when it is built."""
        if not self._built:
            self._answer(None)
            self._built = True
        try:
            self._pipe.send(unit)
        except OSError as error:
            raise _Lost(self._end()) from error
        found = self._answer(deadline)
        assert isinstance(found, Batch)
        return found

    def _answer(self, deadline: float | None) -> Any:
        late = threading.Event()
        timer = threading.Timer(deadline or 0, self._too_late, (late,))  # a worker may hang in the middle of a send
        timer.daemon = True
        if deadline is not None:
            timer.start()
        try:
            connection.wait([self._pipe, self.process.sentinel])
            found = self._pipe.recv()
        except (EOFError, OSError) as error:  # a tensor comes through the worker's shared memory, while it lives
            end = f"took longer than the deadline of {deadline:g} s" if late.is_set() else self._end()
            raise _Lost(end) from error
        finally:
            timer.cancel()
        if isinstance(found, Exception):
            raise found
        return found

    def _too_late(self, late: threading.Event) -> None:
        late.set()
        self.process.kill()

    def _end(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        return f"ended by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"

    def kill(self) -> None:
        """End it now."""
        self.process.kill()
        self.process.join()
        self._pipe.close()


class Pool:
    """Several workers, each started when it is first needed; `submit` hands a group to the next idle one."""

    def __init__(self, start: Start, workers: int, deadline: float | None = None) -> None:
        """deadline: seconds that a group may take, None for no limit."""
        self._start, self._deadline = start, deadline
        self._closed, self._lock = False, threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[Future[Batch], WorkUnit] | None] = queue.SimpleQueue()
        self._all: set[_Worker] = set()
        self._threads = [threading.Thread(target=self._follow, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)  # before multiprocessing's own, which would wait for workers

    def submit(self, unit: WorkUnit) -> Future[Batch]:
        """A group's batch, in time. Raises WorkerLostError where its worker is lost MOST_LOSSES times in a row."""
        future: Future[Batch] = Future()
        self._jobs.put((future, unit))
        return future

    def shrink(self, memory: MemoryPlan) -> None:
        """Start further workers with this plan."""
        self._start = replace(self._start, memory=memory)

    def close(self) -> None:
        """End all workers now, whatever they are at."""
        with self._lock:
            self._closed = True
            for worker in self._all:
                worker.process.kill()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        for worker in self._all:
            worker.kill()
        atexit.unregister(self.close)

    def _follow(self) -> None:
        """A thread's life: one worker after another, one group at a time."""
        worker: _Worker | None = None
        while (job := self._jobs.get()) is not None:
            try:
                worker = self._drawn(worker, *job)
            except BaseException as error:
                worker = None
                job[0].set_exception(error)
            del job

    def _drawn(self, worker: _Worker | None, future: Future[Batch], unit: WorkUnit) -> _Worker:
        """Answer a job; returns the worker that did it."""
        for losses in range(1, MOST_LOSSES + 1):
            worker = worker or self._started()
            try:
                future.set_result(worker.draw(unit, self._deadline))
                return worker
            except _Lost as lost:
                how = f"group {unit.group}: worker process {worker.process.pid} {lost}"
            except BaseException:
                self._drop(worker)
                raise
            self._drop(worker)
            worker = None
            if losses < MOST_LOSSES and not self._closed:
                _log.warning("%s; another one draws the group again", how)
        raise WorkerLostError(
            f"{how}, and {MOST_LOSSES} in a row were lost over this group; every finished group is safe: where memory "
            "ran out use fewer --workers, where time did a longer --deadline, and run the same command again"
        )

    def _started(self) -> _Worker:
        with self._lock:  # none is started behind a close
            if self._closed:
                raise WorkerLostError("the workers were stopped")
            worker = _Worker(self._start)
            self._all.add(worker)
            return worker

    def _drop(self, worker: _Worker) -> None:
        with self._lock:
            self._all.discard(worker)
        worker.kill()
