"""One shard of a set, checked: its groups against the plan, its tar against its groups, its table against its json."""

import hashlib
import json
import mmap
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthkd.engine.encoding import BLOCK, tar_member
from synthkd.engine.errors import SynthkdError
from synthkd.engine.plan import Plan, WorkUnit, sample_key
from synthkd.engine.reading import MAX_MEMBER, members
from synthkd.engine.rows import GroupRow, ShardRow, group_rows, rows_path
from synthkd.engine.shards import file_digest, short_digest

MOST_PROBLEMS = 1000  # whose lines are kept; the others are counted
Stamp = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What was found of a shard: lines for its problems (the first of them), how many there are, where it was drawn.

    environments: keys of its groups; stamp: the state of its files when they were read, for a check that goes on.
    """

    shard: int
    samples: int
    problems: tuple[str, ...] = ()
    found: int = 0
    environments: frozenset[str] = frozenset()
    stamp: Stamp = field(default_factory=dict)


def verdict(shard: int, samples: int, problems: list[str], environments: Iterable[str] = ()) -> Verdict:
    """A verdict whose lines are bounded."""
    return Verdict(shard, samples, tuple(problems[:MOST_PROBLEMS]), len(problems), frozenset(environments))


def check_finished(folder: Path, plan: Plan, row: ShardRow) -> Verdict:
    """Everything that is wrong with a shard that the index calls finished."""
    if not (folder / row.file).is_file():
        return verdict(row.shard, row.samples, [f"{row.file}: is missing ({row.samples} samples)"])
    stamp = stamp_of(folder, row)
    try:
        groups = group_rows(folder, row)
    except SynthkdError as error:
        return verdict(row.shard, row.samples, [str(error).partition("; run `synthkd repair")[0]])
    problems = check_groups(plan, row, groups) + check_shard(folder, row, groups)
    found = verdict(row.shard, row.samples, problems, {key for g in groups for _, key, _ in g.runs})
    return Verdict(**{**vars(found), "stamp": stamp})


def stamp_of(folder: Path, row: ShardRow) -> Stamp:
    """What the system says of a shard's two files, and the digests that the index asks of them."""
    out: Stamp = {"shard": row.shard, "sha256": row.sha256, "rows": row.rows}
    for name, path in (("tar", folder / row.file), ("listed", rows_path(folder, row.shard))):
        found = path.stat() if path.is_file() else None
        out[name] = [found.st_size, found.st_mtime_ns, found.st_ino] if found else []
    return out


def check_groups(plan: Plan, row: ShardRow, groups: list[GroupRow]) -> list[str]:
    """Problems of a shard's groups against the plan: lost, doubled and foreign groups and samples."""
    have, units = {g.group: g for g in groups}, list(plan.shard_units(row.shard))
    problems = [
        f"{row.file}: group {u.group} has {have[u.group].kept if u.group in have else 0} of {u.kept} samples"
        for u in units
        if u.group not in have or have[u.group].kept < u.kept
    ]
    planned = {u.group: u for u in units}
    for group in groups:
        unit = planned.get(group.group)
        if unit is None:
            problems.append(f"{row.file}: group {group.group} is not of this shard")
        elif group.kept > unit.kept:
            problems.append(
                f"{row.file}: group {group.group} has {group.kept} samples; the manifest counts {unit.kept}"
            )
        else:
            problems += _listed(plan, row, unit, group)
    return problems


def _listed(plan: Plan, row: ShardRow, unit: WorkUnit, group: GroupRow) -> list[str]:
    """Problems of the member names of a group: every sample once, all with the same previews."""
    wanted = set(ordered(unit, group, plan.recipe.image_format))
    lost, more = sorted(wanted - group.members.keys()), sorted(group.members.keys() - wanted)
    name = rows_path(Path(), row.shard)
    return [f"{name}: group {group.group} does not list {member}" for member in lost] + [
        f"{name}: group {group.group} lists {member}, which is none of its samples" for member in more
    ]


def ordered(unit: WorkUnit, group: GroupRow, suffix: str) -> list[str]:
    """The names that a group's members should have, as they stand in its tar: image, json, then those of previews."""
    tails = {name.partition(".")[0].partition("-")[1:] for name in group.members}
    shown = sorted({"".join(tail) for tail in tails} | {""})  # percents have two digits, and follow the run
    keys = [sample_key(i) for i in unit.ids[: group.kept]]
    return [f"{key}{tail}.{kind}" for key in keys for tail in shown for kind in (suffix, "json")]


def check_shard(folder: Path, row: ShardRow, groups: list[GroupRow]) -> list[str]:
    """Problems of one shard: damaged, missing and foreign members, truncation, digests or tables that do not fit."""
    path = folder / row.file
    if path.stat().st_size == row.bytes and file_digest(path) == row.sha256:
        with opened(path) as data:
            found = list(walk(data))
            twice = [
                f"{row.file}: unexpected member {name}, the second of its name"
                for name in _doubled(n for n, *_ in found)
            ]
            return twice or _compared(row, groups, {name: (at, size) for name, at, size in found}, data)
    return _differences(path, row, groups)


def _compared(
    row: ShardRow, groups: list[GroupRow], placed: Mapping[str, tuple[int, int]], data: bytes | mmap.mmap
) -> list[str]:
    """Problems of a tar that is the one that was sealed: against the digests and the table of its groups.

    placed: (offset, size) of its members by name.
    """
    listed = [name for g in groups for name in g.members]
    problems = [f"{row.file}: {name} is listed twice" for name in _doubled(listed)]
    problems += [f"{row.file}: unexpected member {name}" for name in sorted(placed.keys() - set(listed))]
    problems += [f"{row.file}: {name} is missing" for name in sorted(set(listed) - placed.keys())]
    for group in groups:
        wrong = [n for n, d in group.members.items() if n in placed and short_digest(_cut(data, placed[n])) != d]
        problems += [f"{row.file}: {name} does not match its digest" for name in wrong]
    return problems or [p for g in groups for p in check_columns(row, g, placed, data)]


def _cut(data: bytes | mmap.mmap, place: tuple[int, int]) -> bytes:
    """A member's bytes, copied when they are looked at: a shard's members may be more than memory holds."""
    return data[place[0] : sum(place)]


def _doubled(names: Iterable[str]) -> list[str]:
    """Those that were there before."""
    seen: set[str] = set()
    again = []
    for name in names:
        if name in seen:
            again.append(name)
        seen.add(name)
    return again


def check_columns(
    row: ShardRow, group: GroupRow, placed: Mapping[str, tuple[int, int]], data: bytes | mmap.mmap
) -> list[str]:
    """Problems of a group's table: a value for each sample, those of its json, and images where it says they are.

    placed: (offset, size) of the members of the tar `data` by name.
    """
    table, where = group.table, f"{rows_path(Path(), row.shard)}: group {group.group}"
    if not table:
        return []
    if wrong := [name for name, column in table.items() if len(column) != group.kept]:
        return [f"{where} has {len(table[wrong[0]])} values of {wrong[0]} for {group.kept} samples"]
    if missing := [name for name in ("key", "label", "offset", "size") if name not in table]:
        return [f"{where} has no column {missing[0]}"]
    keys, problems = table["key"], []
    images = {name.partition(".")[0]: at for name, at in placed.items() if not name.endswith(".json")}
    for i, key in enumerate(keys):
        if not isinstance(key, str) or key not in images or f"{key}.json" not in placed:
            problems.append(f"{where} has a row for {key!r:.40}, which is none of its samples")
            continue
        if (table["offset"][i], table["size"][i]) != images[key]:
            problems.append(f"{where} says that the image of {key} lies elsewhere in the tar")
        if _label(_cut(data, placed[f"{key}.json"])) != (key, group.group, table["label"][i]):
            problems.append(f"{where}: {key} has another key, group or label in its json")
    return problems + [f"{where} has two rows for {key}" for key in _doubled(map(str, keys))]


def _label(data: bytes) -> tuple[Any, Any, Any]:
    try:
        meta = json.loads(data)
        return meta["key"], meta["group"], meta["label"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None, None, None


def _differences(path: Path, row: ShardRow, groups: list[GroupRow]) -> list[str]:
    """What is wrong with a tar that is not the one that was sealed, member by member."""
    wanted = {n: d for g in groups for n, d in g.members.items()}
    problems, seen, size = [], set(), path.stat().st_size
    if size < row.bytes:
        problems.append(f"{row.file}: truncated to {size} of {row.bytes} bytes")
    try:
        for name, data in members(path):
            if name in seen or name not in wanted:
                problems.append(f"{row.file}: unexpected member {name}")
            elif wanted[name] != short_digest(data):
                problems.append(f"{row.file}: {name} does not match its digest (flipped bits)")
            seen.add(name)
    except SynthkdError as error:
        problems.append(str(error).partition("; run `synthkd verify")[0])
    problems += [f"{row.file}: {name} is missing" for name in sorted(wanted.keys() - seen)]
    return problems or [f"{row.file}: SHA-256 differs from the index, though every member is right"]


@contextmanager
def opened(path: Path) -> Iterator[bytes | mmap.mmap]:
    """The bytes of a file, mapped; an empty one, or one that is not there, has none."""
    if not path.is_file() or not path.stat().st_size:
        yield b""
        return
    with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def walk(data: bytes | mmap.mmap) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of the members of a tar as `tar_member` writes them; what cannot be read is passed over."""
    at = 0
    while at + BLOCK <= len(data):
        info = _header(data[at : at + BLOCK])
        if info is None or at + BLOCK + info[1] > len(data):
            at += BLOCK
            continue
        yield info[0], at + BLOCK, info[1]
        at += BLOCK + info[1] + -info[1] % BLOCK


def _header(block: bytes) -> tuple[str, int] | None:
    """Name and size; None for what is not the header of a plain file."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError):
        return None
    return (info.name, info.size) if info.isreg() and 0 <= info.size <= MAX_MEMBER else None


def salvage(data: bytes | mmap.mmap, wanted: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """(offset, size) of the members whose bytes match their digests, wherever they lie, headers damaged or not."""
    found: dict[str, tuple[int, int]] = {}
    named, end = {digest: name for name, digest in wanted.items()}, 0
    for name, at, size in walk(data):
        if at - BLOCK > end:
            found |= _under_bad_header(data, end, at - BLOCK, named)
        if wanted.get(name) == short_digest(data[at : at + size]):
            found[name] = at, size
        end = at + size + -size % BLOCK
    return found | _under_bad_header(data, end, len(data), named)


def _under_bad_header(
    data: bytes | mmap.mmap, start: int, stop: int, named: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """The member between two places, if it is whole: its header is damaged, its zeros at the end tell its size."""
    if not BLOCK < stop - start <= MAX_MEMBER:
        return {}
    size = len(data[start + BLOCK : stop].rstrip(b"\0"))
    name = named.get(short_digest(data[start + BLOCK : start + BLOCK + size]))
    return {name: (start + BLOCK, size)} if name else {}


def is_canonical(data: bytes | mmap.mmap, order: list[tuple[str, str]]) -> bool:
    """Whether a tar is byte for byte what is written for members of these (name, digest), in this order."""
    at = 0
    for (name, digest), (found, offset, size) in zip(order, walk(data), strict=False):
        content = data[offset : offset + size]
        if found != name or offset != at + BLOCK or short_digest(content) != digest:
            return False
        member = tar_member(name, content)
        if data[at : at + len(member)] != member:
            return False
        at += len(member)
    whole = sum(1 for _ in walk(data)) == len(order)
    return whole and data[at:] == b"\0" * (2 * BLOCK)


def digest_of(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
