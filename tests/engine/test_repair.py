"""repair mends each kind of damage, draws no more than it must, and ends in the bytes that were there before."""

import json
import os
import shutil
import signal
import tarfile
import tracemalloc
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import pytest

from synthkd.engine import write_shards
from synthkd.engine.checking import salvage
from synthkd.engine.diagnosis import Need, diagnose
from synthkd.engine.encoding import EncodedGroup, encode_group, tar_member
from synthkd.engine.locks import folder_lock
from synthkd.engine.reading import members
from synthkd.engine.repair import mend_set
from synthkd.engine.rows import all_group_rows, read_index
from synthkd.engine.verify import open_state, verify_set

NAME, ZERO, ONE = "000000007.png", "shard-000000.tar", "shard-000001.tar"
Damage = Callable[[Path], None]


class Mender:
    """Mends a set whose groups are drawn by a stream, and remembers which were."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.drawn, self.told = stream, list[int](), list[str]()

    def draw(self, needs: Iterable[Need]) -> Generator[EncodedGroup, None, None]:
        """As a SynthJob's groups."""
        for batch in self.stream.draw(need.unit for need in needs):
            self.drawn.append(batch.group)
            yield encode_group(batch, self.stream.identity, self.stream.environment)

    def __call__(self, folder: Path) -> list[str] | None:
        """What is left."""
        with folder_lock(folder):
            state = open_state(folder)
            return mend_set(state, diagnose(state), self.draw, tell=self.told.append)


@pytest.fixture
def mender(canned: Callable[..., Any]) -> Mender:
    """Of 20 images: groups 0 to 2 in the first shard, 3 in the second."""
    return Mender(canned(20))


@pytest.fixture
def folder(canned: Callable[..., Any], tmp_path: Path) -> Path:
    """A finished set of 20 images in two shards (18 and 2)."""
    write_shards(canned(20), tmp_path / "set")
    return tmp_path / "set"


def _tars(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("shard-*"))}


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def _member(name: str, part: str) -> Damage:
    """Flip a bit of a member: of its data, its header, or the zeros after it."""

    def damage(folder: Path) -> None:
        with tarfile.open(folder / ZERO) as tar:
            info = tar.getmember(name)
        place = {"data": info.size // 2, "header": -512 + 125, "name": -511, "padding": info.size}[part]
        _flip(folder / ZERO, info.offset_data + place)

    return damage


def _rewritten(change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> Damage:
    def damage(folder: Path) -> None:
        kept = change(list(members(folder / ZERO)))
        (folder / ZERO).write_bytes(b"".join(tar_member(n, d) for n, d in kept) + b"\0" * 1024)

    return damage


def _cut(folder: Path) -> None:
    os.truncate(folder / ZERO, (folder / ZERO).stat().st_size - 3000)


def _swapped(folder: Path) -> None:
    (folder / ZERO).rename(folder / "held")
    (folder / ONE).rename(folder / ZERO)
    (folder / "held").rename(folder / ONE)


def _index(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the rows of the index; False drops one."""

    def damage(folder: Path) -> None:
        rows = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
        kept = [row for row in rows if change(row) is not False]
        (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))

    return damage


def _journal_left(folder: Path) -> None:
    shutil.copyfile(folder / "rows/shard-000000.jsonl", folder / f"{ZERO}.journal")


def _part_left(folder: Path) -> None:
    (folder / f"{ONE}.part").write_bytes(b"half")


CASES: dict[str, tuple[Damage, str, list[int]]] = {
    "image": (_member(NAME, "data"), f"{ZERO}: {NAME} does not match its digest (flipped bits)", [1]),
    "json": (_member("000000012.json", "data"), "000000012.json does not match its digest", [2]),
    "size in a header": (_member(NAME, "header"), ZERO, []),
    "name in a header": (_member("000000000.json", "name"), ZERO, []),
    "padding": (_member("000000003.json", "padding"), "SHA-256 differs from the index", []),
    "truncated": (_cut, "truncated to", [2]),
    "no tar": (lambda f: (f / ZERO).unlink(), f"{ZERO}: is missing (18 samples)", [0, 1, 2]),
    "no rows": (lambda f: (f / "rows/shard-000000.jsonl").unlink(), "cannot be read", []),
    "rows flipped": (lambda f: _flip(f / "rows/shard-000000.jsonl", 90), "does not match its digest in the index", []),
    "no index row": (_index(lambda r: r["shard"] != 0), f"{ZERO}: has no row in the index", []),
    "index flipped": (_index(lambda r: r.update(sha256="0" * 64)), "SHA-256 differs", []),
    "swapped shards": (_swapped, f"{ONE}: unexpected member 000000000.png", [0, 1, 2, 3]),
    "doubled sample": (_rewritten(lambda m: [*m[:4], *m[2:]]), "unexpected member 000000001.png", []),
    "foreign member": (_rewritten(lambda m: [("999999999.png", b"x"), *m]), "unexpected member 999999999.png", []),
    "lost sample": (_rewritten(lambda m: [*m[:14], *m[16:]]), f"{ZERO}: {NAME} is missing", [1]),
    "other order": (_rewritten(lambda m: m[::-1]), "SHA-256 differs", []),
    "journal left": (_journal_left, f"{ZERO}.journal: left by a run that was killed", []),
    "part left": (_part_left, f"{ONE}.part: left by a run that was killed", []),
}


@pytest.mark.parametrize("name", CASES)
def test_each_damage_is_named_and_mended(mender: Mender, folder: Path, name: str) -> None:
    damage, said, drawn = CASES[name]
    before, stamp = _tars(folder), (folder / ONE).stat().st_mtime_ns
    damage(folder)
    problems = verify_set(folder).problems
    assert any(said in p for p in problems), problems
    assert mender(folder) == []
    assert mender.drawn == drawn
    assert _tars(folder) == before
    assert verify_set(folder).problems == ()
    assert [row.group for row in all_group_rows(folder) if row.repaired] == drawn
    if name not in ("swapped shards", "part left"):
        assert (folder / ONE).stat().st_mtime_ns == stamp
    index = (folder / "index.jsonl").read_text()
    assert Mender(mender.stream)(folder) == []
    assert (folder / "index.jsonl").read_text() == index
    if drawn:
        assert all("every byte as recorded" in line for line in mender.told if "drawn again" in line)


def test_rows_without_their_file_lose_seconds_and_curves_alone(mender: Mender, folder: Path) -> None:
    rows = {row.group: row for row in all_group_rows(folder)}
    (folder / "rows/shard-000000.jsonl").unlink()
    assert mender(folder) == []
    for row in all_group_rows(folder):
        was = rows[row.group]
        assert (row.members, row.table, row.end, row.environment) == (was.members, was.table, was.end, was.environment)
        assert (row.seconds == was.seconds) == (row.group == 3)
    assert "seconds and curves are lost" in " ".join(mender.told)


def _begun(mender: Mender, folder: Path) -> None:
    """A set whose run was stopped after two groups."""
    asked = iter((False, True, True, True))
    write_shards(mender.stream, folder, should_stop=lambda: next(asked))


def test_what_is_unfinished_is_drawn(mender: Mender, folder: Path, tmp_path: Path) -> None:
    _begun(mender, tmp_path / "b")
    assert mender(tmp_path / "b") == []
    assert mender.drawn == [2, 3]
    assert _tars(tmp_path / "b") == _tars(folder)
    assert not any(row.repaired for row in all_group_rows(tmp_path / "b"))


def test_a_damaged_part_is_begun_anew(mender: Mender, folder: Path, tmp_path: Path) -> None:
    _begun(mender, tmp_path / "b")
    _flip(tmp_path / "b" / f"{ZERO}.part", 700)
    assert mender(tmp_path / "b") == []
    assert mender.drawn == [0, 1, 2, 3]
    assert _tars(tmp_path / "b") == _tars(folder)


def test_a_damaged_shard_grows(mender: Mender, canned: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    """Of 8 images, one of them damaged, to 20: what is right is kept."""
    small = tmp_path / "small"
    write_shards(canned(8), small)
    manifest = json.loads((small / "manifest.json").read_text())
    (small / "manifest.json").write_text(json.dumps({**manifest, "num_samples": 20}))
    _member("000000001.png", "data")(small)
    assert mender(small) == []
    assert mender.drawn == [0, 1, 2, 3]
    assert _tars(small) == _tars(folder)


def test_a_plan_of_many_shards_fits_into_memory(canned: Callable[..., Any], folder: Path) -> None:
    """What is not begun is told by its ends, and counted by arithmetic."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "num_samples": 18 * 20_000 + 1}))
    diagnose(open_state(folder))  # what is imported on the way is not the plan's
    tracemalloc.start()
    found = diagnose(open_state(folder))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
    assert (found.shards, found.groups, len(found.mends)) == (20_000, 3 * 20_000 + 1 - 3, 1)
    assert list(found.said())[1] == "shards 2 to 20000: not begun (19999 shards) -> 59995 groups are drawn"
    assert [mend.shard for mend in found.in_order()] == list(range(1, 20_001))
    last = list(found.in_order())[-1]
    assert [need.unit.group for need in last.needs(found.state)] == [60_000] == list(last.first)


def test_other_hardware_is_told(mender: Mender, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other bytes under another environment: the row and the report say so, and the set is whole."""
    there, draw = {**mender.stream.environment, "device": "cpu: another"}, mender.draw

    def brighter(needs: Iterable[Need]) -> Generator[EncodedGroup, None, None]:
        for group in draw(needs):
            members_ = [(n, d + b"\0" * 600 if n.endswith("png") else d) for n, d in group.members]
            yield EncodedGroup(**{**vars(group), "members": members_, "environment": there})

    monkeypatch.setattr(mender, "draw", brighter)
    _member(NAME, "data")(folder)
    assert mender(folder) == []
    assert verify_set(folder).problems == ()
    rows = {row.group: row for row in all_group_rows(folder)}
    assert rows[1].repaired
    assert rows[1].environment != rows[0].environment == rows[2].environment
    (line,) = [line for line in mender.told if "drawn again, " in line]
    assert "6 of 12 members differ from the record (other hardware or libraries: recorded in" in line
    assert read_index(folder)[0].revision == 1


def test_a_repair_that_is_killed_goes_on(
    mender: Mender, folder: Path, killed: Callable[..., bool], tmp_path: Path
) -> None:
    """At every fsync and rename."""
    whole = _tars(folder)
    _member(NAME, "data")(folder)
    (folder / ONE).unlink()
    for point in range(100):
        copy = tmp_path / str(point)
        shutil.copytree(folder, copy)
        if not killed(lambda copy=copy, point=point: (_at_call(point), mender(copy))):
            break
        assert mender(copy) == []
        assert _tars(copy) == whole
        assert verify_set(copy).problems == ()
    assert point > 15


def _at_call(number: int) -> None:
    """Die just after the n-th fsync or rename of this process."""
    calls = iter(range(10**6))

    def dying(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            out = inner(*args)
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return out

        return call

    os.fsync, Path.replace = dying(os.fsync), dying(Path.replace)  # type: ignore[method-assign, assignment]


def test_salvage_finds_members_anywhere() -> None:
    """Under a broken header, behind junk, and never one whose bytes are wrong."""
    from synthkd.engine.shards import short_digest

    files = {f"{i}.png": bytes([i + 1]) * 700 for i in range(4)}
    wanted = {n: short_digest(d) for n, d in files.items()}
    data = bytearray(b"".join(tar_member(n, d) for n, d in files.items()) + b"\0" * 1024)
    data[1536 + 124] ^= 1  # the second header's size
    data[3 * 1536 + 600] ^= 1  # the last one's bytes
    found = salvage(bytes(data), wanted)
    assert found == {"0.png": (512, 700), "1.png": (2048, 700), "2.png": (3584, 700)}
    assert salvage(b"\0" * 512 + b"junk" * 128 + bytes(data), wanted).keys() == {"1.png", "2.png"} | {"0.png"}
