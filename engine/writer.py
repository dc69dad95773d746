"""Writing beside the drawing: a ring of groups under way, threads that encode, one thread that appends in order.

The drawing thread hands a group over and draws the next one; it waits only while the ring is full. From hand-over until
a group is safe on disk its pixels and files take one slot, so memory is that of `ring` groups, however slow the disk.
"""

import contextlib
import itertools
import json
import logging
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from synthkd.engine.batch import Batch, SampleStream
from synthkd.engine.encoders import PILLOW, Encoder, encoder_for
from synthkd.engine.encoding import Draft, EncodedGroup, draft_group
from synthkd.engine.environment import environment_key
from synthkd.engine.errors import SynthkdError, WorkerLostError
from synthkd.engine.pinned import Held, PinnedRing
from synthkd.engine.plan import WorkUnit
from synthkd.engine.workers import cores

MOST_ENCODERS, RUNS = 8, "runs.jsonl"
_log = logging.getLogger("synthkd")


@dataclass(frozen=True)
class Writing:
    """How groups become files; none of it but the encoder changes a byte.

    encoder: see `encoder_for`; threads: that encode, None for the default of the device; ring: groups that may be
    drawn and not yet safe on disk. Raises SynthkdError where one of them is out of its range.
    """

    encoder: str = "auto"
    threads: int | None = None
    ring: int = 3

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.threads is not None and not 1 <= self.threads <= 256:
            raise SynthkdError(f"--encoders {self.threads}: expected threads that encode, 1 to 256")
        if not 1 <= self.ring <= 1024:
            raise SynthkdError(f"ring is {self.ring}; expected groups under way, 1 to 1024")

    def threads_for(self, device: str) -> int:
        """On a CPU one, since drawing takes the cores; on a GPU one per core, eight at most."""
        return self.threads or (min(cores(), MOST_ENCODERS) if device == "cuda" else 1)


@dataclass(frozen=True)
class WriteSummary:
    """What writing did: samples drawn by it, samples in the set now, and whether it was stopped.

    Here and in the index a preview is no sample of its own. Seconds: `seconds` by the clock, of them `drawing` in the
    stream and `stalled` waiting for a slot of the ring or for the last groups to be safe; beside them `writing` of the
    appending thread and `encoding` of all encoder threads together. bytes: of images and json that were encoded;
    environment: key of the newest group, "" where none was drawn.
    """

    drawn: int
    present: int
    stopped: bool
    seconds: float = 0.0
    drawing: float = 0.0
    stalled: float = 0.0
    encoding: float = 0.0
    writing: float = 0.0
    bytes: int = 0
    environment: str = ""

    @property
    def images_per_second(self) -> float:
        """Drawn and safe on disk, by the clock."""
        return self.drawn / self.seconds if self.seconds else 0.0

    @property
    def stall_percent(self) -> float:
        """Share of the time in which the drawing waited for the writing."""
        return 100 * self.stalled / self.seconds if self.seconds else 0.0

    def then(self, later: "WriteSummary") -> "WriteSummary":
        """The sum of this and what was written after it."""
        names = ("drawn", "present", "seconds", "drawing", "stalled", "encoding", "writing", "bytes")
        sums = {name: getattr(self, name) + getattr(later, name) for name in names}
        return WriteSummary(**sums, stopped=later.stopped, environment=later.environment or self.environment)


class GroupWriter:
    """`with GroupWriter(...) as writer: writer.put(batch)`: groups are encoded and appended in the order of `put`.

    Leaving the block waits until every group is safe. An error in a thread is raised by the next `put` or on leaving,
    and nothing is appended after it. When the block ends by an interrupt, the group that is being appended is
    finished and the rest is dropped; by any other error, all groups are finished first. No thread is left behind.
    """

    def __init__(
        self,
        append: Callable[[EncodedGroup], int],
        draft: Callable[[Batch], Draft],
        encoder: Encoder = PILLOW,
        threads: int = 1,
        ring: int = 3,
        told: Callable[[int], None] = lambda _: None,
    ) -> None:
        """append: makes a group safe, returns how many samples were new, which `told` hears; both in one thread."""
        self._append, self._draft, self._encoder, self._told = append, draft, encoder, told
        self._ring, self._threads = ring, 1 if encoder.on_device else threads
        self._pinned = PinnedRing(ring, images=not encoder.on_device)
        self._encoders = ThreadPoolExecutor(self._threads, "synthkd-encoder")
        self._appender = threading.Thread(target=self._run, name="synthkd-appender")
        self._queue: queue.SimpleQueue[Future[_Parts] | None] = queue.SimpleQueue()
        self._change = threading.Condition()  # guards what follows
        self._under_way = 0
        self._error: BaseException | None = None
        self._dropping = False
        self.tally = WriteSummary(0, 0, False)
        self.environment: Mapping[str, Any] = {}  # of the newest group

    def __enter__(self) -> "GroupWriter":
        """Start the appending thread; encoders start with the first group."""
        self._appender.start()
        return self

    def put(self, batch: Batch) -> None:
        """Hand a group over; waits while the ring is full, raises what a thread has raised."""
        started = time.monotonic()
        with self._change:
            while self._under_way >= self._ring and self._error is None:
                self._change.wait()
            self._raise()
            self._under_way += 1
        self._add(stalled=time.monotonic() - started)
        self._queue.put(self._encoders.submit(self._split, self._pinned.hold(batch)))

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """End the threads; raises what they raised where the block itself did not."""
        started = time.monotonic()
        try:
            if kind is not None and not issubclass(kind, Exception):
                self._drop()
            self._queue.put(None)
            self._appender.join()
        except BaseException:  # an interrupt of the wait
            self._drop()
            raise
        finally:
            self._appender.join()
            self._encoders.shutdown(wait=True, cancel_futures=True)
        self._add(stalled=time.monotonic() - started)
        if kind is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _drop(self) -> None:
        """Leave alone what is not being appended."""
        self._dropping = True
        self._encoders.shutdown(wait=False, cancel_futures=True)
        self._queue.put(None)

    def _add(self, **more: float) -> None:
        with self._change:
            self.tally = replace(self.tally, **{name: getattr(self.tally, name) + n for name, n in more.items()})

    def _split(self, held: Held) -> "_Parts":
        """In an encoder thread: wait for the copy, cut the group into one part a thread."""
        batch, started = held.batch(), time.monotonic()
        with held.on_stream():
            draft = self._draft(batch)
        count = len(draft.batch.ids)
        size = max(1, -(-count // self._threads))
        parts = [range(first, min(first + size, count)) for first in range(0, count, size)]
        files = [self._encoders.submit(self._encode, draft, samples, held) for samples in parts]
        self._add(encoding=time.monotonic() - started)
        return _Parts(held, draft, files)

    def _encode(self, draft: Draft, samples: range, held: Held) -> list[tuple[str, bytes]]:
        started = time.monotonic()
        with held.on_stream():
            files = draft.encode(samples, self._encoder)
        self._add(encoding=time.monotonic() - started)
        return files

    def _run(self) -> None:
        """The appending thread: groups in order until None; after an error nothing more is appended."""
        while (future := self._queue.get()) is not None:
            if self._error is None and not self._dropping:
                self._finish(future)
            del future

    def _finish(self, future: "Future[_Parts]") -> None:
        try:
            parts = future.result()
            group = parts.draft.finish([file for part in parts.files for file in part.result()])
            started = time.monotonic()
            new = self._append(group)
            self._add(drawn=new, writing=time.monotonic() - started, bytes=sum(len(data) for _, data in group.members))
            self.environment = group.environment
            parts.held.release()
            with self._change:
                self._under_way -= 1
                self._change.notify_all()
            self._told(new)
        except BaseException as error:
            with self._change:
                self._error = self._error or (None if self._dropping else error)
                self._change.notify_all()


@dataclass(frozen=True)
class _Parts:
    """A group that is being encoded."""

    held: Held
    draft: Draft
    files: list[Future[list[tuple[str, bytes]]]]


def write_groups(
    stream: SampleStream,
    units: Iterable[WorkUnit],
    append: Callable[[EncodedGroup], int],
    writing: Writing | None = None,
    on_batch: Callable[[int], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> WriteSummary:
    """Draw units and append them in their order, the writing beside the drawing; `present` is left 0.

    on_batch: called in the appending thread with the number of new samples once a group is safe; should_stop: asked in
    this thread after each group drawn, and once more when all is safe. Groups drawn before a stop are written.
    """
    how, started, drawing, stopped, todo = writing or Writing(), time.monotonic(), 0.0, False, iter(units)
    first = next(todo, None)
    if first is None:
        return WriteSummary(0, 0, False)
    writer = _writer(stream, append, how, on_batch)
    try:
        with writer, _closed(stream.draw(itertools.chain([first], todo))) as batches:
            while not stopped:
                asked = time.monotonic()
                batch = next(batches, None)
                drawing += time.monotonic() - asked
                if batch is None:
                    break
                writer.put(batch)
                del batch  # its slot holds it now
                stopped = should_stop()
    except WorkerLostError:
        if not should_stop():
            raise
        stopped = True  # a stop that reached the workers too
    tally, seconds, stopped = writer.tally, time.monotonic() - started, stopped or should_stop()
    key = environment_key(dict(writer.environment)) if tally.drawn else ""
    return replace(tally, drawing=drawing, seconds=seconds, stopped=stopped, environment=key)


def _writer(
    stream: SampleStream, append: Callable[[EncodedGroup], int], how: Writing, told: Callable[[int], None]
) -> GroupWriter:
    identity, environment = stream.identity, stream.environment  # here: threads are those of the drawing thread
    device = str(environment.get("device", "")).partition(":")[0]
    encoder = encoder_for(how.encoder, identity["recipe"]["image_format"], device)

    def draft(batch: Batch) -> Draft:
        return draft_group(batch, identity, environment, encoder)

    return GroupWriter(append, draft, encoder, how.threads_for(device), how.ring, told)


@contextlib.contextmanager
def _closed(batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """An iterator that is closed at the end where it can be, so that processes behind it end."""
    try:
        yield batches
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()


def note_run(folder: Path, summary: WriteSummary, writing: Writing | None = None) -> None:
    """Add one line on a run that drew something to the set's `runs.jsonl`: counts, rates, memory, environment key.

    It is for people and plots; nothing reads it, and where it cannot be written a warning is all.
    """
    if summary.drawn == 0:
        return
    row = {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(summary).items()}
    row |= {"encoder": (writing or Writing()).encoder, "stall_percent": round(summary.stall_percent, 3)}
    row |= {"images_per_second": round(summary.images_per_second, 3), **_peak_memory()}
    line = (json.dumps(row, sort_keys=True) + "\n").encode()
    try:
        with (folder / RUNS).open("ab+", buffering=0) as f:  # one write, so that lines of parallel runs do not mix
            end = f.seek(0, os.SEEK_END)
            f.seek(max(0, end - 1))
            torn = end > 0 and f.read(1) != b"\n"
            f.write(b"\n" + line if torn else line)
    except OSError as error:
        _log.warning("%s: %s; the set itself is safe", folder / RUNS, error.strerror)


def _peak_memory() -> dict[str, int]:
    """Bytes, the most so far: resident of this process and of its largest ended worker, allocated on the GPU."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    who = {"peak_memory": resource.RUSAGE_SELF, "peak_worker_memory": resource.RUSAGE_CHILDREN}
    found = {name: resource.getrusage(number).ru_maxrss * unit for name, number in who.items()}
    if torch.cuda.is_available():
        found["peak_device_memory"] = torch.cuda.max_memory_allocated()
    return found
