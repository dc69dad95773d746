"""Batches -> WebDataset tars that survive a kill at any moment.

A shard grows as `shard-N.tar.part`; after each group its bytes are forced to disk and one journal line says how
far they are good. A finished shard gets the file of its groups, is renamed, gets its index row, then loses its journal.
Work left is the plan minus index and journals.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from synthkd.engine.batch import SampleStream
from synthkd.engine.encoding import BLOCK, EncodedGroup, tar_member
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import claim_folder, note_environment
from synthkd.engine.locks import claim_lock, folder_lock, shard_lock
from synthkd.engine.plan import Plan, WorkUnit
from synthkd.engine.rows import (
    GroupRow,
    Part,
    ShardRow,
    append_line,
    gather_index,
    group_rows,
    index_name,
    lines_of,
    mend_tail,
    merge_rows,
    read_index,
    read_journal,
    rows_path,
    shard_name,
    write_atomically,
)
from synthkd.engine.writer import WriteSummary, Writing, write_groups
from synthkd.export.artifacts import sync_folder


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

    def drop(self, row: ShardRow) -> None:
        """Let the tar of a published shard leave the folder."""

    def bring(self, row: ShardRow) -> None:
        """Put the tar of a published shard back into the folder."""


def short_digest(data: bytes) -> str:
    """Sixteen hexadecimal digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def part_path(folder: Path, shard: int) -> Path:
    """A shard while it grows."""
    return folder / f"{shard_name(shard)}.part"


def journal_path(folder: Path, shard: int) -> Path:
    """What is good of a shard that grows."""
    return folder / f"{shard_name(shard)}.journal"


def journalled(folder: Path, shard: int) -> dict[int, GroupRow]:
    """Groups of an unfinished shard whose bytes are there, by group; nothing is changed."""
    part, rows = part_path(folder, shard), read_journal(journal_path(folder, shard))
    if part.exists():
        size = part.stat().st_size
        return {group: row for group, row in rows.items() if row.end <= size}
    return rows if (folder / shard_name(shard)).exists() else {}  # renamed, but not indexed


class ShardFile:
    """One shard on its way: the journalled `.part` file and its rows; held by one process until it is released."""

    def __init__(self, folder: Path, shard: int, finished: ShardRow | None) -> None:
        """Pick up whatever an earlier run left of the shard; raises SynthkdError where another process writes it."""
        self._held = contextlib.ExitStack()
        self._held.enter_context(shard_lock(folder, shard))
        self.folder, self.final = folder, folder / shard_name(shard)
        self.part, self.journal = part_path(folder, shard), journal_path(folder, shard)
        self.shard, self.finished = shard, finished
        try:
            self.rows: dict[int, GroupRow] = {}
            if self.journal.exists():  # it begins with the groups that were there before
                self._recover()
            else:  # nothing vouches for a part file without its journal
                self.part.unlink(missing_ok=True)
                self.rows = {r.group: r for r in group_rows(folder, finished)} if finished else {}
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let others write the shard."""
        self._held.close()

    def kept(self, group: int) -> int:
        """Samples of a group that are safe on disk."""
        return self.rows[group].kept if group in self.rows else 0

    def append(self, group: EncodedGroup, repaired: bool = False) -> None:
        """Write the samples of a group that are not there yet; they are safe when this returns."""
        if not self.part.exists():
            self._begin()
        have = self.kept(group.group)
        fresh = group.members[group.per_sample * have :]
        table = {name: column[have:] for name, column in group.table.items()}
        table |= {"offset": [], "size": []}
        with self.part.open("ab") as f:
            end = f.tell()
            for i, (name, data) in enumerate(fresh):
                if i % group.per_sample == 0:
                    table["offset"].append(end + BLOCK)
                    table["size"].append(len(data))
                end += f.write(tar_member(name, data))
            f.flush()
            os.fsync(f.fileno())
        row = GroupRow(
            group=group.group,
            attempt=group.attempt,
            kept=group.kept,
            end=end,
            environment=note_environment(self.folder, group.environment),
            members={name: short_digest(data) for name, data in fresh},
            table=table,
            seconds=group.seconds,
            curves=group.curves,
            repaired=repaired,
        )
        append_line(self.journal, asdict(row))
        self.rows = merge_rows([*self.rows.values(), row])

    def seal(self) -> ShardRow:
        """Close the tar, list its groups, rename it; returns the row that `commit` puts into an index.

        Safe to repeat after a kill.
        """
        if self.part.exists():
            with self.part.open("ab") as f:
                f.write(b"\0" * (2 * BLOCK))
                f.flush()
                os.fsync(f.fileno())
        groups = [self.rows[g] for g in sorted(self.rows)]
        text, listed = lines_of(groups), rows_path(self.folder, self.shard)
        listed.parent.mkdir(exist_ok=True)
        write_atomically(listed, text)
        if self.part.exists():
            self.part.replace(self.final)
            sync_folder(self.folder)
        return ShardRow(
            shard=self.shard,
            file=self.final.name,
            samples=sum(g.kept for g in groups),
            bytes=self.final.stat().st_size,
            sha256=file_digest(self.final),
            groups=len(groups),
            rows=hashlib.sha256(text.encode()).hexdigest(),
            revision=self.finished.revision + 1 if self.finished else 0,
        )

    def _begin(self) -> None:
        """Start the part file, from the finished shard where the set grows."""
        write_atomically(self.journal, lines_of(self.rows[g] for g in sorted(self.rows)))
        fresh = self.part.with_suffix(".fresh")
        if self.rows:
            shutil.copyfile(self.final, fresh)
            with fresh.open("rb+") as f:
                f.truncate(max(r.end for r in self.rows.values()))
        else:
            fresh.touch()
        fresh.replace(self.part)

    def _recover(self) -> None:
        """Cut the part file back to what the journal vouches for."""
        mend_tail(self.journal)
        good, said = journalled(self.folder, self.shard), read_journal(self.journal)
        self.rows = good
        if not self.part.exists():  # renamed but not indexed, or not begun: `seal` or `append` goes on from here
            return
        if len(good) != len(said):
            write_atomically(self.journal, lines_of(good[g] for g in sorted(good)))
        with self.part.open("rb+") as f:
            f.truncate(max((r.end for r in good.values()), default=0))


def commit(folder: Path, row: ShardRow, part: Part | None = None) -> None:
    """Put a sealed shard into the index, then drop its journal; by the one writer of that index."""
    append_line(folder / index_name(part), asdict(row))
    journal_path(folder, row.shard).unlink(missing_ok=True)


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
        rows = read_index(folder, missing=remote is not None)  # a shard of another size is damaged, and drawn again
        self._index = {n: r for n, r in rows.items() if self._whole(r)}
        self._open: ShardFile | None = None

    def _whole(self, row: ShardRow) -> bool:
        """Whether the files of a finished shard are there."""
        path = self.folder / row.file
        there = path.stat().st_size == row.bytes if self.remote is None else self.remote.holds(row)
        return there and rows_path(self.folder, row.shard).is_file()

    def shard(self, shard: int) -> ShardFile:
        """The state of a shard, locked until another one is asked for."""
        if self._open is None or self._open.shard != shard:
            self.release()
            row = self._index.get(shard)
            if row is not None and self.remote is not None and not self._begun(shard):
                self.remote.bring(row)
            self._open = ShardFile(self.folder, shard, row)
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
        state.append(group)
        self.close(shard)
        return new

    def close(self, shard: int) -> None:
        """Finish a shard if all its wanted groups are there and it has none of its rows in the index yet."""
        if self.settled(shard) or not self._begun(shard):
            return
        state = self.shard(shard)
        if all(state.kept(u.group) >= u.kept for u in self.plan.shard_units(shard)):
            row = state.seal()
            if self.remote is not None:
                self.remote.publish(row)
            self.note(row)
            self.release()
            if self.remote is not None:
                self.remote.drop(row)

    def note(self, row: ShardRow) -> None:
        """Put a shard that another process has sealed into the index."""
        commit(self.folder, row, self.part)
        self._index[row.shard] = row

    def row(self, shard: int) -> ShardRow | None:
        """The row of a finished shard; None before that."""
        return self._index.get(shard)

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
    with claim_lock(folder):
        claim_folder(folder, stream.identity, stream.plan.request.num_samples, source)
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


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """What the system says of a disk, as one line."""
    reasons = {
        errno.ENOSPC: "no space left",
        errno.EDQUOT: "disk quota exceeded",
        errno.EFBIG: "file size limit reached",
        errno.EACCES: "no permission to write",
        errno.EROFS: "read-only file system",
    }
    try:
        yield
    except OSError as error:
        reason = reasons.get(error.errno or 0, error.strerror or str(error))
        raise SynthkdError(
            f"{folder}: {reason}; every finished group is safe: mend that and run the same command again"
        ) from error
