"""Pictures of docs/evidence.md: contact sheets of a finished run, and how a prior's training went."""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from synthkd.bench import record
from synthkd.bench.evidence import PRIOR_RESULT
from synthkd.dfkd.prior_loop import LOG
from synthkd.dfkd.report_charts import Axis, Curve, line_chart
from synthkd.dfkd.report_data import Run, load_run
from synthkd.dfkd.report_html import Html, esc
from synthkd.dfkd.report_images import sheet_png
from synthkd.engine.errors import SynthkdError
from synthkd.engine.rows import write_atomically

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
TRAINED, TEACHER = "trained", "-teacher"  # folder of bench/results; end of a teacher's name there
MOST_BYTES = 450_000  # of a contact sheet
_TRIES = ((8, False), (6, False), (8, True), (6, True), (4, True), (2, True))  # columns, and whether in 256 colours
_LOG_ROWS = 120  # of a stage, as kept
_CHART_SIZE = (360, 250)
_CHART_STYLE = """text{font:12px system-ui,sans-serif;fill:#58616b}text.name{font-weight:600;fill:#1a1e23}
.axis{stroke:#dde1e5}.line{fill:none;stroke-width:2;stroke-linejoin:round}
.line.guided{stroke:#0a6c93}.line.teacher{stroke:#a65100}text.guided{fill:#0a6c93}text.teacher{fill:#a65100}"""


def write_sheet(folder: Path, preset: str, images: Path = IMAGES) -> Path:
    """evidence-PRESET.png of a finished run: unguided images left, the same noise guided right, a row per class.

    The first ids of each class; the most of 8, 6, 4 or 2 columns that fits into MOST_BYTES, in 256 colours where it
    must. Raises SynthkdError where the folder is no run, or has no control.
    """
    run = load_run(folder)
    if run.main is None or run.control is None:
        raise SynthkdError(f"{folder}: has no guided set and control; expected a run that `synthkd run` finished")
    for columns, reduced in _TRIES:
        data = _sheet(run, columns, reduced)
        if len(data) <= MOST_BYTES:
            break
    else:
        raise SynthkdError(f"{folder}: a contact sheet takes {len(data)} bytes; expected {MOST_BYTES} at most")
    images.mkdir(parents=True, exist_ok=True)
    path = images / f"evidence-{preset}.png"
    path.write_bytes(data)
    return path


def _sheet(run: Run, columns: int, reduced: bool) -> bytes:
    assert run.main is not None
    rows = [keys[:columns] for _, keys in sorted(run.main.keys.items()) if keys]
    parts = [Image.open(io.BytesIO(sheet_png(drawn.pixels, rows)[0])) for drawn in run.sets]
    wide, tall = parts[0].size
    gap = max(4, tall // (2 * len(rows)))
    out = Image.new("RGB", (2 * wide + gap, tall), "white")
    for i, part in enumerate(reversed(parts)):
        out.paste(part, (i * (wide + gap), 0), part)
    buffer = io.BytesIO()
    (out.quantize(256) if reduced else out).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def keep_training(folder: Path, name: str, images: Path = IMAGES) -> Path:
    """Keep digests, figures and a thinned log of a training in bench/results/trained/, and draw a prior's curve.

    folder: as `synthkd fit-prior` or `bench/fit_teacher.py` left it; name: of the preset, the file of a teacher is
    NAME-teacher.json. Raises SynthkdError where it holds no finished training.
    """
    is_prior = (folder / PRIOR_RESULT).is_file()
    try:
        source = folder / PRIOR_RESULT if is_prior else next(p for p in folder.glob("*.json") if _is_card(p))
        told = {key: value for key, value in json.loads(source.read_text()).items() if key != "captions"}
        log = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
        stages = [[row for row in log if row["stage"] == stage] for stage in dict.fromkeys(r["stage"] for r in log)]
        rows = [row for stage in stages for row in thinned(stage)]
        chart = training_chart(name, rows) if is_prior else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError) as error:
        reason = " ".join(str(error).split())[:100] or "no prior.json, and no card with a .json beside"
        raise SynthkdError(f"{folder}: no finished training of a prior or a teacher ({reason})") from error
    path = record.RESULTS / TRAINED / (f"{name}.json" if is_prior else f"{name}{TEACHER}.json")
    for made in (path.parent, images):
        made.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    write_atomically(path, json.dumps(told, indent=1)[:-2] + f',\n "log": [\n{lines}\n ]\n}}\n')
    if is_prior:
        write_atomically(images / f"evidence-prior-{name}.svg", chart)
    return path


def _is_card(path: Path) -> bool:
    return path.with_suffix(".toml").is_file()


def thinned(rows: Sequence[Mapping[str, Any]], most: int = _LOG_ROWS) -> list[Mapping[str, Any]]:
    """Every n-th row of a log, and all that look at held-out images; the last one is among them."""
    every = max(1, math.ceil(len(rows) / most))
    return [row for i, row in enumerate(rows) if (i + 1) % every == 0 or row is rows[-1] or _held(row) is not None]


def _held(row: Mapping[str, Any]) -> float | None:
    value = row.get("held_out_loss", row.get("psnr_held_out"))
    return None if value is None else float(value)


def training_chart(name: str, log: Sequence[Mapping[str, Any]]) -> str:
    """SVG of a prior's training, [rows of its log] -> two charts: autoencoder in dB, denoiser's loss, over steps."""
    vae, unet = ([row for row in log if row["stage"] == stage] for stage in ("vae", "unet"))
    told = [row for row in vae if _held(row) is not None]
    drawn = [
        (f"{name}: autoencoder, dB (held out)", _chart([_curve("held out", "teacher", told, "psnr_held_out")])),
        (f"{name}: denoiser, loss", _chart([
            _curve("training", "guided", unet, "loss"),
            _curve("held out", "teacher", [r for r in unet if _held(r) is not None], "held_out_loss"),
        ])),
    ]  # fmt: skip
    wide, high = _CHART_SIZE
    parts = [
        f'<text class="name" x="{i * wide + 8}" y="18">{esc(title)}</text>'
        f'<svg x="{i * wide}" y="28" width="{wide}" height="{high - 36}" viewBox="0 0 360 214">{inner}</svg>'
        for i, (title, inner) in enumerate(drawn)
    ]
    size = f'width="{2 * wide}" height="{high}" viewBox="0 0 {2 * wide} {high}"'
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    style = f"<style>{_CHART_STYLE}</style>"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{style}{ground}{"".join(parts)}</svg>\n'


def _curve(label: str, tone: str, rows: Sequence[Mapping[str, Any]], column: str) -> Curve:
    return Curve(label, tone, [float(row["step"]) for row in rows], [float(row[column]) for row in rows])


def _chart(curves: Sequence[Curve]) -> str:
    """What is within the report's chart."""
    shown = [curve for curve in curves if curve.xs]
    x = Axis.over("steps", [0.0, *(v for curve in shown for v in curve.xs)])
    y = Axis.over("", [v for curve in shown for v in curve.ys])
    found: Html = line_chart("", "", shown, x, y, "")
    inner = re.search(r"<svg[^>]*>(.*)</svg>", found, re.DOTALL)
    assert inner is not None
    return inner.group(1)
