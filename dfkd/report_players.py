"""What a method that learns beside its student logged of itself: a chart per term."""

import json
from pathlib import Path

from synthkd.dfkd import report_charts as c
from synthkd.dfkd import report_html as h
from synthkd.dfkd.report_data import read_log

# Columns of a student's own log; any other one is a method's.
OWN = ("step", "loss", "lr", "agreement", "images_per_second", "data_wait")


def terms_of(log: Path) -> list[str]:
    """Names of the columns that a method added to a student's log."""
    names: dict[str, None] = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        names |= dict.fromkeys(row if isinstance(row, dict) else ())
    return [name for name in names if name not in OWN]


def players(log: Path) -> h.Section | None:
    """Curves of all terms; None where the method has none."""
    charts, ends = [], []
    for name in terms_of(log):
        xs, ys = read_log(log, name)
        if not xs:
            continue
        words = name.replace("_", " ")
        x, y = c.Axis.over("optimiser step", xs), c.Axis.over("", ys)
        curve = c.Curve(h.number(ys[-1]), "guided", xs, ys)
        alt = f"{words}: {h.number(ys[-1])} at the end"
        charts.append(c.line_chart(words.capitalize(), "mean", [curve], x, y, alt))
        ends.append(f"{words} {h.number(ys[-1])}")
    if not charts:
        return None
    sentence = f"What else learned or was measured beside the student ended at: {', '.join(ends)}."
    return h.Section("players", "Players", sentence, [h.grid(charts)])
