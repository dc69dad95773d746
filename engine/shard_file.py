"""One shard on its way: the part file that grows, its journal, and the finished tar.

A shard grows as `shard-N.tar.part`; after each group its bytes are forced to disk and one journal line says how
far they are good. A finished shard gets the file of its groups, is renamed, gets its index row, then loses its journal.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from synthkd.engine.encoding import BLOCK, EncodedGroup, tar_member
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import note_environment
from synthkd.engine.locks import shard_lock
from synthkd.engine.rows import (
    GroupRow,
    Part,
    ShardRow,
    append_line,
    group_rows,
    index_name,
    lines_of,
    mend_tail,
    merge_rows,
    read_journal,
    rows_path,
    shard_name,
    write_atomically,
)
from synthkd.export.artifacts import sync_folder


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


def is_whole(folder: Path, row: ShardRow) -> bool:
    """Whether the files of a finished shard are there, and its tar of the size that its row says."""
    tar = folder / row.file
    return tar.is_file() and tar.stat().st_size == row.bytes and rows_path(folder, row.shard).is_file()


def journalled(folder: Path, shard: int) -> dict[int, GroupRow]:
    """Groups of an unfinished shard whose bytes are there, by group; nothing is changed."""
    for path in (part_path(folder, shard), folder / shard_name(shard)):  # the tar: renamed, or as it was before it grew
        if path.exists():
            return read_journal(journal_path(folder, shard), path.stat().st_size)
    return {}


Standing = Callable[[], tuple[ShardRow | None, ShardRow | None]]  # a shard's row if its tar is whole; the newest known


class ShardFile:
    """One shard on its way: the journalled `.part` file and its rows; held by one process until it is released."""

    def __init__(
        self,
        folder: Path,
        shard: int,
        finished: ShardRow | None,
        known: ShardRow | None = None,
        now: Standing | None = None,
    ) -> None:
        """Pick up whatever an earlier run left of the shard; raises SynthkdError where another process writes it.

        finished: its row, where its tar is whole; known: its newest row, though its tar be lost; now: tells both as
        they are once the shard is locked, where other runs may have finished it meanwhile.
        """
        self._held = contextlib.ExitStack()
        self._held.enter_context(shard_lock(folder, shard))
        self.folder, self.final = folder, folder / shard_name(shard)
        self.part, self.journal = part_path(folder, shard), journal_path(folder, shard)
        try:
            self.finished, self.known = now() if now else (finished, known)
            self.shard, finished = shard, self.finished
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
        sealed = ShardRow(
            shard=self.shard,
            file=self.final.name,
            samples=sum(g.kept for g in groups),
            bytes=self.final.stat().st_size,
            sha256=file_digest(self.final),
            groups=len(groups),
            rows=hashlib.sha256(text.encode()).hexdigest(),
        )
        before = self.known or self.finished
        same = before is not None and replace(sealed, revision=before.revision) == before
        return replace(sealed, revision=before.revision + (not same)) if before else sealed

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
        if good != said:
            write_atomically(self.journal, lines_of(good[g] for g in sorted(good)))
        with self.part.open("rb+") as f:
            f.truncate(max((r.end for r in good.values()), default=0))


def commit(folder: Path, row: ShardRow, part: Part | None = None) -> None:
    """Put a sealed shard into the index, then drop its journal; by the one writer of that index."""
    append_line(folder / index_name(part), asdict(row))
    journal_path(folder, row.shard).unlink(missing_ok=True)


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
