"""Who may write a store: notes in it that their owners keep changing (see `engine.lease`)."""

import contextlib
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from synthkd.engine.errors import SynthkdError
from synthkd.engine.lease import Lease
from synthkd.engine.rows import Part
from synthkd.engine.stores import Store
from synthkd.engine.watch import TRY_AGAIN, end_process

_PART_LOCK = re.compile(r"locks/(writer-\d{5,7}-of-\d{5,7})\.json")


class _Notes:
    """A store as `lease.Notes`, which knows OSError alone."""

    def __init__(self, store: Store) -> None:
        self._store = replace(store, tries=min(3, store.tries))

    def read(self, name: str) -> bytes | None:
        with _as_system_error():
            return self._store.read(f"locks/{name}.json")

    def create_exclusive(self, name: str, data: bytes) -> bool:
        with _as_system_error():
            return self._store.create_exclusive(f"locks/{name}.json", data)

    def replace(self, name: str, data: bytes) -> None:
        with _as_system_error():
            self._store.write(f"locks/{name}.json", data)

    def remove(self, name: str) -> None:
        with _as_system_error():
            self._store.remove(f"locks/{name}.json")


@contextlib.contextmanager
def _as_system_error() -> Iterator[None]:
    try:
        yield
    except SynthkdError as error:
        raise OSError(str(error)) from error


@contextlib.contextmanager
def store_lock(store: Store, part: Part | None = None, beat: float = 10.0) -> Iterator[None]:
    """Within it no other run writes this part of the store, or all of it, as far as its client makes files exclusively.

    The lock is a note that is rewritten every `beat` seconds; one that a dead run left is taken over after eight of
    them. Raises SynthkdError where another run lives; a run whose lock is taken over ends with exit code 75.
    """
    name = "writer" if part is None else f"writer-{part.name}"
    over = f"{store.url}: another run took the lock over; every published shard is safe"
    about = {"host": platform.node(), "pid": os.getpid()}
    lease = Lease(_Notes(store), name, about, lambda: end_process(TRY_AGAIN, over), beat)
    try:
        _free(store, lease, lease.take)
        for other in _others(store, part):  # after its own note: of two at once both may be refused, but never none
            seen = Lease(_Notes(store), other, about, beat=beat)
            _free(store, seen, seen.cleared)
        yield
    finally:
        with contextlib.suppress(OSError):
            lease.release()


def _others(store: Store, part: Part | None) -> list[str]:
    """The locks that a run may not meet: parts of a whole one, the whole one of a part."""
    if part is not None:
        return ["writer"]
    return [found[1] for name in store.names("locks/") if (found := _PART_LOCK.fullmatch(name))]


def _free(store: Store, lease: Lease, action: Callable[[], bool]) -> None:
    try:
        free = action()
    except OSError as error:
        raise SynthkdError(str(error)) from error
    if not free:
        owner = ascii(lease.owner.decode("utf-8", "replace"))[:120]
        raise SynthkdError(f"{store.url}: another run is writing there ({owner}); wait or choose another --out")
