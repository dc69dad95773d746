"""merge puts folders of one set together, byte for byte, and refuses what does not belong together."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from synthkd.engine import SynthkdError, write_shards
from synthkd.engine.merge import gather_parts, merge_sets
from synthkd.engine.rows import Part, read_index
from synthkd.engine.verify import verify_set

CHANGES: dict[str, Any] = {"groups_per_shard": 1}


@pytest.fixture
def stream(canned: Callable[..., Any]) -> Any:
    """Twenty images in four shards."""
    return canned(20, **CHANGES)


@pytest.fixture
def halves(stream: Any, tmp_path: Path) -> tuple[Path, Path]:
    """Shards 0 to 2, and 2 and 3, each drawn in a folder of its own."""
    for name, shards in (("a", [0, 1, 2]), ("b", [2, 3])):
        write_shards(stream, tmp_path / name, shards=shards)
    return tmp_path / "a", tmp_path / "b"


@pytest.fixture
def whole(stream: Any, tmp_path: Path) -> dict[str, bytes]:
    """The shards of one run."""
    write_shards(stream, tmp_path / "whole")
    return _tars(tmp_path / "whole")


def _tars(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("shard-*"))}


@pytest.mark.parametrize("link", [False, True])
def test_halves_become_the_whole(
    halves: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path, link: bool
) -> None:
    done = merge_sets(halves, tmp_path / "c", link=link)
    assert (done.samples, done.shards, done.new, done.missing) == (20, 4, 4, ())
    assert _tars(tmp_path / "c") == whole
    assert verify_set(tmp_path / "c").problems == ()
    inodes = [(f / "shard-000000.tar").stat().st_ino for f in (halves[0], tmp_path / "c")]
    assert (inodes[0] == inodes[1]) == link
    assert (tmp_path / "c/README.md").is_file()
    assert merge_sets(halves, tmp_path / "c").new == 0


def test_what_is_missing_is_told_and_can_be_drawn(halves: tuple[Path, Path], stream: Any, tmp_path: Path) -> None:
    done = merge_sets([halves[1]], tmp_path / "c")
    assert (done.shards, done.missing) == (2, (0, 1))
    assert write_shards(stream, tmp_path / "c").drawn == 12
    assert verify_set(tmp_path / "c").problems == ()


def test_a_set_that_grew_elsewhere(canned: Callable[..., Any], halves: tuple[Path, Path], tmp_path: Path) -> None:
    """The larger of two states of a shard, and the larger count, whatever the order."""
    write_shards(canned(19, **CHANGES), tmp_path / "small")
    for order in ((tmp_path / "small", *halves), (*halves, tmp_path / "small")):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        assert merge_sets(order, tmp_path / "c").samples == 20
        assert verify_set(tmp_path / "c").problems == ()


def test_other_sets_and_other_bytes_are_refused(
    canned: Callable[..., Any], halves: tuple[Path, Path], stream: Any, vouch: Callable[..., None], tmp_path: Path
) -> None:
    write_shards(canned(20, steps=3, **CHANGES), tmp_path / "other")
    with pytest.raises(SynthkdError, match=r"other: another set than .*recipe\.steps is 3 there, 2 here"):
        merge_sets([halves[0], tmp_path / "other"], tmp_path / "c")
    vouch(halves[1], 2, {"000000012.png": b"x", "000000012.json": b"{}"})
    with pytest.raises(SynthkdError, match=r"shard-000002\.tar: its bytes are not the same in .*a \(.*environments"):
        merge_sets(halves, tmp_path / "c")
    with pytest.raises(SynthkdError, match="is one of the sets to merge"):
        merge_sets(halves, halves[0])
    assert not (tmp_path / "c").exists()


def test_a_damaged_source_is_refused_by_name(
    halves: tuple[Path, Path], whole: dict[str, bytes], tmp_path: Path
) -> None:
    shard = halves[1] / "shard-000003.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + b"x")
    with pytest.raises(SynthkdError, match=r"shard-000003\.tar: does not match its digest in the index; run `synthkd"):
        merge_sets(halves, tmp_path / "c")
    assert not (tmp_path / "c/shard-000003.tar").exists()
    shard.write_bytes(data)
    assert merge_sets(halves, tmp_path / "c").new == 1
    assert _tars(tmp_path / "c") == whole


def test_a_merge_that_is_killed_goes_on(
    halves: tuple[Path, Path], whole: dict[str, bytes], killed: Callable[..., bool], tmp_path: Path
) -> None:
    """At every rename."""
    for point in range(100):
        out = tmp_path / f"c-{point}"
        if not killed(lambda out=out, point=point: _dying_merge(halves, out, point)):
            break
        merge_sets(halves, out)
        assert _tars(out) == whole
        assert verify_set(out).problems == ()
    assert point >= 8


def _dying_merge(sources: Sequence[Path], out: Path, point: int) -> None:
    """A merge that is killed after its `point`-th rename."""
    calls, inner = iter(range(10**6)), Path.replace

    def dying(*args: Any) -> Any:
        done = inner(*args)
        if next(calls) == point:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    Path.replace = dying  # type: ignore[method-assign, assignment]
    merge_sets(sources, out)


def test_a_merge_into_a_smaller_state_that_is_killed_goes_on(
    canned: Callable[..., Any], killed: Callable[..., bool], tmp_path: Path
) -> None:
    """The groups of a grown shard come first, then its tar, then its row."""
    write_shards(canned(20), tmp_path / "whole")
    write_shards(canned(7), tmp_path / "small")
    for point in range(100):
        out = shutil.copytree(tmp_path / "small", tmp_path / f"c-{point}")
        if not killed(lambda out=out, point=point: _dying_merge([tmp_path / "whole"], out, point)):
            break
        assert merge_sets([tmp_path / "whole"], out).samples == 20
        assert _tars(out) == _tars(tmp_path / "whole")
        assert verify_set(out).problems == ()
    assert point >= 4


def test_what_a_run_has_drawn_beyond_the_source_is_kept(canned: Callable[..., Any], tmp_path: Path) -> None:
    out, asked = tmp_path / "c", iter(range(9))
    write_shards(canned(7), tmp_path / "small")
    write_shards(canned(20), out, should_stop=lambda: next(asked) == 1)
    grown = (out / "shard-000000.tar.part").read_bytes()
    assert merge_sets([tmp_path / "small"], out).missing == (0, 1)
    assert (out / "shard-000000.tar.part").read_bytes() == grown
    assert write_shards(canned(20), out).drawn == 8
    assert verify_set(out).problems == ()


def test_parts_of_one_folder_get_one_index(stream: Any, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "parts"
    write_shards(stream, out, part=Part(1, 2))
    with (out / "index.jsonl").open("a") as f:
        f.write('{"torn')
    assert gather_parts(out).missing == (0, 2)
    write_shards(stream, out, part=Part(0, 2))
    assert verify_set(out).problems == ()
    done = gather_parts(out)
    assert (done.samples, done.missing) == (20, ())
    assert [p.name for p in out.glob("index*.jsonl")] == ["index.jsonl"]
    assert len((out / "index.jsonl").read_text().splitlines()) == len(read_index(out)) == 4
    assert _tars(out) == whole
    assert all(json.loads(line) for line in (out / "index.jsonl").read_text().splitlines())
