"""`synthkd bench`: the benchmark suites."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Column, Table

from synthkd.bench.ablation import AblationSpec, measure_ablation, recorded
from synthkd.bench.adversarial import run_seed as adversarial_seed
from synthkd.bench.cli_backends import backends
from synthkd.bench.cli_distill import distill
from synthkd.bench.cli_evidence import evidence
from synthkd.bench.cli_methods import methods
from synthkd.bench.cli_writing import writing
from synthkd.bench.decoder import DecoderSpec, measure_decoder
from synthkd.bench.digits import run_seed
from synthkd.bench.engine import EngineSpec, measure_engine, summary
from synthkd.bench.engine_cases import EMBEDDED, case_names
from synthkd.bench.kernels import dtype_name, measure, workloads
from synthkd.bench.patches import fitted as fitted_patches
from synthkd.bench.patches import run_seed as patches_seed
from synthkd.bench.record import append_row, stamped
from synthkd.dfkd.cli_options import Device, parse_numbers, pick_device
from synthkd.dfkd.cli_progress import Bars
from synthkd.dfkd.presets import load_preset
from synthkd.engine import SynthkdError
from synthkd.engine.errors import suggest
from synthkd.kernels.dispatch import DTYPES

app = typer.Typer(
    help="Benchmark suites; each prints its rows and can append them to bench/results/.", no_args_is_help=True
)

app.command(epilog="Example: synthkd bench backends --role unet --backend onnx --json")(backends)
app.command(epilog="Example: synthkd bench distill --stage read --size 32 --json")(distill)
app.command(epilog="Example: synthkd bench evidence cifar10-small --seeds 0,1,2 --out out/cifar --record")(evidence)
app.command(epilog="Example: synthkd bench methods --methods mosaickd,pool --out out/methods --record")(methods)
app.command(epilog="Example: synthkd bench writing --case cheap --format png --record")(writing)


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
    for seed in parse_numbers("--seeds", seeds):
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
    for seed in parse_numbers("--seeds", seeds):
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


@app.command(epilog="Example: synthkd bench patches --seeds 0,1,2 --out out/patches --record")
def patches(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder for the discriminator and the sets.")],
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0,1,2.")] = "0",
    weights: Annotated[list[float] | None, typer.Option("--weight", help="Of the term; may be repeated.")] = None,
    num_images: Annotated[int, typer.Option("--num-images", help="Images per set.")] = 600,
    steps: Annotated[int, typer.Option(help="Training steps of each student.")] = 500,
    record: Annotated[bool, typer.Option("--record", help="Append the rows to bench/results/patches.jsonl.")] = False,
    device: Device = None,
) -> None:
    """Digits with and without the patch term in the guidance: what a student makes of each set."""
    preset = load_preset("digits").on(pick_device(device))
    preset = replace(preset, num_images=num_images, distill=replace(preset.distill, steps=steps))
    console, table = Console(), Table("seed", "weight", "student", "teacher reads", "judge reads")
    with Bars(console) as bars:
        held_out = fitted_patches(preset, out_dir / "patches", bars)
    for seed in parse_numbers("--seeds", seeds):
        with Bars(console) as bars:
            folder = out_dir / f"seed-{seed}"
            row = patches_seed(preset, out_dir / "patches", held_out, weights or [0.1, 1.0], seed, folder, bars)
        if record:
            append_row("patches", row)
        for name, scores in row["variants"].items():
            shown = (scores.get(n, "–") for n in ("student_accuracy", "teacher_agreement", "judge"))
            table.add_row(str(seed), name, *map(str, shown))
    console.print(table)


@app.command(epilog="Example: synthkd bench kernels --op kd_loss --dtype bfloat16 --json")
def kernels(
    op: Annotated[list[str] | None, typer.Option(help="An op; may be repeated (default: all).")] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="A dtype; may be repeated (default: all; float32 on a CPU).")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs every contender once.")] = 30,
    record: Annotated[bool, typer.Option("--record", help="Append the rows to bench/results/kernels.jsonl.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON row per line.")] = False,
    device: Device = None,
) -> None:
    """Each op against plain torch, checked before it is timed; exit code 1 where a check fails."""
    where = torch.device(pick_device(device))
    rows = []
    for row in measure(workloads(where, op or (), dtype or ()), where, repeats):
        rows.append(row)
        if record:
            append_row("kernels", row)
        if json_output:
            print(json.dumps(row, sort_keys=True), flush=True)
    if not json_output:
        Console().print(_kernel_table(rows))
    if not all(row["check"]["passed"] for row in rows):
        raise typer.Exit(1)


def _kernel_table(rows: list[dict[str, Any]]) -> Table:
    names = [n for n in ("kernel", "reference", "compiled", "stock") if any(n in (row["speed"] or {}) for row in rows)]
    table = Table(
        Column("workload", min_width=15),
        "direction",
        *names,
        "GB/s",
        "% copy",
        "check",
        title="Medians, microseconds",
    )
    for row in rows:
        speed = row["speed"] or {}
        times = (f"{speed[n]['median']:.1f}" if n in speed else "–" for n in names)
        rate = (str(row[n] if row[n] is not None else "–") for n in ("gb_per_s", "percent_of_copy"))
        verdict = "passed" if row["check"]["passed"] else f"FAILED: {row['check']['reason']}"
        work = f"{row['op']}: {row['case']}, {row['dtype']}"
        table.add_row(work, row["direction"].replace("forward+", "+"), *times, *rate, verdict)
    return table


@app.command(epilog="Example: synthkd bench decoder --size 256 --batch 1 --dtype float32 --json")
def decoder(
    size: Annotated[int, typer.Option(help="Height and width of the images.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of the decoder.")] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs every contender once.")] = 10,
    record: Annotated[bool, typer.Option("--record", help="Append the rows to bench/results/decoder.jsonl.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON row per direction.")] = False,
    device: Device = None,
) -> None:
    """SD 1.5's VAE decoder, random weights: stock, fused, and on a GPU both compiled; forward and input gradient."""
    where, dtypes = torch.device(pick_device(device)), {dtype_name(d): d for d in DTYPES}
    if dtype not in dtypes:
        raise SynthkdError(f"--dtype {dtype!r}: {suggest(dtype, dtypes)}")
    spec = DecoderSpec(size=size, batch=batch, dtype=dtypes[dtype], device=where, repeats=repeats)
    table = Table("direction", "decoder", "ms", "TFLOP/s", "image error", "gradient error", "peak GB")
    failed = False
    for row in measure_decoder(spec):
        if record:
            append_row("decoder", row)
        if json_output:
            print(json.dumps(row, sort_keys=True), flush=True)
        for name, entry in row["contenders"].items():
            failed = failed or bool(entry["failed"])
            table.add_row(row["direction"], name, *_decoder_cells(entry))
    if not json_output:
        Console().print(table)
    if failed:
        raise typer.Exit(1)


@app.command(epilog="Example: synthkd bench engine --case embedded --seeds 0,1,2,3,4 --json --record")
def engine(
    case: Annotated[
        list[str] | None, typer.Option(help="A case; may be repeated (default: embedded, and with a GPU all).")
    ] = None,
    variant: Annotated[list[str] | None, typer.Option(help="A variant; may be repeated (default: all).")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0,1,2.")] = "0",
    num_images: Annotated[int | None, typer.Option(min=8, help="Images per set, not the preset's.")] = None,
    no_quality: Annotated[
        bool, typer.Option("--no-quality", help="Times and counts alone: no set, no student.")
    ] = False,
    counts: Annotated[
        bool, typer.Option("--counts", help="Arithmetic alone, on meta tensors: nothing is drawn.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs every variant once.")] = 5,
    record: Annotated[bool, typer.Option("--record", help="Append the rows to bench/results/engine.jsonl.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON row per line.")] = False,
    device: Device = None,
) -> None:
    """Groups drawn plain, guided, and as published: images/s, arithmetic, memory, and what a student makes of them.

    Without a GPU the cases of random weights (sd15-256, sd15-512, sdxl-512, sdxl-1024) give counted arithmetic only.
    """
    preset, where, rows = load_preset("digits"), torch.device(pick_device(device)), []
    images = None if no_quality else num_images or preset.num_images
    for name in _known_cases(case or (case_names() if where.type == "cuda" else [EMBEDDED])):
        spec = EngineSpec(
            case=name, device=where, variants=variant or (), seeds=parse_numbers("--seeds", seeds), repeats=repeats,
            num_images=images, counts=counts,
        )  # fmt: skip
        for row in measure_engine(spec, preset, _tell):
            rows.append(row)
            _give(row, "engine", record, json_output)
    if (last := summary(rows)) is not None:
        _give(stamped(last), "engine", record, json_output)
    if not json_output:
        Console().print(_engine_table(rows))
        Console().print_json(json.dumps(last)) if last else None
    if any(row["failed"] for row in rows):
        raise typer.Exit(1)


@app.command(epilog="Example: synthkd bench ablation --variants baseline,looks\\ 2 --seeds 0,1,2 --record")
def ablation(
    variants: Annotated[str, typer.Option(help="Names, such as 'baseline,every 2' (default: all).")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0,1,2.")] = "0",
    num_images: Annotated[int | None, typer.Option(min=8, help="Images per set, not the preset's.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each runs every variant once.")] = 3,
    record: Annotated[
        bool, typer.Option("--record", help="Append to bench/results/ablation.jsonl, skip what is there.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON row per line.")] = False,
    device: Device = None,
) -> None:
    """Digits with one idea at a time on or off: what each costs, and what a student makes of the set."""
    names = [name.strip() for name in variants.split(",") if name.strip()]
    where, rows = torch.device(pick_device(device)), []
    numbers = parse_numbers("--seeds", seeds)
    spec = AblationSpec(device=where, variants=names, seeds=numbers, repeats=repeats, num_images=num_images)
    for row in measure_ablation(spec, load_preset("digits"), recorded() if record else set(), _tell):
        rows.append(row)
        _give(row, "ablation", record, json_output)
    if not json_output:
        Console().print(_engine_table(rows))
    if any(row["failed"] for row in rows):
        raise typer.Exit(1)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _give(row: dict[str, Any], name: str, record: bool, json_output: bool) -> None:
    if record:
        append_row(name, row)
    if json_output:
        print(json.dumps(row, sort_keys=True), flush=True)


def _known_cases(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in case_names():
            raise SynthkdError(f"--case {name!r}: {suggest(name, case_names())}")
    return names


def _engine_table(rows: list[dict[str, Any]]) -> Table:
    names = {
        "images_per_second": "images/s", "times_plain": "x plain", "tflop_per_image": "TFLOP",
        "percent_of_ceiling": "% roof", "peak_gb": "GB", "student_accuracy": "student", "judge_agreement": "judge",
    }  # fmt: skip
    table = Table(Column("work", min_width=20), *names.values())
    for row in rows:
        cells = ["FAILED: " + row["failed"]] if row["failed"] else [_cell(row[name]) for name in names]
        table.add_row(f"{row['case']}: {row['variant']}, seed {row['seed']}", *cells)
    return table


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _decoder_cells(entry: dict[str, Any]) -> list[str]:
    errors = entry["error"] or {}
    cells = [f"{errors[n]:.2g}" if errors.get(n) is not None else "–" for n in ("image", "gradient")]
    time = f"FAILED: {entry['failed']}" if entry["failed"] else f"{entry['milliseconds']['median']:.2f}"
    return [time, str(entry["tflop_per_s"] or "–"), *cells, str(entry["peak_gb"] or "–")]


def _table(rows: list[dict[str, object]]) -> Table:
    names = ("seed", "teacher_accuracy", "student_accuracy", "unguided_student_accuracy", "seconds")
    table = Table(*(name.replace("_", " ") for name in names))
    for row in rows:
        table.add_row(*(str(row[name]) for name in names))
    return table
