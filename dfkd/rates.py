"""How fast a set is drawn and how large it is: measured on a set that is there, or recorded with this version."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from synthkd.dfkd.fields import AMOUNT, TABLE, TEXT, check_fields
from synthkd.engine.config import Recipe
from synthkd.engine.errors import SynthkdError, suggest
from synthkd.engine.index import read_environments, read_manifest
from synthkd.engine.rows import group_rows, read_index, rows_path

STAGES = ("encode", "denoise", "guide", "decode", "annotate")
RECORDED = Path(__file__).with_name("rates.json")
_KINDS = {"case": TEXT, "measured": TEXT, "seconds": TABLE, "bytes": TABLE, "student": AMOUNT, "labels": AMOUNT}


@dataclass(frozen=True)
class Rates:
    """What one image costs in one process: a GPU's, or one CPU core's.

    case: what is drawn; measured: where, when and how, in words; seconds: per image by stage (padding of last groups
    left out); bytes: per image on disk by kind; student: images a second that a student learns from; labels: images a
    second that a teacher labels; 0 where these were not measured.
    """

    case: str
    measured: str
    seconds: Mapping[str, float]
    bytes: Mapping[str, float]
    student: float = 0.0
    labels: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Of one process, drawing alone."""
        total = sum(self.seconds.values())
        return 1 / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As in rates.json."""
        return asdict(self)


def in_order(stages: Iterable[str]) -> list[str]:
    """Stages as they follow one another in a group."""
    return sorted(stages, key=lambda name: (STAGES.index(name) if name in STAGES else len(STAGES), name))


@dataclass
class _Sums:
    """Totals over the rows of a set; nothing of a single image is kept."""

    seconds: Counter[str] = field(default_factory=Counter)
    groups: int = 0
    samples: int = 0
    tar: int = 0
    rows: int = 0
    environments: Counter[str] = field(default_factory=Counter)


def rates_of_set(folder: Path, on_shard: Callable[[int], None] = lambda _: None) -> Rates:
    """The rates of a set that was drawn; compiling is left out, since it is done once.

    on_shard: given the images of each shard that was read.
    Raises SynthkdError where no shard of it is finished, or its rows tell no times.
    """
    manifest, sums = read_manifest(folder), _Sums()
    recipe, index = Recipe.from_dict(manifest["recipe"]), read_index(folder)
    for shard in sorted(index):
        sums.tar += index[shard].bytes
        sums.rows += rows_path(folder, shard).stat().st_size
        for group in group_rows(folder, index[shard]):
            sums.seconds.update({stage: s for stage, s in group.seconds.items() if stage != "compile"})
            sums.environments[group.environment] += 1
            sums.groups, sums.samples = sums.groups + 1, sums.samples + group.kept
        on_shard(index[shard].samples)
    drawn = sums.groups * recipe.group_size
    if not sums.samples or not sums.seconds:
        raise SynthkdError(f"{folder}: no finished shard tells how long it took; draw some with `synthkd synth` first")
    known = read_environments(folder).get(sums.environments.most_common(1)[0][0], {})
    source = manifest.get("source")
    model = source.get("model", "") if isinstance(source, Mapping) else ""
    return Rates(
        case=f"{recipe.height}x{recipe.width}, {recipe.steps} steps, {model or 'a prior'}",
        measured=f"on the {sums.samples:,} images of {folder}, {known.get('device', 'device not known')}",
        seconds={stage: sums.seconds[stage] / drawn for stage in in_order(sums.seconds)},
        bytes={"shards": sums.tar / sums.samples, "rows": sums.rows / sums.samples},
    )


def recorded_cases(path: Path = RECORDED) -> dict[str, Rates]:
    """The rates that came with this version, by case; raises SynthkdError for a file of another shape."""
    found = {}
    for entry in json.loads(path.read_text()):
        check_fields(str(path), entry, _KINDS, joint=": ")
        found[entry["case"]] = Rates(**entry)
    return found


def recorded_rates(case: str) -> Rates:
    """The rates of a recorded case; raises SynthkdError with the nearest right name."""
    cases = recorded_cases()
    if case not in cases:
        raise SynthkdError(
            f"--case {case!r}: {suggest(case, cases)}; or measure your own: draw a small set and pass --from SET"
        )
    return cases[case]
