"""One writer: locks with an owner and an age, taken over silently from the dead, with flock and without."""

import errno
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from synthkd.engine import SynthkdError, lease, write_shards
from synthkd.engine.lease import Lease
from synthkd.engine.locks import FolderNotes, claim_lock, folder_lock, owner_note, owner_words, shard_lock
from synthkd.engine.rows import Part


def _held_and_killed(folder: Path, killed: Callable[..., bool], part: Part | None = None) -> None:
    def work() -> None:
        with folder_lock(folder, part), shard_lock(folder, 0):
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed(work)


def test_a_lock_left_by_a_killed_run_is_taken_silently(tmp_path: Path, killed: Callable[..., bool]) -> None:
    _held_and_killed(tmp_path, killed)
    assert json.loads((tmp_path / ".lock").read_bytes())["pid"] != os.getpid()
    with folder_lock(tmp_path), shard_lock(tmp_path, 0):
        assert json.loads((tmp_path / ".lock").read_bytes())["pid"] == os.getpid()
        assert (tmp_path / "shard-000000.tar.lock").exists()
    assert not (tmp_path / "shard-000000.tar.lock").exists()


def test_the_message_names_owner_and_age_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten minutes by the machine's monotonic clock, while the wall clock was set back by days."""
    started, now = time.time(), time.monotonic()
    with folder_lock(tmp_path):
        monkeypatch.setattr(time, "time", lambda: started - 3e5)
        monkeypatch.setattr(time, "monotonic", lambda: now + 601)
        with pytest.raises(SynthkdError, match=rf"\(process {os.getpid()} on .*, for 10 min\)"), folder_lock(tmp_path):
            pass


def test_a_refusal_names_an_owner_that_is_there(tmp_path: Path, killed: Callable[..., bool]) -> None:
    """Neither the last only writer, killed or gone, nor a part that was killed, but the part that runs."""
    here = rf"\(process {os.getpid()} on"
    _held_and_killed(tmp_path, killed, Part(0, 3))
    _held_and_killed(tmp_path, killed)
    with folder_lock(tmp_path, Part(1, 3)):
        with pytest.raises(SynthkdError, match=here), folder_lock(tmp_path):
            pass
        with pytest.raises(SynthkdError, match=here), folder_lock(tmp_path, Part(1, 3)):
            pass
    with folder_lock(tmp_path):
        pass
    assert {path.name: path.stat().st_size > 0 for path in tmp_path.glob(".lock*")} == {
        ".lock": False,
        ".lock-00000-of-00003": True,
        ".lock-00001-of-00003": False,
    }


def test_what_killed_runs_leave_is_swept(tmp_path: Path) -> None:
    """A table or card that is being written after a run is none of it."""
    (tmp_path / "rows").mkdir()
    names = ["shard-000003.arriving", "shard-000003.arriving.01abcdef.tmp", "rows/shard-000003.arriving"]
    described = ["index.parquet.01abcdef.tmp", "README.md.01abcdef.tmp"]
    mine = ["notes.tmp", "README.md.tmp"]
    for name in (*names, *described, *mine):
        (tmp_path / name).touch()
    with folder_lock(tmp_path):
        assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {".lock", *described, *mine}
    for name in (*described, *mine):
        os.utime(tmp_path / name, (0, 0))
    with folder_lock(tmp_path):
        assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {".lock", *mine}
    assert not list((tmp_path / "rows").iterdir())


def test_a_number_that_is_used_again_is_not_the_owner() -> None:
    """The lock outlives its owner in a process that it started; another one has its number now."""
    note = owner_note()
    assert owner_words(json.dumps({**note, "started": "1"}).encode()) == (
        f" (one that process {os.getpid()} on {note['host']} started, itself gone, for 0 min)"
    )
    elsewhere = {**note, "started": "1", "boot": "another", "since": time.time() + 1e6}
    assert owner_words(json.dumps(elsewhere).encode()) == f" (process {os.getpid()} on {note['host']}, for 0 min)"
    for wrong in (b"", b"[]", b"\xff", b'{"pid": 1}', b"[" * 10**5):
        assert owner_words(wrong) == ""


# Where the file system has no locks


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network file systems answer; with beats of a test's length."""

    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(lease, "BEAT", 0.05)
    monkeypatch.setattr(lease, "PATIENCE", 8)


def _refused(folder: Path, part: Part | None = None) -> None:
    with pytest.raises(SynthkdError, match=rf"writing there \(process {os.getpid()} on"), folder_lock(folder, part):
        pass


@pytest.mark.usefixtures("no_flock")
def test_without_flock_a_lease_does_the_same(tmp_path: Path) -> None:
    zero, one = Part(0, 2), Part(1, 2)
    with folder_lock(tmp_path):
        _refused(tmp_path)
        _refused(tmp_path, zero)
        with shard_lock(tmp_path, 0), claim_lock(tmp_path):
            pass
    with folder_lock(tmp_path, zero), folder_lock(tmp_path, one):
        _refused(tmp_path)
        _refused(tmp_path, one)
    assert not list(tmp_path.glob("*lease*"))


@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize("part", [None, Part(0, 2)])
def test_without_flock_a_dead_owner_is_found_out(
    tmp_path: Path, killed: Callable[..., bool], part: Part | None
) -> None:
    """Whatever the dead one was, and whatever comes after it."""
    _held_and_killed(tmp_path, killed, part)
    assert list(tmp_path.glob(".lock*.lease"))
    with folder_lock(tmp_path, Part(0, 2)):
        pass
    _held_and_killed(tmp_path, killed, part)
    with folder_lock(tmp_path), shard_lock(tmp_path, 0):
        pass
    assert not list(tmp_path.glob(".lock.*lease"))


@pytest.mark.usefixtures("no_flock")
def test_without_flock_a_set_is_written_as_ever(canned: Callable[..., Any], tmp_path: Path) -> None:
    assert write_shards(canned(12), tmp_path).present == 12
    assert not list(tmp_path.glob("*lease*"))


class Slow(FolderNotes):
    """A folder in which a breaker is held up before its last step until another one has tried too."""

    tried, broke = 0, 0
    both = threading.Event()

    def create_exclusive(self, name: str, data: bytes) -> bool:
        """A marker, of two watchers at the least."""
        made = super().create_exclusive(name, data)
        Slow.tried += ".broken-" in name
        if Slow.tried == 2:
            Slow.both.set()
        return made

    def replace(self, name: str, data: bytes) -> None:
        """The first of an owner's notes."""
        if b'"count": 0' in data:
            Slow.broke += 1
            Slow.both.wait(10)
        super().replace(name, data)


def test_of_two_that_break_a_lease_one_wins(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"left by a dead owner")
    both = [Lease(Slow(tmp_path), "x", {}, beat=0.05, patience=8) for _ in range(2)]
    took: list[bool] = []
    threads = [threading.Thread(target=lambda each=each: took.append(each.take())) for each in both]
    with ExitStack() as stack:
        for thread, each in zip(threads, both, strict=True):
            thread.start()
            stack.callback(each.release)
        for thread in threads:
            thread.join(30)
        assert sorted(took) == [False, True]
    assert (Slow.tried >= 2, Slow.broke) == (True, 1)
    assert not list(tmp_path.iterdir())


class Dying(FolderNotes):
    """A folder of a process that dies between its marker and its note."""

    def replace(self, name: str, data: bytes) -> None:
        """Never gets there."""
        raise KeyboardInterrupt

    def remove(self, name: str) -> None:
        """Nor here."""


def test_a_breaker_that_died_on_the_way_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"dead")
    with pytest.raises(KeyboardInterrupt):
        Lease(Dying(tmp_path), "x", {}, beat=0.01, patience=2).take()
    assert [path.name for path in tmp_path.glob("x.broken-*-0")]
    after = Lease(FolderNotes(tmp_path), "x", {}, beat=0.01, patience=2)
    assert after.take()
    after.release()
    assert not list(tmp_path.iterdir())


def test_an_owner_that_slept_learns_that_it_is_one_no_more(tmp_path: Path) -> None:
    lost: list[bool] = []
    mine = Lease(FolderNotes(tmp_path), "x", {}, on_lost=lambda: lost.append(True), beat=0.01)
    assert mine.take()
    FolderNotes(tmp_path).replace("x", b"another one's")
    assert mine._thread is not None
    mine._thread.join(30)
    assert (mine.lost, lost) == (True, [True])
    mine.release()
    assert (tmp_path / "x").read_bytes() == b"another one's"


def test_a_store_that_fails_for_a_while_loses_no_lease(tmp_path: Path) -> None:
    failing = threading.Event()
    beats = threading.Semaphore(0)

    class Flaky(FolderNotes):
        def replace(self, name: str, data: bytes) -> None:
            beats.release()
            if failing.is_set():
                raise OSError(errno.EIO, "for a while")
            super().replace(name, data)

    mine = Lease(Flaky(tmp_path), "x", {}, beat=0.01, patience=10**6)
    assert mine.take()
    for on in (True, False):
        failing.set() if on else failing.clear()
        for _ in range(3):
            assert beats.acquire(timeout=30)
    mine.release()
    assert (mine.lost, list(tmp_path.iterdir())) == (False, [])
