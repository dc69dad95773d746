"""Groups on their way from a GPU: page-locked buffers that are filled on a stream of their own."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from synthkd.engine.batch import Batch

_ALIGN = 64  # bytes; every tensor in a buffer begins on such a boundary


class Held:
    """A batch in host memory: one that was there already."""

    def __init__(self, batch: Batch) -> None:
        """batch: on the host."""
        self._batch: Batch | None = batch

    def batch(self) -> Batch:
        """The batch, once it is there; its tensors are good until `release`."""
        assert self._batch is not None
        return self._batch

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Where work on tensors that stayed on the device is queued."""
        yield

    def release(self) -> None:
        """Give the memory back."""
        self._batch = None


@dataclass
class Slot:
    """A page-locked buffer, made with the first group and made anew only for a larger one."""

    buffer: Tensor | None = None

    def room(self, size: int, pin: bool) -> Tensor:
        """uint8 [>= size]."""
        if self.buffer is None or len(self.buffer) < size:
            self.buffer = None  # before the new one is there
            self.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
        return self.buffer


class _Copied(Held):
    """A batch whose copy is under way; what it is copied from lives until it is there."""

    def __init__(self, ring: "PinnedRing", slot: Slot, source: Batch, copy: Batch, event: Any) -> None:
        super().__init__(copy)
        self._ring, self._slot, self._event = ring, slot, event
        self._source: Batch | None = source

    def batch(self) -> Batch:
        """Wait for the copy, in the calling thread alone."""
        self._event.synchronize()
        self._source = None
        return super().batch()

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """The ring's own stream, so that an encoder on the device stands beside the drawing, not in it."""
        with self._ring.cuda.stream(self._ring.stream):
            yield

    def release(self) -> None:
        """Hand the buffer to the next group."""
        super().release()
        self._ring.free(self._slot)


class PinnedRing:
    """`hold(batch)` starts the copy of a batch to the host and returns at once; a batch on the host is kept as it is.

    At most `slots` batches are held at a time, which the caller sees to. images: whether pixels are copied too.
    """

    def __init__(self, slots: int, images: bool = True, cuda: Any = torch.cuda, pin: bool = True) -> None:
        """cuda: where streams and events come from; pin: whether buffers are page-locked."""
        self.cuda, self._images, self._pin = cuda, images, pin
        self.stream: Any = None
        self._lock, self._free = threading.Lock(), [Slot() for _ in range(slots)]

    def free(self, slot: Slot) -> None:
        """Take a slot back."""
        with self._lock:
            self._free.append(slot)

    def hold(self, batch: Batch) -> Held:
        """A batch as it will be on the host."""
        if batch.images.device.type == "cpu":
            return Held(batch)
        return self._copied(batch)

    def _copied(self, batch: Batch) -> Held:
        device = batch.images.device
        if self.stream is None:
            self.stream = self.cuda.Stream(device=device)
        with self._lock:
            slot = self._free.pop()
        sources, rebuild = _tensors(batch, self._images)
        self.stream.wait_stream(self.cuda.current_stream(device))
        with self.cuda.stream(self.stream):
            copies = _copy(sources, slot, self._pin)
            event = self.cuda.Event(blocking=True)  # the thread that waits sleeps
            event.record(self.stream)
        return _Copied(self, slot, batch, rebuild(copies), event)


def _copy(sources: list[Tensor], slot: Slot, pin: bool) -> list[Tensor]:
    """Queue the copy of tensors into one buffer; pixels keep their channels_last memory."""
    stored = [_stored(x) for x in sources]
    sizes = [-(-x.nbytes // _ALIGN) * _ALIGN for x, _ in stored]
    room, copies, start = slot.room(sum(sizes), pin), [], 0
    for (x, turned), size in zip(stored, sizes, strict=True):
        place = room[start : start + x.nbytes].view(x.dtype).view(x.shape)
        place.copy_(x, non_blocking=True)
        copies.append(place.permute(0, 3, 1, 2) if turned else place)
        start += size
    return copies


def _stored(x: Tensor) -> tuple[Tensor, bool]:
    """The tensor in the order of its memory, and whether that is [B,H,W,C] of a channels_last [B,C,H,W]."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1), True
    return x.contiguous(), False


def _tensors(batch: Batch, images: bool) -> tuple[list[Tensor], Callable[[list[Tensor]], Batch]]:
    """The tensors of a batch, and a function that puts others in their places."""
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    def rebuild(copies: list[Tensor]) -> Batch:
        rest = iter(copies)
        return _with_tensors(batch, lambda _: next(rest), images)

    _with_tensors(batch, note, images)
    return found, rebuild


def _with_tensors(batch: Batch, change: Callable[[Tensor], Tensor], images: bool) -> Batch:
    """A batch with every tensor changed, in a fixed order; without `images` all but the pixels."""

    def changed(shown: Any) -> dict[str, Any]:
        notes = {name: change(note) for name, note in shown.notes.items()}
        pixels = {"images": change(shown.images)} if images else {}
        return {**pixels, "targets": change(shown.targets), "notes": notes}

    previews = tuple(replace(preview, **changed(preview)) for preview in batch.previews)
    return replace(batch, labels=change(batch.labels), previews=previews, **changed(batch))
