"""verify names every kind of damage, and says nothing of a set that has none."""

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synthkd.engine import SynthkdError, write_shards
from synthkd.engine.encoding import tar_member
from synthkd.engine.reading import members, read_set
from synthkd.engine.verify import NOTES, verify_set

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
    assert problem == "shard-000001.tar: is missing (2 samples)"


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


def test_in_processes_as_in_this_one(folder: Path, canned: Callable[..., Any], tmp_path: Path) -> None:
    write_shards(canned(20, groups_per_shard=1), tmp_path / "b")
    (tmp_path / "b/shard-000002.tar").unlink()
    _flip(tmp_path / "b/shard-000001.tar", 700)
    assert verify_set(tmp_path / "b", workers=2) == verify_set(tmp_path / "b")
    assert verify_set(tmp_path / "b").found == 2


def test_an_ended_check_goes_on(folder: Path, canned: Callable[..., Any], tmp_path: Path) -> None:
    """What was found right is not read again; what has changed since, and what was wrong, is."""
    out = tmp_path / "b"
    write_shards(canned(20, groups_per_shard=1), out)
    _flip(out / "shard-000000.tar", 700)
    looked: list[int] = []
    ended = verify_set(out, looked.append, resume=True, should_stop=lambda: len(looked) == 3)
    assert ended.stopped
    notes = out / NOTES
    assert len([line for line in notes.read_text().splitlines() if line]) == 2
    notes.write_text(notes.read_text() + '\n{"shard": 3, "torn')
    _flip(out / "shard-000002.tar", 700)
    report = verify_set(out, resume=True)
    assert (report.resumed, report.found, report.stopped) == (1, 2, False)
    assert not notes.exists()
    assert verify_set(out, resume=True).resumed == 0


def test_notes_under_another_manifest_count_for_nothing(folder: Path) -> None:
    verify_set(folder, resume=True, should_stop=lambda: True)
    assert (folder / NOTES).exists()
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "num_samples": 19}))
    report = verify_set(folder, resume=True)
    assert report.resumed == 0
    assert report.problems == ("shard-000001.tar: group 3 has 2 samples; the manifest counts 1",)


def test_hostile_notes_end_in_no_traceback(folder: Path) -> None:
    for text in ("[]", "{}", '{"shard": []}', '{"shard": 0, "environments": 3}', "[" * 9000, "\0" * 50):
        (folder / NOTES).write_text(text + "\n")
        assert verify_set(folder, resume=True).problems == ()


def test_problems_are_bounded_and_counted(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "num_samples": 18 * 3000}))
    report = verify_set(folder)
    assert len(report.problems) == 1000
    assert report.found == 3000 - 2 + 3  # group 3 lacks four, groups 4 and 5 all


def _vouched(folder: Path, change: Callable[[list[dict[str, Any]]], None], tar: bytes | None = None) -> None:
    """Other groups, or another tar, of the first shard, under an index that vouches for them."""
    listed, index = folder / "rows/shard-000000.jsonl", folder / "index.jsonl"
    groups = [json.loads(line) for line in listed.read_text().splitlines()]
    change(groups)
    listed.write_text("".join(json.dumps(group) + "\n" for group in groups))
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    rows[0]["rows"] = hashlib.sha256(listed.read_bytes()).hexdigest()
    rows[0] |= {"groups": len(groups), "samples": sum(g["kept"] for g in groups)}
    if tar is not None:
        (folder / "shard-000000.tar").write_bytes(tar)
        rows[0] |= {"bytes": len(tar), "sha256": hashlib.sha256(tar).hexdigest()}
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda g: g[1]["table"]["label"].__setitem__(2, 9), "000000008 has another key, group or label in its json"),
        (lambda g: g[1]["table"]["offset"].__setitem__(2, 512), "the image of 000000008 lies elsewhere in the tar"),
        (lambda g: g[1]["table"]["key"].__setitem__(2, "000000007"), "has two rows for 000000007"),
        (lambda g: g[1]["table"]["key"].__setitem__(2, [7]), "a digest, key or environment is not a text"),
        (lambda g: g[1]["table"]["size"].pop(), "group 1 has 5 values of size for 6 samples"),
        (lambda g: g[1]["table"].pop("key"), "group 1 has no column key"),
        (lambda g: g[1].update(group=7), "group 7 is not of this shard"),
        (lambda g: g.pop(), "group 2 has 0 of 6 samples"),
        (lambda g: g[0]["members"].pop("000000003.png"), "group 0 does not list 000000003.png"),
        (lambda g: g[0]["members"].update({"000000099.png": "0" * 16}), "group 0 lists 000000099.png, which is none"),
        (lambda g: g[0].update(environment="feed"), "environments/feed.json: is missing or damaged"),
        (lambda g: g[0].update(environment=["feed"]), "a digest, key or environment is not a text"),
    ],
)
def test_books_that_vouch_for_one_another_and_are_wrong(
    folder: Path, change: Callable[[list[dict[str, Any]]], None], said: str
) -> None:
    _vouched(folder, change)
    assert any(said in problem for problem in _problems(folder)), _problems(folder)


def test_a_doubled_sample_that_the_index_vouches_for(folder: Path) -> None:
    files = list(members(folder / "shard-000000.tar"))
    tar = b"".join(tar_member(n, d) for n, d in [*files, *files[:2]]) + b"\0" * 1024
    _vouched(folder, lambda groups: None, tar)
    assert _problems(folder) == (
        "shard-000000.tar: unexpected member 000000000.png, the second of its name",
        "shard-000000.tar: unexpected member 000000000.json, the second of its name",
    )


def test_strange_names_and_leftovers(folder: Path) -> None:
    for name in (
        "shard-1.tar",
        "shard-0000001.tar",
        "shard-000000.tar.bak",
        "shard-000007.tar",
        "shard-000001.tar.part",
    ):
        (folder / name).touch()
    (folder / "my notes.txt").touch()
    (folder / "shard-000000.tar.lock").touch()
    assert [p.partition(":")[0] for p in _problems(folder)] == [
        "shard-000000.tar.bak", "shard-0000001.tar", "shard-000001.tar.part", "shard-000007.tar", "shard-1.tar",
    ]  # fmt: skip


def test_an_environment_that_is_not_its_digest(folder: Path) -> None:
    (path,) = (folder / "environments").iterdir()
    path.write_text(path.read_text().replace('"threads": 1', '"threads": 2'))
    assert _problems(folder) == (f"environments/{path.name}: is not what its name is the digest of",)
