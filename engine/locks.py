"""Who may write where: locks that the system releases when their owner ends, however it ends."""

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from synthkd.engine.errors import SynthkdError
from synthkd.engine.rows import Part, shard_name
from synthkd.engine.untrusted import refuse_links

LOCK, CLAIM = ".lock", ".lock-claim"


@contextlib.contextmanager
def folder_lock(folder: Path, part: Part | None = None) -> Iterator[None]:
    """The one writer of a folder; with a part: one writer of it, beside those of other parts.

    Raises SynthkdError, which names the owner, while another run holds it.
    """
    refuse_links(folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_held(folder, LOCK, shared=part is not None))
        if part is not None:
            stack.enter_context(_held(folder, f"{LOCK}-{part.name}"))
        yield


@contextlib.contextmanager
def claim_lock(folder: Path) -> Iterator[None]:
    """What parts do one after the other: writing the manifest, and what is settled before the first image. Waits."""
    with _held(folder, CLAIM, wait=True):
        yield


@contextlib.contextmanager
def settle_lock(folder: Path, part: Part | None = None) -> Iterator[None]:
    """For what a set settles before its images: its one writer, or one part at a time while others wait."""
    with folder_lock(folder, part), claim_lock(folder):
        yield


@contextlib.contextmanager
def shard_lock(folder: Path, shard: int) -> Iterator[None]:
    """The one writer of a shard's files, whatever run it belongs to; the lock's file goes with it."""
    path = folder / f"{shard_name(shard)}.lock"
    while True:
        with _held(folder, path.name) as descriptor:
            try:  # its last owner may have removed the file while we opened it
                current = os.path.samestat(os.fstat(descriptor), path.stat())
            except FileNotFoundError:
                current = False
            if not current:
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def _held(folder: Path, name: str, shared: bool = False, wait: bool = False) -> Iterator[int]:
    import fcntl

    path = folder / name
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(descriptor, how)
        except BlockingIOError as error:
            taken = f"{folder}: another run is writing there{_owner(path)}"
            raise SynthkdError(f"{taken}; wait or choose another --out") from error
        if not shared:
            _sign(descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


def _sign(descriptor: int) -> None:
    """Write who holds a lock, and since when, into it."""
    note = {"host": platform.node(), "pid": os.getpid(), "since": time.time()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(note).encode(), 0)


def _owner(path: Path) -> str:
    """Who holds a lock, in words; empty where it does not say."""
    try:
        note = json.loads(path.read_text())
        age = max(0.0, time.time() - float(note["since"]))
        return f" (process {int(note['pid'])} on {str(note['host'])[:80]}, for {age / 60:.0f} min)"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
