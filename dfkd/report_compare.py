"""A page about methods beside one another: what their students reached, of how many images, in what time and memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from synthkd.dfkd import report_charts as c
from synthkd.dfkd import report_html as h
from synthkd.dfkd.compare import Row, read_rows, score_column, summarised
from synthkd.dfkd.report import REPORT, STUDENT_LOG
from synthkd.dfkd.report_data import load_set, read_log
from synthkd.dfkd.report_images import contact_sheet
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import MANIFEST

_SCORES = {
    "student_accuracy": "accuracy on real test images",
    "student_miou": "mean IoU on real test images",
    "agreement": "agreement with the teacher on images held out",
}
_CONTROLS = ("pool", "diffusion")


def write_comparison(folder: Path) -> Path:
    """Write `report.html` beside a comparison's rows, and return its path; raises SynthkdError for damaged rows."""
    rows = read_rows(folder)
    if not rows:
        raise SynthkdError(f"{folder}: its comparison has no row")
    try:
        sections = [_table(rows), _curves(folder, rows), *_images(folder, rows)]
    except (TypeError, ValueError, KeyError) as error:
        raise SynthkdError(f"{folder}: its comparison is damaged ({error!r}); run the command again") from error
    steps, batch = rows[0].get("steps", "–"), rows[0].get("batch_size", "–")
    lead = f"Every student is the same network, trained for {steps} steps of {batch} images under the same teacher."
    colours = h.legend([("guided", "methods"), ("unguided", "controls"), ("teacher", "teacher")])
    path = folder / REPORT
    temporary = path.with_name(REPORT + ".tmp")
    title = f"{rows[0].get('preset', folder.name)}: methods compared"
    temporary.write_bytes(h.page(title, lead, colours, sections).encode("utf-8", "replace"))
    temporary.replace(path)
    return path


def tone_of(method: str) -> str:
    """Controls are grey."""
    return "unguided" if method in _CONTROLS else "guided"


def _table(rows: Sequence[Row]) -> h.Section:
    column = score_column(rows)
    scores = summarised(rows, column)
    more = {name: summarised(rows, name) for name in ("agreement", "num_images", "seconds", "cpu_seconds", "peak_mb")}
    teachers = summarised(rows, column.replace("student", "teacher"))
    teacher = max((mean for mean, _, _ in teachers.values()), default=None) if column != "agreement" else None
    low = min(v for _, v, _ in scores.values())
    top = max([v for _, _, v in scores.values()] + ([teacher] if teacher is not None else []))
    axis = c.Axis.over("", [low, top])
    lines = []
    for name, (mean, least, most) in sorted(scores.items(), key=lambda item: -item[1][0]):
        seeds = [float(r[column]) for r in rows if r["method"] == name and column in r]
        marks = [(axis.share(v), tone_of(name)) for v in seeds]
        marks += [(axis.share(teacher), "teacher")] if teacher is not None else []
        spread = f"{h.number(least, 4)} to {h.number(most, 4)}" if len(seeds) > 1 else "one seed"
        cells = [_mean(more, what, name) for what in ("agreement", "num_images", "seconds", "cpu_seconds", "peak_mb")]
        lines.append([name, c.track([(axis.share(mean), "faint")], marks), f"{mean:.2f}", spread, *cells])
    head = ["method", f"{_SCORES[column]}, %", "mean", "spread", "agreement, %", "images made", "seconds", "of the CPU"]
    head.append("peak MB")
    best = max(scores, key=lambda name: scores[name][0])
    sentence = f"Best is {best} with {h.percent(scores[best][0])}, {_SCORES[column]}."
    dots = [
        c.Dot(name, tone_of(name), more["seconds"][name][0], *scores[name])
        for name in scores if name in more["seconds"]
    ]  # fmt: skip
    x = c.Axis.over("seconds for one student, all in", [d.x for d in dots], log=True)
    y = c.Axis.over("", [v for d in dots for v in (d.low, d.high)])
    chart = c.dot_chart("Score and time", "%, with the reach over seeds", dots, x, y, sentence)
    body = [h.table("Methods, best first", head, lines), h.grid([chart], wide=True)]
    return h.Section("methods", "Methods", sentence, body)


def _mean(found: Mapping[str, Mapping[str, tuple[float, float, float]]], what: str, name: str) -> str:
    known = found[what].get(name)
    return "–" if known is None else h.number(known[0], 4)


def _curves(folder: Path, rows: Sequence[Row]) -> h.Section:
    """Agreement and loss of the first seed's students."""
    charts = []
    first = {str(r["method"]): int(r["seed"]) for r in reversed(rows)}
    names = list(dict.fromkeys(str(r["method"]) for r in rows))
    for column, title, unit in (("loss", "Loss of the student", "log scale"), ("agreement", "Agreement", "%")):
        curves = []
        for i, name in enumerate(names):
            xs, ys = read_log(folder / name / f"seed-{first[name]}" / STUDENT_LOG, column)
            if xs:
                shade = 1 - 0.6 * i / max(1, len(names) - 1)
                curves.append(c.Curve(name, tone_of(name), xs, ys, shade=shade))
        if not curves:
            continue
        values = [v for curve in curves for v in curve.ys]
        y = c.Axis.over("", values, log=column == "loss" and min(values) > 0)
        x = c.Axis.over("optimiser step", [v for curve in curves for v in curve.xs])
        charts.append(c.line_chart(title, unit, curves, x, y, f"{title} by method"))
    sentence = "Losses are on each method's own images, and agreement on those it held out: neither ranks methods."
    return h.Section("curves", "Curves", sentence, [h.grid(charts, wide=True)])


def _images(folder: Path, rows: Sequence[Row]) -> list[h.Section]:
    """The first images of each method's set, of its first seed."""
    sheets = []
    for name in dict.fromkeys(str(r["method"]) for r in rows):
        seed = next(int(r["seed"]) for r in rows if r["method"] == name)
        shards = folder / name / f"seed-{seed}" / "shards"
        if (shards / MANIFEST).is_file():
            sheets.append(contact_sheet(load_set(shards), name, tone_of(name)))
    if not sheets:
        return []
    sentence = "The first images of each class, nothing picked by hand."
    return [h.Section("images", "Images", sentence, [h.grid(sheets, wide=True)])]
