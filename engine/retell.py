"""The groups of a shard told again from its tar, where the file that listed them is lost."""

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
    for group, files in _by_group(path, suffix).items():
        row = _row(path, group, files, suffix, environment)
        before = known.get(group)
        same = before is not None and (before.members, before.end, before.table) == (row.members, row.end, row.table)
        out.append(before if before is not None and same else row)
    return sorted(out, key=lambda row: row.group)


def _by_group(path: Path, suffix: str) -> dict[int, list[tuple[str, int, bytes]]]:
    """(name, offset, bytes) of each group's members; an image belongs to the json that follows it."""
    out: dict[int, list[tuple[str, int, bytes]]] = {}
    with opened(path) as data:
        held: list[tuple[str, int, bytes]] = []
        for name, at, size in walk(data):
            held.append((name, at, data[at : at + size]))
            if name.endswith(".json"):
                group = decode_meta(held[-1][2], f"{path}: {name}").get("group")
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
