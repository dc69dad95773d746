"""Sets at URLs: what a store ends up with is the local set byte for byte, whatever fails or dies on the way."""

import json
import os
import pickle
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from synthkd.engine import SynthkdError, stores, write_shards
from synthkd.engine.index import (
    CHECKPOINT_FILES,
    claim_folder,
    found_checkpoint,
    note_checkpoint,
    note_decoder,
    round_folder,
)
from synthkd.engine.reading import read_set
from synthkd.engine.remote import Publisher, RemoteSet, default_spool, open_output, row_name
from synthkd.engine.remote_read import fetched, verify_url
from synthkd.engine.rows import Part, read_index
from synthkd.engine.stores import Store, checked_url, is_url, schemes
from synthkd.engine.verify import verify_set

COUNT = 20  # four groups of 6, the last with 2 kept, in shards of 2 groups
Streams = Callable[..., Any]


@pytest.fixture
def stream(canned: Streams) -> Any:
    """Twenty images in two shards."""
    return canned(COUNT, groups_per_shard=2)


def _set_files(folder: Path) -> dict[str, bytes]:
    """What a set is made of, without locks."""
    files = (p for p in folder.rglob("*") if p.is_file() and "lock" not in p.name)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.fixture
def whole(stream: Any, tmp_path: Path) -> dict[str, bytes]:
    """The same set in a folder."""
    write_shards(stream, tmp_path / "whole")
    return _set_files(tmp_path / "whole")


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty place of each kind: whole puts, and names that are moved."""
    if request.param == "file":
        yield f"file://{tmp_path}/store"
        return
    yield "memory://bucket/set"
    system = stores.filesystem("memory://bucket/set", 0)[0]
    system.store.clear()


def _remote(url: str, spool: Path, tries: int = 3) -> RemoteSet:
    return RemoteSet(Store(url, tries=tries, wait=0.0), spool)


def _drawn(stream: Any, remote: RemoteSet, **how: Any) -> Any:
    done = write_shards(stream, remote.folder, remote=remote, **how)
    if not done.stopped:
        remote.finish(stream.plan.num_shards)
    return done


def _stored(url: str) -> dict[str, bytes]:
    store = Store(url)
    return {name: store.read(name, 2**30) or b"" for name in store.names()}


def _agrees(url: str, whole: dict[str, bytes]) -> None:
    """A store holds the local set and the rows that made it count, and nothing else."""
    found = _stored(url)
    assert {name: data for name, data in found.items() if not name.startswith("index/")} == whole
    assert sorted(name for name in found if name.startswith("index/")) == [row_name(0), row_name(1)]


def test_a_store_holds_the_local_set(stream: Any, whole: dict[str, bytes], url: str, tmp_path: Path) -> None:
    remote = _remote(url, tmp_path / "spool")
    summary = _drawn(stream, remote)
    assert (summary.drawn, summary.present) == (COUNT, COUNT)
    _agrees(url, whole)
    assert not list(remote.folder.glob("*.tar"))  # the disk holds no finished shard


def test_nothing_is_drawn_twice_on_a_new_machine(
    stream: Any, url: str, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    """An empty spool goes on from the store: the group that was under way is lost, no finished shard is."""
    groups, asked = [], iter(range(1, 9))
    _drawn(stream, _remote(url, tmp_path / "one"), on_batch=groups.append, should_stop=lambda: next(asked) == 3)
    again = _drawn(stream, _remote(url, tmp_path / "two"))
    assert (sum(groups), again.drawn, again.present) == (18, COUNT - 12, COUNT)
    assert _drawn(stream, _remote(url, tmp_path / "three")).drawn == 0
    _agrees(url, whole)


def test_a_store_is_read_back(stream: Any, url: str, whole: dict[str, bytes], tmp_path: Path) -> None:
    """As a copy that goes on where it ended, checked by digest, and shard by shard."""
    _drawn(stream, _remote(url, tmp_path / "spool"))
    copy = fetched(url, tmp_path / "copy")
    assert _set_files(copy) == whole
    (copy / "shard-000001.tar").write_bytes(b"torn")
    before = (copy / "shard-000000.tar").stat().st_mtime_ns
    fetched(url, copy)
    assert _set_files(copy) == whole
    assert (copy / "shard-000000.tar").stat().st_mtime_ns == before
    counts: list[int] = []
    report = verify_url(url, tmp_path / "look", counts.append)
    assert (report.samples, report.shards, report.problems, counts) == (COUNT, 2, (), [12, 8])
    assert not list((tmp_path / "look").glob("*.tar"))


def test_a_plain_copy_of_a_store_is_a_set(stream: Any, tmp_path: Path) -> None:
    _drawn(stream, _remote(f"file://{tmp_path}/store", tmp_path / "spool"))
    assert verify_set(tmp_path / "store").problems == ()
    assert len(list(read_set(tmp_path / "store"))) == COUNT


def test_damage_in_a_store_is_found(stream: Any, url: str, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """A flipped bit by whoever fetches; a shard of another size, rows of another digest and no row: drawn again."""
    _drawn(stream, _remote(url, tmp_path / "spool"))
    store = Store(url)
    data = bytearray(whole["shard-000000.tar"])
    data[700] ^= 1
    store.write("shard-000000.tar", bytes(data))
    with pytest.raises(SynthkdError, match="does not match its digest; remove index/shard-000000") as caught:
        fetched(url, tmp_path / "copy")
    assert url in str(caught.value)
    (problem,) = verify_url(url, tmp_path / "look").problems
    assert "shard-000000.tar: damaged after" in problem or "does not match its digest" in problem
    for name, damaged in (
        (row_name(0), b"{}"), (row_name(0), b"[" * 9000), ("shard-000000.tar", b"short"),
        ("rows/shard-000000.jsonl", b"{}"),
    ):  # fmt: skip
        store.write(name, damaged)
        assert "shard 0: not finished" in verify_url(url, tmp_path / f"look-{len(damaged)}").problems[0]
        if name.startswith("rows"):
            shutil.rmtree(tmp_path / "spool")
        assert _drawn(stream, _remote(url, tmp_path / "spool")).drawn == 12
        _agrees(url, whole)


def test_a_set_in_a_store_grows(canned: Streams, url: str, tmp_path: Path) -> None:
    """From 8 images to 20 on a new machine: the shard that was cut short comes back and goes on."""
    small, large = canned(8, groups_per_shard=2), canned(COUNT, groups_per_shard=2)
    for i, stream in enumerate((small, large)):
        write_shards(stream, tmp_path / "whole")
        _drawn(stream, _remote(url, tmp_path / f"spool-{i}"))
    found, want = _stored(url), _set_files(tmp_path / "whole")
    tars = [{name: data for name, data in side.items() if name.endswith(".tar")} for side in (found, want)]
    assert tars[0] == tars[1]
    assert json.loads(found["manifest.json"])["num_samples"] == COUNT
    assert len(list(read_set(fetched(url, tmp_path / "copy")))) == COUNT


def test_a_store_prevails_over_a_later_row_of_a_shard_that_is_lost(stream: Any, url: str, tmp_path: Path) -> None:
    """A spool remembers a shard that had grown; the store has it as another machine finished it."""
    _drawn(stream, _remote(url, tmp_path / "spool"))
    index = tmp_path / "spool/index.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    index.write_text("".join(json.dumps({**row, "revision": 3, "sha256": "0" * 64}) + "\n" for row in rows))
    assert [_drawn(stream, _remote(url, tmp_path / "spool")).drawn for _ in range(2)] == [0, 0]


def test_parts_have_spools_of_their_own(stream: Any, url: str, whole: dict[str, bytes], tmp_path: Path) -> None:
    for index in (1, 0):
        part = Part(index, 2)
        remote = _remote(url, tmp_path / f"spool-{index}")
        assert _drawn(stream, remote, part=part).drawn == (12, 8)[index]
    _agrees(url, whole)


def test_a_store_with_another_set(canned: Streams, stream: Any, url: str, tmp_path: Path) -> None:
    _drawn(stream, _remote(url, tmp_path / "spool"))
    other, before = canned(6, steps=3), _stored(url)
    remote = _remote(url, tmp_path / "other")
    with pytest.raises(SynthkdError, match=r"holds another recipe's set \(recipe\.") as caught, remote.told():
        _drawn(other, remote)
    assert url in str(caught.value)
    Store(url).remove("manifest.json")
    with pytest.raises(SynthkdError, match=r"holds shards but no manifest\.json"):
        _drawn(other, _remote(url, tmp_path / "third"))
    assert {n: d for n, d in before.items() if n != "manifest.json"} == _stored(url)


class Flaky:
    """A file system whose calls fail when `fails(count)` says so; uploads leave a part behind where they can."""

    def __init__(self, inner: Any, fails: Callable[[int], bool], partial: bool) -> None:
        self.inner, self.fails, self.partial, self.calls = inner, fails, partial, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if name not in ("pipe_file", "put_file", "get_file", "cat_file", "info", "find", "mv", "rm_file"):
            return found

        def call(*args: Any, **how: Any) -> Any:
            self.calls += 1
            if self.fails(self.calls):
                if self.partial and name in ("pipe_file", "put_file"):
                    data = args[1] if name == "pipe_file" else Path(args[0]).read_bytes()
                    self.inner.pipe_file(args[0] if name == "pipe_file" else args[1], data[: len(data) // 2])
                raise ConnectionResetError("connection reset by peer")
            return found(*args, **how)

        return call


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch, url: str) -> Callable[[Callable[[int], bool]], Flaky]:
    """`flaky(fails)`: calls on the store of `url` fail from here on where `fails(count)`, counted from 1."""

    def make(fails: Callable[[int], bool]) -> Flaky:
        monkeypatch.undo()
        inner, root = stores.filesystem(url, 0)
        wrapped = Flaky(inner, fails, partial=url.startswith("file"))
        monkeypatch.setattr(stores, "filesystem", lambda *_: (wrapped, root))
        return wrapped

    return make


def test_a_bad_line(
    stream: Any, whole: dict[str, bytes], url: str, flaky: Callable[..., Flaky], tmp_path: Path
) -> None:
    """One in four calls, at random: retried, and nobody hears of it."""
    wrapped = flaky(lambda count: random.Random(count).random() < 0.25)
    assert _drawn(stream, _remote(url, tmp_path / "spool", tries=8)).drawn == COUNT
    wrapped.fails = lambda count: False
    _agrees(url, whole)


def test_a_lost_line_at_every_call_is_one_line_and_loses_nothing(
    stream: Any, whole: dict[str, bytes], url: str, flaky: Callable[..., Flaky], tmp_path: Path
) -> None:
    """From the n-th call on nothing answers; then the same run again, with the spool and without."""
    for lost in (False, True):
        point = 1
        while True:
            wrapped = flaky(lambda count, point=point: count >= point)
            spool = tmp_path / f"spool-{lost}-{point}"
            try:
                _drawn(stream, _remote(url, spool, tries=1))
                done = True
            except SynthkdError as error:
                said, done = str(error), False
            if done:
                break
            assert "\n" not in said
            assert "every published shard is safe" in said
            wrapped.fails = lambda count: False
            if lost:
                shutil.rmtree(spool)
            assert _drawn(stream, _remote(url, spool)).present == COUNT
            _agrees(url, whole)
            for name in Store(url).names():
                Store(url).remove(name)
            point += 7 if lost else 3
        assert point > 25


def test_a_kill_at_every_call(
    stream: Any, whole: dict[str, bytes], killed: Callable[..., bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL within the n-th call on a store of files, in the middle of an upload; then the same run again."""
    point = 1
    while True:
        url, spool = f"file://{tmp_path}/store-{point}", tmp_path / f"spool-{point}"

        def work(url: str = url, spool: Path = spool, point: int = point) -> None:
            inner, root = stores.filesystem(url, 0)
            wrapped = Flaky(inner, lambda count: count == point, partial=True)
            stores.filesystem = lambda *_: (wrapped, root)  # type: ignore[assignment]
            stores.Store._tried = lambda self, what, action: _or_die(action)  # type: ignore[assignment, method-assign]
            _drawn(stream, _remote(url, spool, tries=1))

        def _or_die(action: Callable[[], Any]) -> Any:
            try:
                return action()
            except ConnectionResetError:
                os.kill(os.getpid(), signal.SIGKILL)

        if not killed(work):
            break
        assert _drawn(stream, _remote(url, spool)).present == COUNT
        found = {name: data for name, data in _stored(url).items() if not name.startswith("index/")}
        assert found == whole
        point += 3
    assert point > 25


def test_denied_access_is_not_tried_again(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def refuse(*_: Any, **__: Any) -> None:
        calls.append("x")
        raise PermissionError("Access Denied")

    inner, root = stores.filesystem(url, 0)
    wrapped = Flaky(inner, lambda count: False, partial=False)
    wrapped.pipe_file = refuse  # type: ignore[attr-defined]
    monkeypatch.setattr(stores, "filesystem", lambda *_: (wrapped, root))
    with pytest.raises(SynthkdError, match=r"writing a failed after 1 tries .PermissionError: Access Denied"):
        Store(url).write("a", b"data")
    assert len(calls) == 1


def test_what_arrives_short_is_seen(url: str, flaky: Callable[..., Flaky], monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that says nothing of bytes it lost."""
    wrapped = flaky(lambda count: False)
    inner = wrapped.inner
    wrapped.pipe_file = lambda path, data: inner.pipe_file(path, data[:-1])  # type: ignore[attr-defined]
    with pytest.raises(SynthkdError, match="3 of 4 bytes arrived"):
        Store(url, tries=2, wait=0.0).write("a", b"data")
    assert Store(url).read("a") in (None, b"dat")  # on a store of whole puts the object is there, but no row names it


def test_files_of_a_store(url: str, tmp_path: Path) -> None:
    store = Store(url)
    assert store.read("none") is None
    assert store.size("none") is None
    assert store.names() == []
    store.remove("none")
    (tmp_path / "local").write_bytes(b"12345")
    store.put(tmp_path / "local", "deep/er/name")
    store.write("b", b"1")
    store.write("b", b"22")
    assert store.sizes() == {"b": 2, "deep/er/name": 5}
    assert store.names("deep/") == ["deep/er/name"]
    store.fetch("deep/er/name", tmp_path / "back" / "again")
    assert (tmp_path / "back/again").read_bytes() == b"12345"
    with pytest.raises(SynthkdError, match="is not there"):
        store.fetch("none", tmp_path / "none")
    with pytest.raises(SynthkdError, match="has 5 bytes; expected at most 3"):
        store.read("deep/er/name", 3)
    assert store.create_exclusive("note", b"one")
    assert not store.create_exclusive("note", b"two")
    assert store.read("note") == b"one"
    store.remove("b")
    assert store.names() == ["deep/er/name", "note"]


def test_a_publisher_travels(stream: Any, url: str, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """What a worker elsewhere needs is pickled; a shard published twice is the same shard."""
    folder = tmp_path / "scratch"
    write_shards(stream, folder)
    publish = pickle.loads(pickle.dumps(Publisher(Store(url), folder)))
    for row in read_index(folder).values():
        publish(row)
        publish.publish(row)
    remote = _remote(url, tmp_path / "spool")
    Store(url).write("manifest.json", whole["manifest.json"])
    assert _drawn(stream, remote).drawn == 0
    _agrees(url, whole)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://example.org/set", "scheme 'http' is not allowed"),
        ("https://example.org/set", "is not allowed"),
        ("ftp://example.org/set", "is not allowed"),
        ("simplecache::s3://bucket/set", "chained URLs"),
        ("s3://bucket/set::memory://x", "chained URLs"),
        ("s3://KEY:SECRET@bucket/set", "credentials"),
        ("sftp://me:SECRET@host/set", "credentials"),
        ("az://container/set?sig=SECRET", "credentials, a query"),
        ("s3://bucket/../other", "without '..'"),
        ("s3://", "expected SCHEME://"),
        ("s3://bucket/a\nb", "printable"),
        ("file://relative/path", "file:///ABSOLUTE"),
    ],
)
def test_urls_that_are_not_opened(text: str, said: str) -> None:
    assert is_url(text)
    with pytest.raises(SynthkdError) as caught:
        checked_url(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_paths_that_look_like_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_url("sets/a")
    assert not is_url("other:name")
    for text in ("s3:/bucket/set", "gs:bucket"):
        with pytest.raises(SynthkdError, match="looks like a URL; expected"):
            is_url(text)
    Path("gs:bucket").mkdir()
    assert not is_url("gs:bucket")


def test_schemes_are_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHKD_URL_SCHEMES", "+webdav")
    assert {"s3", "webdav"} <= set(schemes())
    monkeypatch.setenv("SYNTHKD_URL_SCHEMES", "gs, memory")
    assert schemes() == ("gs", "memory")
    with pytest.raises(SynthkdError, match="scheme 's3' is not allowed; allowed: gs, memory"):
        checked_url("s3://bucket/set")


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "sftp": "paramiko", "smb": "smbprotocol"}
    for scheme, package in packages.items():
        for module in (package, "paramiko", "smbclient"):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(SynthkdError, match=f"{package} is not installed: pip install {package}"):
            Store(f"{scheme}://place/set").names()


def test_where_a_run_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert open_output("sets/a") == (Path("sets/a"), None)
    folder, remote = open_output("memory://bucket/set/")
    assert remote is not None
    assert remote.store.url == "memory://bucket/set"
    assert folder == default_spool("memory://bucket/set") == remote.folder
    assert folder.is_relative_to(tmp_path)
    assert open_output("memory://bucket/set", tmp_path / "s", Part(1, 2))[0] == tmp_path / "s" / "00001-of-00002"
    with pytest.raises(SynthkdError, match=r"--spool .* is for sets at a URL"):
        open_output("sets/a", tmp_path)


def test_a_hostile_store_writes_nothing_outside(stream: Any, tmp_path: Path) -> None:
    """Names that climb, and notes of other kinds, are passed over."""
    url = f"file://{tmp_path}/store"
    _drawn(stream, _remote(url, tmp_path / "spool"))
    row = json.loads((tmp_path / "store" / row_name(0)).read_text())
    (tmp_path / "store" / row_name(0)).write_text(json.dumps({**row, "file": "../../escaped.tar"}))
    (tmp_path / "store/environments/evil.pkl").write_bytes(b"x")
    (tmp_path / "store/index/shard-000009.json").write_text(json.dumps({**row, "shard": 9, "file": "shard-000000.tar"}))
    copy = tmp_path / "deep" / "copy"
    fetched(url, copy)
    assert sorted(p.name for p in copy.glob("*.tar")) == ["shard-000001.tar"]
    assert not (copy / "environments/evil.pkl").exists()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["copy"]


def test_one_run_at_a_time_writes_a_store(url: str, tmp_path: Path) -> None:
    """A living run is waited for by nobody; a dead one's lock is taken over; parts do not meet."""
    first, other = _remote(url, tmp_path / "one"), _remote(url, tmp_path / "two")
    with first.held(beat=0.05):
        with pytest.raises(SynthkdError, match="another run is writing there"), other.held(beat=0.05):
            pass
        with pytest.raises(SynthkdError, match="another run is writing there"), other.held(Part(0, 2), beat=0.05):
            pass
    refused = pytest.raises(SynthkdError, match="another run is writing there")
    with other.held(Part(0, 2), beat=0.05), other.held(Part(1, 2), beat=0.05), refused, first.held(beat=0.05):
        pass
    assert Store(url).names("locks/") == []
    Store(url).write("locks/writer.json", b'{"host": "gone"}')
    with other.held(beat=0.02):
        assert b"gone" not in (Store(url).read("locks/writer.json") or b"gone")


def test_a_row_is_the_last_that_is_published(
    stream: Any, url: str, flaky: Callable[..., Flaky], tmp_path: Path
) -> None:
    """Whatever call is the last that arrives: a row that is there has its whole tar and its rows beside it."""
    write_shards(stream, tmp_path / "set")
    row, point = read_index(tmp_path / "set")[0], 1
    while True:
        wrapped = flaky(lambda count, point=point: count >= point)
        publish, done = Publisher(Store(url, tries=1), tmp_path / "set"), True
        try:
            publish(row)
        except SynthkdError:
            done = False
        wrapped.fails = lambda count: False
        sizes = Store(url).sizes()
        whole = sizes.get(row.file) == row.bytes and "rows/shard-000000.jsonl" in sizes
        assert whole or row_name(0) not in sizes
        if done:
            break
        for name in sizes:
            Store(url).remove(name)
        point += 1
    assert point > 5


def _learned(stream: Any, remote: RemoteSet, student: bytes) -> None:
    """A spool of the set that has trained a student for round 1."""
    remote.prepare()
    claim_folder(remote.folder, stream.identity, COUNT, {})
    where = round_folder(remote.folder, 1)
    where.mkdir(parents=True)
    for name in CHECKPOINT_FILES:
        (where / name).write_bytes(student)
    note_checkpoint(remote.folder, 1, found_checkpoint(remote.folder, 1) or "")


def test_two_students_of_one_round_are_refused(stream: Any, url: str, tmp_path: Path) -> None:
    """The second run learns it before it draws, whether the first had published by then or was about to."""
    one, two, late = (_remote(url, tmp_path / name) for name in ("one", "two", "late"))
    for remote, student in ((one, b"aaaa"), (two, b"bbbb"), (late, b"cccc")):
        _learned(stream, remote, student)
    two.gather()
    one.note()
    with pytest.raises(SynthkdError, match=r"the student of round 1 is '\w+' there and '\w+' here"):
        two.note()
    manifest = Store(url).read("manifest.json") or b""
    Store(url).remove("manifest.json")
    with pytest.raises(SynthkdError, match="remove this run's spool"):
        late.note()
    Store(url).write("manifest.json", manifest)
    Store(url).write("rounds/round-1/student.toml", b"dddd")  # as long as the right one
    one.note()
    assert Store(url).read("rounds/round-1/student.toml") == b"aaaa"
    shutil.rmtree(two.folder)
    two.gather()
    assert found_checkpoint(two.folder, 1) == found_checkpoint(one.folder, 1)


def test_two_decoders_of_one_set_are_refused(stream: Any, url: str, tmp_path: Path) -> None:
    one, two = (_remote(url, tmp_path / name) for name in ("one", "two"))
    for remote, chosen in ((one, "vae"), (two, "pooled")):
        remote.prepare()
        claim_folder(remote.folder, stream.identity, COUNT, {})
        note_decoder(remote.folder, {"asked": "pooled:2", "chosen": chosen, "threshold": 0.3})
    one.note()
    with pytest.raises(SynthkdError, match="guidance decoder is 'vae' there and 'pooled' here"):
        two.gather()
