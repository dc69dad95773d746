"""The benchmark suites of a GPU machine in parts that fit a time limit; finished parts are not run again.

`python -m synthkd.bench.gpu --minutes 9` goes on where the last call stopped, until it says `all parts done`.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from synthkd.bench import adversarial
from synthkd.bench.decoder import DIRECTIONS, DecoderSpec, measure_decoder
from synthkd.bench.digits import run_seed
from synthkd.bench.kernels import measure, workloads
from synthkd.bench.record import append_row
from synthkd.dfkd.presets import load_preset
from synthkd.dfkd.progress import Silent
from synthkd.engine.index import write_atomically
from synthkd.kernels.suites import SUITES

STATE = Path("build/gpu/done.json")
SEEDS = range(5)


def digits_part(seed: int) -> None:
    """The main job for one seed on the GPU, its row appended."""
    folder = STATE.parent / f"digits-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # a part that was cut short starts anew: its times must be one run's
    row = run_seed(load_preset("digits").on("cuda"), seed, folder, Silent())
    append_row("digits", row)


def adversarial_part(seed: int) -> None:
    """Digits with and without the adversarial term for one seed on the GPU, its row appended."""
    folder = STATE.parent / f"adversarial-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    row = adversarial.run_seed(load_preset("digits").on("cuda"), 1.0, 3, seed, folder, Silent())
    append_row("adversarial", row)


def kernels_part(op: str) -> None:
    """One op against plain torch; its rows appended together, so that a part that was cut short leaves none."""
    device = torch.device("cuda")
    for row in list(measure(workloads(device, [op]), device)):
        append_row("kernels", row)
        if not row["check"]["passed"]:
            print(f"{op}: {row['case']}, {row['dtype']}: FAILED: {row['check']['reason']}", flush=True)


def decoder_part(direction: str) -> None:
    """SD 1.5's decoder at 512, batch 8, bfloat16, in one direction; its row appended."""
    for row in measure_decoder(DecoderSpec(device=torch.device("cuda"), directions=(direction,))):
        append_row("decoder", row)
        for name, entry in row["contenders"].items():
            if entry["failed"]:
                print(f"decoder, {direction}: {name}: FAILED: {entry['failed']}", flush=True)


def parts() -> dict[str, Callable[[], None]]:
    """All parts by name, in the order in which they run: the short ones first."""
    short: dict[str, Callable[[], None]] = {f"kernels: {s.name}": partial(kernels_part, s.name) for s in SUITES}
    short |= {f"decoder: {direction}": partial(decoder_part, direction) for direction in DIRECTIONS}
    suites = {"digits": digits_part, "adversarial": adversarial_part}
    return short | {f"{name} seed {seed}": partial(part, seed) for name, part in suites.items() for seed in SEEDS}


def run_parts(todo: dict[str, Callable[[], None]], state: Path, minutes: float) -> list[str]:
    """Run parts that are not done yet, and start none after `minutes`; returns the names still to do."""
    done: list[str] = json.loads(state.read_text()) if state.exists() else []
    started = time.monotonic()
    for name, part in todo.items():
        if name in done:
            continue
        if time.monotonic() - started > minutes * 60:
            break
        part()
        done.append(name)
        state.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(state, json.dumps(done))
        print(f"{name}: done after {time.monotonic() - started:.0f} s", flush=True)
    return [name for name in todo if name not in done]


def main() -> None:
    """Run what is left within the time limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="start no part after so many minutes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device")
    left = run_parts(parts(), STATE, arguments.minutes)
    print(f"left for the next call: {', '.join(left)}" if left else "all parts done")


if __name__ == "__main__":
    main()
