"""Methods at equal budget over seeds, a row each; and the table of docs/methods.md, made from the newest rows.

`python -m synthkd.bench.methods` rewrites the table; a test compares.
"""

import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from synthkd.bench.record import RESULTS, append_row, stamped, with_table
from synthkd.dfkd.compare import Comparison, Row
from synthkd.dfkd.method_run import RESULT, MethodRun
from synthkd.dfkd.presets import Preset
from synthkd.dfkd.progress import Progress, Silent
from synthkd.dfkd.train_options import TrainOptions
from synthkd.engine.errors import SynthkdError

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
BEGIN, END = "<!-- table: python -m synthkd.bench.methods -->\n", "<!-- end of table -->\n"
NAME = "methods"
Found = dict[tuple[str, str], list[dict[str, Any]]]


def measure_methods(
    preset: Preset,
    methods: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    steps: int | None = None,
    num_images: int | None = None,
    record: bool = False,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Row]:
    """One row per method and seed, stamped, and appended to bench/results/methods.jsonl where `record` says so.

    A run whose folder says that it was recorded is not appended twice. Raises SynthkdError for a record of another
    budget than the preset's: the table is of one.
    """
    if record and (steps or num_images):
        raise SynthkdError("--record is for the preset's own steps and images; leave --steps and --num-images out")
    preset = replace(preset, distill=replace(preset.distill, steps=steps)) if steps else preset
    how = TrainOptions(device=preset.job.device)
    run = MethodRun(preset=preset, method="", out=out, num_images=num_images, workers=1, how=how)
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(stamped(row))
        folder = out / row["method"] / f"seed-{row['seed']}"
        identity = json.loads((folder / RESULT).read_text())["identity"]
        run_of = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        done = folder / f"recorded-{run_of}"
        if record and not done.exists():
            append_row(NAME, rows[-1])
            done.touch()

    Comparison(
        run=run, methods=methods, seeds=seeds, progress=progress or Silent(), should_stop=should_stop, on_row=keep
    ).execute()
    return rows


def recorded(path: Path = RESULTS / f"{NAME}.jsonl") -> Found:
    """The newest row of each seed by (preset, method), those of a CPU, in the order of the file."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        if not str(row.get("device", "cpu")).startswith("cpu"):
            continue
        found.setdefault((row["preset"], row["method"]), {})[row["seed"]] = row
    return {key: list(rows.values()) for key, rows in found.items()}


def table(found: Found) -> str:
    """The table in Markdown: per preset the methods, best first."""
    head = "| preset | method | teacher | student (spread over seeds) | agreement | images made | seconds | of the CPU "
    head += "| peak MB |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for preset in dict.fromkeys(preset for preset, _ in found):
        named = {method: rows for (p, method), rows in found.items() if p == preset}
        for method in sorted(named, key=lambda m: -_mean(named[m], _score(named[m]))):
            lines.append(_line(preset, method, named[method]))
    return "\n".join(lines) + "\n"


def _score(rows: list[dict[str, Any]]) -> str:
    return "miou" if "student_miou" in rows[0] else "accuracy"


def _mean(rows: list[dict[str, Any]], what: str, who: str = "student") -> float:
    return statistics.fmean(float(row.get(f"{who}_{what}", 0.0)) for row in rows)


def _line(preset: str, method: str, rows: list[dict[str, Any]]) -> str:
    what = _score(rows)
    values = [float(row.get(f"student_{what}", 0.0)) for row in rows]
    unit = " mIoU" if what == "miou" else ""
    spread = f"{min(values):.1f} to {max(values):.1f}, {len(rows)} seeds" if len(rows) > 1 else "one seed"
    names = ("num_images", "seconds", "cpu_seconds", "peak_mb")
    known = [[float(row[name]) for row in rows if name in row] for name in names]
    rest = [f"{statistics.fmean(values):,.0f}" if values else "–" for values in known]
    student = f"**{statistics.fmean(values):.1f}**{unit} ({spread})"
    cells = [
        preset, method, f"{_mean(rows, what, 'teacher'):.1f}{unit}", student,
        f"{statistics.fmean(float(row['agreement']) for row in rows):.1f}", *rest,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def page(text: str, found: Found) -> str:
    """The page with its table made anew."""
    return with_table(text, BEGIN, END, table(found))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), recorded()))
