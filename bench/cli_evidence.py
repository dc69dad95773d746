"""`synthkd bench evidence`, and `python -m synthkd.bench.evidence`, which is the same command alone."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from synthkd.bench.evidence import Evidence, Row
from synthkd.bench.evidence_page import PAGE, page, recorded
from synthkd.bench.evidence_pictures import keep_training, write_sheet
from synthkd.dfkd.cli_methods import Deadline, Minutes, chosen_preset, shortened
from synthkd.dfkd.cli_options import Device, parse_numbers, pick_device
from synthkd.dfkd.cli_progress import Bars, StopFlag
from synthkd.dfkd.training import Stopped
from synthkd.engine.errors import SynthkdError
from synthkd.engine.rows import write_atomically


def evidence(
    preset: Annotated[str, typer.Argument(help="Preset to run; `synthkd info` lists them.")] = "",
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder for the runs, seed-N.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0,1,2.")] = "0",
    teacher: Annotated[str | None, typer.Option(help="One of the preset's teachers by name, or a card.")] = None,
    student: Annotated[str | None, typer.Option(help="Architecture of the student, such as resnet8.")] = None,
    num_images: Annotated[int | None, typer.Option(min=8, help="Images per set, not the preset's.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of every student.")] = None,
    controls: Annotated[str | None, typer.Option(help="Methods beside, such as pool,fastdfkd, or none.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that draw.")] = None,
    minutes: Minutes = None,
    record: Annotated[bool, typer.Option("--record", help="Append the rows to bench/results/evidence.jsonl.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON row per line.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Make the tables of docs/evidence.md anew.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="A finished run whose contact sheet the page gets.")] = None,
    trained: Annotated[
        Path | None, typer.Option(help="Folder of a trained prior or teacher whose digests and log the page gets.")
    ] = None,
    device: Device = None,
) -> None:
    """Guided, unguided and the preset's controls over seeds at equal steps: a row each.

    --table, --sheet RUN and --trained FOLDER (both with the preset's name) work on docs/evidence.md and run nothing.
    """
    if table or sheet or trained:
        _paged(preset, sheet, trained)
        return
    if not preset or out_dir is None:
        raise SynthkdError("evidence: name a preset and --out, or ask for --table")
    chosen = shortened(chosen_preset(preset, teacher, student, controls), steps).on(pick_device(device))
    job = Evidence(preset=chosen, seeds=parse_numbers("--seeds", seeds), out=out_dir, num_images=num_images,
                   workers=workers, record=record)  # fmt: skip
    console = Console(stderr=True)
    with Bars(console) as bars, StopFlag() as stop:
        until = Deadline(stop, minutes)
        try:
            rows = replace(job, progress=bars, should_stop=until.is_set).execute()
        except Stopped:
            raise typer.Exit(stop.exit_code(console, "the same command goes on from here", "step")) from None
    for row in rows if json_output else ():
        print(json.dumps(row, sort_keys=True), flush=True)
    if not json_output:
        Console().print(_shown(rows))


def _paged(preset: str, sheet: Path | None, trained: Path | None) -> None:
    """What the page holds beside its text, made anew."""
    if (sheet or trained) and not preset:
        raise SynthkdError("evidence: --sheet and --trained need the preset's name, such as cifar10-small")
    if sheet is not None:
        print(write_sheet(sheet, preset))
    if trained is not None:
        print(keep_training(trained, preset))
    write_atomically(PAGE, page(PAGE.read_text(), recorded()))


def _shown(rows: Sequence[Row]) -> Table:
    table = Table("seed", "control", "teacher, %", "student, %", "images", "hours", "images/s")
    for row in rows:
        rate = "–" if row["images_per_second"] is None else f"{row['images_per_second']:.2f}"
        figures = (row["teacher_accuracy"], row["student_accuracy"])
        cells = [f"{value:.2f}" for value in figures]
        table.add_row(str(row["seed"]), row["control"], *cells, f"{row['images']:,}", f"{row['hours']:.2f}", rate)
    return table


def main(words: Sequence[str]) -> None:
    """The command alone; a wrong input ends in one line on standard error and its exit code."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(evidence)
    try:
        app(list(words))
    except (SynthkdError, OSError, SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))
