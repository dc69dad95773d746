"""`synthkd compare`, and what `synthkd run --method` needs: methods by name, their options, a time limit."""

import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from synthkd.dfkd import cli_options as options
from synthkd.dfkd.choices import with_controls, with_student, with_teacher
from synthkd.dfkd.cli_progress import Bars, StopFlag
from synthkd.dfkd.compare import Comparison, Row, score_column, summarised
from synthkd.dfkd.method_run import MethodRun
from synthkd.dfkd.methods.base import load_method, method_names
from synthkd.dfkd.presets import Preset, load_preset
from synthkd.dfkd.train_options import TrainOptions
from synthkd.dfkd.training import Stopped
from synthkd.engine import Request, SynthkdError

Method = Annotated[
    str | None, typer.Option(help="A method by name (`synthkd info` lists them): its student, and no control.")
]
Pool = Annotated[
    str | None,
    typer.Option(help="Out-of-domain images: a folder of images or of tar shards, an .npz of x, embedded:digits/pool."),
]
Patch = Annotated[
    int | None, typer.Option(help="Pixels that a logit of MosaicKD's discriminator sees: 10, 22 or 46; --set patch=N.")
]
MethodOptions = Annotated[
    list[str] | None, typer.Option("--set", help="An option of the method, NAME=VALUE; may be given several times.")
]
Minutes = Annotated[
    float | None, typer.Option(help="Stop after so many minutes with exit code 75; the same command goes on.")
]
TeacherChoice = Annotated[
    str | None, typer.Option("--teacher", help="A teacher of the preset by name, or the path of any card.")
]
StudentChoice = Annotated[
    str | None, typer.Option("--student", help="The student's network, such as resnet8 or wrn16_1, not the preset's.")
]
ControlChoice = Annotated[
    str | None,
    typer.Option("--controls", help="Methods to compare with, such as pool,fastdfkd, or none (default: the preset's)."),
]
out = Console()


class Deadline:
    """Whether a stop was asked for, or the time is over."""

    def __init__(self, stop: StopFlag, minutes: float | None) -> None:
        """Raises SynthkdError for a limit that is not above 0."""
        if minutes is not None and not minutes > 0:
            raise SynthkdError(f"--minutes is {minutes}; expected a number above 0")
        self._stop, self._until = stop, time.monotonic() + 60 * minutes if minutes is not None else float("inf")

    def is_set(self) -> bool:
        """Asked in the loops."""
        return self._stop.is_set() or time.monotonic() > self._until


def parsed_options(entries: Sequence[str] | None, patch: int | None) -> dict[str, Any]:
    """`name=value` entries, and --patch, as a table; a value is TOML's, or a text.

    Raises SynthkdError for any other entry.
    """
    found: dict[str, Any] = {} if patch is None else {"patch": patch}
    for entry in entries or ():
        name, equals, value = entry.partition("=")
        if not equals or not name.strip():
            raise SynthkdError(f"--set {entry!r}: expected NAME=VALUE, such as adv=0.5")
        try:
            found[name.strip()] = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:
            found[name.strip()] = value.strip()
    return found


def without_seed(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of fields; raises SynthkdError where one is the seed, which has an option of its own."""
    if "seed" in changes:
        raise SynthkdError(f"--set seed={changes['seed']!r}: a seed is given by --seed; expected another field")
    return dict(changes)


def run_method(job: MethodRun, minutes: float | None, grace: float | None = None) -> None:
    """`synthkd run PRESET --method NAME`."""
    load_method(job.method)
    with Bars(out) as bars, StopFlag(grace) as stop:
        try:
            until = Deadline(stop, minutes)
            result = replace(job, progress=bars, should_stop=until.is_set).execute()
        except Stopped:
            raise typer.Exit(stop.exit_code(out, "the same command goes on from here", "step")) from None
    table = Table(title=f"{result['preset']}, {result['method']}, seed {result['seed']}", show_header=False)
    for name in (
        "teacher_accuracy", "student_accuracy", "teacher_miou", "student_miou", "agreement", "num_images", "seconds",
        "peak_mb",
    ):  # fmt: skip
        if name in result:
            table.add_row(name.replace("_", " "), str(result[name]))
    out.print(table)
    out.print(f"report: {job.out / 'report.html'}", highlight=False, soft_wrap=True)


def run_summary(result: Mapping[str, Any]) -> Table:
    """What `synthkd run` prints of its result."""
    table = Table(title=f"{result['preset']}, seed {result['seed']}", show_header=False)
    chosen = [name for name in ("teacher", "student") if name in result]
    for name in (*chosen, "teacher_accuracy", "student_accuracy", "unguided_student_accuracy"):
        table.add_row(name.replace("_", " "), str(result.get(name, "not measured")))
    for name, control in result.get("controls", {}).items():
        table.add_row(f"{name} student accuracy", str(control.get("student_accuracy", "not measured")))
    for name in ("num_images", "images_per_second", "guided_images_per_second", "seconds"):
        table.add_row(name.replace("_", " "), str(result.get(name, "not measured")))
    return table


def compare(
    preset: Annotated[str, typer.Argument(help="Preset to run; `synthkd info` lists them.")],
    out_dir: options.Out,
    teacher: TeacherChoice = None,
    student: StudentChoice = None,
    methods: Annotated[str, typer.Option(help="Names, such as mosaickd,fastdfkd,pool (default: the preset's).")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0,1,2.")] = "0",
    num_images: Annotated[int | None, typer.Option("--num-images", help="Images a method may make.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of every student.")] = None,
    pool: Pool = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that draw, of methods that can use several.")] = 1,
    minutes: Minutes = None,
    device: options.Device = None,
) -> None:
    """Methods at equal budget: the same student, steps and images; a table, a plot and pictures in one report.

    One run after the other, each in a process of its own. What is finished is kept: add methods or seeds later.
    """
    chosen = chosen_preset(preset, teacher, student)
    names = named_methods(methods, chosen)
    job = MethodRun(
        preset=shortened(chosen, steps).on(options.pick_device(device)), method=names[0], out=out_dir,
        num_images=num_images, pool=pool, workers=workers,
    )  # fmt: skip
    if num_images is not None:
        Request(num_samples=num_images, seed=0)
    job = replace(job, how=TrainOptions(device=job.preset.job.device))
    with Bars(out) as bars, StopFlag() as stop:
        until = Deadline(stop, minutes)
        try:
            rows = Comparison(
                run=job, methods=names, seeds=options.parse_numbers("--seeds", seeds), progress=bars,
                should_stop=until.is_set,
            ).execute()  # fmt: skip
        except Stopped:
            raise typer.Exit(stop.exit_code(out, "the same command goes on from here", "step")) from None
    out.print(comparison_table(rows))
    out.print(f"report: {out_dir / 'report.html'}", highlight=False, soft_wrap=True)


def chosen_preset(name: str, teacher: str | None, student: str | None, controls: str | None = None) -> Preset:
    """A preset by name with --teacher, --student and --controls; raises SynthkdError for a wrong one."""
    found = load_preset(name)
    found = found if teacher is None else with_teacher(found, teacher)
    found = found if student is None else with_student(found, student)
    return found if controls is None else with_controls(found, controls)


def named_methods(text: str, preset: Preset) -> list[str]:
    """Names of `a,b`, or those that a preset is compared by; raises SynthkdError for one that is not known."""
    names = [n.strip() for n in text.split(",") if n.strip()] or list(preset.compared) or method_names()
    for name in names:
        load_method(name)
    return names


def shortened(preset: Preset, steps: int | None) -> Preset:
    """A preset with another number of training steps."""
    return preset if steps is None else replace(preset, distill=replace(preset.distill, steps=steps))


def comparison_table(rows: Sequence[Row]) -> Table:
    """Means over seeds, best first."""
    column = score_column(rows)
    more = {name: summarised(rows, name) for name in ("agreement", "num_images", "seconds", "cpu_seconds", "peak_mb")}
    table = Table("method", f"{column.replace('_', ' ')}, %", "spread", *(n.replace("_", " ") for n in more))
    for name, (mean, low, high) in sorted(summarised(rows, column).items(), key=lambda item: -item[1][0]):
        cells = [f"{found[name][0]:.6g}" if name in found else "–" for found in more.values()]
        table.add_row(name, f"{mean:.2f}", f"{low:.2f} to {high:.2f}", *cells)
    return table
