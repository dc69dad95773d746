"""A set as folders by class, for loaders that know nothing of tars: `train/CLASS/KEY.png`, labels.csv, classes.json.

Files are whole or absent, so that a killed export goes on; every image is compared with its digest on the way, those
that are there already too. In labels.csv a text that a spreadsheet would take for a formula stands after a '.
"""

import csv
import hashlib
import json
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from synthkd.dfkd.progress import Progress, Silent
from synthkd.engine.columns import ShardColumns, set_plan, shard_columns
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import read_manifest
from synthkd.engine.locks import folder_lock
from synthkd.engine.reading import Sample, read_shard
from synthkd.engine.rows import read_index, write_atomically
from synthkd.engine.shards import disk_errors, short_digest
from synthkd.engine.untrusted import open_plain

MARKER, CLASSES, LABELS, PARTIAL = "export.json", "classes.json", "labels.csv", ".partial"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_PREVIEW = re.compile(r"([0-9]{9,19})-p[0-9]{2}")
_LONGEST = 80  # bytes of a folder's name
_RESERVED = {"con", "prn", "aux", "nul", *(f"{kind}{i}" for kind in ("com", "lpt") for i in range(1, 10))}
_HEAD = ("file", "key", "split", "class", "label", "confidence")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_log = logging.getLogger("synthkd")


@dataclass(frozen=True)
class Exported:
    """Images in the folder, how many were written by this call, and whether it was stopped."""

    present: int
    written: int
    stopped: bool


class _Image(NamedTuple):
    """One image file to be: its name without its ending, its class, size in bytes, digest, and where to get it."""

    key: str
    sample: str
    label: int
    confidence: float | None
    size: int
    digest: str
    read: Callable[[], bytes]


def parse_split(text: str) -> dict[str, float]:
    """`train=0.9,val=0.1` as shares; raises SynthkdError for names that are no folders, or a sum other than 1."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.strip().partition("=")
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if not _NAME.fullmatch(name) or name.lower() in _RESERVED or name in shares or not 0 < value <= 1:
            raise SynthkdError(f"--split {text!r}: {part!r} is not NAME=SHARE with a share above 0, each name once")
        shares[name] = value
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise SynthkdError(f"--split {text!r}: the shares sum to {sum(shares.values()):g}; expected 1")
    return shares


def split_of(key: str, seed: int, shares: Mapping[str, float]) -> str:
    """The split of a sample: a function of its key and the set's seed, whatever else the set holds."""
    point = int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "big") / 2**64
    edge = 0.0
    for name, share in shares.items():
        edge += share
        if point < edge:
            return name
    return list(shares)[-1]  # rounding left a gap below 1


def folder_names(classes: Sequence[str]) -> list[str]:
    """A folder's name for each class that every file system takes: distinct whatever the case, never a path."""
    safe = [_safe(name) for name in classes]
    counts: dict[str, int] = {}
    for name in safe:
        counts[name.casefold()] = counts.get(name.casefold(), 0) + 1
    taken = {name.casefold() for name in safe if counts[name.casefold()] == 1}
    out = []
    for i, name in enumerate(safe):
        if counts[name.casefold()] > 1:
            name = next(n for n in (f"{name}{'-' * k}{i}" for k in range(1, 99)) if n.casefold() not in taken)
            taken.add(name.casefold())
        out.append(name)
    return out


def _safe(name: str) -> str:
    text = "".join(c if c.isalnum() or c in "-_+" or c == "." else "_" for c in unicodedata.normalize("NFC", name))
    text = text.encode()[:_LONGEST].decode("utf-8", "ignore").strip(".") or "class"
    return f"_{text}" if text.partition(".")[0].lower() in _RESERVED or text[0] == "-" else text


def export_images(
    folder: Path,
    out: Path,
    shares: Mapping[str, float],
    previews: bool = False,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Exported:
    """Copy the finished images of a set into `out`, by split and class; what is there already stays.

    Raises SynthkdError where `out` holds anything but an export of this set with these shares, an image does not match
    its digest, or the disk refuses.
    """
    manifest = read_manifest(folder)
    with disk_errors(out):
        _claim(out, manifest, shares, previews)
        with folder_lock(out):
            (out / PARTIAL).mkdir(exist_ok=True)
            try:
                return _Export(folder, out, manifest, shares, previews).run(progress or Silent(), should_stop)
            finally:
                for left in (out / PARTIAL).iterdir():
                    left.unlink()
                (out / PARTIAL).rmdir()


def _claim(out: Path, manifest: Mapping[str, Any], shares: Mapping[str, float], previews: bool) -> None:
    """Make an empty folder ours, or check that it holds the same export."""
    out.mkdir(parents=True, exist_ok=True)
    recipe = manifest["recipe"]
    mine = {
        "fingerprint": manifest["fingerprint"],
        "model_sha256": manifest["model_sha256"],
        "format": recipe["image_format"],
        "previews": previews,
        "split": dict(shares),
    }
    path = out / MARKER
    if path.is_file():
        try:
            have = json.loads(path.read_text())
            different = [name for name, value in mine.items() if have[name] != value]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SynthkdError(f"{path}: not the note of an export ({error!r:.80}); choose another --out") from error
        if different:
            raise SynthkdError(f"{out}: holds another export ({different[0]} differs); choose another --out")
    elif any(out.iterdir()):
        raise SynthkdError(f"{out}: is not empty and holds no export ({MARKER}); choose another --out")
    else:
        write_atomically(path, json.dumps(mine, indent=2, sort_keys=True) + "\n")


class _Export:
    """One pass over a set into a folder."""

    def __init__(
        self, folder: Path, out: Path, manifest: Mapping[str, Any], shares: Mapping[str, float], previews: bool
    ) -> None:
        self.folder, self.out, self.shares, self.previews = folder, out, dict(shares), previews
        recipe = set_plan(manifest).recipe
        self.classes, self.suffix, self.seed = recipe.classes, recipe.image_format, int(manifest["seed"])
        self.names = folder_names(self.classes)
        self.present, self.written = 0, 0
        self.seen: dict[str, set[int]] = {name: set() for name in self.shares}

    def run(self, progress: Progress, should_stop: Callable[[], bool]) -> Exported:
        """Images first, then the lists that say what is there."""
        index = read_index(self.folder)
        if changed := [name for name in self.classes if as_text(name) != name]:
            _log.warning("class %r stands after a ' in %s, where a spreadsheet would take it for a formula; %s has "
                         "the name itself", changed[0], LABELS, CLASSES)  # fmt: skip
        progress.begin("export", sum(row.samples for row in index.values()), "images")
        temporary = self.out / PARTIAL / LABELS
        try:
            with temporary.open("w", newline="", encoding="utf-8") as f:
                lines = csv.writer(f, lineterminator="\n")
                lines.writerow(_HEAD)
                for columns in shard_columns(self.folder, index):
                    for image in self._images(columns):
                        if should_stop():
                            return Exported(self.present, self.written, True)
                        lines.writerow(self._put(image))
                        if image.key == image.sample:
                            progress.advance("export", 1)
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(self.out / LABELS)
            self._write_classes()
        finally:
            progress.end("export")
        return Exported(self.present, self.written, False)

    def _images(self, columns: ShardColumns) -> Iterator[_Image]:
        """The images of a shard, previews after them."""
        path, end = self.folder / columns.file, f".{self.suffix}"
        place = zip(
            columns.key, columns.label, columns.confidence, columns.offset, columns.size, columns.digest, strict=True
        )
        with open(open_plain(path, self.folder), "rb", buffering=0) as f:  # noqa: PTH123
            for key, label, confidence, offset, size, digest in place:

                def read(offset: int = offset, size: int = size, name: str = key + end, digest: str = digest) -> bytes:
                    return _checked(path, os.pread(f.fileno(), size, offset), digest, name)

                yield _Image(key, key, label, confidence, size, digest, read)
        for sample in read_shard(self.folder, columns.shard) if self.previews else ():
            if sample.preview is not None:
                yield self._preview(sample)

    def _preview(self, sample: Sample) -> _Image:
        label, named = sample.meta.get("label"), _PREVIEW.fullmatch(sample.key)
        if named is None or type(label) is not int or not 0 <= label < len(self.names):
            raise SynthkdError(f"{sample.where}: not a preview's name and label; run `synthkd verify {self.folder}`")
        digest = short_digest(sample.image)
        return _Image(sample.key, named[1], label, None, len(sample.image), digest, lambda: sample.image)

    def _put(self, image: _Image) -> tuple[object, ...]:
        """Write an image where it is not there yet; returns its line of labels.csv."""
        split = split_of(image.sample, self.seed, self.shares)
        target = self.out / split / self.names[image.label] / f"{image.key}.{self.suffix}"
        if not _holds(target, image):
            temporary = self.out / PARTIAL / target.name
            data = image.read()
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(target)
            self.written += 1
        self.present += 1
        self.seen[split].add(image.label)
        confidence = "" if image.confidence is None else image.confidence
        name = target.relative_to(self.out).as_posix()
        return name, image.key, split, as_text(self.classes[image.label]), image.label, confidence

    def _write_classes(self) -> None:
        order = {name: i for i, name in enumerate(sorted(self.names))}
        rows = [
            {"folder": folder, "class": name, "label": i, "sorted": order[folder]}
            for i, (folder, name) in enumerate(zip(self.names, self.classes, strict=True))
        ]
        write_atomically(self.out / CLASSES, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        have = set().union(*self.seen.values())
        for split, labels in self.seen.items():
            if missing := sorted(have - labels):
                _log.warning(
                    "split %s has no image of class %r: loaders that number the folders they find would number others "
                    "than in the other splits; take numbers from %s", split, self.classes[missing[0]], LABELS,
                )  # fmt: skip


def as_text(value: str) -> str:
    """A cell that spreadsheets show as it is: after a ' where it would be a formula (OWASP, "CSV Injection")."""
    return f"'{value}" if value[:1] in _FORMULA else value


def _holds(path: Path, image: _Image) -> bool:
    """Whether an image's file is there, byte for byte."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size != image.size:
        return False
    return short_digest(path.read_bytes()) == image.digest


def _checked(path: Path, data: bytes, digest: str, name: str) -> bytes:
    if short_digest(data) != digest:
        raise SynthkdError(f"{path}: {name} does not match its digest; run `synthkd verify {path.parent}`")
    return data
