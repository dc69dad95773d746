"""The groups of a shard told again from its tar, where the file that listed them is lost."""

import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from synthkd.engine.checking import opened, walk
from synthkd.engine.encoding import BLOCK, table_of
from synthkd.engine.errors import SynthkdError
from synthkd.engine.reading import decode_meta
from synthkd.engine.rows import GroupRow
from synthkd.engine.shards import short_digest


def retold(path: Path, suffix: str, environment: str, remembered: Iterable[GroupRow] = ()) -> list[GroupRow]:
    """The groups of a whole tar, in order; their seconds and curves are lost, but for `remembered` rows that agree.

    environment: the key of where they were drawn, "" where that is not known.
    Raises SynthkdError for a member that is not a sample's.
    """
    known, out = {row.group: row for row in remembered}, []
    with opened(path) as data:
        for group, places in _by_group(path, data, suffix).items():
            files = [(name, at, data[at : at + size]) for name, at, size in places]
            row = _row(path, group, files, suffix, environment)
            before = known.get(group)
            told = (row.members, row.end, row.table)
            same = before is not None and (before.members, before.end, before.table) == told
            out.append(before if before is not None and same else row)
    return sorted(out, key=lambda row: row.group)


def _by_group(path: Path, data: bytes | mmap.mmap, suffix: str) -> dict[int, list[tuple[str, int, int]]]:
    """(name, offset, size) of each group's members; an image belongs to the json that follows it."""
    out: dict[int, list[tuple[str, int, int]]] = {}
    held: list[tuple[str, int, int]] = []
    for name, at, size in walk(data):
        held.append((name, at, size))
        if name.endswith(".json"):
            group = decode_meta(data[at : at + size], f"{path}: {name}").get("group")
            if type(group) is not int:
                raise SynthkdError(f"{path}: {name} names no group; expected the json of a sample")
            out.setdefault(group, []).extend(held)
            held = []
    if held:
        raise SynthkdError(f"{path}: {held[0][0]} has no json after it; expected {suffix} and json in turn")
    return out


def _row(path: Path, group: int, files: list[tuple[str, int, bytes]], suffix: str, environment: str) -> GroupRow:
    metas = [decode_meta(data, f"{path}: {name}") for name, _, data in files if name.endswith(".json")]
    whole = [meta for meta in metas if "preview" not in meta]
    shown = {f"{meta.get('key')}.{suffix}" for meta in whole}
    images = [(at, len(data)) for name, at, data in files if name in shown]
    try:
        table: dict[str, list[Any]] = table_of(metas)
        attempt = whole[0]["attempt"]
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise SynthkdError(f"{path}: group {group} has json without the fields of a sample ({error!r})") from error
    table |= {"offset": [at for at, _ in images], "size": [size for _, size in images]}
    last = files[-1]
    return GroupRow(
        group=group, attempt=attempt, kept=len(whole), end=last[1] + len(last[2]) + -len(last[2]) % BLOCK,
        environment=environment, members={name: short_digest(data) for name, _, data in files}, table=table,
    )  # fmt: skip
