"""Who may write where: locks that the system releases when their owner ends, however it ends.

Where a file system has no locks a lease takes their place (see `engine.lease`): files named `LOCK.lease`.
"""

import contextlib
import errno
import json
import os
import platform
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthkd.engine.errors import HeldError
from synthkd.engine.lease import Lease
from synthkd.engine.rows import Part, shard_name
from synthkd.engine.untrusted import refuse_links
from synthkd.engine.watch import TRY_AGAIN, end_process

LOCK, CLAIM = ".lock", ".lock-claim"
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS)
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_HEX = r"\.[0-9a-f]{8}\.tmp"
_STRAY = {  # what a killed run leaves of a file that it was replacing, or fetching, by folder
    "": r"(manifest\.json|index(-\d+-of-\d+)?\.jsonl|shard-\d{6,}\.tar\.journal)\.tmp|shard-\d{6,}\.tar\.fresh"
    rf"|shard-\d{{6,}}\.arriving({_HEX})?|shard-\d{{6,}}\.tar{_HEX}",
    "rows": rf"shard-\d{{6,}}\.(jsonl\.tmp|arriving({_HEX})?)",
    "environments": rf"[0-9a-f]{{16}}\.json{_HEX}",
}
_DESCRIBED = rf"(index\.parquet|README\.md){_HEX}"  # written when the lock is let go of: only old ones are strays
_OLD = 3600.0  # seconds, by the clock of the file system


@contextlib.contextmanager
def folder_lock(folder: Path, part: Part | None = None) -> Iterator[None]:
    """The one writer of a folder; with a part: one writer of it, beside those of other parts.

    The one writer removes what a killed run left half written. Raises SynthkdError, which names the owner, while
    another run holds it.
    """
    refuse_links(folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_held(folder, LOCK, shared=part is not None))
        if part is not None:
            stack.enter_context(_held(folder, f"{LOCK}-{part.name}"))
        else:
            _sweep(folder)
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
                current = descriptor is None or os.path.samestat(os.fstat(descriptor), path.stat())
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
def _held(folder: Path, name: str, shared: bool = False, wait: bool = False) -> Iterator[int | None]:
    """The locked file's descriptor; None where a lease holds in its place."""
    path = folder / name
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        locked = _locked(descriptor, shared, wait)
        if locked is None:
            with _leased(folder, name, shared, wait):
                yield None
            return
        if not locked:
            raise _taken(folder, _read(path) or _sharer(folder, name))
        _sign(descriptor, b"" if shared else json.dumps(owner_note()).encode())  # of those that share none is the owner
        try:
            yield descriptor
        finally:
            if not shared:
                _sign(descriptor, b"")
    finally:
        os.close(descriptor)


def _locked(descriptor: int, shared: bool, wait: bool) -> bool | None:
    """Lock an open file; False where another one holds it, None where its file system has no locks."""
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


@contextlib.contextmanager
def _leased(folder: Path, name: str, shared: bool, wait: bool) -> Iterator[None]:
    """The same by leases: one for the only writer, one each for those that share.

    Each makes its own before it looks at the others', so that of two at once both may be refused, but never none.
    """
    notes, about = FolderNotes(folder), owner_note()
    alone = f"{name}.lease"
    share = f"{name}.share-{secrets.token_hex(8)}.lease"
    lost = f"{folder}: another run took its lock over while this one stood still; the same command goes on from here"
    lease = Lease(notes, share if shared else alone, about, on_lost=lambda: end_process(TRY_AGAIN, lost))
    if not lease.take(wait):
        raise _taken(folder, lease.owner)
    try:
        others = [alone] if shared else [path.name for path in folder.glob(f"{name}.share-*.lease")]
        for other in others:
            seen = Lease(notes, other, about)
            if not seen.cleared():
                raise _taken(folder, seen.owner)
        yield
    finally:
        lease.release()


@dataclass(frozen=True)
class FolderNotes:
    """Notes of leases as files of a folder; see `lease.Notes`."""

    folder: Path

    def read(self, name: str) -> bytes | None:
        """A file's bytes."""
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def create_exclusive(self, name: str, data: bytes) -> bool:
        """A new file, by the system's exclusive creation."""
        try:
            with (self.folder / name).open("xb") as f:
                f.write(data)
        except FileExistsError:
            return False
        return True

    def replace(self, name: str, data: bytes) -> None:
        """Another file, renamed."""
        fresh = self.folder / f"{name}.{secrets.token_hex(4)}.tmp"
        fresh.write_bytes(data)
        fresh.replace(self.folder / name)

    def remove(self, name: str) -> None:
        """Its file."""
        (self.folder / name).unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove files that a killed run had not put in their place yet; only names that this package makes."""
    for inside, pattern in _STRAY.items():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            names = [entry.name for entry in os.scandir(folder / inside) if re.fullmatch(pattern, entry.name)]
            for name in names:
                (folder / inside / name).unlink(missing_ok=True)
    now = (folder / LOCK).stat().st_mtime  # just signed
    for entry in [entry for entry in os.scandir(folder) if re.fullmatch(_DESCRIBED, entry.name)]:
        with contextlib.suppress(FileNotFoundError):
            if now - entry.stat(follow_symlinks=False).st_mtime > _OLD:
                (folder / entry.name).unlink()


def owner_note() -> dict[str, Any]:
    """Who this process is, and when that is: by the wall clock, and by the machine's monotonic one since its start."""
    return {
        "host": platform.node(), "pid": os.getpid(), "started": _started(os.getpid()), "boot": _boot(),
        "since": time.time(), "monotonic": time.monotonic(),
    }  # fmt: skip


def is_owner(pid: int, boot: str, started: str) -> bool:
    """Whether a process number here is still the process that said this of itself (see `owner_note`)."""
    return boot == _boot() != "" and started == _started(pid) != ""


def owner_words(data: bytes) -> str:
    """Who holds a lock, in words; empty where its note does not say."""
    try:
        note = json.loads(data)
        here = note.get("boot") == _boot() != ""
        age = time.monotonic() - float(note["monotonic"]) if here else time.time() - float(note["since"])
        pid, host = int(note["pid"]), str(note["host"])[:80]
        gone = here and host == platform.node() and note.get("started") != _started(pid)
        of = f"one that process {pid} on {host} started, itself gone" if gone else f"process {pid} on {host}"
        return f" ({of}, for {max(0.0, age) / 60:.0f} min)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return ""


def _boot() -> str:
    """The machine's run since its last start; "" where it does not say."""
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process started, in clock ticks of the machine; "" where there is none: a number alone is used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _taken(folder: Path, note: bytes) -> HeldError:
    return HeldError(f"{folder}: another run is writing there{owner_words(note)}; wait or choose another --out")


def _sign(descriptor: int, note: bytes) -> None:
    """Write who holds a lock, and since when, into it; a full disk does not unlock it."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, note, 0)


def _sharer(folder: Path, name: str) -> bytes:
    """The note of one of those that share a lock: the newest of a process that lives, as far as can be told."""
    named = [path for path in folder.glob(f"{name}-*-of-*") if re.fullmatch(r"-\d+-of-\d+", path.name[len(name) :])]
    notes = [note for note in map(_read, named) if owner_words(note)]
    return max(notes, key=lambda note: ("itself gone" not in owner_words(note), json.loads(note)["since"]), default=b"")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()[: 2**16]
    except OSError:
        return b""
