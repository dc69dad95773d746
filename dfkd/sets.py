"""A synthetic set as a table: where every image lies in its shard, with label and digest, for reads in any order.

Tar headers and json are read once, images only when they are asked for; about fifty bytes a sample stay in memory.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from synthkd.dfkd.feed import Reader, ReadOptions, Rows
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import read_manifest
from synthkd.engine.reading import decode_meta
from synthkd.engine.rows import ShardRow, group_rows, read_index
from synthkd.engine.shards import short_digest
from synthkd.engine.tar import Member, Window, scan
from synthkd.engine.untrusted import open_plain

_OPEN_FILES = 32


class _Entry(NamedTuple):
    """One image of a shard; offset and size in bytes, mark: whether it is a preview."""

    key: bytes
    label: int
    mark: bool
    offset: int
    size: int
    digest: int


def _number(digest: Any) -> int:
    """Sixteen hexadecimal digits as a number; -1 for anything else."""
    try:
        return int(digest, 16) if isinstance(digest, str) and len(digest) == 16 else -1
    except ValueError:
        return -1


def _label(meta: Mapping[str, Any], classes: int, where: str) -> int:
    label = meta.get("label")
    if type(label) is not int or not 0 <= label < classes:
        raise SynthkdError(f"{where}: label is {label!r:.40}; expected a whole number from 0 to {classes - 1}")
    return label


def _entries(path: Path, row: ShardRow, suffix: str, classes: int) -> Iterator[_Entry]:
    """The images of one shard, each when its json has been seen; the images' bytes are not looked at."""
    wanted = {name: digest for group in group_rows(path.parent, row) for name, digest in group.members.items()}
    held: dict[str, dict[str, Member]] = {}
    digests: dict[str, int] = {}
    with open(open_plain(path, path.parent), "rb", buffering=0) as file:  # noqa: PTH123
        window = Window(file.fileno())
        for member in scan(path, window):
            digest, (key, _, kind) = wanted.pop(member.name, None), member.name.partition(".")
            known = _number(digest)
            is_json = kind == "json"
            if known < 0 or (is_json and short_digest(window.take(member.offset, member.size)) != digest):
                raise SynthkdError(
                    f"{path}: {member.name} does not match its digest; run `synthkd verify {path.parent}`"
                )
            if kind == suffix:
                digests[key] = known
            parts = held.setdefault(key, {})
            parts[kind] = member
            if suffix in parts and "json" in parts:
                image, note = parts[suffix], parts["json"]
                where = f"{path}: {note.name}"
                meta = decode_meta(window.take(note.offset, note.size), where)
                mark = isinstance(meta.get("preview"), float)
                label = _label(meta, classes, where)
                yield _Entry(key.encode(), label, mark, image.offset, image.size, digests.pop(key))
                del held[key]
    if wanted:
        raise SynthkdError(f"{path}: {min(wanted)} is missing; run `synthkd verify {path.parent}`")


class _Table:
    """Columns that grow shard by shard."""

    kinds = (("label", np.int64), ("mark", np.bool_), ("offset", np.int64), ("size", np.int32), ("digest", np.uint64))

    def __init__(self) -> None:
        self.parts: dict[str, list[NDArray[Any]]] = {name: [] for name in ("key", "shard", *(n for n, _ in self.kinds))}
        self.count = 0

    def add(self, shard: int, entries: list[_Entry]) -> None:
        """The rows of one shard."""
        self.count += len(entries)
        self.parts["key"].append(np.array([e.key for e in entries], dtype=np.bytes_))
        self.parts["shard"].append(np.full(len(entries), shard, np.int32))
        for name, kind in self.kinds:
            self.parts[name].append(np.array([getattr(e, name) for e in entries], dtype=kind))

    def column(self, name: str) -> NDArray[Any]:
        """All rows of a column."""
        return np.concatenate(self.parts.pop(name))


class _Descriptor:
    """An open file, closed when the last read of it is done."""

    def __init__(self, path: Path) -> None:
        self.number = open_plain(path, path.parent)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class _Files:
    """Reads from many files by several threads, with few of them open."""

    def __init__(self, paths: Mapping[int, Path]) -> None:
        self.paths = dict(paths)
        self.names = {which: str(path) for which, path in paths.items()}
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, which: int, offset: int, size: int) -> bytes:
        """`size` bytes, fewer where the file ends; raises SynthkdError where it cannot be read."""
        try:
            return os.pread(self._descriptor(which).number, size, offset)
        except OSError as error:
            raise SynthkdError(f"{self.paths[which]}: cannot be read ({error.strerror})") from error

    def _descriptor(self, which: int) -> _Descriptor:
        with self._lock:
            found = self._open.pop(which, None) or _Descriptor(self.paths[which])
            self._open[which] = found
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
            return found


class SetSource:
    """A synthetic set as a `Source`: labels, previews, classes and digest as there; image_format: png, jpg or webp."""

    def __init__(self, folder: Path, table: _Table, files: _Files, facts: Mapping[str, Any]) -> None:
        """facts: classes and image_format, as `open_set` finds them."""
        self.folder, self._files = folder, files
        self.labels: Rows = table.column("label")
        self.previews: NDArray[np.bool_] = table.column("mark")
        self.classes: tuple[str, ...] = facts["classes"]
        self.image_format: str = facts["image_format"]
        self._keys, self._shard = table.column("key"), table.column("shard")
        self._offset, self._size, self._digest = (table.column(name) for name in ("offset", "size", "digest"))
        parts = (self._keys, self.labels, self.previews, self._digest)  # of these rows alone: a set that grew keeps it
        self.digest: str = hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
        self._checked = np.zeros(len(self.labels), np.bool_)
        self.stores: dict[Any, Any] = {}  # decoded images that readers of this set share (see `cached.py`)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.labels)

    def keys(self, rows: Rows) -> tuple[str, ...]:
        """Names of samples."""
        return tuple(key.decode() for key in self._keys[rows].tolist())

    def where(self, row: int) -> str:
        """Shard file and member, for messages."""
        return f"{self._files.names[int(self._shard[row])]}: {self._keys[row].decode()}.{self.image_format}"

    def encoded(self, row: int) -> bytes:
        """The image file of a row; raises SynthkdError where it is cut off or does not match its digest."""
        size = int(self._size[row])
        data = self._files.read(int(self._shard[row]), int(self._offset[row]), size)
        if not self._checked[row]:
            if len(data) < size or int(short_digest(data), 16) != self._digest[row]:
                raise SynthkdError(f"{self.where(row)} does not match its digest; run `synthkd verify {self.folder}`")
            self._checked[row] = True
        if len(data) < size:
            raise SynthkdError(f"{self.where(row)} is cut off; run `synthkd verify {self.folder}`")
        return data

    def reader(self, size: tuple[int, int], options: ReadOptions) -> Reader:
        """A reader of these images at height x width; raises SynthkdError where the one asked for is not installed."""
        from synthkd.dfkd.reader_choice import open_reader

        return open_reader(self, size, options)


def open_set(folder: Path, limit: int | None = None, previews: bool = True) -> SetSource:
    """The first `limit` samples of a synthetic set (all by default) in id order; images are not decoded.

    previews: with the clean-latent previews of these samples, where the set has them, each after its sample.
    Raises SynthkdError where a shard is damaged, unfinished or made to deceive; an image that does not match its
    digest is found when it is read.
    """
    manifest, index = read_manifest(folder), read_index(folder)
    if not index:
        raise SynthkdError(f"{folder}: holds no finished shard; finish the set with the command that began it")
    recipe = manifest["recipe"]
    classes = _names(folder, recipe)
    each = 1 + (len(recipe.get("previews", ())) if previews else 0)
    wanted = each * min(limit or manifest["num_samples"], manifest["num_samples"])
    table = _Table()
    paths = {shard: folder / index[shard].file for shard in sorted(index)}
    for shard, path in paths.items():
        row = index.pop(shard)  # the rows of a large index are many strings
        found = (e for e in _entries(path, row, recipe["image_format"], len(classes)) if previews or not e.mark)
        table.add(shard, list(islice(found, wanted - table.count)))
        if table.count >= wanted:
            break
    if table.count < wanted or not wanted:
        raise SynthkdError(
            f"{folder}: {table.count} of {wanted} images are in finished shards; finish the set with the command that "
            "began it, or use fewer"
        )
    facts = {"classes": classes, "image_format": recipe["image_format"]}
    return SetSource(folder, table, _Files(paths), facts)


def _names(folder: Path, recipe: Any) -> tuple[str, ...]:
    """The recipe's classes; raises SynthkdError for a recipe that is none."""
    names = recipe.get("classes") if isinstance(recipe, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise SynthkdError(f"{folder}: its manifest names no classes; expected a set written by `synthkd synth`")
    if not isinstance(recipe.get("previews", ()), list | tuple):
        raise SynthkdError(f"{folder}: its manifest's previews are no list; expected a set written by `synthkd synth`")
    return tuple(names)
