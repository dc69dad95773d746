"""Decoded images kept in memory or on the student's device: after the first epoch a batch is an index operation."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthkd.dfkd.crops import viewed
from synthkd.dfkd.data import LabelledImages
from synthkd.dfkd.decode import stored_size
from synthkd.dfkd.feed import Reader, ReadOptions, Request, Rows
from synthkd.dfkd.readers import AheadReader, Decoded, Encoded, thread_count
from synthkd.dfkd.views import Views
from synthkd.engine.errors import SynthkdError
from synthkd.engine.memory import free_memory

CACHES = ("auto", "memory", "device", "off")
_SHARE = 4  # a cache takes at most one part in this of what is free


@dataclass(frozen=True)
class Store:
    """Decoded images of a set: uint8 [N,H,W,3], and which rows of it are filled (bool [N])."""

    images: Tensor
    held: NDArray[np.bool_]

    @staticmethod
    def empty(count: int, size: tuple[int, int], device: str) -> "Store":
        """Raises SynthkdError where it does not fit."""
        try:
            images = torch.empty(count, *size, 3, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            need = f"{count * size[0] * size[1] * 3 / 2**30:.1f} GiB on {device}"
            raise SynthkdError(f"cache: the decoded set takes {need}, which is not free; choose cache 'off'") from error
        return Store(images, np.zeros(count, np.bool_))

    def put(self, rows: Rows, pixels: Tensor) -> None:
        """Fill some rows with uint8 [B,H,W,3]."""
        self.images[torch.from_numpy(rows).to(self.images.device)] = pixels.to(self.images.device)
        self.held[rows] = True

    def take(self, rows: Rows, pinned: bool) -> Tensor:
        """uint8 [B,H,W,3], fresh memory; pinned: of the kind that a GPU copies from without waiting."""
        index = torch.from_numpy(rows).to(self.images.device, non_blocking=True)
        shape = (len(rows), *self.images.shape[1:])
        if self.images.device.type != "cpu":
            return self.images[index]
        return torch.index_select(self.images, 0, index, out=torch.empty(shape, dtype=torch.uint8, pin_memory=pinned))


def cache_place(options: ReadOptions, count: int, size: tuple[int, int]) -> str:
    """The device that keeps a decoded set of `count` images of height x width, or "" for none.

    auto: the student's device, else host memory, where the set takes less than a quarter of what is free there.
    """
    if options.cache == "off":
        return ""
    if options.cache != "auto":
        return "cpu" if options.cache == "memory" else options.device
    need = count * size[0] * size[1] * 3
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for place in (options.device, "cpu"):
        free = free_memory(torch.device(place), ranks if place == "cpu" else 1)
        if free is not None and need < free // _SHARE:
            return place
    return ""


class StoreReader(AheadReader):
    """What readers of decoded images share: a batch is an index operation, crop, resize and mirror follow on it."""

    def __init__(self, source: Any, size: tuple[int, int], options: ReadOptions, ahead: int, store: Store) -> None:
        """store: at whatever size; where it is larger than `size` images are resized from it."""
        super().__init__(source, size, options, ahead, thread_count(options))
        self._store = store

    def gathered(self, request: Request, readable: NDArray[np.bool_]) -> Decoded:
        """A batch of rows that are held, where `readable` says so."""
        if not readable.any():
            return Decoded(self.placed(self.batch(len(readable))), readable)
        rows = np.where(readable, request.rows, request.rows[np.argmax(readable)])
        pinned = self.options.device.startswith("cuda") and torch.cuda.is_available()
        images = self.placed(self._store.take(rows, pinned))
        return Decoded(viewed(images, request.views, self.size, self.pool), readable)


@dataclass(frozen=True)
class _Job:
    """rows that `fill` brings, or a request that goes past the cache."""

    request: Request
    rows: Rows
    fill: Any = None
    past: Any = None


class CachedReader(StoreReader):
    """Another reader, asked once for each image; in host memory the same pixels as without a cache.

    On a GPU images are cropped and resized there, in float32: the pixels of a CPU's fixed point within 1.
    """

    def __init__(
        self,
        source: Encoded,
        inner: AheadReader,
        store: Store,
        size: tuple[int, int],
        options: ReadOptions,
        uncached: Callable[[], AheadReader] | None = None,
    ) -> None:
        """inner: reads whole images at the store's size; uncached: makes a reader for images stored at another one.

        Without `uncached` the store holds images at `size`, and requests are not to crop.
        """
        super().__init__(source, size, options, inner.ahead, store)
        self._files, self._inner, self._uncached = source, inner, uncached
        self._past: AheadReader | None = None
        self.name, self.decoder, self.damaged, self.bad = inner.name, inner.decoder, inner.damaged, inner.bad
        self._asked, self._other = np.zeros(len(source), np.bool_), np.zeros(len(source), np.bool_)

    def begin(self, request: Request) -> _Job:
        """Ask for what is not held and was not asked for."""
        if self._uncached is None and (request.views.box != np.array([0, 0, 1, 1], np.float32)).any():
            raise SynthkdError("reader: a crop of images that are kept at the size read; set ReadOptions.crops")
        rows = np.unique(request.rows)
        rows = rows[~(self._store.held[rows] | self._asked[rows] | self.bad[rows] | self._other[rows])]
        if self._uncached is not None:
            rows = self._of_common_size(rows)
            if self._other[request.rows].any():
                self._past = self._past or self._made_past()
                return _Job(request, rows[:0], past=self._past.begin(request))
        self._asked[rows] = True
        return _Job(request, rows, self._inner.begin(Request(rows, Views.plain(rows))) if len(rows) else None)

    def finish(self, job: _Job) -> Decoded:
        """Keep what was asked for; then all rows of the request are held, or damaged."""
        if job.past is not None:
            assert self._past is not None
            return self._past.finish(job.past)
        if job.fill is not None:
            decoded = self._inner.finish(job.fill)
            good = decoded.readable
            pixels = decoded.pixels if good.all() else decoded.pixels[torch.from_numpy(np.flatnonzero(good))]
            self._store.put(job.rows[good], pixels)
            self._asked[job.rows] = False
        return self.gathered(job.request, self._store.held[job.request.rows])

    def abandon(self) -> None:
        """Forget what was asked for."""
        self._asked[:] = False
        for reader in (self._inner, self._past):
            if reader is not None:
                reader.abandon()

    def close(self) -> None:
        """Close the readers beneath; the store stays with the set."""
        super().close()
        for reader in (self._inner, self._past):
            if reader is not None:
                reader.close()

    def _made_past(self) -> AheadReader:
        assert self._uncached is not None
        made = self._uncached()
        made.damaged, made.bad = self.damaged, self.bad
        return made

    def _of_common_size(self, rows: Rows) -> Rows:
        """Those stored at the store's size, or damaged; the others are marked."""
        common = tuple(self._store.images.shape[1:3])
        for row in rows.tolist():
            try:
                self._other[row] = stored_size(self._files.encoded(row), self._files.where(row)) != common
            except SynthkdError:  # the reader beneath says what is wrong with it
                continue
        return rows[~self._other[rows]]


class MemoryReader(StoreReader):
    """Of images that are in memory anyway."""

    name, decoder = "memory", "none"

    def __init__(self, source: "MemorySource", size: tuple[int, int], options: ReadOptions, store: Store) -> None:
        """store: all rows are held."""
        super().__init__(source, size, options, 0, store)

    def begin(self, request: Request) -> Request:
        """Nothing to wait for."""
        return request

    def finish(self, job: Request) -> Decoded:
        """The batch."""
        return self.gathered(job, np.ones(len(job.rows), np.bool_))


@dataclass
class MemorySource:
    """Labelled images in memory as a `Source`; a key is nine digits of the row."""

    data: LabelledImages
    labels: Rows = field(init=False)
    previews: NDArray[np.bool_] = field(init=False)
    classes: tuple[str, ...] = field(init=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        """The digest is over shape, pixels and labels."""
        marks = self.data.previews
        self.labels = self.data.labels.cpu().numpy().astype(np.int64)
        self.previews = np.zeros(len(self.data), np.bool_) if marks is None else marks.cpu().numpy()
        self.classes = self.data.classes
        found = hashlib.sha256(str(tuple(self.data.images.shape)).encode())
        for part in torch.split(self.data.images.cpu(), 1024):
            found.update(part.contiguous().numpy().data)
        found.update(self.labels.data)
        self.digest = found.hexdigest()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.labels)

    def keys(self, rows: Rows) -> tuple[str, ...]:
        """Their names."""
        return tuple(f"{row:09d}" for row in rows.tolist())

    def reader(self, size: tuple[int, int], options: ReadOptions) -> Reader:
        """A reader of these images at height x width; with cache "device" they are copied there."""
        images = self.data.images.permute(0, 2, 3, 1)
        place = options.device if options.cache == "device" else images.device
        return MemoryReader(self, size, options, Store(images.to(place), np.ones(len(self), np.bool_)))
