"""Batches -> WebDataset tars that survive a kill at any moment: which shards of a plan are there, and what is left.

Work left is the plan minus index and journals; how one shard grows is told in `engine.shard_file`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from synthkd.engine.batch import SampleStream
from synthkd.engine.encoding import EncodedGroup
from synthkd.engine.index import claim_folder
from synthkd.engine.locks import claim_lock, folder_lock
from synthkd.engine.plan import Plan, WorkUnit
from synthkd.engine.rows import (
    IndexTail,
    Part,
    ShardRow,
    gather_index,
    group_rows,
    index_name,
    mend_tail,
    read_index,
    rows_path,
)
from synthkd.engine.shard_file import (
    ShardFile,
    commit,
    disk_errors,
    file_digest,
    is_whole,
    journal_path,
    journalled,
    part_path,
    short_digest,
)
from synthkd.engine.writer import WriteSummary, Writing, write_groups

__all__ = [
    "Elsewhere", "ShardFile", "ShardFolder", "claim", "commit", "disk_errors", "file_digest", "journal_path",
    "journalled", "part_path", "short_digest", "write_shards",
]  # fmt: skip


class Elsewhere(Protocol):
    """Where finished shards go from the folder they grow in (`remote.RemoteSet`)."""

    def attach(self) -> None:
        """Bring the folder up to what is there, before it is claimed."""

    def note(self) -> None:
        """Publish what the folder says of itself."""

    def holds(self, row: ShardRow) -> bool:
        """Whether a finished shard is there."""
        ...

    def publish(self, row: ShardRow) -> None:
        """Put a sealed shard there."""

    def took(self, row: ShardRow) -> None:
        """Another process has put it there."""

    def drop(self, row: ShardRow) -> None:
        """Let the tar of a published shard leave the folder."""

    def bring(self, row: ShardRow) -> None:
        """Put the tar of a published shard back into the folder."""


class ShardFolder:
    """A set on disk: which samples of a plan are there, and where the next group goes. Holds one short row a shard."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        shards: Sequence[int] | None,
        part: Part | None = None,
        remote: Elsewhere | None = None,
    ) -> None:
        """shards: the order in which shards are filled, all by default, or all of the part; remote: where they go."""
        self.folder, self.plan, self.part, self.remote = folder, plan, part, remote
        mend_tail(folder / index_name(part))
        whole: Sequence[int] = range(plan.num_shards) if part is None else part.shards(plan.num_shards)
        self.order = whole if shards is None else shards
        self._known = read_index(folder, missing=True)  # newest rows, with those of shards that are lost
        self._index = {n: r for n, r in self._known.items() if self._whole(r)}
        self._tail = IndexTail(folder) if part is not None and remote is None else None
        self._open: ShardFile | None = None

    def _whole(self, row: ShardRow) -> bool:
        """Whether the files of a finished shard are there; one of another size is damaged, and drawn again."""
        if self.remote is None:
            return is_whole(self.folder, row)
        return self.remote.holds(row) and rows_path(self.folder, row.shard).is_file()

    def _follow(self) -> None:
        """Take in what runs of other parts have finished meanwhile; parts of different counts share shards."""
        for row in self._tail.fresh() if self._tail else ():
            if row.shard not in self._known or row.revision > self._known[row.shard].revision:
                self._known[row.shard] = row
                self._index.pop(row.shard, None)
                if self._whole(row):
                    self._index[row.shard] = row

    def standing(self, shard: int) -> tuple[ShardRow | None, ShardRow | None]:
        """The row of a finished shard, None before that; and its newest row, though its tar be lost."""
        self._follow()
        return self._index.get(shard), self._known.get(shard)

    def shard(self, shard: int) -> ShardFile:
        """The state of a shard, locked until another one is asked for."""
        if self._open is None or self._open.shard != shard:
            self.release()
            row, known = self.standing(shard)
            if row is not None and self.remote is not None and not self._begun(shard):
                self.remote.bring(row)
            self._open = ShardFile(self.folder, shard, row, known, partial(self.standing, shard))
        return self._open

    def release(self) -> None:
        """Let others write the shard that was open."""
        if self._open is not None:
            self._open.release()
        self._open = None

    def settled(self, shard: int) -> bool:
        """Whether a shard has all its wanted samples, and a row that says so."""
        row = self._index.get(shard)
        return row is not None and row.samples >= self.plan.shard_samples(shard) and not self._begun(shard)

    def _begun(self, shard: int) -> bool:
        return journal_path(self.folder, shard).exists()

    def wanted(self, shard: int) -> list[WorkUnit]:
        """Units of a shard with samples that are not on disk; nothing is changed."""
        self._follow()
        if self.settled(shard):
            return []
        kept = self._kept(shard)
        return [u for u in self.plan.shard_units(shard) if kept.get(u.group, 0) < u.kept]

    def pending(self) -> Iterator[WorkUnit]:
        """Units with samples that are not on disk, in the order of shards."""
        for shard in self.order:
            yield from self.wanted(shard)

    def _kept(self, shard: int) -> dict[int, int]:
        """Samples of each group of a shard that are safe."""
        if self._begun(shard):
            return {g: row.kept for g, row in journalled(self.folder, shard).items()}
        row = self._index.get(shard)
        return {g.group: g.kept for g in group_rows(self.folder, row)} if row else {}

    def append(self, group: EncodedGroup) -> int:
        """Write a group, and finish its shard where that was its last; returns how many samples were new."""
        shard = group.group // self.plan.recipe.groups_per_shard
        state = self.shard(shard)
        new = group.kept - state.kept(group.group)
        if new <= 0 and self.settled(shard):  # another run has finished it while this one drew
            return 0
        state.append(group)
        self.close(shard)
        return new

    def close(self, shard: int) -> None:
        """Finish a shard if all its wanted groups are there and it has none of its rows in the index yet."""
        if self.settled(shard) or not self._begun(shard):
            return
        state = self.shard(shard)
        if not self.settled(shard) and all(state.kept(u.group) >= u.kept for u in self.plan.shard_units(shard)):
            row = state.seal()
            if self.remote is not None:
                self.remote.publish(row)
            self._note(row)
            self.release()
            if self.remote is not None:
                self.remote.drop(row)

    def took(self, row: ShardRow) -> None:
        """Put a shard that another process has sealed, and published, into the index."""
        if self.remote is not None:
            self.remote.took(row)
        self._note(row)

    def _note(self, row: ShardRow) -> None:
        commit(self.folder, row, self.part)
        self._index[row.shard] = self._known[row.shard] = row

    def present(self) -> int:
        """Wanted samples that are safe on disk."""
        return sum(self.samples(shard) for shard in self.order)

    def samples(self, shard: int) -> int:
        """Wanted samples of a shard that are safe on disk."""
        if self.settled(shard):
            return self.plan.shard_samples(shard)
        if shard not in self._index and not self._begun(shard):
            return 0
        kept = self._kept(shard)
        return sum(min(u.kept, kept.get(u.group, 0)) for u in self.plan.shard_units(shard))


def write_shards(
    stream: SampleStream,
    out: str | Path,
    *,
    shards: Sequence[int] | None = None,
    part: Part | None = None,
    source: Mapping[str, Any] | None = None,
    writing: Writing | None = None,
    on_batch: Callable[[int], None] = lambda _: None,
    on_present: Callable[[int], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    remote: Elsewhere | None = None,
) -> WriteSummary:
    """Write a stream to a folder; what is there already is kept, and only the rest is drawn.

    shards: order of shards; part: which of several runs that share the folder this is; source: what the command line
    needs for a replay, kept in the manifest; writing: encoder, threads and groups under way;
    on_batch: called with the number of new samples when a group is safe, in the thread that appends; on_present once
    with those already there; should_stop: asked after each group drawn, and at the end; remote: where finished shards
    go, for which the folder is a spool then.
    Raises SynthkdError where the folder holds another set, is being written, or has no space left.
    """
    folder = Path(out)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder, part):
            if remote is not None:
                remote.attach()
            claim(folder, stream, source or {}, part)
            if remote is not None:
                remote.note()
            state = ShardFolder(folder, stream.plan, shards, part, remote)
            try:
                on_present(state.present())
                return _write(stream, state, writing, on_batch, should_stop)
            finally:
                state.release()


def claim(folder: Path, stream: SampleStream, source: Mapping[str, Any], part: Part | None = None) -> None:
    """Make the folder this stream's set, under its lock; raises SynthkdError where it holds another one."""
    identity = stream.identity  # digests of all weights: parts that start at once take them side by side
    with claim_lock(folder):
        claim_folder(folder, identity, stream.plan.request.num_samples, source)
    if part is None:
        gather_index(folder)


def _write(
    stream: SampleStream,
    state: ShardFolder,
    writing: Writing | None,
    on_batch: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> WriteSummary:
    for shard in state.order:  # renamed by a run that ended before it wrote the row
        state.close(shard)
    summary = write_groups(stream, state.pending(), state.append, writing, on_batch, should_stop)
    return replace(summary, present=state.present())
