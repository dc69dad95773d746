"""A set survives SIGKILL at any moment, torn files and a full disk: the same bytes in the end."""

import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synthkd.dfkd import replay
from synthkd.dfkd.job import SynthJob
from synthkd.engine import Batch, GuidanceSpec, Request, SynthkdError, WorkUnit, rows, write_shards
from synthkd.engine.columns import shard_columns
from synthkd.engine.index import read_environments
from synthkd.engine.rows import Part, group_rows, read_index
from synthkd.engine.verify import verify_set

Killed = Callable[[Callable[[], object]], bool]
COUNT = 20  # four groups of 6, the last with 2 kept, in shards of 2 groups
CHANGES: dict[str, Any] = {"groups_per_shard": 2}


def _tars(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("shard-*"))}


@pytest.fixture
def stream(canned: Callable[..., Any]) -> Any:
    """Twenty images in two shards."""
    return canned(COUNT, **CHANGES)


@pytest.fixture
def whole(stream: Any, tmp_path: Path) -> dict[str, bytes]:
    """The shards of a run that nothing disturbed."""
    write_shards(stream, tmp_path / "whole")
    return _tars(tmp_path / "whole")


def _agrees(stream: Any, folder: Path, whole: dict[str, bytes]) -> None:
    """Finish a set and compare every file that is left with the undisturbed run."""
    summary = write_shards(stream, folder)
    assert summary.present == COUNT
    assert _tars(folder) == whole
    assert verify_set(folder).problems == ()


def _at_call(number: int, act: Callable[[], None], after: bool) -> None:
    """Let the n-th fsync or rename of this process (counted from 0) be the one at which something happens."""
    calls = iter(range(10**6))
    for name in ("fsync", "replace"):
        inner = getattr(os, name) if name == "fsync" else Path.replace

        def wrapped(*args: Any, inner: Any = inner) -> Any:
            mine = next(calls) == number
            if mine and not after:
                act()
            out = inner(*args)
            if mine and after:
                act()
            return out

        if name == "fsync":
            os.fsync = wrapped
        else:
            Path.replace = wrapped  # type: ignore[method-assign, assignment]


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_every_write_to_disk(
    stream: Any, whole: dict[str, bytes], killed: Killed, tmp_path: Path, after: bool
) -> None:
    """One run per fsync and rename, killed just before or after it; then the same call again."""
    points = 0
    while True:
        folder = tmp_path / f"killed-{points}"

        def work(folder: Path = folder, point: int = points) -> None:
            _at_call(point, _die, after)
            write_shards(stream, folder)

        if not killed(work):
            break
        _agrees(stream, folder, whole)
        points += 1
    assert points > 20


def test_a_kill_at_every_write_while_a_set_grows(canned: Callable[..., Any], killed: Killed, tmp_path: Path) -> None:
    """From 8 images (a group of 2 kept, in a finished shard) to 20."""
    small, large = canned(8, **CHANGES), canned(COUNT, **CHANGES)
    write_shards(large, tmp_path / "whole")
    whole, points = _tars(tmp_path / "whole"), 0
    while True:
        folder = tmp_path / f"killed-{points}"
        write_shards(small, folder)

        def work(folder: Path = folder, point: int = points) -> None:
            _at_call(point, _die, after=True)
            write_shards(large, folder)

        if not killed(work):
            break
        _agrees(large, folder, whole)
        points += 1
    assert points > 15


def test_killed_three_times_over(stream: Any, whole: dict[str, bytes], killed: Killed, tmp_path: Path) -> None:
    """Each continuation is killed in turn: between groups, inside a group, and between rename and index row."""
    for points in ((6, 5, 7), (4, 4, 4), (9, 2, 3), (1, 10, 6)):
        folder = tmp_path / "-".join(map(str, points))
        for point in points:

            def work(folder: Path = folder, point: int = point) -> None:
                _at_call(point, _die, after=False)
                write_shards(stream, folder)

            assert killed(work)
        _agrees(stream, folder, whole)


def test_a_killed_run_loses_at_most_one_group(stream: Any, killed: Killed, tmp_path: Path) -> None:
    def work() -> None:
        write_shards(stream, tmp_path / "set", on_batch=lambda _: done.append(1) or (len(done) == 3 and _die()))

    done: list[int] = []
    assert killed(work)
    assert write_shards(stream, tmp_path / "set").drawn == COUNT - 18


def _interrupted(stream: Any, folder: Path) -> Path:
    """A folder whose second shard holds one journalled group; the path of its part file."""
    drawn = iter(range(1, 5))
    write_shards(stream, folder, should_stop=lambda: next(drawn) == 3)
    part = folder / "shard-000001.tar.part"
    assert part.exists()
    return part


@pytest.mark.parametrize("extra", [1, 511, 700, 5000])
def test_bytes_after_the_journalled_end_are_dropped(
    stream: Any, whole: dict[str, bytes], tmp_path: Path, extra: int
) -> None:
    part = _interrupted(stream, tmp_path / "set")
    with part.open("ab") as f:
        f.write(random.Random(0).randbytes(extra))
    _agrees(stream, tmp_path / "set", whole)


@pytest.mark.parametrize("cut", [1, 513, 10**9])
def test_a_part_file_shorter_than_its_journal_is_redrawn(
    stream: Any, whole: dict[str, bytes], tmp_path: Path, cut: int
) -> None:
    """A file system that lost the data, but kept the journal."""
    part = _interrupted(stream, tmp_path / "set")
    with part.open("rb+") as f:
        f.truncate(max(0, part.stat().st_size - cut))
    _agrees(stream, tmp_path / "set", whole)


@pytest.mark.parametrize("keep", [0, 1, 40, -2, -1])
def test_a_torn_journal_line(stream: Any, whole: dict[str, bytes], tmp_path: Path, keep: int) -> None:
    part = _interrupted(stream, tmp_path / "set")
    journal = part.with_suffix(".journal")
    data = journal.read_bytes()
    journal.write_bytes(data[:keep] if keep else data + b'{"group": 3, "attem')
    _agrees(stream, tmp_path / "set", whole)


def test_a_row_after_a_torn_line_is_a_row_of_its_own(canned: Callable[..., Any], tmp_path: Path) -> None:
    stream, folder = canned(COUNT, groups_per_shard=4), tmp_path / "set"
    for torn in (b'{"group": 1, "attem', b""):
        assert write_shards(stream, folder, should_stop=lambda: True).drawn == 6
        with (folder / "shard-000000.tar.journal").open("ab") as f:
            f.write(torn)
    assert write_shards(stream, folder).drawn == COUNT - 12


def test_a_missing_journal(stream: Any, whole: dict[str, bytes], tmp_path: Path) -> None:
    part = _interrupted(stream, tmp_path / "set")
    part.with_suffix(".journal").unlink()
    _agrees(stream, tmp_path / "set", whole)


@pytest.mark.parametrize("torn", [0, 1, 60, -1])
def test_a_torn_or_missing_index_row(stream: Any, whole: dict[str, bytes], tmp_path: Path, torn: int) -> None:
    """The shard was renamed; of its index row nothing, a part, or all but the line's end reached the disk."""
    write_shards(stream, tmp_path)
    index = tmp_path / "index.jsonl"
    first, second = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(first + second[:torn])
    _agrees(stream, tmp_path, whole)
    rows = [json.loads(line) for line in index.read_text().splitlines()]
    assert [row["shard"] for row in rows] == [0, 1]


def test_a_renamed_shard_with_its_journal_and_no_row(
    stream: Any, whole: dict[str, bytes], killed: Killed, tmp_path: Path
) -> None:
    from synthkd.engine import shard_file

    def work() -> None:
        inner = shard_file.append_line
        shard_file.append_line = lambda path, row: _die() if path.name == "index.jsonl" else inner(path, row)
        write_shards(stream, tmp_path / "set")

    assert killed(work)
    assert (tmp_path / "set/shard-000000.tar").exists()
    assert (tmp_path / "set/shard-000000.tar.journal").exists()
    drawn: list[int] = []
    write_shards(stream, tmp_path / "set", on_batch=drawn.append)
    assert sum(drawn) == COUNT - 12  # adopted, not drawn again
    assert _tars(tmp_path / "set") == whole


def test_a_lost_shard_is_drawn_again(stream: Any, whole: dict[str, bytes], tmp_path: Path) -> None:
    write_shards(stream, tmp_path / "set")
    (tmp_path / "set/shard-000001.tar").unlink()
    _agrees(stream, tmp_path / "set", whole)


def test_a_part_file_that_was_removed_while_a_set_grew(canned: Callable[..., Any], tmp_path: Path) -> None:
    """The old tar is there, and vouches only for the samples that it had."""
    three = {"groups_per_shard": 3}
    write_shards(canned(8, **three), tmp_path / "set")
    write_shards(canned(18, **three), tmp_path / "set", should_stop=lambda: True)
    (tmp_path / "set/shard-000000.tar.part").unlink()
    done = write_shards(canned(18, **three), tmp_path / "set")
    assert (done.drawn, done.present, verify_set(tmp_path / "set").problems) == (10, 18, ())
    write_shards(canned(18, **three), tmp_path / "whole")
    assert _tars(tmp_path / "set") == _tars(tmp_path / "whole")


def test_a_shard_that_had_grown_and_is_lost_is_finished_once(canned: Callable[..., Any], tmp_path: Path) -> None:
    """Its row is newer than any that was lost."""
    for count in (8, 18):
        write_shards(canned(count, **CHANGES), tmp_path)
    lost, index = read_index(tmp_path)[0], tmp_path / "index.jsonl"
    index.write_text(index.read_text().replace(lost.rows, "0" * 64))  # its groups took other times than they will now
    (tmp_path / "shard-000000.tar").unlink()
    assert [write_shards(canned(18, **CHANGES), tmp_path).drawn for _ in range(2)] == [12, 0]
    assert read_index(tmp_path)[0].revision == 2
    assert verify_set(tmp_path).problems == ()


def test_samples_of_a_group_that_grows_elsewhere_keep_their_environment(
    canned: Callable[..., Any], tmp_path: Path
) -> None:
    """Ids 6 and 7 of group 1 were drawn in one environment, 8 and 9 in another, 10 and 11 in the first again."""

    class Elsewhere:
        def __init__(self, count: int, library: str) -> None:
            self._inner = canned(count, groups_per_shard=3)
            self.plan, self.identity = self._inner.plan, self._inner.identity
            self.environment = {**self._inner.environment, "library": library}

        def draw(self, units: Iterable[WorkUnit]) -> Iterator[Batch]:
            return (replace(batch, environment={}) for batch in self._inner.draw(units))

    for count, library in ((8, "one"), (10, "two"), (18, "one")):
        write_shards(Elsewhere(count, library), tmp_path)
    row = group_rows(tmp_path, read_index(tmp_path)[0])[1]
    libraries = {key: detail["library"] for key, detail in read_environments(tmp_path).items()}
    assert [(count, libraries[key]) for count, key, _ in row.runs] == [(2, "one"), (2, "two"), (2, "one")]
    (columns,) = shard_columns(tmp_path)
    assert [libraries[key] for key in columns.spread("environment")] == ["one"] * 8 + ["two"] * 2 + ["one"] * 8
    assert [replay._environment(tmp_path, 1, place, 0)["library"] for place in (1, 2, 4)] == ["one", "two", "one"]
    assert verify_set(tmp_path).problems == ()


@pytest.mark.parametrize(
    "earlier", [[[7, "a", False]], [[0, "a", False]], [[True, "a", False]], [[1, "a"]], ["abc"], 1]
)
def test_earlier_samples_that_no_group_has(earlier: Any) -> None:
    said = {"group": 0, "attempt": 0, "kept": 7, "end": 0, "environment": "a", "members": {}, "earlier": earlier}
    with pytest.raises(TypeError):
        rows.group_row(said)


def test_parts_of_different_counts_draw_a_shard_once(stream: Any, tmp_path: Path) -> None:
    """Shard 0 is in both parts; the one is finished while the other draws its first group."""

    class Late:
        plan, identity, environment = stream.plan, stream.identity, stream.environment

        def draw(self, units: Iterable[WorkUnit]) -> Iterator[Batch]:
            for number, batch in enumerate(stream.draw(units)):
                if number == 0:
                    assert write_shards(stream, tmp_path, part=Part(0, 4)).drawn == 12
                yield batch

    assert write_shards(Late(), tmp_path, part=Part(0, 2)).drawn == 0
    lines = [line for path in tmp_path.glob("index-*.jsonl") for line in path.read_text().splitlines()]
    assert [json.loads(line)["revision"] for line in lines] == [0]


def test_a_reader_misses_no_row_that_is_gathered_meanwhile(
    stream: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two index files that it reads, all rows move from the parts' files to the set's own."""
    for index in range(2):
        write_shards(stream, tmp_path, part=Part(index, 2))
    inner = rows._lines

    def lines(path: Path) -> list[dict[str, Any]]:
        found = list(inner(path))
        monkeypatch.setattr(rows, "_lines", inner)
        rows.gather_index(tmp_path)
        return found

    monkeypatch.setattr(rows, "_lines", lines)
    assert sorted(read_index(tmp_path)) == [0, 1]
    assert sorted(read_index(tmp_path)) == [0, 1]


def test_parts_take_digests_side_by_side(stream: Any, tmp_path: Path) -> None:
    """A stream's identity is asked for before the lock that parts take in turn."""

    class Watched:
        plan, environment, draw = stream.plan, stream.environment, stream.draw

        @property
        def identity(self) -> Any:
            with (tmp_path / ".lock-claim").open("a") as f:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return stream.identity

    assert write_shards(Watched(), tmp_path).present == COUNT


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`full_disk(n)`: from the n-th fsync on there is no space."""

    def at(number: int) -> None:
        calls, inner = iter(range(10**6)), os.fsync

        def fsync(descriptor: int) -> None:
            if next(calls) >= number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            inner(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    return at


@pytest.mark.parametrize("number", [0, 1, 2, 3, 5, 8, 11, 14])
def test_a_full_disk_is_one_line_and_loses_nothing(
    stream: Any,
    whole: dict[str, bytes],
    tmp_path: Path,
    full_disk: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    full_disk(number)
    with pytest.raises(SynthkdError, match="no space left") as caught:
        write_shards(stream, tmp_path / "set")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    monkeypatch.undo()
    _agrees(stream, tmp_path / "set", whole)


@pytest.mark.slow
def test_the_command_killed_from_outside(
    pipeline_folder: Path, teacher_card: Path, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """`kill -9` of `synthkd synth` while it draws; the same job in this process completes the set."""
    wanted = recipe(guidance=GuidanceSpec(scale=0.3), groups_per_shard=3)
    job = SynthJob(model=str(pipeline_folder), teacher=str(teacher_card), recipe=wanted)
    text = "".join(f"{k} = {json.dumps(v)}\n" for k, v in wanted.to_dict().items() if not isinstance(v, dict))
    (tmp_path / "recipe.toml").write_text(f"{text}[guidance]\nscale = 0.3\n")
    folder, request = tmp_path / "set", Request(num_samples=2000)
    command = [
        *(sys.executable, "-m", "synthkd.dfkd.cli", "synth", "--model", job.model, "--teacher", job.teacher),
        *("--recipe", str(tmp_path / "recipe.toml"), "--num-samples", "2000", "--workers", "1", "--out", str(folder)),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (folder / "shard-000001.tar.journal").exists():
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stderr.read() if process.stderr else ""
    small = Request(num_samples=40)
    write_shards(job.build().stream(small), folder, source=job.source())
    write_shards(job.build().stream(small), tmp_path / "whole")
    for name in ("shard-000000.tar", "shard-000001.tar"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert json.loads((folder / "manifest.json").read_text())["num_samples"] == request.num_samples
