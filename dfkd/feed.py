"""What a student is fed: batches of a set, in an order and in views that are functions of (seed, position) alone.

A reader's whole state is therefore the number of the next step: a run that was killed goes on anywhere.
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from synthkd.dfkd.views import Views
from synthkd.engine import rng
from synthkd.engine.errors import SynthkdError

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """Which of `count` samples each step sees: a new permutation for every epoch, cut in batches across its ends.

    batch_size: images of a step over all ranks; rank r of `world` takes the r-th part of each batch.
    """

    count: int
    batch_size: int
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        """Raise SynthkdError where the ranks cannot have equal parts."""
        if self.batch_size % self.world:
            parts = f"batch_size {self.batch_size} over {self.world} processes"
            raise SynthkdError(f"distill: {parts} leaves a remainder; choose a multiple of {self.world}")

    def at(self, step: int) -> tuple[Rows, Rows]:
        """Rows of this rank's part of a step, and the epoch each belongs to: int64 [batch_size / world] twice."""
        part = self.batch_size // self.world
        first = step * self.batch_size + self.rank * part
        positions = np.arange(first, first + part)
        epochs, offsets = np.divmod(positions, self.count)
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = _permutation(self.seed, int(epoch), self.count)[offsets[here]]
        return rows, epochs


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> Rows:
    return rng.permutation(seed, epoch, "order of training", count)


@dataclass(frozen=True)
class Request:
    """Images to read: their rows, and the views whose crop and flip are to be made."""

    rows: Rows
    views: Views


@dataclass(frozen=True)
class Pixels:
    """What was read: uint8 [B,3,h,w] in channels_last memory, and for each position which of the request's it holds.

    used: int64 [B], usually 0..B-1; a damaged image's place is taken by the next readable one of the request.
    """

    images: Tensor
    used: Rows


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How a set is read; nothing of it changes what is read, but for a decoder's last bit.

    reader: dali, torch, or auto, the faster one here; cache: decoded images kept in memory or on the student's device,
    auto where they fit, off; threads that decode (0: as many as there are cores, eight at most); strict: a damaged
    image is an error, not a warning; device: where batches are to be; crops: whether requests may crop (without,
    images can be kept at the size that is read).
    """

    reader: str = "auto"
    cache: str = "auto"
    threads: int = 0
    strict: bool = False
    device: str = "cpu"
    crops: bool = True


class Source(Protocol):
    """Labelled images, by row: what an `Order` puts in order and a `Reader` reads.

    labels: int64 [N]; previews: bool [N], which rows are previews; classes: names in label order; digest: of the set,
    for checkpoints and stored labels.
    """

    labels: Rows
    previews: NDArray[np.bool_]
    classes: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def keys(self, rows: Rows) -> tuple[str, ...]:
        """Their names."""
        ...

    def reader(self, size: tuple[int, int], options: ReadOptions) -> "Reader":
        """A reader of these images at height x width."""
        ...


class Reader(Protocol):
    """Reads images of a set in any order, crops, mirrors and resizes them to `size` (height, width)."""

    name: str
    decoder: str
    size: tuple[int, int]
    damaged: dict[str, str]

    def read(self, requests: Iterable[Request]) -> Iterator[Pixels]:
        """Pixels of each request, in order; requests may be taken ahead. Raises SynthkdError for damage if strict."""
        ...

    def close(self) -> None:
        """Give back what the reader holds."""
        ...


class Feed(Protocol):
    """Where the training loop gets its batches from.

    waited: seconds in which the student had nothing to do.
    """

    waited: float

    def batches(self, start: int, stop: int) -> Generator["Batch"]:
        """Batches of steps [start, stop), in order, on the student's device."""
        ...

    def learned(self, batch: "Batch", student_logits: Tensor, teacher_logits: Tensor) -> None:
        """What both networks said of a batch, [B,K] each, after its step; without a wait."""
        ...

    def terms(self) -> dict[str, float]:
        """What it measured of itself since it was last asked, for the log: means by name."""
        ...

    def state(self) -> dict[str, Tensor]:
        """All that the batches to come hang on beside their step, by name, once a step is done; see `load`."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a state; raises KeyError, ValueError or RuntimeError for another feed's."""
        ...


class Unmoved:
    """The part of a Feed whose batches do not hang on what the student makes of them: it learns and keeps nothing."""

    def learned(self, batch: "Batch", student_logits: Tensor, teacher_logits: Tensor) -> None:
        """Nothing."""

    def terms(self) -> dict[str, float]:
        """None."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Batch:
    """What one step of a student sees.

    images: uint8 [B,3,h,w], an NCHW view of channels_last memory, cropped and mirrored; partners: the same, of what
    they are blended with, or None where none is; labels, partner_labels: int64 [B], of both; rows: int64 [B] in the
    set; keys: their names;
    views: what else `views.looks` is to do; logits: float [B,K], the teacher's of exactly these views where they
    are stored; masks: int64 [B,h,w], label maps of dense tasks, cropped, mirrored and turned as the images are.
    """

    step: int
    images: Tensor
    labels: Tensor
    partner_labels: Tensor
    rows: Rows
    keys: tuple[str, ...]
    views: Views
    partners: Tensor | None = None
    logits: Tensor | None = None
    masks: Tensor | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)
