"""Batches -> WebDataset tars that survive a kill at any moment.

A shard grows as `shard-N.tar.part`; after each group its bytes are forced to disk and one journal line says how
far they are good. A finished shard is renamed, then gets its index row, then loses its journal. Work left is the
plan minus index and journals.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from synthkd.engine.batch import Batch, Preview, SampleStream
from synthkd.engine.errors import SynthkdError, WorkerLostError
from synthkd.engine.index import (
    INDEX,
    LOCK,
    GroupRow,
    ShardRow,
    append_line,
    claim_folder,
    mend_tail,
    merge_rows,
    note_environment,
    read_index,
    read_journal,
    shard_name,
    write_atomically,
)
from synthkd.engine.plan import Plan, WorkUnit, preview_key
from synthkd.export.artifacts import sync_folder

_BLOCK = tarfile.BLOCKSIZE
_PIL_FORMAT = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


@dataclass(frozen=True)
class WriteSummary:
    """What one call of `write_shards` did: samples drawn by it, samples in the set now, and whether it was stopped.

    Here and in the index a preview is no sample of its own.
    """

    drawn: int
    present: int
    stopped: bool


def short_digest(data: bytes) -> str:
    """Sixteen hexadecimal digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def encode_image(pixels: Any, image_format: str, quality: int) -> bytes:
    """uint8 [H,W,3] array -> file bytes; the same bytes for the same pixels and Pillow version."""
    buffer = io.BytesIO()
    options = {} if image_format == "png" else {"quality": quality}
    Image.fromarray(pixels).save(buffer, _PIL_FORMAT[image_format], **options)
    return buffer.getvalue()


def tar_member(name: str, data: bytes) -> bytes:
    """One tar member with a fixed header (mode 644, time 0, no owner), padded to whole blocks."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (-len(data) % _BLOCK)


def sample_members(batch: Batch, identity: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the image and json of each sample of a batch, followed by those of its previews."""
    views = [_view_members(batch, preview, identity) for preview in (None, *batch.previews)]
    for sample in zip(*views, strict=True):
        yield from chain.from_iterable(sample)


def _view_members(
    batch: Batch, preview: Preview | None, identity: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, bytes], tuple[str, bytes]]]:
    """Image and json of each finished image, or of each sample's preview; that one says so, and of which sample."""
    recipe, shown = identity["recipe"], batch if preview is None else preview
    pixels = shown.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    notes = {name: note.float().cpu().tolist() for name, note in shown.notes.items()}
    labels, targets, suffix = shown.labels.tolist(), shown.targets.cpu().tolist(), recipe["image_format"]
    last = {name: curve[-1] for name, curve in batch.curves.items()}
    for i, sample in enumerate(batch.keys):
        key = sample if preview is None else preview_key(sample, preview.share)
        meta: dict[str, Any] = {
            "key": key,
            "label": labels[i],
            "class": recipe["classes"][labels[i]],
            "prompt": batch.prompts[i],
            "seed": identity["seed"],
            "group": batch.group,
            "attempt": batch.attempt,
        }
        if preview is None:
            meta["losses"] = {name: value[i] if isinstance(value, list) else value for name, value in last.items()}
        meta |= {name: note[i] for name, note in notes.items()}
        if batch.sources:
            meta["source"] = batch.sources[i]
        if preview is not None:
            meta |= {"preview": preview.share, "of": sample}
        if recipe["rounds"] > 1:
            meta["round"] = batch.round
        if recipe["cutmix"]["scope"] == "any" and recipe["cutmix"]["every"]:
            meta["targets"] = targets[i]
        image = encode_image(pixels[i], suffix, recipe["image_quality"])
        yield (f"{key}.{suffix}", image), (f"{key}.json", json.dumps(meta, sort_keys=True).encode())


class ShardFile:
    """One shard on its way: the journalled `.part` file and its rows."""

    def __init__(self, folder: Path, shard: int, finished: ShardRow | None) -> None:
        """Pick up whatever an earlier run left of the shard."""
        self.final = folder / shard_name(shard)
        self.part = folder / f"{self.final.name}.part"
        self.journal = folder / f"{self.final.name}.journal"
        self.shard, self.finished = shard, finished
        self.rows = {r.group: r for r in finished.groups} if finished else {}
        if self.journal.exists():
            self._recover()
        else:  # nothing vouches for a part file without its journal
            self.part.unlink(missing_ok=True)

    def kept(self, group: int) -> int:
        """Samples of a group that are safe on disk."""
        return self.rows[group].kept if group in self.rows else 0

    def append(self, batch: Batch, stream: SampleStream, identity: Mapping[str, Any]) -> None:
        """Write the samples of a group that are not there yet; they are safe when this returns."""
        if not self.part.exists():
            self._begin()
        per_sample = 2 * (1 + len(batch.previews))
        members = dict(list(sample_members(batch, identity))[per_sample * self.kept(batch.group) :])
        with self.part.open("ab") as f:
            for name, data in members.items():
                f.write(tar_member(name, data))
            f.flush()
            os.fsync(f.fileno())
            end = f.tell()
        key = note_environment(self.final.parent, stream.environment)
        row = GroupRow(
            group=batch.group,
            attempt=batch.attempt,
            kept=len(batch.ids),
            end=end,
            environment=key,
            members={name: short_digest(data) for name, data in members.items()},
            seconds={k: round(v, 6) for k, v in batch.seconds.items()},
            curves={name: [_mean(v) for v in curve] for name, curve in batch.curves.items()},
        )
        append_line(self.journal, asdict(row))
        self.rows = merge_rows(iter([*self.rows.values(), row]))

    def finish(self, folder: Path) -> None:
        """Close the tar, rename it, write its index row, drop the journal; safe to repeat after a kill."""
        if self.part.exists():
            with self.part.open("ab") as f:
                f.write(b"\0" * (2 * _BLOCK))
                f.flush()
                os.fsync(f.fileno())
            self.part.replace(self.final)
            sync_folder(folder)
        groups = [self.rows[g] for g in sorted(self.rows)]
        row = ShardRow(
            shard=self.shard,
            file=self.final.name,
            samples=sum(g.kept for g in groups),
            bytes=self.final.stat().st_size,
            sha256=file_digest(self.final),
            groups=groups,
        )
        append_line(folder / INDEX, asdict(row))
        self.finished = row
        self.journal.unlink(missing_ok=True)

    def _begin(self) -> None:
        """Start the part file, from the finished shard where the set grows."""
        rows = [asdict(self.rows[g]) for g in sorted(self.rows)]
        write_atomically(self.journal, "".join(json.dumps(r, sort_keys=True) + "\n" for r in rows))
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
        self.rows = read_journal(self.journal)
        if not self.part.exists():  # renamed but not indexed, or not begun: `finish` or `append` goes on from here
            self.rows = self.rows if self.final.exists() else {}
            return
        size = self.part.stat().st_size
        good = {g: r for g, r in self.rows.items() if r.end <= size}
        if len(good) != len(self.rows):
            self.rows = good
            lines = [json.dumps(asdict(good[g]), sort_keys=True) + "\n" for g in sorted(good)]
            write_atomically(self.journal, "".join(lines))
        with self.part.open("rb+") as f:
            f.truncate(max((r.end for r in self.rows.values()), default=0))


def _mean(value: Any) -> float:
    return sum(value) / len(value) if isinstance(value, list) else float(value)


class ShardFolder:
    """A set on disk: which samples of a plan are there, and where the next batch goes."""

    def __init__(self, folder: Path, plan: Plan, shards: Iterable[int] | None) -> None:
        """shards: the order in which shards are filled, all by default."""
        mend_tail(folder / INDEX)
        self.folder, self.plan = folder, plan
        self.order = list(range(plan.num_shards) if shards is None else shards)
        rows = read_index(folder)  # a shard of another size is damaged, and drawn again
        self._index = {n: r for n, r in rows.items() if (folder / r.file).stat().st_size == r.bytes}
        self._open: dict[int, ShardFile] = {}

    def shard(self, shard: int) -> ShardFile:
        """The state of one shard, read once."""
        if shard not in self._open:
            self._open[shard] = ShardFile(self.folder, shard, self._index.get(shard))
        return self._open[shard]

    def pending(self) -> Iterator[WorkUnit]:
        """Units with samples that are not on disk, in the order of shards."""
        for shard in self.order:
            state = self.shard(shard)
            yield from (u for u in self.plan.shard_units(shard) if state.kept(u.group) < u.kept)

    def close(self, shard: int) -> None:
        """Finish a shard if all its wanted groups are there and it has none of its rows in the index yet."""
        state = self.shard(shard)
        complete = all(state.kept(u.group) >= u.kept for u in self.plan.shard_units(shard))
        if complete and (state.finished is None or state.journal.exists()):
            state.finish(self.folder)

    def present(self) -> int:
        """Wanted samples that are safe on disk."""
        units = self.plan.units(self.order)
        return sum(min(u.kept, self.shard(u.shard).kept(u.group)) for u in units)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """One writer per folder; raises SynthkdError while another run holds it. Released by the system on a kill."""
    import fcntl

    with (folder / LOCK).open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SynthkdError(f"{folder}: another run is writing there; wait or choose another --out") from error
        yield


def write_shards(
    stream: SampleStream,
    out: str | Path,
    *,
    shards: Iterable[int] | None = None,
    source: Mapping[str, Any] | None = None,
    on_batch: Callable[[int], None] = lambda _: None,
    on_present: Callable[[int], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> WriteSummary:
    """Write a stream to a folder; what is there already is kept, and only the rest is drawn.

    shards: order of shards; source: what the command line needs for a replay, kept in the manifest;
    on_batch: called with the number of new samples after each group, on_present once with those already there;
    should_stop: asked after each group.
    Raises SynthkdError where the folder holds another set, is being written, or has no space left.
    """
    folder = Path(out)
    try:
        return _write(stream, folder, shards, source or {}, (on_present, on_batch), should_stop)
    except OSError as error:
        raise _disk_error(folder, error) from error


def _write(
    stream: SampleStream,
    folder: Path,
    shards: Iterable[int] | None,
    source: Mapping[str, Any],
    told: tuple[Callable[[int], None], Callable[[int], None]],
    should_stop: Callable[[], bool],
) -> WriteSummary:
    on_present, on_batch = told
    identity, drawn, stopped = stream.identity, 0, False
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        claim_folder(folder, identity, stream.plan.request.num_samples, source)
        state = ShardFolder(folder, stream.plan, shards)
        on_present(state.present())
        batches = stream.draw(state.pending())
        try:
            for batch in batches:
                shard = stream.plan.unit(batch.group).shard
                new = len(batch.ids) - state.shard(shard).kept(batch.group)
                state.shard(shard).append(batch, stream, identity)
                state.close(shard)
                drawn += new
                on_batch(new)
                if should_stop():
                    stopped = True
                    break
        except WorkerLostError:
            if not should_stop():
                raise
            stopped = True  # a stop that reached the workers too
        for shard in state.order:
            state.close(shard)
        return WriteSummary(drawn, state.present(), stopped)


def _disk_error(folder: Path, error: OSError) -> SynthkdError:
    reasons = {
        errno.ENOSPC: "no space left",
        errno.EDQUOT: "disk quota exceeded",
        errno.EFBIG: "file size limit reached",
        errno.EACCES: "no permission to write",
        errno.EROFS: "read-only file system",
    }
    reason = reasons.get(error.errno or 0, error.strerror or str(error))
    return SynthkdError(f"{folder}: {reason}; every finished group is safe: mend that and run the same command again")
