"""verify names every kind of damage, and says nothing of a set that has none."""

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synthkd.engine import SynthkdError, write_shards
from synthkd.engine.reading import members, read_set
from synthkd.engine.shards import tar_member
from synthkd.engine.verify import verify_set

NAME = "000000007.png"


@pytest.fixture
def folder(canned: Callable[..., Any], tmp_path: Path) -> Path:
    """A finished set of 20 images in two shards (18 and 2)."""
    write_shards(canned(20), tmp_path / "set")
    return tmp_path / "set"


def _problems(folder: Path) -> tuple[str, ...]:
    problems = verify_set(folder).problems
    assert all("\n" not in p for p in problems)
    return problems


def _rewrite(shard: Path, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> None:
    """The same shard with other members."""
    kept = change(list(members(shard)))
    shard.write_bytes(b"".join(tar_member(n, d) for n, d in kept) + b"\0" * 1024)


def _flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(bytes(data))


def test_a_clean_set_is_clean(folder: Path) -> None:
    counted: list[int] = []
    report = verify_set(folder, counted.append)
    assert (report.samples, report.shards, report.problems) == (20, 2, ())
    assert counted == [18, 2]


@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("name", [NAME, "000000000.json", "000000017.json"])
def test_a_flipped_bit_names_its_member(folder: Path, name: str, where: str) -> None:
    shard = folder / "shard-000000.tar"
    with tarfile.open(shard) as tar:
        info = tar.getmember(name)
    offset = {"first": 0, "middle": info.size // 2, "last": info.size - 1}[where]
    _flip(shard, info.offset_data + offset)
    assert _problems(folder) == (f"shard-000000.tar: {name} does not match its digest (flipped bits)",)
    with pytest.raises(SynthkdError, match=f"{name} does not match its digest"):
        list(read_set(folder))


def test_no_flipped_bit_of_a_shard_goes_unseen(folder: Path) -> None:
    """Headers, padding and the end of the archive too."""
    shard = folder / "shard-000001.tar"
    clean, rng = shard.read_bytes(), random.Random(0)
    for _ in range(150):
        _flip(shard, rng.randrange(len(clean)), rng.randrange(8))
        assert any(p.startswith("shard-000001.tar") or "shard-000001.tar: " in p for p in _problems(folder))
        shard.write_bytes(clean)
    assert _problems(folder) == ()


def test_a_missing_member_is_named(folder: Path) -> None:
    _rewrite(folder / "shard-000000.tar", lambda m: [x for x in m if x[0] != NAME])
    assert f"shard-000000.tar: {NAME} is missing" in _problems(folder)
    with pytest.raises(SynthkdError, match=f"{NAME} is missing"):
        list(read_set(folder))


def test_a_foreign_member_is_named(folder: Path) -> None:
    _rewrite(folder / "shard-000000.tar", lambda m: [*m, ("999999999.png", b"hello")])
    assert "shard-000000.tar: unexpected member 999999999.png" in _problems(folder)
    with pytest.raises(SynthkdError, match=r"999999999\.png"):
        list(read_set(folder))


def test_a_doubled_member_is_named(folder: Path) -> None:
    _rewrite(folder / "shard-000000.tar", lambda m: [*m, m[0]])
    assert f"shard-000000.tar: unexpected member {'000000000.png'}" in _problems(folder)


def test_swapped_members_are_found(folder: Path) -> None:
    """Every member is right; the order is not what was written."""
    _rewrite(folder / "shard-000000.tar", lambda m: m[::-1])
    (problem,) = _problems(folder)
    assert "SHA-256 differs from the index" in problem


@pytest.mark.parametrize("cut", [1, 600, 1024, 3000, 20000])
def test_a_truncated_shard(folder: Path, cut: int) -> None:
    shard = folder / "shard-000000.tar"
    size = shard.stat().st_size
    with shard.open("rb+") as f:
        f.truncate(size - cut)
    assert f"shard-000000.tar: truncated to {size - cut} of {size} bytes" in _problems(folder)


def test_an_empty_shard(folder: Path) -> None:
    (folder / "shard-000001.tar").write_bytes(b"")
    problems = _problems(folder)
    assert any("truncated to 0" in p for p in problems)
    assert any("000000018.png is missing" in p for p in problems)


def test_a_missing_shard_counts_its_samples(folder: Path) -> None:
    (folder / "shard-000001.tar").unlink()
    (problem,) = _problems(folder)
    assert problem.startswith("shard 1: not finished (2 samples)")


def test_an_unfinished_set(canned: Callable[..., Any], tmp_path: Path) -> None:
    write_shards(canned(20), tmp_path, should_stop=lambda: True)
    problems = _problems(tmp_path)
    assert [p.partition(";")[0] for p in problems] == [
        "shard 0: not finished (18 samples)",
        "shard 1: not finished (2 samples)",
    ]


def test_a_set_that_is_to_grow_lacks_samples(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "num_samples": 23}))
    assert _problems(folder) == ("shard-000001.tar: group 3 has 2 of 5 samples",)


def test_no_damage_to_the_books_ends_in_a_traceback(folder: Path) -> None:
    """Flipped bits in index and manifest: a report or one line, whatever they hit."""
    rng = random.Random(1)
    for name in ("index.jsonl", "manifest.json"):
        path = folder / name
        clean = path.read_bytes()
        for _ in range(150):
            _flip(path, rng.randrange(len(clean)), rng.randrange(8))
            for look in (verify_set, lambda f: list(read_set(f))):
                said = ""
                try:
                    look(folder)
                except SynthkdError as error:
                    said = str(error)
                assert "\n" not in said
            path.write_bytes(clean)


@pytest.mark.parametrize(
    "change",
    [
        {"shard": "0"},
        {"shard": None},
        {"groups": -1},
        {"groups": [5]},
        {"rows": 5},
        {"file": "../../etc/passwd"},
        {"file": 3},
        {"surprise": 1},
        {"bytes": "many"},
    ],
)
def test_an_index_row_of_another_shape_is_one_line(folder: Path, change: dict[str, Any]) -> None:
    index = folder / "index.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    index.write_text("".join(json.dumps({**row, **change}) + "\n" for row in rows))
    with pytest.raises(SynthkdError, match=r"index\.jsonl: ") as caught:
        verify_set(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (tarfile.USTAR_FORMAT, "SHA-256 differs"),
        (tarfile.PAX_FORMAT, "is not a plain file of a sample"),
    ],
)
def test_a_tar_of_another_writer_is_read_or_refused(folder: Path, how: int, said: str) -> None:
    """The members are what counts: rewritten with other times they are right, the digest of the file is not.

    Extended headers, which a time of parts of a second needs, are refused.
    """
    shard, buffer = folder / "shard-000001.tar", io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=how) as tar:
        for name, data in members(shard):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1e9 + 0.5  # type: ignore[assignment]
            tar.addfile(info, io.BytesIO(data))
    shard.write_bytes(buffer.getvalue())
    assert any(said in problem for problem in _problems(folder))
