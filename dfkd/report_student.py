"""A page about one student: how it learned, how fast, from what."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synthkd.dfkd import report_html as h
from synthkd.dfkd.report import REPORT, STUDENT_LOG, learning
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import flatten

TRAINING = "training.json"


def is_student(folder: Path) -> bool:
    """Whether `synthkd distill` or `synthkd online` left this folder."""
    return (folder / TRAINING).is_file() and (folder / STUDENT_LOG).is_file()


def write_student_report(folder: Path) -> Path:
    """Write `report.html` beside a student, and return its path; raises SynthkdError for a damaged folder."""
    try:
        told = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
        sections = [_summary(told), learning({"guided": folder}), _settings(told)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SynthkdError(f"{folder / TRAINING}: not the summary of a training ({error})") from error
    lead = "A student trained on synthetic images alone, under its teacher's outputs."
    path = folder / REPORT
    temporary = path.with_name(REPORT + ".tmp")
    temporary.write_bytes(h.page(folder.resolve().name, lead, h.legend([]), sections).encode("utf-8", "replace"))
    temporary.replace(path)
    return path


def _summary(told: Mapping[str, Any]) -> h.Section:
    agreement, rate, wait = (float(told.get(n) or 0) for n in ("agreement", "images_per_second", "data_wait"))
    hero = [h.Figure("Agreement with the teacher", f"{agreement:.1f}", "%", "held-out synthetic images", "guided")]
    small = [h.Figure("Speed", h.number(rate), "images/s", "of training"),
             h.Figure("Waiting for data", f"{wait:.1f}", "%", "of the time")]  # fmt: skip
    if told.get("seconds"):
        small.append(h.Figure("Whole training", h.duration(float(told["seconds"])), "", ""))
    damaged = told.get("damaged") or {}
    body = [h.figures(hero, hero=True), h.figures(small)]
    if damaged:
        rows = [[key, str(reason)] for key, reason in sorted(damaged.items())[:50]]
        body.append(h.table(f"Damaged images, skipped: {len(damaged)}", ["image", "why"], rows))
    sentence = f"The student agrees with its teacher on {h.percent(agreement)} of held-out synthetic images."
    return h.Section("summary", "Summary", sentence, body)


def _settings(told: Mapping[str, Any]) -> h.Section:
    parts = {name: told[name] for name in ("identity", "execution", "online") if isinstance(told.get(name), Mapping)}
    rows = [[name, str(value)] for name, value in flatten(parts).items()]
    sentence = "The student is a function of its identity; the rest says how it was computed."
    return h.Section("settings", "Settings", sentence, [h.table("The training", ["field", "value"], rows, "facts")])
