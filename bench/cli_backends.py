"""`synthkd bench backends`."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Column, Table

from synthkd.bench.backend_runs import measure_backends
from synthkd.bench.backends import RUN, VARIANTS, BackendSpec
from synthkd.bench.engine_cases import EMBEDDED
from synthkd.bench.record import append_row
from synthkd.dfkd.cli_options import Artifacts, Device, pick_device
from synthkd.dfkd.presets import load_preset
from synthkd.engine import SynthkdError
from synthkd.engine.errors import suggest
from synthkd.engine.roles import ROLES

CASES = (EMBEDDED, "sd15-512", "sdxl-1024")


def backends(
    case: Annotated[list[str] | None, typer.Option(help="A case; may be repeated (default: embedded).")] = None,
    role: Annotated[
        list[str] | None, typer.Option(help="text_encoder, unet, vae, teacher, gradient, or run: whole groups.")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Beside eager; may be repeated (default: aoti and onnx, on a GPU all).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of random weights: bfloat16 or float16.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; each times every backend of a role once.")] = 5,
    record: Annotated[bool, typer.Option("--record", help="Append the rows to bench/results/backends.jsonl.")] = False,
    artifacts: Artifacts = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON row per line.")] = False,
    device: Device = None,
) -> None:
    """Every role on every backend, and whole groups: images/s, distance from eager, seconds to build and to load.

    Cases: embedded (the digits preset), and with a GPU sd15-512 and sdxl-1024, whose weights are random. A backend that
    is not installed is skipped, and its row says why.
    """
    for option, given, known in (
        ("case", case, CASES),
        ("role", role, (*ROLES, RUN)),
        ("backend", backend, tuple(VARIANTS)),
        ("dtype", [dtype], ("bfloat16", "float16")),
    ):
        _check(option, given or (), known)
    where, rows = torch.device(pick_device(device)), []
    for name in case or [EMBEDDED]:
        spec = BackendSpec(
            case=name, device=where, roles=role or (), backends=backend or (), rounds=rounds, artifacts=artifacts,
            dtype=getattr(torch, dtype),
        )  # fmt: skip
        for row in measure_backends(spec, load_preset("digits"), _tell):
            rows.append(row)
            if record:
                append_row("backends", row)
            if json_output:
                print(json.dumps(row, sort_keys=True), flush=True)
    if not json_output:
        _show(rows)
    if any(row.get("failed") for row in rows):
        raise typer.Exit(1)


def _check(option: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise SynthkdError(f"--{option} {name!r}: {suggest(name, known)}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    console = Console()
    console.print(_table([row for row in rows if row["kind"] == "backends"]))
    for row in rows:
        if row["kind"] == "summary":
            console.print_json(json.dumps({name: row[name] for name in ("runs", "eager_by_diffusers", "reached")}))


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = ("batch", "images_per_second", "times_eager", "max_abs_diff", "psnr", "build_seconds", "load_seconds")
    heads = ("batch", "images/s", "x eager", "max abs", "PSNR, dB", "build, s", "load, s")
    table = Table(Column("role", min_width=12), Column("backend", min_width=8), *heads)
    for row in rows:
        said = f"skipped: {row['skipped']}" if row["skipped"] else f"FAILED: {row['failed']}" if row["failed"] else ""
        cells = [said] if said else ["–" if row[n] is None else f"{row[n]:.4g}" for n in names]
        table.add_row(f"{row['role']}, {row['run']}" if row["run"] else row["role"], row["backend"], *cells)
    return table
