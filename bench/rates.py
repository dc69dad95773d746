"""The rates that `synthkd plan` reckons with where a user has not measured their own: `python -m synthkd.bench.rates`.

Draws a small set of the digits preset in one process, times the teacher's labels, and takes the student's speed from
the rows of `bench distill` on the same kind of device. What is written travels in the package.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from synthkd.bench.record import RESULTS, commit, stamped
from synthkd.dfkd.presets import Preset, load_preset
from synthkd.dfkd.rates import RECORDED, Rates, rates_of_set
from synthkd.dfkd.rounds import draw_set
from synthkd.dfkd.teachers import load_teacher
from synthkd.engine import Request
from synthkd.engine.rows import write_atomically

_SECONDS = 3.0  # of labelling


def measured(preset: Preset, images: int) -> Rates:
    """The rates of a preset on its device, drawn now."""
    with tempfile.TemporaryDirectory() as folder:
        draw_set(preset.job, Request(num_samples=images), Path(folder), workers=1)
        found = rates_of_set(Path(folder))
    device, row = preset.job.device, stamped({})
    where = f"{row['machine']}, one process, {images} images, {row['date']}, commit {commit()}"
    return Rates(
        case=preset.name if device == "cpu" else f"{preset.name} {device}", measured=f"on {where}",
        seconds={k: round(v, 7) for k, v in found.seconds.items()},
        bytes={k: round(v, 1) for k, v in found.bytes.items()},
        student=_student_rate(preset.name, device), labels=round(_label_rate(preset), 1),
    )  # fmt: skip


def _label_rate(preset: Preset) -> float:
    """Images a second that the teacher labels."""
    device = torch.device(preset.job.device)
    teacher = load_teacher(preset.job.teacher, preset.job.device)
    images = torch.rand(128, 3, preset.job.recipe.height, preset.job.recipe.width, device=device)
    done, started = 0, time.monotonic()
    with torch.no_grad():
        while time.monotonic() - started < _SECONDS:
            teacher(images).sum().item()
            done += len(images)
    return done / (time.monotonic() - started)


def _student_rate(name: str, device: str) -> float:
    """Images a second of a whole training, from the newest row of that kind; 0 where there is none."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in (RESULTS / "distill.jsonl").read_text().splitlines()]
    kind = {"stage": "end-to-end", "case": f"{name} -> {name}", "variant": "teacher-in-the-loop", "device": device}
    found = [r["images_per_second"] for r in rows if all(r.get(k) == v for k, v in kind.items())]
    return float(next((rate for rate in reversed(found) if rate), 0.0))


def main() -> None:
    """Measure, and put the rates into the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=400)
    images: int = parser.parse_args().images
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    record(measured(load_preset("digits").on(device), images))


def record(rates: Rates) -> None:
    """Put the rates in place of those of the same case."""
    known = json.loads(RECORDED.read_text()) if RECORDED.exists() else []
    kept = [entry for entry in known if entry["case"] != rates.case]
    write_atomically(RECORDED, json.dumps([*kept, rates.to_dict()], indent=2) + "\n")
    print(json.dumps(rates.to_dict()))


if __name__ == "__main__":
    main()
