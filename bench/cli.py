"""`synthkd bench`: the benchmark suites."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from synthkd.bench.adversarial import run_seed as adversarial_seed
from synthkd.bench.digits import run_seed
from synthkd.bench.record import append_row
from synthkd.dfkd.cli_options import Device, pick_device
from synthkd.dfkd.cli_progress import Bars
from synthkd.dfkd.presets import load_preset
from synthkd.engine import SynthkdError

app = typer.Typer(
    help="Benchmark suites; each prints its rows and can append them to bench/results/.", no_args_is_help=True
)


@app.command(epilog="Example: synthkd bench digits --seeds 0,1,2,3,4 --out out/bench --record")
def digits(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the runs, one per seed.")],
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0,1,2.")] = "0",
    num_images: Annotated[int | None, typer.Option(help="Images per set, not the preset's.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Append the rows to bench/results/digits.jsonl.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON row per seed.")] = False,
    device: Device = None,
) -> None:
    """The main job on digits: guided and unguided students at 250, 1,000 and all images."""
    preset = load_preset("digits").on(pick_device(device))
    if num_images is not None:
        preset = replace(preset, num_images=num_images)
    console = Console(stderr=json_output)
    rows = []
    for seed in _numbers(seeds):
        if record and (out_dir / f"seed-{seed}").exists():
            raise SynthkdError(
                f"{out_dir}/seed-{seed}: holds an earlier run, so times would not be one run's; remove it"
            )
        with Bars(console) as bars:
            rows.append(run_seed(preset, seed, out_dir / f"seed-{seed}", bars))
        if record:
            append_row("digits", rows[-1])
        if json_output:
            print(json.dumps(rows[-1], sort_keys=True), flush=True)
    if not json_output:
        console.print(_table(rows))


@app.command(epilog="Example: synthkd bench adversarial --seeds 0,1,2,3,4 --out out/adversarial --record")
def adversarial(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the sets, one per seed.")],
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0,1,2.")] = "0",
    gamma: Annotated[float, typer.Option(help="Weight of the disagreement with the student.")] = 1.0,
    rounds: Annotated[int, typer.Option(help="Rounds of each set; the student learns between them.")] = 3,
    num_images: Annotated[int | None, typer.Option(help="Images per set, not the preset's.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Append rows to bench/results/adversarial.jsonl.")] = False,
    device: Device = None,
) -> None:
    """Digits with and without the adversarial term, KL and JS: what a student makes of each set."""
    preset = load_preset("digits").on(pick_device(device))
    preset = replace(preset, num_images=num_images or preset.num_images)
    console, rows = Console(), []
    for seed in _numbers(seeds):
        with Bars(console) as bars:
            rows.append(adversarial_seed(preset, gamma, rounds, seed, out_dir / f"seed-{seed}", bars))
        if record:
            append_row("adversarial", rows[-1])
    table = Table("seed", "variant", "student", "short student", "teacher reads", "judge reads", "near-copies")
    names = ("student_accuracy", "short_student_accuracy", "teacher_agreement", "judge", "near_duplicates")
    for row in rows:
        for name, scores in row["variants"].items():
            table.add_row(str(row["seed"]), name, *(str(scores.get(n, "–")) for n in names))
    console.print(table)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise SynthkdError(f"--seeds {text!r}: expected numbers such as 0,1,2") from error


def _table(rows: list[dict[str, object]]) -> Table:
    names = ("seed", "teacher_accuracy", "student_accuracy", "unguided_student_accuracy", "seconds")
    table = Table(*(name.replace("_", " ") for name in names))
    for row in rows:
        table.add_row(*(str(row[name]) for name in names))
    return table
