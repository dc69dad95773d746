"""The tables of docs/evidence.md, from rows: `python -m synthkd.bench.evidence --table`; a test compares."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from synthkd.bench.evidence import NAME, Row, read_rows
from synthkd.bench.evidence_pictures import IMAGES, TEACHER, TRAINED
from synthkd.bench.record import RESULTS, with_table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "evidence.md"
_MADE = "python -m synthkd.bench.evidence --table"
END = "<!-- end of table -->\n"
ARMS = ("guided", "unguided", "pool", "fastdfkd")
# What the page is about: preset, teacher -> student, of which size its prior is.
EXPECTED = {
    "cifar10": ("resnet56 → resnet20", "base"),
    "pacs-sketch": ("", "base"),
    "cifar10-small": ("resnet56 → resnet20", "small"),
    "pacs-sketch-small": ("", "small"),
}
NOT_RUN = "**not run**"


class Setting(NamedTuple):
    """What rows of one group share: all but arm and seed."""

    preset: str
    size: str
    pair: str
    budget: int
    steps: int
    batch_size: int
    cuda: bool


Found = dict[Setting, dict[str, list[Row]]]


def recorded(path: Path = RESULTS / f"{NAME}.jsonl") -> Found:
    """By setting and arm the rows of the newest run, the newest of each seed; settings in the order of the file."""
    groups: dict[Setting, list[Row]] = {}
    for row in read_rows(path):
        pair, cuda = f"{row['teacher']} → {row['student']}", str(row["device"]).startswith("cuda")
        setting = Setting(
            row["preset"], row["size"], pair, row["budget"], row["steps"], row["batch_size"], cuda
        )  # fmt: skip
        groups.setdefault(setting, []).append(row)
    found: Found = {}
    for setting, rows in groups.items():
        newest = {(row["control"], row["seed"]): row for row in rows if row["run"] == rows[-1]["run"]}
        arms: dict[str, list[Row]] = {}
        for (arm, _), row in sorted(newest.items()):
            arms.setdefault(arm, []).append(row)
        found[setting] = arms
    return found


def results_table(found: Found) -> str:
    """Accuracy by setting and arm; a preset of the page that has no row is said to be not run."""
    head = ["preset", "prior", "teacher → student", "teacher, %", "arm", "student, % (spread)", "images made", "steps",
            "hours", "of a GPU", "images/s"]  # fmt: skip
    lines = []
    for preset, (pair, size) in EXPECTED.items():
        mine = [setting for setting in found if setting.preset == preset]
        for setting in mine:
            arms = found[setting]
            for arm in [*ARMS, *(a for a in arms if a not in ARMS)]:
                lines.append(_arm_line(setting, arm, arms.get(arm, [])))
        if not mine:
            lines.append([preset, size, pair, "", ", ".join(ARMS), NOT_RUN, "", "", "", "", ""])
    return _markdown(head, lines)


def _arm_line(setting: Setting, arm: str, rows: Sequence[Row]) -> list[str]:
    about = [setting.preset, setting.size, setting.pair]
    if not rows:
        return [*about, "", arm, NOT_RUN, "", f"{setting.steps:,}", "", "", ""]
    rates = [row["images_per_second"] for row in rows if row["images_per_second"]]
    rest = [
        f"{statistics.fmean(row['images'] for row in rows):,.0f}", f"{setting.steps:,} x {setting.batch_size}",
        _hours(rows, "hours"), _hours(rows, "gpu_hours") if setting.cuda else "0",
        f"{statistics.fmean(rates):.1f}" if rates else "–",
    ]  # fmt: skip
    return [*about, f"{_mean(rows, 'teacher_accuracy'):.2f}", arm, _spread(rows), *rest]


def _spread(rows: Sequence[Row]) -> str:
    values = [float(row["student_accuracy"]) for row in rows]
    told = f"{min(values):.2f} to {max(values):.2f}, {len(values)} seeds" if len(values) > 1 else "one seed"
    return f"**{statistics.fmean(values):.2f}** ({told})"


def _hours(rows: Sequence[Row], name: str) -> str:
    return f"{_mean(rows, name):.2f}"


def _mean(rows: Sequence[Row], name: str) -> float:
    return statistics.fmean(float(row[name]) for row in rows)


def _above(other: str) -> Callable[[Mapping[str, float]], float]:
    return lambda a: a["guided"] - a[other]


class Wanted(NamedTuple):
    """An expectation: its words, arms that it takes, the figure made of their means, its unit, and the least it may be.

    strict: whether the figure must be above the least.
    """

    words: str
    arms: tuple[str, ...]
    figure: Callable[[Mapping[str, float]], float]
    unit: str
    least: float
    strict: bool = False


WANTED: Mapping[str, tuple[Wanted, ...]] = {
    "cifar10": (
        Wanted("guided: at least 90 %", ("guided",), lambda a: a["guided"], " %", 90.0),
        Wanted("at least 5 points above unguided", ("guided", "unguided"), _above("unguided"), " points", 5.0),
        Wanted("above distillation on the pool", ("guided", "pool"), _above("pool"), " points", 0.0, strict=True),
    ),
    "pacs-sketch": (
        Wanted("guided: at least 85 % of the teacher's accuracy", ("guided",),
               lambda a: 100 * a["guided"] / a["teacher"], " %", 85.0),
        Wanted("at least 10 points above unguided", ("guided", "unguided"), _above("unguided"), " points", 10.0),
    ),
}  # fmt: skip


def expectations_table(found: Found) -> str:
    """What was expected of the GPU presets beside what was found, there and, with no claim, at a CPU's size."""
    lines = []
    for preset, wanted in WANTED.items():
        full, small = (_means(found, name) for name in (preset, f"{preset}-small"))
        for one in wanted:
            lines.append([preset, one.words, _verdict(one, full), _verdict(one, small)])
    return _markdown(["preset", "expected", "found", "at a CPU's size (no such claim)"], lines)


def _means(found: Found, preset: str) -> dict[str, float]:
    """Means over seeds by arm, and the teacher's, of the preset's largest setting with a guided row."""
    pair = EXPECTED[preset][0]
    mine = [s for s in found if s.preset == preset and "guided" in found[s] and pair in ("", s.pair)]
    if not mine:
        return {}
    arms = found[max(mine, key=lambda s: (s.budget, s.steps, s.cuda))]
    means = {arm: _mean(rows, "student_accuracy") for arm, rows in arms.items()}
    return {**means, "teacher": _mean(arms["guided"], "teacher_accuracy")}


def _verdict(wanted: Wanted, means: Mapping[str, float]) -> str:
    if any(arm not in means for arm in wanted.arms):
        return NOT_RUN
    value = wanted.figure(means)
    reached = value > wanted.least if wanted.strict else value >= wanted.least
    return f"{value:.2f}{wanted.unit}: {'reached' if reached else '**missed**'}"


def trainings_table(folder: Path = RESULTS / TRAINED) -> str:
    """Priors, then teachers, whose training is recorded: budget and figures; then the SHA-256 of their weights."""
    head = ["prior of", "weights, millions", "images", "steps (autoencoder, denoiser)", "hours", "on",
            "autoencoder, dB", "held-out loss", "images/s"]  # fmt: skip
    told = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    lines = [_prior_line(name, told[name]) if name in told else [name, NOT_RUN, *[""] * 7] for name in EXPECTED]
    made = [_markdown(head, lines)]
    if teachers := [_teacher_line(name, told[name]) for name in told if name.endswith(TEACHER)]:
        head = ["teacher of", "weights, millions", "images", "steps", "hours", "on", "accuracy, %", "images/s"]
        made.append(_markdown(head, teachers))
    if sums := [[name, f"`{f}`", f"`{sha}`"] for name, one in told.items() for f, sha in sorted(one["sha256"].items())]:
        made.append(_markdown(["training", "file", "SHA-256"], sums))
    return "\n".join(made)


def _teacher_line(name: str, told: Mapping[str, Any]) -> list[str]:
    how = told["training"]
    return [
        name.removesuffix(TEACHER), f"{told['parameters'] / 1e6:.1f}", f"{told['images']:,}", f"{how['steps']:,}",
        f"{how['seconds'] / 3600:.2f}", told["device"], f"{told['test_accuracy']:.2f}",
        f"{how['images_per_second']:,.0f}",
    ]  # fmt: skip


def _prior_line(name: str, told: Mapping[str, Any]) -> list[str]:
    vae, unet = told["vae"], told["unet"]
    return [
        name, f"{sum(told['parameters'].values()) / 1e6:.1f}", f"{told['images']:,}",
        f"{vae['steps']:,}, {unet['steps']:,}", f"{(vae['seconds'] + unet['seconds']) / 3600:.2f}", told["device"],
        f"{vae['psnr_held_out']:.1f}", f"{unet['held_out_loss']:.4f}", f"{unet['images_per_second']:,.0f}",
    ]  # fmt: skip


def pictures(images: Path = IMAGES) -> str:
    """Contact sheets and curves that are there."""
    lines = []
    for preset in EXPECTED:
        if (images / f"evidence-prior-{preset}.svg").exists():
            lines += [f"![Training of the prior of {preset}](images/evidence-prior-{preset}.svg)", ""]
        if (images / f"evidence-{preset}.png").exists():
            alt = f"Contact sheet of {preset}: guided images above, unguided ones below, one row per class"
            lines += [f"![{alt}](images/evidence-{preset}.png)", "", f"*{preset}: guided above, unguided below, the "
                      "same noise at the same place, a row per class; the first ids, nothing picked.*", ""]  # fmt: skip
    return "\n".join(lines) + "\n" if lines else "No picture yet: **not run**.\n"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def page(text: str, found: Found, trained: Path = RESULTS / TRAINED, images: Path = IMAGES) -> str:
    """The page with its tables and pictures made anew."""
    made = {"results": results_table(found), "expectations": expectations_table(found),
            "trainings": trainings_table(trained), "pictures": pictures(images)}  # fmt: skip
    for name, table in made.items():
        text = with_table(text, f"<!-- {name}: {_MADE} -->\n", END, table)
    return text
