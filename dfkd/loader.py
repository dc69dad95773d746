"""Requests -> batches, a few steps ahead of the student, in a thread that knows how long the student waited."""

import queue
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from synthkd.dfkd.feed import Batch, Order, Reader, Request, Source, Unmoved
from synthkd.dfkd.sight import Asked, Labels, Sight, ask, batch_of

AHEAD = 3  # batches that wait for the student


class Loader(Unmoved):
    """Iterates over the batches of steps [start, stop), read and copied to the device ahead of time."""

    def __init__(
        self,
        source: Source,
        reader: Reader,
        order: Order,
        sight: Sight,
        device: torch.device,
        stored: Labels | None = None,
    ) -> None:
        """stored: logits to hand out with the batches."""
        self.source, self.reader, self.order, self.sight, self.stored = source, reader, order, sight, stored
        self.device = device
        self.waited = 0.0  # seconds in which the student had nothing to do

    def batches(self, start: int, stop: int) -> Generator[Batch]:
        """Batches in order; closing the generator ends the thread."""
        waiting: queue.Queue[Any] = queue.Queue(AHEAD)
        ended = threading.Event()
        thread = threading.Thread(target=self._fill, args=(start, stop, waiting, ended), daemon=True)
        thread.start()
        try:
            for _ in range(start, stop):
                began = time.perf_counter()
                found = waiting.get()
                self.waited += time.perf_counter() - began
                if isinstance(found, BaseException):
                    raise found
                batch, ready = found
                yield _arrived(batch, ready)
        finally:
            ended.set()
            while thread.is_alive():
                _drain(waiting)
                thread.join(0.02)

    def _fill(self, start: int, stop: int, waiting: "queue.Queue[Any]", ended: threading.Event) -> None:
        try:
            with _apart(self.device):
                for batch in self._read(start, stop, ended):
                    _put(waiting, _sent(batch, self.device), ended)
                    if ended.is_set():
                        return
        except BaseException as error:
            _put(waiting, error, ended)

    def _read(self, start: int, stop: int, ended: threading.Event) -> Iterator[Batch]:
        under_way: list[Asked] = []

        def requests() -> Iterator[Request]:
            for step in range(start, stop):
                if ended.is_set():
                    return
                under_way.append(ask(self.order, self.sight, step))
                yield under_way[-1].request

        for pixels in self.reader.read(requests()):
            yield batch_of(self.source, under_way.pop(0), pixels, self.stored)


def _put(waiting: "queue.Queue[Any]", item: Any, ended: threading.Event) -> None:
    while not ended.is_set():
        try:
            waiting.put(item, timeout=0.1)
            return
        except queue.Full:
            continue


def _drain(waiting: "queue.Queue[Any]") -> None:
    while True:
        try:
            waiting.get_nowait()
        except queue.Empty:
            return


_TENSORS = ("images", "labels", "partner_labels", "partners", "logits", "masks")


def _sent(batch: Batch, device: torch.device) -> tuple[Batch, Any]:
    """The batch on its device; on a GPU the event says when it is there."""
    tensors: dict[str, Any] = {name: value for name in _TENSORS if (value := getattr(batch, name)) is not None}
    if device.type != "cuda":
        return batch, None
    moved: dict[str, Any] = {n: _pinned(v).to(device, non_blocking=True) for n, v in tensors.items()}
    ready: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    ready.record()
    return replace(batch, **moved), ready


def _pinned(value: Tensor) -> Tensor:
    return value if value.is_cuda else value.pin_memory()


_streams: dict[torch.device, Any] = {}


def _apart(device: torch.device) -> AbstractContextManager[Any]:
    """On a GPU a stream of its own for reading and copying, beside the student's."""
    if device.type != "cuda":
        return nullcontext()
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return torch.cuda.stream(_streams[device])


def _arrived(batch: Batch, ready: Any) -> Batch:
    """The batch, once the current stream waits for its copy."""
    if ready is not None:
        current = torch.cuda.current_stream()
        current.wait_event(ready)
        for name in _TENSORS:
            if (value := getattr(batch, name)) is not None:
                value.record_stream(current)
    return batch
