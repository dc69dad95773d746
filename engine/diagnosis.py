"""What would mend a set: what is right is kept, what can be told from the rest is told, and only the others drawn."""

from collections.abc import Callable, Iterable, Mapping
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


@dataclass(frozen=True)
class Need:
    """A group that has to be drawn, and the key of the environment that is to be the like of."""

    unit: WorkUnit
    environment: str


@dataclass(frozen=True)
class Mend:
    """What is to be done for a shard.

    how: "list" its groups again from its tar; "index" it again, "clear" what a killed run left; "rebuild" its tar, from
    the groups `keep` of `listed` and those of `needs`, without its journal where `discard` says so.
    why: its first problem; row: of the index, if there is one; needs: what is to be drawn.
    """

    shard: int
    how: str
    why: str
    row: ShardRow | None
    listed: bool = False
    keep: frozenset[int] = frozenset()
    needs: tuple[Need, ...] = ()
    discard: bool = False

    def said(self) -> str:
        """What will be done, in one line."""
        what = {
            "list": "its groups are listed again from its tar (its seconds and curves are lost)",
            "index": "it is put back into the index",
            "clear": "what a killed run left of it is removed",
            "rebuild": f"{len(self.keep)} groups are kept, {len(self.needs)} drawn: {_short(self.needs)}",
        }[self.how]
        return f"{shard_name(self.shard)}: {what if self.needs or self.how != 'rebuild' else 'written again'}"


def _short(needs: tuple[Need, ...]) -> str:
    shown = ", ".join(str(n.unit.group) for n in needs[:8])
    return shown + (", ..." if len(needs) > 8 else "")


@dataclass(frozen=True)
class Diagnosis:
    """What is to be done for a set, shard by shard, and the problems that a repair leaves alone."""

    mends: tuple[Mend, ...]
    left: tuple[str, ...]


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
    mends, left, seen = [], settled(state), _Seen()
    with closing(checked(state, workers)) as verdicts:
        for one in verdicts:
            row = state.index.get(one.shard)
            if row is not None:
                on_shard(one.samples)
            if one.shard >= state.plan.num_shards:
                left += one.problems
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
    return Diagnosis(tuple(_usual(m, seen.usual()) for m in mends), tuple(left))


def _usual(mend: Mend, key: str) -> Mend:
    """The same, its groups of unknown origin drawn as most of the set was."""
    return replace(mend, needs=tuple(replace(n, environment=n.environment or key) for n in mend.needs))


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
    units, have = {u.group: u for u in state.plan.shard_units(shard)}, {g.group: g for g in listed}
    keep = {g.group for g in listed if g.group in units and _whole(state, units[g.group], g, found)}
    needs = [
        Need(u, have[u.group].environment if u.group in have else "")
        for u in units.values()
        if u.group not in keep or have[u.group].kept < u.kept
    ]
    return Mend(shard, "rebuild", why, row, bool(listed), frozenset(keep), tuple(needs), discard=True)


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
    needs = tuple(n for n in mend.needs if n.unit.group not in done)
    return replace(mend, keep=mend.keep - begun.keys(), needs=needs, discard=False)


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
        placed = {name: (at, data[at : at + size]) for name, at, size in walk(data)}
    return not [p for g in listed for p in check_columns(row, g, placed)]


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
