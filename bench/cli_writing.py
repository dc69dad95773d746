"""`synthkd bench writing`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from synthkd.bench.record import append_row
from synthkd.bench.writing import CASES, FORMATS, WritingSpec, measure_writing
from synthkd.dfkd.cli_options import Device, Encoder, Encoders, pick_device
from synthkd.dfkd.presets import load_preset
from synthkd.engine.writer import Writing


def writing(
    case: Annotated[list[str] | None, typer.Option(help="guided or cheap; may be repeated (default: both).")] = None,
    image_format: Annotated[
        list[str] | None, typer.Option("--format", help="png, jpg or webp; may be repeated (default: all).")
    ] = None,
    encoder: Encoder = "auto",
    encoders: Encoders = None,
    ring: Annotated[int, typer.Option(help="Groups that may be drawn and not yet safe on disk.")] = 3,
    groups: Annotated[int, typer.Option(help="Groups a round; the cheap case has ten times as many.")] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds; each draws alone once and with writing once.")] = 5,
    folder: Annotated[Path | None, typer.Option("--out", help="A folder on the disk to write to.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Append the rows to bench/results/writing.jsonl.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON row per line.")] = False,
    device: Device = None,
) -> None:
    """Synthesis with writing over synthesis without, one drawing process: ratio, images/s, stall."""
    preset = load_preset("digits").on(pick_device(device))
    spec = WritingSpec(
        case or CASES, image_format or FORMATS, Writing(encoder, encoders, ring), groups, rounds, folder
    )  # fmt: skip
    names = ("case", "image_format", "encoder", "ratio", "lowest_ratio", "images_per_second", "stall_percent")
    table = Table("case", "format", "encoder", "with / without", "lowest", "images/s", "stall, %")
    for row in measure_writing(spec, preset):
        table.add_row(*(str(row[name]) for name in names))
        if record:
            append_row("writing", row)
        if json_output:
            print(json.dumps(row, sort_keys=True), flush=True)
    if not json_output:
        Console().print(table)
