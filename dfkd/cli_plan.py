"""`synthkd plan`: what a set will take, before anything is drawn."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from synthkd.dfkd.cli_options import recipe_fields
from synthkd.dfkd.cli_progress import Bars
from synthkd.dfkd.distill_spec import spec_from
from synthkd.dfkd.planning import Planned, plan_cost
from synthkd.dfkd.presets import load_preset
from synthkd.dfkd.rates import Rates, rates_of_set, recorded_rates
from synthkd.engine import Plan, Recipe, Request, SynthkdError
from synthkd.engine.index import read_manifest

_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
out = Console()


def parse_count(text: str) -> int:
    """`1e9`, `50k`, `1.5M`, `2B` or `1_000_000` as a whole number; raises SynthkdError for anything else."""
    plain = text.strip().lower().replace(",", "").replace("_", "")
    unit = _UNITS.get(plain[-1:], 1)
    try:
        number = float(plain[:-1] if unit > 1 else plain) * unit
        whole = int(number)
    except (ValueError, OverflowError) as error:
        raise SynthkdError(f"--num-samples {text!r}: expected a whole number, such as 50000, 50k, 1e9") from error
    if whole != number or not 1 <= whole < 2**63:
        raise SynthkdError(f"--num-samples {text!r}: expected a whole number from 1 on, such as 50000, 50k, 1e9")
    return whole


def plan(
    num_samples: Annotated[str, typer.Option(help="Images in the set: 50000, 50k, 1e9.")] = "1e6",
    gpus: Annotated[int, typer.Option(help="Processes that draw at once: one per GPU, or per CPU core.")] = 1,
    from_set: Annotated[
        Path | None, typer.Option("--from", help="A set drawn on the machine in question: its recipe, its rates.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Take this preset's recipe (default: the case's).")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file of recipe fields on top.")] = None,
    case: Annotated[str, typer.Option(help="Recorded rates to reckon with, where no --from is given.")] = "digits",
    images_per_second: Annotated[
        float | None, typer.Option(help="Of one process, where you know better than what was measured.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Of one GPU for an hour, in any currency.")] = None,
    student_steps: Annotated[int, typer.Option(help="Steps of the student's training (0: leave it out).")] = 0,
    batch_size: Annotated[int, typer.Option(help="Its batch size.")] = 256,
    views: Annotated[int, typer.Option(help="Stored soft labels of each image (0: none).")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Reckon time, storage, files and money of a set of any size from measured rates; nothing is drawn.

    Draw a few hundred images on the machine in question first, and pass that set with --from: then every figure is
    yours. Without it the rates are those recorded with this version, and the page says where.
    """
    request = Request(num_samples=parse_count(num_samples))
    if preset is not None:
        load_preset(preset).job.check_apart()
    for name, value in {"--student-steps": student_steps, "--batch-size": batch_size, "--views": views}.items():
        if value < 0:
            raise SynthkdError(f"{name} is {value}; expected a whole number >= 0")
    rates, chosen = _measured(from_set) if from_set else recorded_rates(case), preset or _preset_of(case)
    whole = Plan(_recipe(from_set, chosen, recipe), request)
    between = _round_images(from_set, chosen) if whole.num_rounds > 1 else 0
    if from_set and (views or student_steps or between):
        rates = _with_recorded(rates, case)
    planned = plan_cost(whole, _at(rates, images_per_second), gpus, price, student_steps * batch_size, views, between)
    if json_output:
        print(json.dumps({**planned.to_dict(), "case": rates.case, "measured": rates.measured}))
        return
    _show(planned, rates, price, images_per_second is not None)


def _measured(from_set: Path) -> Rates:
    """Rates of a set, whose rows are read under a bar."""
    with Bars(Console(stderr=True)) as bars:
        bars.begin("rates", int(read_manifest(from_set)["num_samples"]), "images")
        return rates_of_set(from_set, lambda n: bars.advance("rates", n))


def _preset_of(case: str) -> str:
    """The preset whose recipe a recorded case was drawn with."""
    return case.partition(" ")[0]


def _with_recorded(rates: Rates, case: str) -> Rates:
    """A set tells how fast it was drawn, not how fast a teacher labels or a student learns: these two are recorded."""
    known = recorded_rates(case)
    about = f"{rates.measured}; labels and student as recorded for case {case!r} ({known.measured})"
    return replace(rates, measured=about, labels=known.labels, student=known.student)


def _round_images(from_set: Path | None, preset: str) -> int:
    """Images that the student of a round is shown; 0 where no student is trained between rounds, or none is told."""
    if from_set is None:
        job = load_preset(preset).job
        spec = job.round_student if job.gamma > 0 else None
    else:
        source = read_manifest(from_set).get("source")
        told = source.get("round_student") if isinstance(source, Mapping) else None
        spec = None if told is None else spec_from(told, f"{from_set}: source.round_student")
    return 0 if spec is None else spec.steps * spec.batch_size


def _recipe(from_set: Path | None, preset: str, changes: Path | None) -> Recipe:
    base = read_manifest(from_set)["recipe"] if from_set else load_preset(preset).job.recipe.to_dict()
    if not isinstance(base, Mapping):
        raise SynthkdError(f"{from_set}: its manifest holds no recipe")
    return Recipe.from_dict({**base, **recipe_fields(changes)})


def _at(rates: Rates, images_per_second: float | None) -> Rates:
    """The rates at another speed, stages in the proportions that were measured."""
    if images_per_second is None:
        return rates
    if not 0 < images_per_second < 1e9:
        raise SynthkdError(f"--images-per-second is {images_per_second}; expected a number above 0")
    factor = rates.images_per_second / images_per_second
    return replace(rates, seconds={stage: s * factor for stage, s in rates.seconds.items()})


def _show(planned: Planned, rates: Rates, price: float | None, given: bool) -> None:
    table = Table(title=f"{planned.samples:,} images on {planned.processes:,} processes")
    for name in ("stage", "ms an image", "process hours", *(("cost",) if price is not None else ())):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for s in planned.stages:
        cost = () if s.cost is None else (f"{s.cost:,.2f}",)
        table.add_row(s.stage, f"{1e3 * s.seconds:,.3f}", f"{s.hours:,.1f}", *cost)
    total = sum(s.hours for s in planned.stages)
    cost = () if price is None else (f"{total * price:,.2f}",)
    table.add_row("all", f"{1e3 * sum(s.seconds for s in planned.stages):,.3f}", f"{total:,.1f}", *cost, style="bold")
    out.print(table)
    lines = [
        f"until the last image: {_time(planned.wall_hours)}, {planned.shards_per_process:,} shards a process at most",
        f"{planned.shards:,} shards of {planned.groups:,} groups, about {planned.files:,} files",
        "storage: " + ", ".join(f"{kind} {_size(n)}" for kind, n in planned.bytes.items()),
        f"rates: {rates.case}, measured {rates.measured}" + ("; speed as given" if given else ""),
        *planned.advice,
    ]
    for line in lines:
        out.print(line, highlight=False, soft_wrap=True)


def _time(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.1f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} PB"


