"""Out-of-domain pools: images of other classes than the teacher's, without labels, and the teacher's word on them.

A pool has no normalisation of its own: its pixels are [0,1] like all others, and each network normalises what it sees.
"""

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthkd.dfkd.cached import MemorySource
from synthkd.dfkd.data import LabelledImages, images_from_npz
from synthkd.dfkd.decode import decode
from synthkd.dfkd.dense_task import POOL, letter_scenes
from synthkd.dfkd.feed import Reader, ReadOptions, Request, Rows, Source
from synthkd.dfkd.losses import entropy
from synthkd.dfkd.progress import Progress, Silent
from synthkd.dfkd.sets import open_set
from synthkd.dfkd.teachers import Teacher, teacher_digest
from synthkd.dfkd.tensor_files import read_tensors, write_tensors
from synthkd.dfkd.views import Views
from synthkd.engine.assets import embedded_path
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import MANIFEST
from synthkd.engine.models import EMBEDDED
from synthkd.engine.tar import MAX_MEMBER, Member, foreign_members

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LABELS = "pool.safetensors"
TILE = 32  # pixels, of an embedded pool's sheet
_BATCH, _SAMPLED = 256, 64
_log = logging.getLogger("synthkd")


class _File(NamedTuple):
    """An image: the file it is in, where it starts there (0 for a file of its own), bytes, and its name."""

    path: int
    offset: int
    size: int
    key: str


class FileSource:
    """Images in files, or in tars, as a `Source`; all labels are 0 until a teacher has named them."""

    def __init__(self, paths: list[Path], files: list[_File]) -> None:
        """files: by row; each names one of `paths`."""
        self._paths, self._files = paths, files
        self.labels: Rows = np.zeros(len(files), np.int64)
        self.previews = np.zeros(len(files), np.bool_)
        self.classes: tuple[str, ...] = ()
        kinds = {_format(f.key) for f in files}
        self.image_format = kinds.pop() if len(kinds) == 1 else "jpg"
        self.stores: dict[Any, Any] = {}
        told = hashlib.sha256("".join(f"{f.key} {f.size}\n" for f in files).encode("utf-8", "surrogateescape"))
        for row in range(0, len(files), max(1, len(files) // _SAMPLED)):  # enough to know other images of equal names
            with contextlib.suppress(SynthkdError):
                told.update(self.encoded(row))
        self.digest = told.hexdigest()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._files)

    def keys(self, rows: Rows) -> tuple[str, ...]:
        """Names of images."""
        return tuple(self._files[row].key for row in rows.tolist())

    def where(self, row: int) -> str:
        """The file, and the member of a tar."""
        file = self._files[row]
        path = self._paths[file.path]
        return f"{path}: {file.key}" if path.suffix == ".tar" else str(path)

    def encoded(self, row: int) -> bytes:
        """The bytes of a row's image; raises SynthkdError where they cannot be read or are fewer than there were."""
        file = self._files[row]
        try:
            with self._paths[file.path].open("rb") as f:
                f.seek(file.offset)
                data = f.read(file.size)
        except OSError as error:
            raise SynthkdError(f"{self.where(row)}: cannot be read ({error.strerror})") from error
        if len(data) < file.size:
            raise SynthkdError(f"{self.where(row)} is cut off")
        return data

    def reader(self, size: tuple[int, int], options: ReadOptions) -> Reader:
        """See `SetSource.reader`."""
        from synthkd.dfkd.reader_choice import open_reader

        return open_reader(self, size, options)


class Subset:
    """Some rows of a source of files, with labels of their own."""

    def __init__(self, source: Any, rows: Rows, labels: Rows, classes: tuple[str, ...]) -> None:
        """rows, labels: int64 [M]; classes: what the labels name."""
        self._source, self._rows = source, rows
        self.labels, self.classes = labels, classes
        self.previews = np.zeros(len(rows), np.bool_)
        self.image_format: str = source.image_format
        self.stores: dict[Any, Any] = {}
        self.digest = hashlib.sha256(source.digest.encode() + rows.tobytes() + labels.tobytes()).hexdigest()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def keys(self, rows: Rows) -> tuple[str, ...]:
        """Names in the source."""
        found: tuple[str, ...] = self._source.keys(self._rows[rows])
        return found

    def where(self, row: int) -> str:
        """As the source says it."""
        return str(self._source.where(int(self._rows[row])))

    def encoded(self, row: int) -> bytes:
        """As the source has it."""
        data: bytes = self._source.encoded(int(self._rows[row]))
        return data

    def reader(self, size: tuple[int, int], options: ReadOptions) -> Reader:
        """See `SetSource.reader`."""
        from synthkd.dfkd.reader_choice import open_reader

        return open_reader(self, size, options)


@dataclass(frozen=True)
class Pool:
    """Images and the teacher's word on them.

    source: its labels are the classes that the teacher names; entropy: float32 [N], of the teacher's output in nats,
    NaN where an image or the output cannot be used.
    """

    source: Source
    entropy: NDArray[np.float32]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.source)

    def selected(self, count: int | None = None) -> "Pool":
        """The `count` images of the highest teacher entropy, in the pool's order; None: all that can be used.

        As MosaicKD chooses its subset (arXiv 2110.15094, sec. 4.1), where the teacher is least sure. Images without a
        finite entropy are never chosen. Raises SynthkdError where fewer than two are left.
        """
        rows = highest_entropy(self.entropy, count)
        if len(rows) < 2:
            raise SynthkdError(f"pool: {len(rows)} of {len(self)} images can be used; expected at least 2")
        if (lost := len(self) - int(np.isfinite(self.entropy).sum())) > 0:
            _log.warning("pool: %d of %d images are unreadable or have no finite output; left out", lost, len(self))
        return Pool(_rows_of(self.source, rows), self.entropy[rows])


def highest_entropy(found: NDArray[np.float32], count: int | None = None) -> Rows:
    """Rows int64, ascending, of the `count` highest finite values (all finite ones for None); the first of equals."""
    usable = np.flatnonzero(np.isfinite(found)).astype(np.int64)
    if count is None or count >= len(usable):
        return usable
    order = np.argsort(-found[usable].astype(np.float64), kind="stable")[:count]
    return np.sort(usable[order])


def _rows_of(source: Source, rows: Rows) -> Source:
    """Some rows of a source."""
    if isinstance(source, MemorySource):
        index = torch.from_numpy(rows)
        data = source.data
        return MemorySource(LabelledImages(data.images[index], data.labels[index], data.classes))
    return Subset(source, rows, source.labels[rows], source.classes)


def open_images(reference: str) -> Source:
    """Images of a folder (sub-folders too), of tar shards in a folder, of one tar, a synthetic set or an .npz.

    Or embedded:NAME/pool, or segments:pool (see `dfkd/dense_task.py`). npz: x uint8 [N,H,W,3] or [N,H,W]. Raises
    SynthkdError where there is nothing to read.
    """
    path = Path(reference)
    if reference.startswith(EMBEDDED):
        return _unlabelled(embedded_pool(reference))
    if reference == POOL:
        return _unlabelled(letter_scenes())
    if path.suffix == ".npz" and path.is_file():
        return _unlabelled(images_from_npz(path, "pool"))
    if path.suffix == ".tar" and path.is_file():
        return _from_tars(reference, [path])
    if not path.is_dir():
        raise SynthkdError(f"pool {reference!r}: not found; expected a folder of images or tar shards, or an .npz of x")
    if (path / MANIFEST).is_file():
        return open_set(path)
    tars = sorted(path.glob("*.tar"))
    return _from_tars(reference, tars) if tars else _from_folder(reference, path)


def _unlabelled(images: Tensor) -> MemorySource:
    return MemorySource(LabelledImages(images, torch.zeros(len(images), dtype=torch.long), ()))


def embedded_pool(reference: str) -> Tensor:
    """The pool that comes with an embedded default, `embedded:NAME/pool`: uint8 [N,3,32,32], tiles of one sheet."""
    name, _, part = reference.removeprefix(EMBEDDED).partition("/")
    path = embedded_path(name) / f"{part}.webp"
    if not path.is_file():
        raise SynthkdError(f"pool {reference!r}: not found; known: {EMBEDDED}{name}/pool")
    sheet = torch.from_numpy(decode(path.read_bytes(), str(path)).copy())
    rows, columns = sheet.shape[0] // TILE, sheet.shape[1] // TILE
    tiles = sheet.view(rows, TILE, columns, TILE, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, TILE, TILE).contiguous()


def _from_folder(reference: str, path: Path) -> FileSource:
    paths = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    if not paths:
        raise SynthkdError(f"pool {reference!r}: holds no {', '.join(SUFFIXES)} file and no tar")
    files = [_File(i, 0, f.stat().st_size, f.relative_to(path).as_posix()) for i, f in enumerate(paths)]
    return FileSource(paths, files)


def _from_tars(reference: str, paths: list[Path]) -> FileSource:
    """Images of tar shards; members are read where they lie, nothing is unpacked."""
    files: list[_File] = []
    for i, path in enumerate(paths):
        try:
            files += [_File(i, m.offset, m.size, m.name) for m in foreign_members(path) if _is_image(m)]
        except SynthkdError as error:
            raise SynthkdError(f"pool {path}: not a readable tar ({error})") from error
    if not files:
        raise SynthkdError(f"pool {reference!r}: its tars hold no {', '.join(SUFFIXES)} member")
    return FileSource(paths, files)


def _is_image(member: Member) -> bool:
    return Path(member.name).suffix.lower() in SUFFIXES and 0 < member.size <= MAX_MEMBER


def _format(name: str) -> str:
    suffix = Path(name).suffix.lower().removeprefix(".")
    return "jpg" if suffix == "jpeg" else suffix


def open_pool(
    reference: str, teacher: Teacher, options: ReadOptions, keep: Path | None = None, progress: Progress | None = None
) -> Pool:
    """A pool with the teacher's word on every image; keep: a folder where that is kept for the next time."""
    source = open_images(reference)
    path = keep / LABELS if keep else None
    note = {"pool": source.digest, "teacher": teacher_digest(teacher)}
    known = _known(path, note, len(source), len(teacher.classes))
    if known is None:
        known = _named(source, teacher, options, progress or Silent())
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {"labels": known[0], "entropy": known[1]}, note)
    labels, found = known
    return Pool(_labelled(source, labels, teacher.classes), found.numpy())


def _known(path: Path | None, note: dict[str, str], count: int, classes: int) -> tuple[Tensor, Tensor] | None:
    """What an earlier run has kept, of this pool and teacher; None where there is nothing of that kind."""
    if path is None or not path.exists():
        return None
    try:
        tensors, found = read_tensors(path)
        labels, values = tensors["labels"], tensors["entropy"]
    except (SynthkdError, KeyError):
        return None
    fits = found == note and labels.shape == values.shape == (count,) and labels.dtype == torch.int64
    fits = fits and values.dtype == torch.float32 and bool(((labels >= 0) & (labels < classes)).all())
    return (labels, values) if fits else None


def _labelled(source: Source, labels: Tensor, classes: tuple[str, ...]) -> Source:
    if isinstance(source, MemorySource):
        return MemorySource(LabelledImages(source.data.images, labels, classes))
    return Subset(source, np.arange(len(source), dtype=np.int64), labels.numpy(), classes)


@torch.no_grad()
def _named(source: Source, teacher: Teacher, options: ReadOptions, progress: Progress) -> tuple[Tensor, Tensor]:
    """Classes int64 [N] and entropies float32 [N] (NaN: unusable) that the teacher gives, in one pass."""
    device = teacher.get_buffer("mean").device
    labels, values = torch.zeros(len(source), dtype=torch.long), torch.full((len(source),), torch.nan)
    reader = source.reader(teacher.input_size, replace(options, strict=False, crops=False))
    progress.begin("pool", len(source), "images")
    try:
        for rows, images, used in _whole(reader, len(source)):
            told = logits_word(teacher(images.to(device).float() / 255))
            good = torch.from_numpy(np.flatnonzero(used == np.arange(len(rows))))
            place = torch.from_numpy(rows)[good]
            labels[place], values[place] = told[0].cpu()[good], told[1].cpu()[good]
            progress.advance("pool", len(rows))
    finally:
        reader.close()
        progress.end("pool")
    return labels, values


def _whole(reader: Reader, count: int) -> Iterator[tuple[Rows, Tensor, Rows]]:
    """All images in order: rows, pixels, and which of them stand in for damaged ones (see `Pixels.used`)."""
    parts = np.array_split(np.arange(count, dtype=np.int64), max(1, -(-count // _BATCH)))
    requests = (Request(part, Views.plain(part)) for part in parts)
    for part, pixels in zip(parts, reader.read(requests), strict=True):
        yield part, pixels.images, pixels.used


def logits_word(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Class int64 [B] and entropy float32 [B], NaN where an output is not finite; of label maps 0 and the mean entropy.

    logits: [B,K], or [B,K,h,w] of a dense teacher.
    """
    if logits.dim() == 2:
        found, named = entropy(logits), logits.argmax(dim=1)
    else:
        found, named = entropy(logits.movedim(1, -1).flatten(0, -2)).view(len(logits), -1).mean(1), logits.new_zeros(
            len(logits), dtype=torch.long
        )
    finite = logits.flatten(1).isfinite().all(dim=1)
    return named, torch.where(finite, found, torch.nan).float()
