"""The finished images of a set as columns, shard by shard, from `rows/` alone: for tables, statistics, copies."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from synthkd.engine.config import Recipe, Request
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import read_manifest
from synthkd.engine.plan import Plan
from synthkd.engine.reading import MAX_MEMBER
from synthkd.engine.rows import GroupRow, ShardRow, first_row, group_rows, read_index, rows_path

LOSSES = "losses."
_OWN = ("key", "label", "confidence", "offset", "size")


@dataclass
class ShardColumns:
    """The images of one shard, in id order: lists of one value an image.

    id: whole numbers; key: names in the shard; digest: 16 hexadecimal digits of SHA-256 of the image's bytes;
    offset, size: of those bytes in the tar; confidence: the teacher's probability of the label, or None;
    losses: term -> values; members: digests of all files of the shard by name; groups: its rows, in order, whose
    samples follow one another.
    """

    shard: int
    file: str
    groups: list[GroupRow]
    id: list[int] = field(default_factory=list)
    key: list[str] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    confidence: list[float | None] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    digest: list[str] = field(default_factory=list)
    losses: dict[str, list[float | None]] = field(default_factory=dict)
    members: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.key)

    def spread(self, value: str) -> list[Any]:
        """A field of the group rows, one value an image."""
        if value in ("environment", "repaired"):
            at = ("environment", "repaired").index(value)
            return [told[at] for g in self.groups for count, *told in g.runs for _ in range(count)]
        return [v for g in self.groups for v in [getattr(g, value)] * g.kept]


def set_plan(manifest: Mapping[str, Any]) -> Plan:
    """The plan of a set's manifest; raises SynthkdError for a recipe that is none."""
    request = Request(num_samples=manifest["num_samples"], seed=manifest["seed"])
    return Plan(Recipe.from_dict(manifest["recipe"]), request)


def index_digest(index: Mapping[int, ShardRow]) -> str:
    """SHA-256 of what an index says of its shards' content; how often they were finished does not count."""
    lasting = ("shard", "file", "samples", "bytes", "sha256", "groups")
    rows = [[asdict(index[shard])[name] for name in lasting] for shard in sorted(index)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def is_complete(folder: Path) -> bool:
    """Whether every wanted sample of a set lies in a finished shard."""
    plan, index = set_plan(read_manifest(folder)), read_index(folder)
    have = {shard: row.samples for shard, row in index.items()}
    return all(have.get(shard, 0) >= plan.shard_samples(shard) for shard in range(plan.num_shards))


def shard_columns(folder: Path, index: Mapping[int, ShardRow] | None = None) -> Iterator[ShardColumns]:
    """The columns of every finished shard, in order; one shard is held at a time.

    Raises SynthkdError for rows that contradict one another, and where a file of groups is not the index's.
    """
    recipe = read_manifest(folder)["recipe"]
    index = read_index(folder) if index is None else index
    last = -1
    for shard in sorted(index):
        columns = _columns(folder, index[shard], recipe)
        if columns.id and columns.id[0] <= last:
            raise _wrong(folder, shard, "ids do not rise from shard to shard")
        last = columns.id[-1] if columns.id else last
        yield columns


def first_losses(folder: Path, index: Mapping[int, ShardRow]) -> set[str]:
    """Names of loss terms in the first group of each shard; raises SynthkdError for what is no row."""
    names: set[str] = set()
    for shard in index:
        try:
            names |= {n.removeprefix(LOSSES) for n in first_row(folder, shard).table if n.startswith(LOSSES)}
        except (OSError, TypeError, StopIteration) as error:
            raise _wrong(folder, shard, f"its first group is not readable ({error!r:.80})") from error
    return names


def _wrong(folder: Path, shard: int, what: str) -> SynthkdError:
    return SynthkdError(f"{rows_path(folder, shard)}: {what}; run `synthkd repair {folder}`")


def _columns(folder: Path, row: ShardRow, recipe: Mapping[str, Any]) -> ShardColumns:
    out = ShardColumns(row.shard, row.file, group_rows(folder, row))
    for group in out.groups:
        table = group.table
        short = [name for name in _OWN if len(table.get(name, ())) != group.kept]
        short += [name for name, column in table.items() if len(column) != group.kept]
        if short:
            raise _wrong(folder, row.shard, f"column {short[0]!r} of group {group.group} has not {group.kept} values")
        _take(out, group)
    try:
        _check(out, len(recipe["classes"]))
        suffix = f".{recipe['image_format']}"
        out.digest = [out.members[key + suffix] for key in out.key]
        if not all(isinstance(digest, str) and len(digest) == 16 for digest in out.digest):
            raise ValueError("a digest is not of 16 digits")
    except (TypeError, ValueError, KeyError) as error:
        raise _wrong(folder, row.shard, f"its columns are not a synthkd set's ({error})") from error
    return out


def _take(out: ShardColumns, group: GroupRow) -> None:
    before, table = len(out.key), group.table
    for name in _OWN:
        getattr(out, name).extend(table[name])
    named = {n.removeprefix(LOSSES): column for n, column in table.items() if n.startswith(LOSSES)}
    for name in out.losses.keys() | named.keys():
        column = out.losses.setdefault(name, [None] * before)
        column.extend(named.get(name) or [None] * group.kept)
    out.members |= group.members


def _check(out: ShardColumns, classes: int) -> None:
    """Raise TypeError or ValueError for values that no set has."""
    for name, limit in (("label", classes), ("offset", 2**63), ("size", MAX_MEMBER + 1)):
        values = getattr(out, name)
        if set(map(type, values)) - {int} or (values and not 0 <= min(values) <= max(values) < limit):
            raise ValueError(f"{name} holds what is no whole number from 0 to {limit - 1}")
    for name, column in {"confidence": out.confidence, **out.losses}.items():
        if set(map(type, column)) - {float, int, type(None)}:
            raise TypeError(f"{name} holds what is no number")
    if set(map(type, out.key)) - {str} or not all(key.isdecimal() and key.isascii() for key in out.key):
        raise ValueError("key holds what is no sample's name")
    out.id = [int(key) for key in out.key]
    if any(a >= b for a, b in pairwise(out.id)) or (out.id and out.id[-1] >= 2**63):
        raise ValueError("keys do not rise")
