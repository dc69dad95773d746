"""Readers of encoded images: what they have in common (reading ahead, damage), and the one on threads and torch."""

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthkd.dfkd.crops import Boxes, put
from synthkd.dfkd.decode import decode, decoder_name, stored_size
from synthkd.dfkd.feed import Pixels, ReadOptions, Request, Rows
from synthkd.engine.errors import SynthkdError
from synthkd.engine.workers import cores

_MOST_THREADS = 8
_SMALL = 96 * 96  # pixels of an image below which a second thread costs more than it decodes
_PROBED = 16  # images that are tried before one is found whose size can be read

_log = logging.getLogger("synthkd")


class Named(Protocol):
    """Samples by row."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def keys(self, rows: Rows) -> tuple[str, ...]:
        """Names of samples."""
        ...


class Encoded(Named, Protocol):
    """Image files by row; stores: decoded images that the readers of a set share."""

    image_format: str
    stores: dict[Any, Any]

    def where(self, row: int) -> str:
        """File and member, for messages."""
        ...

    def encoded(self, row: int) -> bytes:
        """File bytes; raises SynthkdError where they are damaged."""
        ...


@dataclass(frozen=True)
class Decoded:
    """pixels: uint8 [B,h,w,3], anything where an image is damaged; readable: bool [B], where none is."""

    pixels: Tensor
    readable: NDArray[np.bool_]


def common_size(source: Encoded) -> tuple[int, int]:
    """Stored height and width of the first readable image: of all, in a set that was drawn by one recipe."""
    last = SynthkdError("holds no image")
    for row in range(min(len(source), _PROBED)):
        try:
            return stored_size(source.encoded(row), source.where(row))
        except SynthkdError as error:
            last = error
    raise last


def thread_count(options: ReadOptions) -> int:
    """How many threads are to decode."""
    return options.threads or min(cores(), _MOST_THREADS)


def stand_ins(readable: NDArray[np.bool_]) -> Rows:
    """For each of [B] positions itself, or the next readable one, round the end; int64 [B].

    Raises SynthkdError where none is readable.
    """
    used, good = np.arange(len(readable)), np.flatnonzero(readable)
    if not len(good) and len(used):
        raise SynthkdError(f"none of {len(used)} images of a batch can be read; run `synthkd verify` on the set")
    bad = np.flatnonzero(~readable)
    used[bad] = good[np.searchsorted(good, bad) % max(len(good), 1)]
    return used


class AheadReader(ABC):
    """A reader that begins requests before earlier ones are done, and notes damaged images by key.

    name: dali or torch; decoder: package and version; size: height and width; damaged: key -> what is wrong with it;
    quiet: no warnings.
    """

    name: str
    decoder: str

    def __init__(self, source: Named, size: tuple[int, int], options: ReadOptions, ahead: int, threads: int) -> None:
        """ahead: requests begun beside the one that is waited for; threads of `pool`, which is None for one."""
        self.samples, self.size, self.options, self.ahead = source, size, options, ahead
        self.damaged: dict[str, str] = {}
        self.quiet = False
        self.pool = ThreadPoolExecutor(threads, "synthkd-read") if threads > 1 else None
        self.bad = np.zeros(len(source), np.bool_)

    @abstractmethod
    def begin(self, request: Request) -> Any:
        """Start a request; what comes back is for `finish`, in the same order."""

    @abstractmethod
    def finish(self, job: Any) -> Decoded:
        """Wait for it. Raises SynthkdError for a damaged image if strict."""

    def abandon(self) -> None:
        """Forget all requests that were begun and not finished."""
        return

    def close(self) -> None:
        """Give back threads and buffers."""
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def read(self, requests: Iterable[Request]) -> Iterator[Pixels]:
        """Pixels of each request, in order; see `feed.Reader`. One iterator of a reader at a time."""
        jobs: deque[Any] = deque()
        try:
            for request in requests:
                jobs.append(self.begin(request))
                if len(jobs) > self.ahead:
                    yield _with_stand_ins(self.finish(jobs.popleft()))
            while jobs:
                yield _with_stand_ins(self.finish(jobs.popleft()))
        except BaseException:  # an error, or the iterator was closed
            self.abandon()
            raise

    def note(self, row: int, reason: str) -> None:
        """An image cannot be read: a warning, once, or SynthkdError if strict."""
        if self.bad[row]:
            return
        if self.options.strict:
            raise SynthkdError(f"{reason} (damaged images are errors here: strict)")
        self.bad[row] = True
        self.damaged[self.samples.keys(np.array([row]))[0]] = reason
        if not self.quiet:
            _log.warning("%s; left out, %d so far", reason, len(self.damaged))

    def batch(self, count: int) -> Tensor:
        """Host memory for a batch, uint8 [B,h,w,3]; pinned where it goes to a GPU."""
        pinned = self.options.device.startswith("cuda") and torch.cuda.is_available()
        return torch.empty(count, *self.size, 3, dtype=torch.uint8, pin_memory=pinned)

    def placed(self, pixels: Tensor) -> Tensor:
        """The batch on the device that was asked for."""
        return pixels.to(self.options.device, non_blocking=True)


def _with_stand_ins(decoded: Decoded) -> Pixels:
    used = stand_ins(decoded.readable)
    pixels = decoded.pixels
    if not decoded.readable.all():
        pixels = pixels[torch.from_numpy(used).to(pixels.device)]
    return Pixels(pixels.permute(0, 3, 1, 2), used)


_Part = list[tuple[int, str]]  # positions of damaged images, and what is wrong with them


@dataclass(frozen=True)
class _Job:
    rows: Rows
    readable: NDArray[np.bool_]
    out: Tensor
    parts: list[_Part | Future[_Part]]


class TorchReader(AheadReader):
    """Decodes by simplejpeg or Pillow, on threads where images are large enough for them to pay."""

    name = "torch"

    def __init__(self, source: Encoded, size: tuple[int, int], options: ReadOptions) -> None:
        """Raises SynthkdError where none of a set's first images can be read."""
        self.source = source
        self.common = common_size(source)
        self.threads = thread_count(options) if self.common[0] * self.common[1] >= _SMALL else 1
        super().__init__(source, size, options, 2 if self.threads > 1 else 0, self.threads)
        self.decoder = decoder_name(source.image_format)

    def begin(self, request: Request) -> _Job:
        """Hand parts of a batch to the threads."""
        readable = ~self.bad[request.rows]
        out, good = self.batch(len(request.rows)), np.flatnonzero(readable)
        boxes, places = Boxes(request.views.box, self.common), out.numpy()
        parts: list[_Part | Future[_Part]] = []
        for some in np.array_split(good, self.threads):
            work = (request, boxes, places, some.tolist())
            parts.append(self.pool.submit(self._decode, *work) if self.pool else self._decode(*work))
        return _Job(request.rows, readable, out, parts)

    def finish(self, job: _Job) -> Decoded:
        """Wait for all parts, note what is damaged."""
        for part in [p.result() if isinstance(p, Future) else p for p in job.parts]:
            for position, reason in part:
                job.readable[position] = False
                self.note(int(job.rows[position]), reason)
        return Decoded(self.placed(job.out), job.readable)

    def _decode(self, request: Request, boxes: Boxes, out: NDArray[np.uint8], positions: list[int]) -> _Part:
        """Some positions of a batch, written to `out`."""
        damaged, flips = [], request.views.flip
        for i in positions:
            row = int(request.rows[i])
            try:
                pixels = decode(self.source.encoded(row), self.source.where(row), out[i])
                put(pixels, boxes.at(i, (pixels.shape[0], pixels.shape[1])), bool(flips[i]), out[i])
            except SynthkdError as error:
                damaged.append((i, str(error)))
        return damaged
