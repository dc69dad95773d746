"""`synthkd online`: a student trained on images as they are drawn; none of them is written."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from synthkd.dfkd import cli_options as options
from synthkd.dfkd.apart import student_seen
from synthkd.dfkd.cli_distill import averages
from synthkd.dfkd.cli_progress import Bars, StopFlag
from synthkd.dfkd.online import PoolSpec, distill_online
from synthkd.dfkd.presets import load_preset
from synthkd.dfkd.report import STUDENT_LOG
from synthkd.dfkd.report_student import TRAINING, write_student_report
from synthkd.dfkd.student import Hooks, Stopped, TrainOptions, save_student
from synthkd.dfkd.teachers import load_teacher
from synthkd.dfkd.training import LogRow
from synthkd.engine import Request
from synthkd.engine.rows import write_atomically
from synthkd.engine.workers import one_thread

out = Console()


def online(
    out_dir: options.Out,
    num_samples: Annotated[int, typer.Option(help="Images drawn in all; the first tenth is held out.")] = 1000,
    preset: Annotated[str | None, typer.Option(help="Start from a preset's recipe, model, teacher, student.")] = None,
    model: Annotated[str | None, typer.Option(help="Diffusers pipeline folder, hub id, or embedded:digits.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher card (TOML), or embedded:digits.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file of recipe fields, [guidance], [cutmix].")] = None,
    spec_file: Annotated[Path | None, typer.Option("--spec", help="TOML file of DistillSpec fields.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    pool: Annotated[int, typer.Option(help="Images held for replay.")] = 4096,
    exponent: Annotated[float, typer.Option(help="0 replays all alike, 1 by distance from the teacher.")] = 0.6,
    seed: options.Seed = 0,
    allow_code: options.AllowCode = False,
    decoder: options.GuidanceDecoder = None,
    compile: Annotated[str, typer.Option(help="The training step: auto, off, default, max-autotune.")] = "auto",
    device: options.Device = None,
) -> None:
    """Draw and train at once: groups enter a bounded pool, the student replays what it is still unsure of.

    Nothing is written but the student, so a stopped training begins again. For students of one set, or many of them,
    `synth` and `distill` cost less: a set is drawn once.
    """
    asked = options.Asked(
        model=model, teacher=teacher, recipe=recipe, allow_code=allow_code, decoder=decoder,
    )  # fmt: skip
    job = options.build_job(load_preset(preset).job if preset else None, asked, device)
    spec = options.distill_spec(preset, spec_file, steps, batch_size, None, seed)
    if preset and spec.soft_labels == "stored":  # the preset's own way, which needs a set
        spec = replace(spec, soft_labels="teacher", views=0)
    request, held = Request(num_samples=num_samples, seed=seed), PoolSpec(capacity=pool, exponent=exponent)
    how = TrainOptions(device=job.device, compile=compile)
    out_dir.mkdir(parents=True, exist_ok=True)
    rows: list[LogRow] = []
    with Bars(out) as bars, StopFlag() as stop, one_thread(job.device):
        bars.begin("distill", spec.steps, "steps")
        hooks = Hooks(
            on_step=lambda _: bars.advance("distill", 1),
            on_row=rows.append,
            should_stop=stop.is_set,
        )
        network = load_teacher(job.teacher, job.device, allow_code=job.allow_code)
        try:
            student = distill_online(job.build(), request, network, spec, pool=held, options=how, hooks=hooks)
        except Stopped:
            raise typer.Exit(stop.exit_code(out, "nothing is kept: begin again", "training step")) from None
    about = {"teacher": job.teacher, "images": num_samples, "online": True, **student_seen(job.teacher)}
    path = save_student(student, spec, out_dir, about)
    write_atomically(out_dir / STUDENT_LOG, "".join(json.dumps(row) + "\n" for row in rows))
    summary = {"online": asdict(held), "agreement": student.agreement, **averages(rows)}
    write_atomically(out_dir / TRAINING, json.dumps(summary, indent=2, sort_keys=True) + "\n")
    write_student_report(out_dir)
    told = f"{summary['images_per_second']:.0f} images/s, {summary['data_wait']:.0f} % of the time spent drawing"
    says = f"agrees with the teacher on {student.agreement:.1f} % of held-out synthetic images"
    out.print(f"{path}: {says}; {told}", soft_wrap=True, highlight=False)
