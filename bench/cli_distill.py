"""`synthkd bench distill`."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Column, Table

from synthkd.bench.distill import measure_distill
from synthkd.bench.distill_variants import DistillBench
from synthkd.bench.record import append_row
from synthkd.dfkd.cli_options import Device, pick_device


def distill(
    stage: Annotated[
        list[str] | None, typer.Option(help="read, step or end-to-end; may be repeated (default: all).")
    ] = None,
    size: Annotated[list[int] | None, typer.Option(help="32 or 224; may be repeated (default: both).")] = None,
    variant: Annotated[
        list[str] | None, typer.Option(help="Beside the stage's reference; may be repeated (default: all).")
    ] = None,
    student: Annotated[
        list[str] | None, typer.Option(help="Of step and end-to-end, such as resnet20; may be repeated.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds; each runs every variant once (default: 5; 3 end-to-end).")
    ] = None,
    images: Annotated[int | None, typer.Option(min=8, help="Images of a set (default: by size and device).")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Images of a batch.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of one end-to-end training.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes of the Pillow loader.")] = 2,
    image_format: Annotated[str, typer.Option("--format", help="Of the files: jpg (quality 90), png, webp.")] = "jpg",
    record: Annotated[bool, typer.Option("--record", help="Append the rows to bench/results/distill.jsonl.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON row per line.")] = False,
    device: Device = None,
) -> None:
    """Readers, training steps and short trainings against the plain thing: images/s, and the quality of each.

    read: a Pillow DataLoader, torch, DALI, and decoded images kept. step: an eager loop, and ours eager, compiled, in
    bfloat16. end-to-end: the teacher in the loop, and its labels stored. A variant whose package is missing is skipped,
    and its row says why.
    """
    spec = DistillBench(
        device=torch.device(pick_device(device)), stages=stage or (), sizes=size or (), variants=variant or (),
        students=student or (), rounds=rounds, images=images, batch_size=batch_size, steps=steps, workers=workers,
        image_format=image_format,
    )  # fmt: skip
    rows = []
    for row in measure_distill(spec, _tell):
        rows.append(row)
        if record:
            append_row("distill", row)
        if json_output:
            print(json.dumps(row, sort_keys=True), flush=True)
    if not json_output:
        Console().print(_table(rows))
    if any(row["failed"] for row in rows):
        raise typer.Exit(1)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    heads = ("images/s", "q1 – q3", "x reference", "bar", "compile, s", "wait, %", "quality")
    table = Table(Column("work", min_width=12), Column("variant", min_width=10), *heads)
    for row in rows:
        said = f"skipped: {row['skipped']}" if row["skipped"] else f"FAILED: {row['failed']}" if row["failed"] else ""
        work = f"{row['stage']}: {row['case']}"
        table.add_row(work, row["variant"], *([said] if said else _cells(row)))
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    bar = "" if row["bar"] is None else f"{row['bar']:g}: {'reached' if row['bar_reached'] else 'NOT reached'}"
    spread = f"{row['q1']:.4g} – {row['q3']:.4g}"
    numbers = [_number(row.get(name)) for name in ("compile_seconds", "data_wait")]
    return [_number(row["images_per_second"]), spread, _number(row["times_reference"]), bar, *numbers, _quality(row)]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _quality(row: Mapping[str, Any]) -> str:
    """What a variant gives, beside the reference, in a few words."""
    if row["stage"] == "read":
        same = "same labels" if row["same_keys"] and row["same_labels"] else "OTHER LABELS"
        return f"pixels within {row['max_pixel_difference']:g} of 255, {same}"
    apart = f"loss {row['loss']:.4g}, {100 * row['loss_relative']:.2g} % apart"
    if row["stage"] == "step":
        return apart
    labels = f", labels {row['labels_seconds']:g} s, {row['labels_megabytes']:g} MB" if "labels_seconds" in row else ""
    return f"agrees {row['agreement']:g} %, {apart}{labels}"
