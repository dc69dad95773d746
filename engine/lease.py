"""A lock where the system has none: a note that its owner keeps changing; one that stands still is broken.

No clocks are compared. Who finds a note watches it on its own monotonic clock: one that changes has a living owner,
one that does not for several beats has none. One watcher alone breaks it: each makes a marker that only one can make.
"""

import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

BEAT = 5.0  # seconds between two changes
PATIENCE = 6  # beats without a change after which an owner is dead


class Notes(Protocol):
    """Where notes lie, by name: a folder, an object store."""

    def read(self, name: str) -> bytes | None:
        """A note's bytes; None where there is none."""
        ...

    def create_exclusive(self, name: str, data: bytes) -> bool:
        """Make a note; False where it is there already. Of several that try at once one succeeds."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Write a note as a whole."""
        ...

    def remove(self, name: str) -> None:
        """Nothing where there is none."""
        ...


class Lease:
    """The right to write, for as long as its note is kept changing.

    >>> lease = Lease(notes, "writer", {"host": "a", "pid": 1}, on_lost=stop)
    >>> if lease.take():  # False: `lease.owner` holds it, and lives
    ...     work(), lease.release()
    """

    def __init__(
        self, notes: Notes, name: str, about: Mapping[str, Any], on_lost: Callable[[], object] = lambda: None,
        beat: float | None = None, patience: int | None = None,
    ) -> None:  # fmt: skip
        """about: of the owner, plain values; on_lost: called once, by a thread, where another one took it over.

        beat: seconds, BEAT by default; patience: beats, PATIENCE by default; the same for all who share a note.
        """
        self.notes, self.name, self.lost, self.owner = notes, name, False, b""
        self._about, self._on_lost = dict(about), on_lost
        self._beat, self._patience = BEAT if beat is None else beat, PATIENCE if patience is None else patience
        self._token, self._count = secrets.token_hex(8), 0
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, wait: bool = False) -> bool:
        """Make or take over the note; False where its owner lives, unless `wait` waits for its end.

        Watching takes a beat where the owner lives, PATIENCE beats and two where it is dead.
        """
        while not self.notes.create_exclusive(self.name, self._content()):
            seen = self.notes.read(self.name)
            if seen is not None and self._broken(seen, self._content()):
                self._released.wait(2 * self._beat)  # an owner that only slept may have been about to write
                if self._ours():
                    break
            self.owner = self.notes.read(self.name) or b""
            if self.owner and not wait:
                return False
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()
        return True

    def cleared(self) -> bool:
        """Whether nobody holds the lease; a dead owner's note is removed."""
        while (seen := self.notes.read(self.name)) is not None:
            if not self._broken(seen, None):
                self.owner = self.notes.read(self.name) or b""
                if self.owner:
                    return False
        return True

    def release(self) -> None:
        """Give it back; nothing where it is another's by now."""
        self._released.set()
        if self._thread is not None:
            self._thread.join()
            if not self.lost and self._ours():
                self.notes.remove(self.name)

    def _content(self) -> bytes:
        return json.dumps({**self._about, "token": self._token, "count": self._count}, sort_keys=True).encode()

    def _ours(self) -> bool:
        return self._token.encode() in (self.notes.read(self.name) or b"")

    def _stands_still(self, seen: bytes) -> bool:
        """Whether a note is the same for all of the patience; many looks, since this process may be stopped too."""
        for _ in range(self._patience):
            time.sleep(self._beat)
            if self.notes.read(self.name) != seen:
                return False
        return True

    def _broken(self, seen: bytes, new: bytes | None) -> bool:
        """Put `new`, or nothing, in the place of a dead owner's note; False where that owner, or another one, lives.

        A marker is made for the very content that was seen; one left by a breaker that died counts for nothing after
        as long again, when the next one is tried for.
        """
        marks: list[str] = []
        while self._stands_still(seen):
            marks.append(f"{self.name}.broken-{hashlib.sha256(seen).hexdigest()[:16]}-{len(marks)}")
            if not self.notes.create_exclusive(marks[-1], self._token.encode()):
                continue
            try:
                if self.notes.read(self.name) != seen:
                    return False
                if new is None:
                    self.notes.remove(self.name)
                else:
                    self.notes.replace(self.name, new)
                return True
            finally:
                for mark in marks:
                    self.notes.remove(mark)
        return False

    def _keep(self) -> None:
        """Change the note every beat, until it is released or another one's."""
        missed = 0
        while not self._released.wait(self._beat):
            try:
                if not self._ours():
                    break
                self._count += 1
                self.notes.replace(self.name, self._content())
                missed = 0
            except OSError:
                missed += 1
                if missed >= self._patience:
                    break
        else:
            return
        self.lost = True
        self._on_lost()
