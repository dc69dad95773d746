"""`synthkd bench distill`."""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
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
        _show(rows)
    if any(row["failed"] for row in rows):
        raise typer.Exit(1)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table for each interleaved run, and a line for each variant that has no rate."""
    console = Console()
    for name, some in groupby(rows, lambda row: f"{row['stage']}: {row['case']}"):
        there = list(some)
        fixed = (Column(head, no_wrap=True) for head in ("variant", "images/s", "q1 – q3", "times"))
        title = f"{name}, beside {there[0]['reference']}"
        table = Table(*fixed, "what it gives", title=title, title_justify="left")
        for row in there:
            if row["images_per_second"] is not None:
                table.add_row(row["variant"], *_cells(row))
        console.print(table)
        for row in there:
            if said := row["skipped"] or row["failed"]:
                console.print(f"{row['variant']}: {'skipped' if row['skipped'] else 'FAILED'}: {said}", soft_wrap=True)


def _cells(row: Mapping[str, Any]) -> list[str]:
    rate, *spread = (_rate(row[name]) for name in ("images_per_second", "q1", "q3"))
    return [rate, " – ".join(spread), f"{row['times_reference'] or math.nan:.2f}", "; ".join(_beside(row))]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _beside(row: Mapping[str, Any]) -> Iterator[str]:
    """What a variant gives, beside the reference, and what else it costs."""
    if row["bar"] is not None:
        yield f"bar {row['bar']:g} {'reached' if row['bar_reached'] else 'NOT reached'}"
    if row["stage"] == "read":
        yield f"within {row['max_pixel_difference']:g} of 255"
        yield "same labels" if row["same_keys"] and row["same_labels"] else "OTHER LABELS"
        return
    if row["variant"] != row["reference"] and row["loss_relative"] is not None:
        yield f"loss {100 * row['loss_relative']:.1g} % apart"
    if row.get("compile_seconds") is not None:
        yield f"compiled in {row['compile_seconds']:.0f} s"
    if row["stage"] == "end-to-end":
        yield f"agrees {row['agreement']:.1f} %; waits {row['data_wait']:g} %"
    if "labels_seconds" in row:
        yield f"labels {row['labels_seconds']:g} s, {row['labels_megabytes']:g} MB"
