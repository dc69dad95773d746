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
NOT_RUN = "**not run**"


class Own(NamedTuple):
    """What a preset of the page is by itself: a row of anything else is of another budget.

    names, parameters: of teacher and student; side: of images, pixels; gpu: whether a CPU's row is none of it.
    """

    size: str
    names: tuple[str, str]
    parameters: tuple[int, int]
    side: int
    budget: int
    steps: int
    batch_size: int
    gpu: bool

    @property
    def pair(self) -> str:
        """Teacher -> student."""
        return _pair(self.names, self.parameters)


_CIFAR = (("resnet56", "resnet20"), (853_018, 269_722), 32)
_PACS = (("resnet", "resnet"), (1_228_199, 308_439))
EXPECTED = {
    "cifar10": Own("base", *_CIFAR, 50_000, 40_000, 256, True),
    "pacs-sketch": Own("base", *_PACS, 128, 21_000, 20_000, 128, True),
    "cifar10-small": Own("small", *_CIFAR, 2_000, 1_000, 128, False),
    "pacs-sketch-small": Own("small", *_PACS, 64, 1_050, 800, 64, False),
}


def _pair(names: tuple[str, str], parameters: Sequence[int] | None) -> str:
    """Teacher -> student, with millions of weights where they are known: two of one name differ in widths."""
    sizes = ("", "") if parameters is None else tuple(f" {n / 1e6:.2f} M" for n in parameters)
    return " → ".join(f"{name}{size}" for name, size in zip(names, sizes, strict=True))


class Setting(NamedTuple):
    """What rows of one group share: all but arm and seed."""

    preset: str
    size: str
    pair: str
    teacher: str
    side: int
    budget: int
    steps: int
    batch_size: int
    cuda: bool

    @property
    def label(self) -> str:
        """The preset's name, and what its rows are less than it."""
        own = EXPECTED.get(self.preset)
        if own is None:
            return self.preset
        mine = (self.size, self.pair, self.side, self.budget, self.steps, self.batch_size)
        whole = mine == (own.size, own.pair, own.side, own.budget, own.steps, own.batch_size)
        return self.preset + ("" if whole else ", other budget") + (", on a CPU" if own.gpu and not self.cuda else "")

    @property
    def whole(self) -> bool:
        """Whether its rows count as the preset's."""
        return self.label == self.preset


Found = dict[Setting, dict[str, list[Row]]]


def setting_of(row: Row) -> Setting:
    """A row's group; what an older row does not say is its preset's own."""
    own, names = EXPECTED.get(row["preset"]), (str(row["teacher"]), str(row["student"]))
    known = own.parameters if own and names == own.names else None
    told = row.get("parameters")
    parameters = (int(told["teacher"]), int(told["student"])) if told else known
    side = row["image_size"][0] if "image_size" in row else own.side if own else 0
    return Setting(
        row["preset"], row["size"], _pair(names, parameters), row.get("teacher_sha256") or "", side, row["budget"],
        row["steps"], row["batch_size"], str(row["device"]).startswith("cuda"),
    )  # fmt: skip


def recorded(path: Path = RESULTS / f"{NAME}.jsonl") -> Found:
    """By setting and arm the rows of the newest run, the newest of each seed; settings in the order of the file."""
    groups: dict[Setting, list[Row]] = {}
    for row in read_rows(path):
        groups.setdefault(setting_of(row), []).append(row)
    found: Found = {}
    for setting, rows in groups.items():
        newest = {(row["control"], row["seed"]): row for row in rows if row["run"] == rows[-1]["run"]}
        arms: dict[str, list[Row]] = {}
        for (arm, _), row in sorted(newest.items()):
            arms.setdefault(arm, []).append(row)
        found[setting] = arms
    return found


def results_table(found: Found) -> str:
    """Accuracy by setting and arm; a preset of the page that has no row of its own is said to be not run."""
    head = ["preset", "prior", "teacher → student", "teacher, %", "arm", "student, % (spread)", "images made", "steps",
            "hours", "of a GPU", "images/s"]  # fmt: skip
    lines = []
    for preset, own in EXPECTED.items():
        mine = [setting for setting in found if setting.preset == preset]
        if not any(setting.whole for setting in mine):
            lines.append([preset, own.size, own.pair, "", ", ".join(ARMS), NOT_RUN, "", "", "", "", ""])
        for setting in mine:
            arms = found[setting]
            named = ARMS if setting.whole else tuple(a for a in ARMS if a in arms)
            for arm in [*named, *(a for a in arms if a not in ARMS)]:
                lines.append(_arm_line(setting, arm, arms.get(arm, [])))
    return _markdown(head, lines)


def _arm_line(setting: Setting, arm: str, rows: Sequence[Row]) -> list[str]:
    about = [setting.label, setting.size, setting.pair]
    if not rows:
        return [*about, "", arm, NOT_RUN, "", f"{setting.steps:,} x {setting.batch_size}", "", "", ""]
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
        full, small = (_arms(found, name) for name in (preset, f"{preset}-small"))
        for one in wanted:
            lines.append([preset, one.words, _verdict(one, full), _verdict(one, small)])
    return _markdown(["preset", "expected", "found", "at a CPU's size (no such claim)"], lines)


def _arms(found: Found, preset: str) -> dict[str, list[Row]]:
    """Rows by arm of the preset's own setting; where there are several, teachers of their own, of the last one."""
    mine = [s for s in found if s.preset == preset and s.whole and "guided" in found[s]]
    return found[mine[-1]] if mine else {}


def _verdict(wanted: Wanted, arms: Mapping[str, Sequence[Row]]) -> str:
    """From means over the seeds that all of its arms have."""
    rows = {arm: {row["seed"]: row for row in arms.get(arm, ())} for arm in wanted.arms}
    seeds = set.intersection(*(set(one) for one in rows.values()))
    if not seeds:
        return NOT_RUN
    shared = {arm: [one[seed] for seed in sorted(seeds)] for arm, one in rows.items()}
    means = {arm: _mean(one, "student_accuracy") for arm, one in shared.items()}
    value = wanted.figure({**means, "teacher": _mean(shared["guided"], "teacher_accuracy")})
    reached = value > wanted.least if wanted.strict else value >= wanted.least
    count = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return f"{value:.2f}{wanted.unit}: {'reached' if reached else '**missed**'} ({count})"


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
            alt = f"Contact sheet of {preset}: unguided images left, guided ones right, one row per class"
            lines += [f"![{alt}](images/evidence-{preset}.png)", "", f"*{preset}: unguided left, guided right, the "
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
