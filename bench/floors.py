"""The table of docs/kernels.md: what each op moves at least, the floor at a copy's bandwidth, and what was measured.

`python -m synthkd.bench.floors` rewrites it; a test compares.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synthkd.bench.record import RESULTS, with_table
from synthkd.kernels.case import Case, Suite
from synthkd.kernels.suites import SUITES

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
BEGIN, END = "<!-- table: python -m synthkd.bench.floors -->\n", "<!-- end of table -->\n"
COPY = 4.3e12  # bytes per second, a device copy on an H200
SIZE, DTYPE = 2, "bfloat16"
NOT_YET = "not measured on a GPU yet"
Rows = Mapping[tuple[str, str, str], Mapping[str, Any]]


def measured(path: Path = RESULTS / "kernels.jsonl") -> Rows:
    """The newest row of a GPU by (op, case, direction), in bfloat16."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {
        (r["op"], r["case"], r["direction"]): r
        for r in rows
        if r["dtype"] == DTYPE and r["speed"] and "kernel" in r["speed"]
    }


def table(rows: Rows) -> str:
    """The table in Markdown: a line per GPU case and direction."""
    lines = ["| op | workload | direction | MB | floor, us | measured |", "|---|---|---|---|---|---|"]
    for suite in SUITES:
        for case in suite.cases:
            if case.measured == "gpu":
                lines += _lines(suite, case, rows)
    return "\n".join(lines) + "\n"


def _lines(suite: Suite, case: Case, rows: Rows) -> list[str]:
    forward, backward = case.traffic(SIZE)
    moved = {"forward": forward, **({"forward+backward": forward + backward} if case.differentiable else {})}
    return [
        f"| {suite.name} | {case.name} | {direction} | {size / 1e6:,.1f} | {size / COPY * 1e6:,.1f} | "
        f"{_said(rows.get((suite.name, case.name, direction)))} |"
        for direction, size in moved.items()
    ]


def _said(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return NOT_YET
    return f"{row['speed']['kernel']['median']:,.0f} us, {row['percent_of_copy']} % of a copy ({row['machine']})"


def page(text: str, rows: Rows) -> str:
    """The page with its table made anew."""
    return with_table(text, BEGIN, END, table(rows))


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), measured()))
