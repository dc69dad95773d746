"""Mends a set: what is right stays as it is, what can be told from what is left is written again, the rest is drawn.

A shard is rebuilt as one grows: a part file with a journal, which replaces the old tar when it is whole. So a repair
may be killed at any moment, and goes on when it is run again.
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

from synthkd.engine.checking import check_finished, opened, ordered, salvage
from synthkd.engine.diagnosis import Diagnosis, Mend, Need, left_by_a_run, members, row_of, unvouched, vouched
from synthkd.engine.encoding import BLOCK, EncodedGroup, tar_member
from synthkd.engine.index import note_environment, read_environments
from synthkd.engine.plan import WorkUnit
from synthkd.engine.retell import retold
from synthkd.engine.rows import (
    INDEX,
    append_line,
    lines_of,
    mend_tail,
    merge_rows,
    read_index,
    rows_path,
    shard_name,
    write_atomically,
)
from synthkd.engine.shards import ShardFile, commit
from synthkd.engine.verify import SetState

Draw = Callable[[Iterable[Need]], Generator[EncodedGroup, None, None]]


def mend_set(
    state: SetState,
    diagnosis: Diagnosis,
    draw: Draw,
    *,
    tell: Callable[[str], None] = lambda _: None,
    on_group: Callable[[], None] = lambda: None,
    on_shard: Callable[[int], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[str] | None:
    """Do what a diagnosis says, under the folder's lock; returns the problems that are left, None where it was stopped.

    draw: groups in the order in which they are needed; tell: given a line for every shard; on_group: called for each
    that was drawn; on_shard: samples of each shard that is checked at the end; should_stop: asked after each group.
    What needs no drawing is mended first.
    """
    mend_tail(state.folder / INDEX)
    with closing(draw(need for mend in diagnosis.in_order() for need in mend.needs(state))) as drawn:
        for mend in diagnosis.in_order():
            told = _done(state, mend, drawn, on_group, should_stop)
            if told is None:
                return None
            for line in told:
                tell(line)
    return _still_wrong(state, diagnosis.in_order(), on_shard)


def _still_wrong(state: SetState, mends: Iterable[Mend], on_shard: Callable[[int], None]) -> list[str]:
    """Problems of shards that were mended: of damage to a part file that a killed run had begun."""
    index, out = read_index(state.folder), list[str]()
    for mend in mends:
        row = index.get(mend.shard)
        out += check_finished(state.folder, state.plan, row).problems if row else [_unfinished(mend.shard)]
        on_shard(row.samples if row else 0)
    return out


def _unfinished(shard: int) -> str:
    return f"{shard_name(shard)}: is not finished yet"


def _done(
    state: SetState, mend: Mend, drawn: Iterator[EncodedGroup], on_group: Callable[[], None],
    should_stop: Callable[[], bool],
) -> list[str] | None:  # fmt: skip
    """Mend one shard; lines on what was done, None if stopped."""
    folder = state.folder
    if mend.how == "rebuild":
        return _Rebuild(state, mend).run(drawn, on_group, should_stop)
    if mend.how == "clear":
        _clear(folder, mend.shard)
    elif mend.how == "index":
        commit(folder, row_of(folder, mend.shard, unvouched(folder, mend.shard), mend.row))
    else:
        _list_again(state, mend)
    return [mend.said()]


def _clear(folder: Path, shard: int) -> None:
    """Remove what a killed run left of a shard; its journal last, which vouches for the rest."""
    for path in left_by_a_run(folder, shard):
        path.unlink(missing_ok=True)


def _list_again(state: SetState, mend: Mend) -> None:
    """Make the file of a shard's groups from its tar, whose digest is right."""
    assert mend.row is not None
    folder, environments = state.folder, list(read_environments(state.folder))
    only = environments[0] if len(environments) == 1 else ""
    listed = retold(folder / mend.row.file, state.plan.recipe.image_format, only, unvouched(folder, mend.shard))
    path = rows_path(folder, mend.shard)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, lines_of(listed))
    commit(folder, row_of(folder, mend.shard, listed, mend.row))


def _sync(f: IO[bytes]) -> None:
    f.flush()
    os.fsync(f.fileno())


class _Rebuild:
    """A shard written again, group by group in order."""

    def __init__(self, state: SetState, mend: Mend) -> None:
        self._state, self._mend, self._folder = state, mend, state.folder
        self._suffix = state.plan.recipe.image_format
        self._listed = {g.group: g for g in (vouched(state.folder, mend.shard, mend.row) if mend.listed else [])}

    def run(
        self, drawn: Iterator[EncodedGroup], on_group: Callable[[], None], should_stop: Callable[[], bool]
    ) -> list[str] | None:
        """Lines on what was done; None if stopped."""
        mend, told = self._mend, [self._mend.said()]
        if mend.discard:
            _clear(self._folder, mend.shard)
        needed, file = {n.unit.group for n in mend.needs(self._state)}, ShardFile(self._folder, mend.shard, None)
        file.finished = mend.row
        try:
            with opened(file.final) as data:
                found = salvage(data, members(g for g in self._listed.values() if g.group in mend.keep))
                for unit in self._state.plan.shard_units(mend.shard):
                    if unit.group in mend.keep:
                        self._copy(file, unit, {n: data[at : at + size] for n, (at, size) in self._of(unit, found)})
                    if unit.group in needed:
                        told.append(self._drawn(file, unit, next(drawn)))
                        on_group()
                        if should_stop():
                            return None
            told += self._finish(file)
        finally:
            file.release()
        return told

    def _of(self, unit: WorkUnit, found: Mapping[str, tuple[int, int]]) -> list[tuple[str, tuple[int, int]]]:
        group = self._listed[unit.group]
        return [(name, found[name]) for name in ordered(unit, group, self._suffix)]

    def _copy(self, file: ShardFile, unit: WorkUnit, files: Mapping[str, bytes]) -> None:
        """Append a group as it was; only where its images lie in the tar is told anew."""
        row, table = self._listed[unit.group], {"offset": list[int](), "size": list[int]()}
        if not file.part.exists():
            write_atomically(file.journal, "")
            file.part.touch()
        with file.part.open("ab") as f:
            end = f.tell()
            for name, data in files.items():
                if name.removesuffix(f".{self._suffix}") in row.table.get("key", ()):
                    table["offset"].append(end + BLOCK)
                    table["size"].append(len(data))
                end += f.write(tar_member(name, data))
            _sync(f)
        columns = {name: table.get(name, column) for name, column in row.table.items()}
        copied = replace(row, end=end, table=columns)
        append_line(file.journal, asdict(copied))
        file.rows = merge_rows([*file.rows.values(), copied])

    def _drawn(self, file: ShardFile, unit: WorkUnit, group: EncodedGroup) -> str:
        """Append a drawn group; a line on how it compares with what the index had recorded."""
        before = self._listed.get(unit.group)
        lost = unit.group not in self._mend.keep and (before is not None or self._mend.row is not None)
        file.append(group, repaired=lost)
        where, key = f"{file.final.name}: group {unit.group}", note_environment(self._folder, group.environment)
        if before is None:
            return f"{where}: drawn in environment {key}"
        names = before.members.keys()
        now = file.rows[unit.group].members
        wrong = [name for name in names if now.get(name) != before.members[name]]
        if not wrong:
            return f"{where}: drawn again, every byte as recorded"
        recorded = sorted({old for _, old, _ in before.runs})
        apart = f"recorded in {' and '.join(recorded)}, drawn again in {key}"
        why = "the same environment" if recorded == [key] else f"other hardware or libraries: {apart}"
        return f"{where}: drawn again, {len(wrong)} of {len(names)} members differ from the record ({why})"

    def _finish(self, file: ShardFile) -> list[str]:
        """Seal the tar; the index gets a row where it says something new. A line on how the tars compare."""
        sealed, row = file.seal(), self._mend.row
        if row is not None and replace(sealed, revision=row.revision) == row:
            file.journal.unlink(missing_ok=True)
        else:
            commit(self._folder, sealed)
        if row is None or sealed.samples != row.samples:
            return []
        same = "the one" if sealed.sha256 == row.sha256 else "another one than"
        return [f"{file.final.name}: the tar is {same} that the index had recorded"]
