"""A set in a store: shards grow in a local folder, the spool, and each finished one is published and leaves the disk.

In the store a shard counts once `index/shard-NNNNNN.json` is there, which is written after its tar and its rows. Work
left is the plan minus these. Two runs that publish one shard write the same tar, for a shard is a function of the plan;
only the times in its rows differ, and where rows of the one meet the row of the other, the shard does not count and is
drawn again. So runs that overlap cost time and nothing else.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from synthkd.engine.agreement import learned, refuse_unlike, settle
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import (
    CHECKPOINT_FILES,
    CHECKPOINTS,
    DECODER,
    DECODER_FILES,
    ENVIRONMENTS,
    MANIFEST,
    read_manifest,
)
from synthkd.engine.locks import folder_lock
from synthkd.engine.remote_lock import store_lock
from synthkd.engine.rows import (
    INDEX,
    MAX_ROWS,
    ROWS,
    Part,
    ShardRow,
    append_line,
    group_rows,
    mend_tail,
    read_index,
    rows_path,
    shard_row,
    write_atomically,
)
from synthkd.engine.shards import file_digest, journal_path
from synthkd.engine.stores import Store, checked_url, is_url
from synthkd.engine.untrusted import parse_note
from synthkd.export.artifacts import own_cache

_ROW = re.compile(r"index/shard-(\d{6,18})\.json")
_NOTE = re.compile(
    rf"{ENVIRONMENTS}/[0-9a-f]{{16}}\.json|{DECODER}/({'|'.join(map(re.escape, DECODER_FILES))})"
    rf"|rounds/round-\d{{1,9}}/({'|'.join(map(re.escape, CHECKPOINT_FILES))})"
)


def row_name(shard: int) -> str:
    """Where a store says that a shard is finished."""
    return f"index/shard-{shard:06d}.json"


@dataclass(frozen=True)
class Publisher:
    """Puts finished shards of a folder into a store; picklable, so that workers on other machines can do it."""

    store: Store
    folder: Path

    def __call__(self, row: ShardRow) -> None:
        """Publish a sealed shard: environments, tar, rows, and then the row that makes it count.

        A row of other bytes (it grew, or was drawn on other hardware) goes first: until the end the shard counts as not
        there. Raises SynthkdError where the store does not answer; to repeat it is safe.
        """
        if self.published(row.shard) != row:
            self.store.remove(row_name(row.shard))
        for key in sorted({key for group in group_rows(self.folder, row) for _, key, _ in group.runs}):
            name = f"{ENVIRONMENTS}/{key}.json"
            if self.store.size(name) is None:
                self.store.put(self.folder / name, name)
        self.store.put(self.folder / row.file, row.file)
        self.store.put(rows_path(self.folder, row.shard), f"{ROWS}/{rows_path(self.folder, row.shard).name}")
        self.store.write(row_name(row.shard), (json.dumps(asdict(row), sort_keys=True) + "\n").encode())

    publish = __call__

    def bring(self, row: ShardRow) -> None:
        """The tar and the rows of a published shard, for what reads it or lets it grow.

        Raises SynthkdError where one of them is damaged.
        """
        rows = rows_path(self.folder, row.shard)
        rows.parent.mkdir(parents=True, exist_ok=True)
        self._fetch(row, self.folder / row.file, row.file, row.sha256)
        self._fetch(row, rows, f"{ROWS}/{rows.name}", row.rows)

    def _fetch(self, row: ShardRow, path: Path, name: str, sha256: str) -> None:
        if path.exists() and file_digest(path) == sha256:
            return
        arriving = path.with_suffix(".arriving")
        self.store.fetch(name, arriving)
        if file_digest(arriving) != sha256:
            arriving.unlink()
            raise SynthkdError(
                f"{self.store.url}/{name}: does not match its digest; remove {row_name(row.shard)} there and run "
                "the command that drew the set again"
            )
        arriving.replace(path)

    def drop(self, row: ShardRow) -> None:
        """Let the tar of a published shard leave the disk."""
        (self.folder / row.file).unlink(missing_ok=True)

    def published(self, shard: int) -> ShardRow | None:
        """What the store says of a shard; None where it is not finished there, or the row is none of ours."""
        data = self.store.read(row_name(shard))
        try:
            found = parse_note(data) if data is not None else None
            row = shard_row(Path(self.store.url, row_name(shard)), found) if isinstance(found, dict) else None
        except (ValueError, RecursionError, SynthkdError):
            return None
        return row if row is not None and row.shard == shard else None

    def finished(self, shard: int, samples: int) -> ShardRow | None:
        """The row of a shard that is there with at least so many samples, its tar and rows as it says; else None."""
        row = self.published(shard)
        if row is None or row.samples < samples or self.store.size(row.file) != row.bytes:
            return None
        data = self.store.read(f"{ROWS}/{rows_path(self.folder, shard).name}", MAX_ROWS)
        return row if data is not None and hashlib.sha256(data).hexdigest() == row.rows else None


class RemoteSet:
    """A store and its spool; one run at a time has the spool.

    What the store holds is known after `attach`; nothing of it is trusted but what its digests vouch for.
    """

    def __init__(self, store: Store, spool: Path) -> None:
        """spool: made where it does not exist."""
        self.store, self.folder = store, spool
        self.publisher = Publisher(store, spool)
        self._there: dict[int, ShardRow] = {}

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Errors that name the spool name the store."""
        try:
            yield
        except SynthkdError as error:
            if str(self.folder) not in str(error):
                raise
            said = str(error).replace(str(self.folder), self.store.url)
            error.args = (f"{said} (spool {self.folder})",)
            raise

    def held(self, part: Part | None = None, beat: float = 10.0) -> contextlib.AbstractContextManager[None]:
        """See `store_lock`."""
        return store_lock(self.store, part, beat)

    def prepare(self) -> None:
        """Attach under the spool's lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.folder):
            self.attach()

    def attach(self) -> None:
        """Bring the spool up to the store: manifest, what was settled, rows; what the store has leaves the spool.

        A spool that is empty or gone costs the groups of unfinished shards. Raises SynthkdError where the two hold
        different sets.
        """
        self.gather()
        for row in read_index(self.folder).values():
            if self.holds(row) and not journal_path(self.folder, row.shard).exists():
                self.drop(row)

    def gather(self) -> None:
        """Manifest, notes and rows into the spool, whose own files stay as they are."""
        sizes = self.store.sizes()
        self._merge_manifest()
        if not (self.folder / MANIFEST).exists() and any(map(_ROW.fullmatch, sizes)):
            raise SynthkdError(f"{self.store.url}: holds shards but no {MANIFEST}; choose another --out")
        noted = read_manifest(self.folder) if (self.folder / MANIFEST).exists() else {}
        damaged = {name for names, good in learned(self.folder, noted) if not good for name in names}
        for name in sorted(filter(_NOTE.fullmatch, sizes)):
            if not (self.folder / name).exists() or name in damaged:
                self.store.fetch(name, self.folder / name)
        mend_tail(self.folder / INDEX)
        known = read_index(self.folder, missing=True) if self.folder.exists() else {}
        self._there = {}
        for match in filter(None, map(_ROW.fullmatch, sorted(sizes))):
            row = self.publisher.published(int(match[1]))
            if row is None or sizes.get(row.file) != row.bytes or not self._has_rows(row):
                continue
            row = self._there[row.shard] = _newer(row, known.get(row.shard))
            if known.get(row.shard) != row and not journal_path(self.folder, row.shard).exists():
                append_line(self.folder / INDEX, asdict(row))

    def holds(self, row: ShardRow) -> bool:
        """Whether the store has this very shard."""
        return self._there.get(row.shard) == row

    def rows(self) -> list[ShardRow]:
        """The shards of the store, in order."""
        return [self._there[shard] for shard in sorted(self._there)]

    def rows_of(self, shard: int) -> list[ShardRow]:
        """The row of a shard, if the store has it."""
        return [self._there[shard]] if shard in self._there else []

    def publish(self, row: ShardRow) -> None:
        """See `Publisher`."""
        self.publisher(row)
        self.took(row)

    def took(self, row: ShardRow) -> None:
        """Another process has published it."""
        self._there[row.shard] = row

    def drop(self, row: ShardRow) -> None:
        """See `Publisher`."""
        self.publisher.drop(row)

    def bring(self, row: ShardRow) -> None:
        """See `Publisher`."""
        self.publisher.bring(row)

    @contextlib.contextmanager
    def brought(self, shards: Iterable[int]) -> Iterator[None]:
        """Within it the tars of these shards are there, as far as the store has them."""
        rows = [self._there[shard] for shard in shards if shard in self._there]
        try:
            for row in rows:
                self.bring(row)
            yield
        finally:
            for row in rows:
                self.drop(row)

    def note(self) -> None:
        """Publish the manifest, the files of checkpoints and decoder that it names, and shards that only the spool has.

        Raises SynthkdError where the store meanwhile holds another set, or one with another student or decoder.
        """
        self._merge_manifest()
        noted = read_manifest(self.folder)
        settle(self.store, noted)
        for name in (name for names, good in learned(self.folder, noted) if good for name in names):
            if not self._has(name):
                self.store.put(self.folder / name, name)
        data = (self.folder / MANIFEST).read_bytes()
        if self.store.read(MANIFEST) != data:
            self.store.write(MANIFEST, data)
        for row in read_index(self.folder).values():
            if not self.holds(row) and self._is_sealed(row):
                self.publish(row)
                self.drop(row)

    def finish(self, num_shards: int) -> None:
        """Once all shards are there: their rows as one index too, so that a plain copy of the store is a set."""
        self.gather()
        if len(self._there) >= num_shards:
            text = "".join(json.dumps(asdict(row), sort_keys=True) + "\n" for row in self.rows())
            if self.store.read(INDEX) != text.encode():
                self.store.write(INDEX, text.encode())

    def _has(self, name: str) -> bool:
        """Whether the store has this very file of the spool."""
        path = self.folder / name
        if self.store.size(name) != path.stat().st_size:
            return False
        there = path.with_name(f"{path.name}.arriving")
        self.store.fetch(name, there)
        try:
            return file_digest(there) == file_digest(path)
        finally:
            there.unlink()

    def _is_sealed(self, row: ShardRow) -> bool:
        path = self.folder / row.file
        return path.stat().st_size == row.bytes and not journal_path(self.folder, row.shard).exists()

    def _merge_manifest(self) -> None:
        """The store's manifest and the spool's as one in the spool; of counts the larger."""
        data, path = self.store.read(MANIFEST), self.folder / MANIFEST
        if data is None:
            return
        theirs, mine = _manifest(self.store, data), read_manifest(self.folder) if path.exists() else {}
        if mine and any(mine[name] != theirs[name] for name in ("fingerprint", "model_sha256")):
            raise SynthkdError(
                f"{self.store.url}: holds another recipe's set than its spool; choose another --out, or --spool"
            )
        refuse_unlike(self.store.url, mine, theirs)
        merged = {**mine, **theirs, "num_samples": max(theirs["num_samples"], mine.get("num_samples", 0))}
        if CHECKPOINTS in mine or CHECKPOINTS in theirs:
            merged[CHECKPOINTS] = {**mine.get(CHECKPOINTS, {}), **theirs.get(CHECKPOINTS, {})}
        if DECODER in mine and DECODER in theirs:
            merged[DECODER] = {**mine[DECODER], **theirs[DECODER]}
        if merged != mine:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(merged, indent=2, sort_keys=True) + "\n")

    def _has_rows(self, row: ShardRow) -> bool:
        """Whether the groups of a shard are in the spool, fetched where they were not; False where they are others."""
        path = rows_path(self.folder, row.shard)
        if path.is_file() and file_digest(path) == row.rows:
            return True
        if journal_path(self.folder, row.shard).exists():  # it grows here: its own rows are ahead
            return True
        data = self.store.read(f"{ROWS}/{path.name}", MAX_ROWS)
        if data is None or hashlib.sha256(data).hexdigest() != row.rows:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data.decode())
        return True


def _newer(row: ShardRow, known: ShardRow | None) -> ShardRow:
    """A store's row with a revision by which it holds in the spool, which may know a later one of a lost shard."""
    if known is None or known.revision <= row.revision:
        return row
    return known if replace(known, revision=row.revision) == row else replace(row, revision=known.revision + 1)


def _manifest(store: Store, data: bytes) -> dict[str, Any]:
    """A store's manifest, checked like one on disk."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="synthkd-") as name:
        Path(name, MANIFEST).write_bytes(data)
        try:
            return read_manifest(Path(name))
        except SynthkdError as error:
            raise SynthkdError(str(error).replace(name, store.url)) from error


def default_spool(url: str, part: Part | None = None) -> Path:
    """Where shards of a URL grow if nothing is said: a folder of the user's cache, by URL and part."""
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    return own_cache() / "spool" / (key if part is None else f"{key}-{part.name}")


def open_output(out: str, spool: Path | None = None, part: Part | None = None) -> tuple[Path, RemoteSet | None]:
    """Where a run writes: (folder, None) for a path, (spool, remote set) for a URL.

    Raises SynthkdError for a URL that is not allowed, and for a spool without one.
    """
    if not is_url(out):
        if spool is not None:
            raise SynthkdError(f"--spool {spool}: is for sets at a URL, and --out {out} is a folder; leave it out")
        return Path(out), None
    url = checked_url(out)
    where = default_spool(url, part) if spool is None else spool if part is None else spool / part.name
    return where, RemoteSet(Store(url), where)


__all__ = ["Publisher", "RemoteSet", "default_spool", "open_output", "row_name"]
