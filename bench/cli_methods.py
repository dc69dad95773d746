"""`synthkd bench methods`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from synthkd.bench.methods import measure_methods
from synthkd.dfkd.cli_methods import Deadline, Minutes, comparison_table, named_methods
from synthkd.dfkd.cli_options import Device, parse_numbers, pick_device
from synthkd.dfkd.cli_progress import Bars, StopFlag
from synthkd.dfkd.presets import load_preset
from synthkd.dfkd.training import Stopped


def methods(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the runs, METHOD/seed-N.")],
    preset: Annotated[str, typer.Option(help="Preset of teacher, student, budget and pool.")] = "digits",
    methods: Annotated[str, typer.Option(help="Names, such as mosaickd,pool (default: the preset's).")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0,1,2.")] = "0,1,2",
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of every student.")] = None,
    num_images: Annotated[int | None, typer.Option(min=8, help="Images a method may make.")] = None,
    minutes: Minutes = None,
    record: Annotated[bool, typer.Option("--record", help="Append the rows to bench/results/methods.jsonl.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON row per line.")] = False,
    device: Device = None,
) -> None:
    """Methods of one preset at equal budget: accuracy, images, seconds and peak memory, a row per seed.

    `python -m synthkd.bench.methods` then makes the table of docs/methods.md.
    """
    chosen, numbers = load_preset(preset).on(pick_device(device)), parse_numbers("--seeds", seeds)
    names = named_methods(methods, chosen)
    console = Console(stderr=True)
    with Bars(console) as bars, StopFlag() as stop:
        until = Deadline(stop, minutes)
        try:
            rows = measure_methods(
                chosen, names, numbers, out_dir, steps=steps, num_images=num_images, record=record, progress=bars,
                should_stop=until.is_set,
            )  # fmt: skip
        except Stopped:
            raise typer.Exit(stop.exit_code(console, "the same command goes on from here", "step")) from None
    for row in rows if json_output else ():
        print(json.dumps(row, sort_keys=True), flush=True)
    if not json_output:
        Console().print(comparison_table(rows))
