"""Figures of a set: exact ones from its rows, in one pass; pixels, readings and near-copies from a seeded sample.

A shard's rows are in memory at a time, sixteen bytes an image (to find files that are equal), and the sample.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from synthkd.dfkd.metrics import NearCopy, shapes
from synthkd.dfkd.near import Near, near_copies
from synthkd.dfkd.progress import Progress, Silent
from synthkd.engine.columns import ShardColumns, set_plan, shard_columns
from synthkd.engine.config import Recipe
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import flatten, read_environments, read_manifest
from synthkd.engine.plan import sample_key
from synthkd.engine.reading import MAX_MEMBER, decode_image, decode_meta
from synthkd.engine.rows import read_index
from synthkd.engine.shards import short_digest
from synthkd.engine.untrusted import open_plain

SHEET_CLASSES, SHEET_COLUMNS, BINS, PAIRS = 20, 8, 20, 6
MAX_SAMPLE = 100_000  # three kilobytes each
_BLOCK = 512


class Place(NamedTuple):
    """Where a sample's files lie, and what they must be."""

    id: int
    label: int
    shard: str
    offset: int
    size: int
    digest: str
    note: str


@dataclass
class Spread:
    """Mean and range of many numbers, exact, and quantiles of those in the sample."""

    count: int = 0
    total: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    sampled: list[float] = field(default_factory=list)

    def add(self, values: Iterable[Any]) -> None:
        """Values, None or not finite where there is none."""
        column = np.array([np.nan if v is None else v for v in values], np.float64)
        good = column[np.isfinite(column)]
        if len(good):
            self.count, self.total = self.count + len(good), self.total + float(good.sum())
            self.low, self.high = min(self.low, float(good.min())), max(self.high, float(good.max()))

    @property
    def mean(self) -> float:
        """Of all."""
        return self.total / max(1, self.count)

    def figures(self) -> dict[str, float]:
        """Plain values; quantiles are of the sample."""
        if not self.count:
            return {}
        deciles = np.quantile(self.sampled or [self.mean], [0.1, 0.5, 0.9]).tolist()
        named = zip(("min", "p10", "median", "p90", "max"), (self.low, *deciles, self.high), strict=True)
        return {"mean": _short(self.mean), **{name: _short(value) for name, value in named}}


@dataclass
class Pixels:
    """What was seen of the sample. mean, square: sums over images of each channel's mean and mean square, in [0,1].

    brightness, contrast: mean and standard deviation of each image over all its values; read: teacher's first choices,
    and how many of them are the label, among those whose logits are stored.
    """

    images: int = 0
    mean: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    square: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    brightness: list[float] = field(default_factory=list)
    contrast: list[float] = field(default_factory=list)
    read: Counter[int] = field(default_factory=Counter)
    right: Counter[int] = field(default_factory=Counter)
    asked: Counter[int] = field(default_factory=Counter)

    def add(self, pixels: NDArray[np.uint8], label: int, logits: Any) -> None:
        """One image uint8 [H,W,3], its label, and its stored logits."""
        values = pixels.reshape(-1, 3).astype(np.float64) / 255
        self.images += 1
        self.mean += values.mean(axis=0)
        self.square += np.square(values).mean(axis=0)
        self.brightness.append(float(values.mean()))
        self.contrast.append(float(values.std()))
        if isinstance(logits, list) and logits and all(isinstance(v, (int, float)) for v in logits):
            choice = int(np.argmax(logits))
            self.read[choice] += 1
            self.asked[label] += 1
            self.right[label] += choice == label

    @property
    def agreement(self) -> float | None:
        """Percent of the sample that the teacher reads as its label."""
        return 100 * self.right.total() / self.asked.total() if self.asked else None

    def figures(self) -> dict[str, Any]:
        """Plain values."""
        mean = self.mean / max(1, self.images)
        std = np.sqrt(np.maximum(self.square / max(1, self.images) - mean**2, 0))
        return {
            "images": self.images,
            "mean": [_short(v) for v in mean.tolist()],
            "std": [_short(v) for v in std.tolist()],
            "brightness": _short(float(np.mean(self.brightness))) if self.brightness else None,
            "contrast": _short(float(np.mean(self.contrast))) if self.contrast else None,
            "agreement_percent": None if self.agreement is None else _short(self.agreement),
        }


@dataclass
class SetStats:
    """All that `synthkd stats` says of a set.

    counts: images [K]; confidence: sums over the `judged` images [K]; histogram: of it, BINS shares of [0,1] [K,BINS];
    repaired: images that were drawn again by `synthkd repair`;
    equal: files that are byte for byte an earlier one, and ids of some; near: positions in `sample`.
    """

    folder: Path
    manifest: dict[str, Any]
    recipe: Recipe
    counts: NDArray[np.int64]
    confidence: NDArray[np.float64]
    judged: NDArray[np.int64]
    histogram: NDArray[np.int64]
    sizes: Spread = field(default_factory=Spread)
    losses: dict[str, Spread] = field(default_factory=dict)
    attempts: Counter[int] = field(default_factory=Counter)
    environments: Counter[str] = field(default_factory=Counter)
    repaired: int = 0
    groups: int = 0
    shards: int = 0
    seconds: Counter[str] = field(default_factory=Counter)
    equal: int = 0
    equal_pairs: list[tuple[int, int]] = field(default_factory=list)
    sample: list[Place] = field(default_factory=list)
    pixels: Pixels = field(default_factory=Pixels)
    near: Near = field(default_factory=lambda: Near(0, [], True))
    sheet: dict[int, list[Place]] = field(default_factory=dict)
    pictures: dict[str, NDArray[np.uint8]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Images in the set."""
        return int(self.counts.sum())

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Seconds per drawn image (padding included) by stage."""
        drawn = max(1, self.groups * self.recipe.group_size)
        return {name: value / drawn for name, value in sorted(self.seconds.items(), key=lambda item: -item[1])}

    def figures(self) -> dict[str, Any]:
        """Plain values, ready for JSON; without pictures."""
        classes = [
            {"class": name, "images": int(n), "confidence": _short(float(c / j)) if j else None}
            for name, n, c, j in zip(self.recipe.classes, self.counts, self.confidence, self.judged, strict=True)
        ]
        return {
            "fingerprint": self.manifest["fingerprint"],
            "images": self.total,
            "shards": self.shards,
            "classes": classes,
            "confidence_histogram": self.histogram.sum(axis=0).tolist(),
            "losses": {name: spread.figures() for name, spread in sorted(self.losses.items())},
            "bytes": self.sizes.figures(),
            "attempts": {str(n + 1): count for n, count in sorted(self.attempts.items())},
            "repaired": self.repaired,
            "environments": dict(sorted(self.environments.items())),
            "stage_seconds": {name: _short(value) for name, value in self.stage_seconds.items()},
            "equal_files": self.equal,
            "sample": self.pixels.figures(),
            "near_copies": {
                "images": self.near.count,
                "of": len(self.sample),
                "all_pairs": self.near.exact,
                "examples": [[*self.ids_of(p), p.likeness] for p in self.near.examples],
            },
        }

    def ids_of(self, pair: NearCopy) -> tuple[int, int]:
        """The ids of a pair of near-copies."""
        return self.sample[pair.earlier].id, self.sample[pair.later].id

    def described(self) -> dict[str, str]:
        """What the environments' keys stand for, in words."""
        known = read_environments(self.folder)
        return {
            key: ", ".join(f"{n}: {v}" for n, v in flatten(known.get(key, {})).items()) for key in self.environments
        }


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def sample_size(count: int) -> int:
    """Raise SynthkdError for a sample that cannot be."""
    if not 1 <= count <= MAX_SAMPLE:
        raise SynthkdError(f"--sample is {count}; expected 1 to {MAX_SAMPLE}")
    return count


def measure_set(folder: Path, sample: int = 2000, seed: int = 0, progress: Progress | None = None) -> SetStats:
    """Figures of the finished images of a set; sample: images whose pixels are looked at, a function of seed and ids.

    Raises SynthkdError where no shard is finished, rows are damaged, or a sampled file does not match its digest.
    """
    manifest, index, told = read_manifest(folder), read_index(folder), progress or Silent()
    if not index:
        raise SynthkdError(f"{folder}: holds no finished shard; finish the set with the command that began it")
    recipe = set_plan(manifest).recipe
    kinds = len(recipe.classes)
    stats = SetStats(
        folder, manifest, recipe, np.zeros(kinds, np.int64), np.zeros(kinds), np.zeros(kinds, np.int64),
        np.zeros((kinds, BINS), np.int64), shards=len(index),
    )  # fmt: skip
    pick, equal = _Pick(sample, seed), _Equal()
    told.begin("rows", sum(row.samples for row in index.values()), "images")
    for columns in shard_columns(folder, index):
        _count(stats, columns)
        pick.take(columns)
        equal.add(columns)
        told.advance("rows", len(columns))
    told.end("rows")
    stats.equal, stats.equal_pairs = equal.found()
    stats.sample = pick.places(stats)
    _look(stats, told)
    return stats


def _count(stats: SetStats, columns: ShardColumns) -> None:
    """Add one shard's rows."""
    labels = np.array(columns.label, np.int64)
    stats.counts += np.bincount(labels, minlength=len(stats.counts))
    sure = np.array([np.nan if v is None else v for v in columns.confidence], np.float64)
    known = np.isfinite(sure)
    stats.judged += np.bincount(labels[known], minlength=len(stats.counts))
    stats.confidence += np.bincount(labels[known], weights=sure[known], minlength=len(stats.counts))
    bins = np.clip((sure[known] * BINS).astype(np.int64), 0, BINS - 1)
    stats.histogram += np.bincount(labels[known] * BINS + bins, minlength=stats.histogram.size).reshape(-1, BINS)
    stats.sizes.add(columns.size)
    for name, values in columns.losses.items():
        stats.losses.setdefault(name, Spread()).add(values)
    for group in columns.groups:
        stats.attempts[group.attempt] += 1
        for count, key, again in group.runs:
            stats.environments[key] += count
            stats.repaired += count * again
        stats.seconds.update({name: value for name, value in group.seconds.items() if isinstance(value, (int, float))})
    stats.groups += len(columns.groups)
    for i in np.flatnonzero(labels < SHEET_CLASSES).tolist() if _wants_more(stats) else ():
        row = stats.sheet.setdefault(columns.label[i], [])
        if len(row) < SHEET_COLUMNS:
            row.append(_place(columns, i))


def _wants_more(stats: SetStats) -> bool:
    shown = range(min(SHEET_CLASSES, len(stats.counts)))
    return any(len(stats.sheet.get(label, ())) < SHEET_COLUMNS for label in shown)


def _place(columns: ShardColumns, i: int) -> Place:
    key = columns.key[i]
    note = columns.members.get(f"{key}.json", "")
    return Place(
        columns.id[i], columns.label[i], columns.file, columns.offset[i], columns.size[i], columns.digest[i], note
    )


def _mixed(ids: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """64 well-mixed bits of each id (the finalizer of SplitMix64, Steele et al. 2014)."""
    x = ids + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _Pick:
    """The `count` images of the smallest mixed ids, whatever the order in which they come."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.edge = count, seed, 2**64 - 1
        self.held: list[tuple[int, Place, dict[str, float | None]]] = []

    def take(self, columns: ShardColumns) -> None:
        """The images of a shard that may be in the sample, as far as is known by now, and their losses."""
        order = _mixed(np.array(columns.id, np.uint64), self.seed)
        for i in np.flatnonzero(order <= np.uint64(self.edge)).tolist():
            losses = {name: values[i] for name, values in columns.losses.items()}
            self.held.append((int(order[i]), _place(columns, i), losses))
        if len(self.held) >= 2 * self.count:
            self._thin()

    def _thin(self) -> None:
        self.held = sorted(self.held)[: self.count]
        if len(self.held) == self.count:
            self.edge = self.held[-1][0]

    def places(self, stats: SetStats) -> list[Place]:
        """The sample, by id; its sizes and losses go into the figures' quantiles."""
        self._thin()
        for _, place, losses in self.held:
            stats.sizes.sampled.append(place.size)
            for name, value in losses.items():
                if value is not None and math.isfinite(value):
                    stats.losses[name].sampled.append(value)
        return sorted(place for _, place, _ in self.held)


class _Equal:
    """Files that repeat one another byte for byte, by their digests."""

    def __init__(self) -> None:
        self.digests: list[NDArray[np.uint64]] = []
        self.ids: list[NDArray[np.int64]] = []

    def add(self, columns: ShardColumns) -> None:
        """The images of one shard; raises SynthkdError for a digest that is none."""
        try:
            self.digests.append(np.frombuffer(bytes.fromhex("".join(columns.digest)), ">u8"))
        except ValueError as error:
            raise SynthkdError(f"{columns.file}: a digest in its rows is not hexadecimal") from error
        self.ids.append(np.array(columns.id, np.int64))

    def found(self, shown: int = PAIRS) -> tuple[int, list[tuple[int, int]]]:
        """How many images equal an earlier one, and the first such pairs."""
        digests, ids = np.concatenate(self.digests), np.concatenate(self.ids)
        order = np.argsort(digests, kind="stable")
        same = np.flatnonzero(digests[order[1:]] == digests[order[:-1]])
        pairs = [(int(ids[order[i]]), int(ids[order[i + 1]])) for i in same[:shown].tolist()]
        return len(same), sorted(pairs)


def _look(stats: SetStats, told: Progress) -> None:
    """Pixels, readings and near-copies of the sample, and the pictures that the page shows."""
    vectors = torch.empty(len(stats.sample), 0)
    told.begin("pixels", len(stats.sample), "images")
    for i, place in enumerate(stats.sample):
        pixels, meta = read_place(stats.folder, place, stats.recipe.image_format)
        stats.pixels.add(pixels, place.label, meta.get("logits"))
        shape = shapes(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None], 1)[0]
        vectors = vectors if vectors.shape[1] else vectors.new_empty(len(stats.sample), len(shape))
        vectors[i] = shape
        told.advance("pixels", 1)
    told.end("pixels")
    stats.near = near_copies(vectors, examples=PAIRS)
    shown = [stats.sample[i] for p in stats.near.examples for i in (p.earlier, p.later)]
    for place in [*shown, *(p for row in stats.sheet.values() for p in row)]:
        stats.pictures[sample_key(place.id)] = read_place(stats.folder, place, stats.recipe.image_format)[0]


def read_place(folder: Path, place: Place, suffix: str) -> tuple[NDArray[np.uint8], Mapping[str, Any]]:
    """Pixels [H,W,3] and json of a stored sample; raises SynthkdError where they do not match their digests."""
    path = folder / place.shard
    where, after = f"{path}: {sample_key(place.id)}.{suffix}", -(-place.size // _BLOCK) * _BLOCK
    try:
        with open(open_plain(path, folder), "rb", buffering=0) as f:  # noqa: PTH123
            image = os.pread(f.fileno(), place.size, place.offset)
            header = os.pread(f.fileno(), _BLOCK, place.offset + after)
            size = int(header[124:136].strip(b"\0 ") or b"0", 8) if len(header) == _BLOCK else 0
            note = os.pread(f.fileno(), min(size, MAX_MEMBER), place.offset + after + _BLOCK) if size > 0 else b""
    except (OSError, ValueError) as error:
        raise SynthkdError(f"{where}: cannot be read ({error!s:.80}); run `synthkd verify {folder}`") from error
    if short_digest(image) != place.digest or (place.note and short_digest(note) != place.note):
        raise SynthkdError(f"{where}: it or its json does not match its digest; run `synthkd verify {folder}`")
    return decode_image(image, where), decode_meta(note, where) if place.note else {}
