"""As many images of the embedded model as a time allows, up to a million: `python -m synthkd.bench.million`.

Groups are ten times the preset's, so that a GPU has something to do. The set goes on where an earlier call ended; the
row is of the last call: what it drew, how fast, how long it waited for the disk, and the most memory it had.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from synthkd.bench.record import append_row, stamped
from synthkd.dfkd.presets import Preset, load_preset
from synthkd.dfkd.rounds import DrawOptions, draw_set
from synthkd.engine import Request
from synthkd.engine.verify import verify_set
from synthkd.engine.writer import RUNS, Writing

IMAGES, LARGER = 1_000_000, 10


def larger(preset: Preset, device: str) -> Preset:
    """The preset on a device; on a GPU in groups of ten times the size, in shards of as many images as before."""
    if device == "cpu":
        return preset.on(device)
    recipe = preset.job.recipe
    each = replace(recipe, samples_per_class=LARGER * recipe.samples_per_class, image_format="webp")
    return replace(preset, job=replace(preset.job, recipe=each)).on(device)


def measure_million(device: str, folder: Path, minutes: float, images: int = IMAGES) -> dict[str, Any]:
    """Draw until the time is over or the set is whole, verify what is there, and say how it went."""
    until, preset = time.monotonic() + 60 * minutes, larger(load_preset("digits"), device)
    summary = draw_set(
        preset.job, Request(num_samples=images), folder, workers=1,
        should_stop=lambda: time.monotonic() > until, how=DrawOptions(writing=Writing()),
    )  # fmt: skip
    ran = json.loads((folder / RUNS).read_text().splitlines()[-1])
    problems = [line for line in verify_set(folder).problems if "not finished" not in line]
    return {
        "kind": "million", "device": device, "images_wanted": images, "images": summary.present,
        "whole": summary.present == images, "drawn": summary.drawn, "seconds": round(summary.seconds, 1),
        "images_per_second": round(summary.images_per_second, 2), "stall_percent": round(summary.stall_percent, 2),
        "encoding_seconds": round(summary.encoding, 2), "writing_seconds": round(summary.writing, 2),
        "bytes": summary.bytes, "image_format": preset.job.recipe.image_format,
        "group": preset.job.recipe.group_size, "problems": len(problems),
        "peak_mb": round(ran["peak_memory"] / 2**20, 1),
        "peak_device_mb": round(ran.get("peak_device_memory", 0) / 2**20, 1),
    }  # fmt: skip


def main() -> None:
    """Measure, and print the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("out/million"))
    parser.add_argument("--record", action="store_true", help="append the row to bench/results/million.jsonl")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    row = stamped(measure_million(device, given.out, given.minutes, given.images))
    print(json.dumps(row))
    if given.record:
        append_row("million", row)


if __name__ == "__main__":
    main()
