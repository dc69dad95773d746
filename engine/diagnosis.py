"""What would mend a set: what is right is kept, what can be told from the rest is told, and only the others drawn."""

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from synthkd.engine.checking import (
    check_columns,
    check_groups,
    digest_of,
    is_canonical,
    opened,
    ordered,
    salvage,
    walk,
)
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import read_environments
from synthkd.engine.plan import WorkUnit
from synthkd.engine.rows import GroupRow, ShardRow, group_rows, read_journal, rows_path, shard_name
from synthkd.engine.shards import file_digest, journal_path, journalled, part_path
from synthkd.engine.verify import SetState, checked, leftovers, settled

_SHOWN = 8  # groups that a line names


@dataclass(frozen=True)
class Need:
    """A group that has to be drawn, and the key of the environment that is to be the like of."""

    unit: WorkUnit
    environment: str


@dataclass(frozen=True)
class Mend:
    """What is to be done for a shard.

    how: "list" its groups again from its tar; "index" it again, "clear" what a killed run left; "rebuild" its tar, from
    the groups `keep` of those that its file lists, and drawn ones, without its journal where `discard` says so.
    why: its first problem; row: of the index, if there is one; count: groups to be drawn; first: the first of them;
    done: groups that its journal has whole; usual: the environment of groups of unknown origin.
    """

    shard: int
    how: str
    why: str
    row: ShardRow | None
    listed: bool = False
    keep: frozenset[int] = frozenset()
    count: int = 0
    first: tuple[int, ...] = ()
    done: frozenset[int] = frozenset()
    discard: bool = False
    usual: str = ""

    def said(self) -> str:
        """What will be done, in one line."""
        what = {
            "list": "its groups are listed again from its tar (its seconds and curves are lost)",
            "index": "it is put back into the index",
            "clear": "what a killed run left of it is removed",
            "rebuild": f"{len(self.keep)} groups are kept, {self.count} drawn: {self._shown()}",
        }[self.how]
        return f"{shard_name(self.shard)}: {what if self.count or self.how != 'rebuild' else 'written again'}"

    def _shown(self) -> str:
        return ", ".join(map(str, self.first)) + (", ..." if self.count > len(self.first) else "")

    def needs(self, state: SetState) -> Iterator[Need]:
        """What is to be drawn, in order; told from the plan and the shard's file of groups, so that nothing is held."""
        have = {g.group: g for g in vouched(state.folder, self.shard, self.row)} if self.count and self.listed else {}
        for unit in state.plan.shard_units(self.shard) if self.count else ():
            listed = have.get(unit.group)
            whole = listed is not None and unit.group in self.keep and listed.kept >= unit.kept
            if not whole and unit.group not in self.done:
                yield Need(unit, (listed.environment if listed else "") or self.usual)

    def counted(self, state: SetState) -> "Mend":
        """The same, with the number of its needs."""
        first, count = [], 0
        for need in replace(self, count=1).needs(state):
            first += [need.unit.group] if count < _SHOWN else []
            count += 1
        return replace(self, count=count, first=tuple(first))


@dataclass(frozen=True)
class Diagnosis:
    """What is to be done for a set, shard by shard, and the problems that a repair leaves alone.

    absent: runs of shards of which nothing is there; what they need is told when it is asked for.
    """

    state: SetState
    mends: tuple[Mend, ...]
    absent: tuple[range, ...]
    left: tuple[str, ...]
    usual: str = ""

    @property
    def shards(self) -> int:
        """How many have to be mended or drawn."""
        return len(self.mends) + sum(map(len, self.absent))

    @property
    def groups(self) -> int:
        """How many have to be drawn."""
        return sum(m.count for m in self.mends) + sum(_groups(self.state, run) for run in self.absent)

    def in_order(self) -> Iterator[Mend]:
        """What needs no drawing first, then shard by shard."""
        yield from (m for m in self.mends if not m.count)
        drawn = (m for m in self.mends if m.count)
        lost = (_lost(self.state, shard, self.usual) for run in self.absent for shard in run)
        yield from heapq.merge(drawn, lost, key=lambda mend: mend.shard)

    def said(self) -> Iterator[str]:
        """A line for each shard that is to be mended, and for each run of shards of which nothing is there."""
        for mend in self.mends:
            yield f"{mend.why} -> {mend.said()}"
        for run in self.absent:
            if len(run) == 1:
                mend = _lost(self.state, run[0], self.usual)
                yield f"{mend.why} -> {mend.said()}"
            else:
                about = f"{_groups(self.state, run)} groups are drawn"
                yield f"shards {run[0]} to {run[-1]}: not begun ({len(run)} shards) -> {about}"


def _groups(state: SetState, run: range) -> int:
    size, most = state.plan.recipe.groups_per_shard, state.plan.num_groups
    return min((run[-1] + 1) * size, most) - run[0] * size


def _lost(state: SetState, shard: int, usual: str) -> Mend:
    """All of a shard of which nothing is there."""
    run = range(shard, shard + 1)
    start, count = shard * state.plan.recipe.groups_per_shard, _groups(state, run)
    first = tuple(range(start, start + min(count, _SHOWN)))
    why = f"shard {shard}: not finished ({state.plan.shard_samples(shard)} samples)"
    return Mend(shard, "rebuild", why, None, count=count, first=first, discard=True, usual=usual)


@dataclass
class _Seen:
    """What the shards that are right tell of the others."""

    environments: dict[str, int] = field(default_factory=dict)

    def note(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.environments[key] = self.environments.get(key, 0) + 1

    def usual(self) -> str:
        """The environment that most shards know; "" for none."""
        return max(self.environments, key=lambda key: self.environments[key], default="")


def diagnose(state: SetState, workers: int | None = 1, on_shard: Callable[[int], None] = lambda _: None) -> Diagnosis:
    """Check a set, and say what would mend it; nothing is changed. on_shard: as in `verify_set`."""
    mends, absent, left, seen = list[Mend](), list[range](), settled(state), _Seen()
    with closing(checked(state, workers)) as verdicts:
        for one in verdicts:
            row = state.index.get(one.shard)
            if row is not None:
                on_shard(one.samples)
            if one.shard >= state.plan.num_shards:
                left += one.problems
            elif row is None and _is_absent(state.folder, one.shard):
                start = absent.pop().start if absent and absent[-1].stop == one.shard else one.shard
                absent.append(range(start, one.shard + 1))
            elif one.found:
                mends.append(_mend(state, one.shard, row, one.problems[0]))
            else:
                seen.note(one.environments - {""})
                if any(path.exists() for path in left_by_a_run(state.folder, one.shard)):
                    mends.append(Mend(one.shard, "clear", f"{shard_name(one.shard)}: left by a killed run", row))
    known = read_environments(state.folder)
    left += [f"environments/{key}.json: is missing or damaged, and only a drawing there tells it" for key in
             sorted(seen.environments.keys() - known.keys())]  # fmt: skip
    left += [line for line in leftovers(state) if "no file of a set" in line or "outside the set" in line]
    usual = seen.usual()  # groups of unknown origin are drawn as most of the set was
    return Diagnosis(state, tuple(replace(m, usual=usual) for m in mends), tuple(absent), tuple(left), usual)


def _is_absent(folder: Path, shard: int) -> bool:
    """Whether there is nothing of a shard that anything vouches for."""
    return not (folder / shard_name(shard)).exists() and not journal_path(folder, shard).exists()


def _mend(state: SetState, shard: int, row: ShardRow | None, why: str) -> Mend:
    """What mends a shard that has a problem; as little as will do."""
    folder, tar = state.folder, state.folder / shard_name(shard)
    if journal_path(folder, shard).exists():
        return _gone_on(state, shard, row, why)
    listed = vouched(folder, shard, row)
    if row is not None and not listed and tar.is_file() and file_digest(tar) == row.sha256:
        return Mend(shard, "list", why, row)
    unsure = listed or unvouched(folder, shard)
    if unsure and _agree(state, shard, unsure):
        return Mend(shard, "index", why, row)
    with opened(tar) as data:
        return _rebuilt(state, shard, row, why, listed, salvage(data, members(listed)))


def _rebuilt(
    state: SetState, shard: int, row: ShardRow | None, why: str, listed: list[GroupRow], found: Mapping[str, Any]
) -> Mend:
    """Groups whose members were all found are kept, the others drawn."""
    units = {u.group: u for u in state.plan.shard_units(shard)} if listed else {}
    keep = {g.group for g in listed if g.group in units and _whole(state, units[g.group], g, found)}
    return Mend(shard, "rebuild", why, row, bool(listed), frozenset(keep), discard=True).counted(state)


def _whole(state: SetState, unit: WorkUnit, group: GroupRow, found: Mapping[str, Any]) -> bool:
    """Whether a group lists its samples, and each of their files was found."""
    names = set(ordered(unit, group, state.plan.recipe.image_format))
    return group.kept <= unit.kept and names == group.members.keys() and names <= found.keys()


def _gone_on(state: SetState, shard: int, row: ShardRow | None, why: str) -> Mend:
    """What a killed run left is gone on from where all of it is right; else it counts for nothing."""
    folder, tar, part = state.folder, state.folder / shard_name(shard), part_path(state.folder, shard)
    begun, listed = _begun(folder, shard), vouched(folder, shard, row)
    with opened(part if part.exists() else tar) as data:
        found, planned = salvage(data, members(begun.values())), {u.group: u for u in state.plan.shard_units(shard)}
    sound = all(g in planned and _whole(state, planned[g], r, found) for g, r in begun.items())
    with opened(tar) as data:
        mend = _rebuilt(state, shard, row, why, listed, salvage(data, members(listed)))
    done = {u.group for u in planned.values() if u.group in begun and begun[u.group].kept >= u.kept}
    if not sound or not (part.exists() or done == planned.keys()):
        return mend
    return replace(mend, keep=mend.keep - begun.keys(), done=frozenset(done), discard=False).counted(state)


def _begun(folder: Path, shard: int) -> dict[int, GroupRow]:
    """What a journal vouches for; nothing where it cannot be read."""
    with suppress(SynthkdError):
        return journalled(folder, shard)
    return {}


def members(rows: Iterable[GroupRow]) -> dict[str, str]:
    """Digests of all members of groups."""
    return {name: digest for row in rows for name, digest in row.members.items()}


def vouched(folder: Path, shard: int, row: ShardRow | None) -> list[GroupRow]:
    """The groups of a shard as the index vouches for them; [] where it does not."""
    with suppress(SynthkdError):
        return group_rows(folder, row) if row is not None else []
    return []


def unvouched(folder: Path, shard: int) -> list[GroupRow]:
    """The groups of a shard as their file lists them, whatever the index says."""
    with suppress(SynthkdError, OSError, ValueError):
        rows = read_journal(rows_path(folder, shard))
        return [rows[g] for g in sorted(rows)]
    return []


def _agree(state: SetState, shard: int, listed: list[GroupRow]) -> bool:
    """Whether tar and listed groups agree with one another and with the plan in every byte, so that both are right."""
    tar, units = state.folder / shard_name(shard), {u.group: u for u in state.plan.shard_units(shard)}
    if not tar.is_file() or not all(g.group in units for g in listed):
        return False
    row = row_of(state.folder, shard, listed, None)
    if check_groups(state.plan, row, listed):
        return False
    suffix = state.plan.recipe.image_format
    order = [(n, g.members[n]) for g in listed for n in ordered(units[g.group], g, suffix)]
    with opened(tar) as data:
        if not is_canonical(data, order):
            return False
        placed = {name: (at, size) for name, at, size in walk(data)}
        return not [p for g in listed for p in check_columns(row, g, placed, data)]


def row_of(folder: Path, shard: int, listed: list[GroupRow], before: ShardRow | None) -> ShardRow:
    """The index row of a shard whose tar and groups are right."""
    tar = folder / shard_name(shard)
    return ShardRow(
        shard=shard, file=tar.name, samples=sum(g.kept for g in listed), bytes=tar.stat().st_size,
        sha256=file_digest(tar), groups=len(listed), rows=digest_of(rows_path(folder, shard).read_text()),
        revision=before.revision + 1 if before else 0,
    )  # fmt: skip


def left_by_a_run(folder: Path, shard: int) -> tuple[Path, ...]:
    """Files of a shard that grows; the journal after the part that it vouches for."""
    part = part_path(folder, shard)
    return part.with_suffix(".fresh"), part, journal_path(folder, shard), part.with_suffix(".lock")
