"""What the report reads: a run's result, its sets in one pass, its students' logs."""

import json
import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synthkd.dfkd.methods.diffdfkd import KIND
from synthkd.dfkd.rates import in_order
from synthkd.engine.config import Recipe
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import MANIFEST, read_manifest
from synthkd.engine.plan import sample_key
from synthkd.engine.reading import Sample, read_set
from synthkd.engine.rows import GroupRow, all_group_rows

RESULT = "result.json"
CLASSES_SHOWN, COLUMNS, POINTS = 20, 8, 150


@dataclass
class DrawnSet:
    """What a pass over a set keeps of it: counts, the teacher's view, and the pixels of a few samples.

    All but `previews` (of the first sample of each class) is about finished images.
    """

    folder: Path
    recipe: Recipe
    manifest: dict[str, Any]
    rows: list[GroupRow]
    counts: list[int]
    readings: Counter[int] = field(default_factory=Counter)
    intended: list[float] = field(default_factory=list)
    top: list[float] = field(default_factory=list)
    agreed: int = 0
    keys: dict[int, list[str]] = field(default_factory=dict)
    pixels: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    copied: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    previews: dict[str, NDArray[np.uint8]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Samples in the set."""
        return sum(self.counts)

    @property
    def tone(self) -> str:
        """Whose colour the set wears, and what it is called."""
        declared = self.manifest.get("guidance")
        kind = declared.get("kind", KIND) if isinstance(declared, dict) else KIND  # another one is a method's own set
        return "guided" if self.recipe.guidance.scale > 0 or kind != KIND else "unguided"

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per drawn image (padding included) by stage, in the order of the loop."""
        totals: Counter[str] = Counter()
        for row in self.rows:
            totals.update(row.seconds)
        drawn = max(1, len(self.rows) * self.recipe.group_size)
        return {name: totals[name] / drawn for name in in_order(totals)}


def load_set(folder: Path, chosen: Collection[str] | None = None, copied: Collection[str] = ()) -> DrawnSet:
    """Read a set once; chosen: keys whose pixels are kept, the first few of each class by default.

    copied: keys of images that repeat one another; their pixels are kept apart.
    """
    manifest = read_manifest(folder)
    recipe = Recipe.from_dict(manifest["recipe"])
    rows = list(all_group_rows(folder))
    drawn = DrawnSet(folder, recipe, manifest, rows, [0] * len(recipe.classes))
    for sample in read_set(folder):
        try:
            if sample.preview is not None:
                if any(row[:1] == [sample.meta["of"]] for row in drawn.keys.values()):
                    drawn.previews[sample.key] = sample.pixels
                continue
            _take(drawn, sample, chosen)
            if sample.key in copied:
                drawn.copied[sample.key] = sample.pixels
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise SynthkdError(f"{folder}: the json of {sample.key} is not a synthkd sample's ({error!r})") from error
    return drawn


def _take(drawn: DrawnSet, sample: Sample, chosen: Collection[str] | None) -> None:
    label = int(sample.meta["label"])
    drawn.counts[label] += 1
    row = drawn.keys.setdefault(label, [])
    wanted = label < CLASSES_SHOWN and len(row) < COLUMNS if chosen is None else sample.key in chosen
    if wanted:
        row.append(sample.key)
        drawn.pixels[sample.key] = sample.pixels
    logits = np.asarray(sample.meta.get("logits", ()), dtype=np.float64)
    if logits.shape == (len(drawn.counts),) and np.isfinite(logits).all():
        odds = np.exp(logits - logits.max())
        drawn.intended.append(float(odds[label] / odds.sum()))
        drawn.top.append(float(1.0 / odds.sum()))
        drawn.readings[int(logits.argmax())] += 1
        drawn.agreed += int(logits.argmax()) == label


@dataclass(frozen=True)
class Run:
    """A run's folder, or (result None) that of a set alone."""

    folder: Path
    result: dict[str, Any] | None
    main: DrawnSet | None
    control: DrawnSet | None

    def number(self, *names: str) -> float | None:
        """A finite number in result.json, found by nested keys; None where there is none."""
        value: Any = self.result
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if real and math.isfinite(value) else None

    def text(self, name: str) -> str:
        """A value of result.json as text, empty where it is absent."""
        return str((self.result or {}).get(name) or "")

    @property
    def sets(self) -> list[DrawnSet]:
        """The sets that are there, the guided one first."""
        return [s for s in (self.main, self.control) if s is not None]

    @cached_property
    def classes(self) -> list[str]:
        """Class names, as the result or the recipe gives them."""
        named = (self.result or {}).get("classes")
        recipe = self.main.recipe.classes if self.main else ()
        return [str(c) for c in named] if isinstance(named, list) else list(recipe)

    def near_copies(self, tone: str) -> list[tuple[str, str, float]]:
        """Example pairs of near-copies in a set: key of the earlier image, key of the later, likeness."""
        held: Any = self.result
        for name in ("near_duplicates", "examples", tone):
            held = held.get(name) if isinstance(held, dict) else None
        rows = [row for row in held if isinstance(row, list) and len(row) == 3] if isinstance(held, list) else []
        whole = [row for row in rows if _whole(row[0]) and _whole(row[1]) and isinstance(row[2], (int, float))]
        return [(sample_key(a), sample_key(b), float(likeness)) for a, b, likeness in whole]

    def confusion(self, name: str) -> list[list[int]] | None:
        """One of the run's confusion matrices, None where it is absent or not KxK counts."""
        try:
            counts = np.asarray((self.result or {})["confusion"][name])
        except (KeyError, TypeError, ValueError):
            return None
        square = counts.shape == (len(self.classes),) * 2 and counts.size > 0
        return counts.tolist() if square and counts.dtype.kind in "iu" and counts.min() >= 0 else None


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def load_run(folder: Path) -> Run:
    """Find out what a folder holds and read it; raises SynthkdError where it is no run and no set."""
    if (folder / RESULT).is_file():
        told = Run(folder, _read_result(folder / RESULT), None, None)
        keys = {tone: {key for pair in told.near_copies(tone) for key in pair[:2]} for tone in ("guided", "unguided")}
        ours, other = folder / "shards", folder / "control" / "shards"
        main = load_set(ours, None, keys["guided"]) if (ours / MANIFEST).is_file() else None
        chosen = set(main.pixels) if main else None
        control = load_set(other, chosen, keys["unguided"]) if (other / MANIFEST).is_file() else None
        return replace(told, main=main, control=control)
    if (folder / MANIFEST).is_file():
        return Run(folder, None, load_set(folder), None)
    raise SynthkdError(
        f"{folder}: no {RESULT} and no {MANIFEST} there; expected a folder written by `synthkd run` or `synthkd synth`"
    )


def _read_result(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SynthkdError(f"{path}: not JSON ({error}); run the command that wrote it again") from error
    if not isinstance(data, dict):
        raise SynthkdError(f"{path}: holds {type(data).__name__}; expected the result of `synthkd run`")
    return data


def read_log(path: Path, name: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of one column of a student's log, averaged down to what a chart can show."""
    pairs = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
            pair = float(row["step"]), float(row[name])
        except (ValueError, TypeError, KeyError):
            continue
        if all(map(math.isfinite, pair)):
            pairs.append(pair)
    size = max(1, -(-len(pairs) // POINTS))
    blocks = [np.mean(pairs[i : i + size], axis=0) for i in range(0, len(pairs), size)]
    return [float(b[0]) for b in blocks], [float(b[1]) for b in blocks]
