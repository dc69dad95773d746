"""What a set knows of its shards: one short row a shard in the index, and its groups in a file of their own.

An index of a million images is a few hundred rows; digests and figures of single samples lie in `rows/`, one file a
shard, and are read when they are asked for.
"""

import contextlib
import hashlib
import json
import os
import secrets
from array import array
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from synthkd.engine.errors import SynthkdError
from synthkd.engine.untrusted import open_plain, read_plain

INDEX, ROWS = "index.jsonl", "rows"
MAX_LINE, MAX_ROWS = 16 * 2**20, 256 * 2**20  # bytes of a line, and of the groups of one shard


@dataclass(frozen=True)
class GroupRow:
    """One finished group in a shard: kept samples, where its bytes end, and what was measured while it was drawn.

    members: file name in the tar -> first 16 hexadecimal digits of its SHA-256.
    table: columns with one value a sample, without its previews: `key`, `label`, `offset` and `size` of the image's
    bytes in the tar, `confidence` of the teacher in the label (None where it was not asked), `losses.NAME`.
    repaired: whether the group was drawn again by `synthkd repair`.
    earlier: [samples, environment, repaired] of its first samples, in order, where the group has grown in another
    environment; `environment` and `repaired` are those of the rest.
    """

    group: int
    attempt: int
    kept: int
    end: int
    environment: str
    members: dict[str, str]
    table: dict[str, list[Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)
    repaired: bool = False
    earlier: list[list[Any]] = field(default_factory=list)

    @property
    def runs(self) -> list[tuple[int, str, bool]]:
        """Its samples in order, as (how many, environment, repaired)."""
        runs = [(count, environment, repaired) for count, environment, repaired in self.earlier]
        return [*runs, (self.kept - sum(count for count, _, _ in runs), self.environment, self.repaired)]

    @property
    def environments(self) -> list[str]:
        """The environment of each sample."""
        return [environment for count, environment, _ in self.runs for _ in range(count)]


@dataclass(frozen=True, slots=True)
class ShardRow:
    """One finished shard: digests of the tar and of the file of its groups, and how many there are.

    revision: how often the shard was finished before (it grew, or was repaired); of several rows the highest holds.
    """

    shard: int
    file: str
    samples: int
    bytes: int
    sha256: str
    groups: int
    rows: str
    revision: int = 0


@dataclass(frozen=True)
class Part:
    """Every count-th shard, from `index` on: what one of several independent runs draws."""

    index: int
    count: int

    def __post_init__(self) -> None:
        """Raise SynthkdError for an index outside 0..count - 1."""
        if not (0 <= self.index < self.count <= 10**6):
            raise SynthkdError(
                f"--shard-index {self.index} --num-shards {self.count}: expected 0 <= index < count <= 1000000"
            )

    def shards(self, num_shards: int) -> range:
        """The shards of this part, of `num_shards` in the plan."""
        return range(self.index, num_shards, self.count)

    @property
    def name(self) -> str:
        """As in file names."""
        return f"{self.index:05d}-of-{self.count:05d}"


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"shard-{shard:06d}.tar"


def rows_path(folder: Path, shard: int) -> Path:
    """Where the groups of a finished shard are listed."""
    return folder / ROWS / f"shard-{shard:06d}.jsonl"


def write_atomically(path: Path, text: str, shared: bool = False) -> None:
    """Replace a file as a whole: temporary file, fsync, rename. shared: several processes may write it at once."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp" if shared else path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line and force it to disk."""
    append_lines(path, [row])


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append JSON lines and force them to disk together."""
    with path.open("a") as f:
        f.writelines(json.dumps(row, sort_keys=True) + "\n" for row in rows)
        f.flush()
        os.fsync(f.fileno())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole JSON tables of a file, one a line; a torn last line, left by a killed run, is passed over."""
    try:
        descriptor = open_plain(path, path.parent.parent if path.parent.name == ROWS else path.parent)
    except FileNotFoundError:
        return
    with open(descriptor, "rb") as f:  # noqa: PTH123
        while line := f.readline(MAX_LINE + 1):
            if len(line) > MAX_LINE:
                raise SynthkdError(f"{path}: a line is above {MAX_LINE} bytes; expected rows of a synthkd set")
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row


def mend_tail(path: Path) -> None:
    """Cut a torn last line off a file, so that the next row starts on a line of its own."""
    if not path.exists():
        return
    with path.open("rb+") as f:
        end = f.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 2**16)
            f.seek(start)
            found = f.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        f.truncate(end)


def first_row(folder: Path, shard: int) -> GroupRow:
    """The first group that a finished shard's file lists, which is not compared with its digest.

    Raises OSError or SynthkdError where the file cannot be read, TypeError or StopIteration where it holds no such row.
    """
    return group_row(next(_lines(rows_path(folder, shard))))


def lines_of(rows: Iterable[GroupRow]) -> str:
    """Group rows as JSON lines."""
    return "".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in rows)


def group_row(data: Mapping[str, Any]) -> GroupRow:
    """A journal line as a row; raises TypeError where a count is no whole number, or a table no table."""
    row = GroupRow(**data)
    _check_counts(row.group, row.attempt, row.kept, row.end)
    tables = (row.members, row.table, row.seconds, row.curves)
    if not all(isinstance(table, dict) for table in tables):
        raise TypeError("members, table, seconds or curves is not a table")
    if not all(isinstance(column, list) for column in row.table.values()):
        raise TypeError("a column of the table is not a list")
    _check_values(row)
    return row


def _check_values(row: GroupRow) -> None:
    """Digests and names are texts, figures are numbers that a float holds, places are whole numbers."""
    texts = [*row.members.values(), *row.table.get("key", ())]
    if not isinstance(row.environment, str) or not set(map(type, texts)) <= {str}:
        raise TypeError("a digest, key or environment is not a text")
    if [[int, str, bool]] * len(row.earlier) != [list(map(type, run)) for run in row.earlier]:
        raise TypeError("earlier is not a list of samples, environment, repaired")
    if not all(count > 0 for count, _, _ in row.runs):
        raise TypeError("a run of earlier samples has none, or all of the group's")
    for name in ("label", "offset", "size"):
        _check_counts(*row.table.get(name, ()))
    figures = [column for name, column in row.table.items() if name == "confidence" or name.startswith("losses.")]
    try:
        array("d", row.seconds.values())
        for column in (*row.curves.values(), *figures):
            array("d", [value for value in column if value is not None])
    except OverflowError as error:
        raise TypeError("a figure is larger than any number") from error


def _check_counts(*counts: Any) -> None:
    if not all(type(n) is int and 0 <= n < 2**63 for n in counts):
        raise TypeError("a count is not a whole number")


def read_journal(path: Path, size: int | None = None) -> dict[int, GroupRow]:
    """Rows of an unfinished shard by group, the newest of each; with a size in bytes, only of what ends within it."""
    try:
        rows = map(group_row, _lines(path))
        return merge_rows(row for row in rows if size is None or row.end <= size)
    except (TypeError, KeyError) as error:
        raise SynthkdError(f"{path}: a row is not a synthkd group's ({error!s:.200})") from error


def merge_rows(rows: Iterable[GroupRow]) -> dict[int, GroupRow]:
    """The newest row of each group, with the members and samples of all its rows (a group may grow)."""
    out: dict[int, GroupRow] = {}
    for row in rows:
        before = out.get(row.group)
        if before is None:
            out[row.group] = row
            continue
        table = {name: [*before.table.get(name, []), *column] for name, column in row.table.items()}
        alike = (before.environment, before.repaired) == (row.environment, row.repaired)
        earlier = before.earlier if alike else [list(run) for run in before.runs]
        members = {**before.members, **row.members}
        out[row.group] = replace(row, members=members, table=table, earlier=earlier)
    return out


def group_rows(folder: Path, row: ShardRow) -> list[GroupRow]:
    """The groups of a finished shard, in order.

    Raises SynthkdError where their file is missing, or is not the one that the index names.
    """
    path = rows_path(folder, row.shard)
    try:
        data = read_plain(path, folder, MAX_ROWS)
    except OSError as error:
        raise SynthkdError(f"{path}: cannot be read ({error.strerror}); run `synthkd repair {folder}`") from error
    if hashlib.sha256(data).hexdigest() != row.rows:
        raise SynthkdError(f"{path}: does not match its digest in the index; run `synthkd repair {folder}`")
    rows = read_journal(path)
    if sum(g.kept for g in rows.values()) != row.samples or len(rows) != row.groups:
        raise SynthkdError(f"{path}: its groups are not those that the index counts; run `synthkd repair {folder}`")
    return [rows[group] for group in sorted(rows)]


def all_group_rows(folder: Path) -> Iterator[GroupRow]:
    """The groups of all finished shards, shard by shard."""
    index = read_index(folder)
    for shard in sorted(index):
        yield from group_rows(folder, index[shard])


def index_name(part: Part | None) -> str:
    """The index file that a run writes: the set's own, or one of its part."""
    return INDEX if part is None else f"index-{part.name}.jsonl"


def index_files(folder: Path) -> list[Path]:
    """All index files of a set: its own, then those of parts."""
    return [folder / INDEX, *sorted(folder.glob("index-*.jsonl"))]


def read_index(folder: Path, missing: bool = False) -> dict[int, ShardRow]:
    """Rows of all finished shards by shard, the newest of each.

    missing: with the rows of shards whose file is not there.
    Raises SynthkdError for a row that is not one of ours.
    """
    out: dict[int, ShardRow] = {}
    for path in reversed(index_files(folder)):  # rows move from the parts' files to the set's own, which is read last
        for data in _lines(path):
            row = shard_row(path, data)
            if row.shard not in out or row.revision >= out[row.shard].revision:
                out[row.shard] = row
    return out if missing else {shard: row for shard, row in out.items() if (folder / row.file).exists()}


class IndexTail:
    """What other runs append to a set's index files; each look reads what is new since the last one."""

    def __init__(self, folder: Path) -> None:
        """The first look reads everything."""
        self._folder, self._read = folder, dict[str, int]()

    def fresh(self) -> Iterator[ShardRow]:
        """Rows of whole lines that were not there before, file by file."""
        for path in index_files(self._folder):
            try:
                f = open(open_plain(path, self._folder), "rb")  # noqa: PTH123, SIM115
            except FileNotFoundError:
                continue
            with f:
                start = self._read.get(path.name, 0)
                f.seek(start if start <= f.seek(0, os.SEEK_END) else 0)  # its writer has cut a torn line off
                data = f.read()
                self._read[path.name] = f.tell() - len(data) + data.rfind(b"\n") + 1
            for line in data[: data.rfind(b"\n") + 1].splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    yield shard_row(path, json.loads(line))


def shard_row(path: Path, data: Mapping[str, Any]) -> ShardRow:
    """An index row of a file; raises SynthkdError, which names the file, for one that is none of ours."""
    try:
        row = ShardRow(**data)
        _check_counts(row.shard, row.samples, row.bytes, row.groups, row.revision)
        if not isinstance(row.sha256, str) or not isinstance(row.rows, str):
            raise TypeError("a digest is not a text")
    except (TypeError, KeyError) as error:
        again = f"run `synthkd repair {path.parent}`"
        raise SynthkdError(f"{path}: a row is not a synthkd index row ({error!s:.200}); {again}") from error
    if row.file != shard_name(row.shard):
        raise SynthkdError(f"{path}: shard {row.shard} names file {row.file!r:.80}; expected a shard name")
    return row


def drop_rows(folder: Path, shards: Container[int] = ()) -> int:
    """Take rows that are not ours, and those of some shards, out of a set's index files; only under its lock.

    Returns how many there were.
    """
    dropped = 0
    for path in filter(Path.is_file, index_files(folder)):
        lines, kept = path.read_bytes().splitlines(), []
        for data in _lines(path):
            with contextlib.suppress(SynthkdError):
                row = shard_row(path, data)
                kept += [] if row.shard in shards else [json.dumps(asdict(row), sort_keys=True) + "\n"]
        if len(kept) < len(lines):
            write_atomically(path, "".join(kept))
        dropped += len(lines) - len(kept)
    return dropped


def gather_index(folder: Path) -> None:
    """Put the rows that parts have written into the set's own index; only under the folder's lock."""
    own, *parts = index_files(folder)
    mend_tail(own)
    if parts:
        append_lines(own, (data for path in parts for data in _lines(path)))
    for path in parts:
        path.unlink()
