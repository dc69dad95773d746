"""The `synthkd` command; further subcommands come from the entry-point group `synthkd.commands`."""

import logging
import sys
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError

from synthkd.dfkd import cli_options as options
from synthkd.dfkd.cli_decoder import fit
from synthkd.dfkd.cli_distill import distill, labels
from synthkd.dfkd.cli_evaluate import evaluate
from synthkd.dfkd.cli_export import export
from synthkd.dfkd.cli_methods import (
    ControlChoice,
    Deadline,
    Method,
    MethodOptions,
    Minutes,
    Patch,
    Pool,
    StudentChoice,
    TeacherChoice,
    chosen_preset,
    compare,
    parsed_options,
    run_method,
    run_summary,
    shortened,
)
from synthkd.dfkd.cli_online import online
from synthkd.dfkd.cli_patches import fit as fit_patches
from synthkd.dfkd.cli_plan import plan
from synthkd.dfkd.cli_prior import EPILOG as FIT_PRIOR
from synthkd.dfkd.cli_prior import fit as fit_prior
from synthkd.dfkd.cli_progress import Bars, StopFlag
from synthkd.dfkd.cli_sets import merge, repair, verify
from synthkd.dfkd.cli_table import export_folder, index, stats
from synthkd.dfkd.cli_teacher import app as teacher_app
from synthkd.engine import Plan, Request, SynthkdError
from synthkd.engine.encoders import check_encoder, encoder_for
from synthkd.engine.environment import versions
from synthkd.engine.writer import WriteSummary, Writing
from synthkd.export import available, default_store
from synthkd.kernels.dispatch import backend

app = typer.Typer(
    name="synthkd",
    help="A trained classifier goes in, a smaller one comes out, and no training image is needed.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(teacher_app, name="teacher")
app.command("export", epilog="Example: synthkd export embedded:digits --preset digits --backend onnx")(export)
app.command("distill", epilog="Example: synthkd distill sets/digits --out students/a --steps 1000")(distill)
app.command("labels", epilog="Example: synthkd labels sets/digits --preset digits --views 8")(labels)
app.command("online", epilog="Example: synthkd online --preset digits --num-samples 1200 --out students/b")(online)
app.command("verify", epilog="Example: synthkd verify sets/digits")(verify)
app.command("repair", epilog="Example: synthkd repair sets/digits --dry-run")(repair)
app.command("merge", epilog="Example: synthkd merge sets/a sets/b --out sets/digits")(merge)
app.command("compare", epilog="Example: synthkd compare digits --methods mosaickd,fastdfkd,pool --out runs/c")(compare)
app.command("evaluate", epilog="Example: synthkd evaluate students/a/student.toml --data digits:test")(evaluate)
app.command("plan", epilog="Example: synthkd plan --num-samples 1e9 --gpus 1024 --from sets/small --price 2")(plan)
app.command("fit-patches", epilog="Example: synthkd fit-patches --preset digits --out patches/digits")(fit_patches)
app.command("fit-prior", epilog=FIT_PRIOR)(fit_prior)
app.command("fit-decoder", epilog="Example: synthkd fit-decoder --preset digits --out decoders/digits")(fit)
app.command("index", epilog="Example: synthkd index sets/digits --where 'confidence > 0.9'")(index)
app.command("stats", epilog="Example: synthkd stats sets/digits --out stats.html")(stats)
app.command("export-folder", epilog="Example: synthkd export-folder sets/digits --out folders/a --split train=1")(
    export_folder
)
out = Console()


@app.command(epilog="Example: synthkd run digits --out runs/digits --seed 0")
def run(
    preset: Annotated[str, typer.Argument(help="Preset to run; `synthkd info` lists them.")],
    out_dir: options.Out,
    seed: options.Seed = 0,
    teacher: TeacherChoice = None,
    student: StudentChoice = None,
    controls: ControlChoice = None,
    num_images: Annotated[int | None, typer.Option("--num-images", help="Images per set, not the preset's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of the students instead of the preset's.")] = None,
    method: Method = None,
    pool: Pool = None,
    set_option: MethodOptions = None,
    patch: Patch = None,
    minutes: Minutes = None,
    gamma: options.Gamma = None,
    rounds: options.Rounds = None,
    divergence: options.Divergence = None,
    patches: options.Patches = None,
    patch_weight: options.PatchWeight = None,
    allow_code: options.AllowCode = False,
    workers: options.Workers = None,
    deadline: options.GroupDeadline = None,
    grace: options.Grace = options.GRACE,
    strict_bits: options.StrictBits = False,
    decoder: options.GuidanceDecoder = None,
    fuse: options.Fuse = "auto",
    compile: options.Compile = "auto",
    micro_batch: options.MicroBatch = "auto",
    backend: options.Backend = None,
    artifacts: options.Artifacts = None,
    trust: options.Trust = False,
    attention: options.Attention = "sdpa",
    quantize: options.Quantize = "",
    opset: options.Opset = 0,
    provider: options.Provider = "auto",
    fixed_batch: options.FixedBatch = False,
    device: options.Device = None,
) -> None:
    """Do the whole job: guided set, unguided control, both students, scores on real data, report.

    A preset may name further controls, methods at equal steps of the same student; --controls chooses others, or none.
    With --method another one: what it makes, its student, its score; `synthkd compare` puts several beside one another.
    """
    from synthkd.dfkd.method_run import MethodRun
    from synthkd.dfkd.run import Interrupted, Run

    for name, seconds in {"--deadline": deadline, "--grace": grace}.items():
        options.check_seconds(name, seconds)
    if method is not None and deadline is not None:
        raise SynthkdError("--deadline is for groups of a diffusion prior; leave it out with --method")
    if method is not None and controls is not None:
        raise SynthkdError("--controls are what a whole run compares with; leave them out with --method")
    chosen = chosen_preset(preset, teacher, student, controls)
    asked = options.Asked(
        gamma=gamma, rounds=rounds, divergence=divergence,
        patches=patches, patch=patch_weight, allow_code=allow_code, decoder=decoder, fuse=fuse,
        compile=compile, micro_batch=micro_batch, backends=backend or (), artifacts=artifacts, trust=trust,
        attention=attention, quantize=quantize, opset=opset, provider=provider, fixed_batch=fixed_batch,
        strict_bits=strict_bits,
    )  # fmt: skip
    if method is None or asked != options.Asked(allow_code=allow_code):  # a method without a prior asks nothing of one
        chosen = replace(chosen, job=options.build_job(chosen.job, asked, device))
    chosen = shortened(chosen.on(options.pick_device(device)), steps)
    chosen = replace(chosen, job=replace(chosen.job, allow_code=allow_code or chosen.job.allow_code))
    if num_images is not None:
        Request(num_samples=num_images, seed=seed)
    if method is not None:
        run_method(MethodRun(
            preset=chosen, method=method, out=out_dir, seed=seed, num_images=num_images, pool=pool,
            options=parsed_options(set_option, patch), workers=options.check_workers(workers),
        ), minutes, grace)  # fmt: skip
        return
    if pool is not None or set_option or patch is not None:
        raise SynthkdError("--pool, --patch and --set are for --method; name one")
    options.check_seconds("--deadline", deadline)
    with Bars(out) as bars, StopFlag(options.check_seconds("--grace", grace)) as stop:
        until = Deadline(stop, minutes)
        job = Run(chosen, out_dir, seed, num_images, options.check_workers(workers), bars, until.is_set, deadline)
        try:
            result = job.execute()
        except Interrupted:
            raise typer.Exit(stop.exit_code(out, "the same command goes on from here")) from None
    out.print(run_summary(result))
    out.print(f"report: {out_dir / 'report.html'}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: synthkd synth --preset digits --num-samples 500 --out sets/digits --scale 0.3")
def synth(
    out_dir: options.OutOrUrl,
    num_samples: Annotated[int, typer.Option(help="Images in the set; raise it later to grow the same set.")] = 1000,
    seed: options.Seed = 0,
    preset: Annotated[str | None, typer.Option(help="Start from a preset's recipe, model and teacher.")] = None,
    model: Annotated[str | None, typer.Option(help="Diffusers pipeline folder, hub id, or embedded:digits.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher card (TOML), or embedded:digits.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file of recipe fields, tables guidance and cutmix.")] = None,
    classes: Annotated[Path | None, typer.Option(help="File of class names, one a line (or the teacher's).")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of prompt templates, one a line, with {class}.")] = None,
    targets: Annotated[Path | None, typer.Option(help="TOML of class weights, exclusions and prompt words.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="LoRA to fuse into the model, PATH or PATH@WEIGHT.")] = None,
    scale: Annotated[float | None, typer.Option(help="Teacher guidance scale; 0 draws the unguided control.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of the BatchNorm term.")] = None,
    beta: Annotated[float | None, typer.Option(help="Weight of the class term.")] = None,
    gamma: options.Gamma = None,
    rounds: options.Rounds = None,
    divergence: options.Divergence = None,
    patches: options.Patches = None,
    patch_weight: options.PatchWeight = None,
    allow_code: options.AllowCode = False,
    shards: Annotated[str | None, typer.Option(help="Order or subset of shards, such as 2,0,1.")] = None,
    shard_index: options.ShardIndex = None,
    num_shards: options.NumShards = None,
    spool: options.Spool = None,
    workers: options.Workers = None,
    deadline: options.GroupDeadline = None,
    grace: options.Grace = options.GRACE,
    strict_bits: options.StrictBits = False,
    encoder: options.Encoder = "auto",
    encoders: options.Encoders = None,
    ray: options.Ray = None,
    ray_actors: options.RayActors = None,
    ray_wheel: options.RayWheel = None,
    decoder: options.GuidanceDecoder = None,
    fuse: options.Fuse = "auto",
    compile: options.Compile = "auto",
    micro_batch: options.MicroBatch = "auto",
    backend: options.Backend = None,
    artifacts: options.Artifacts = None,
    trust: options.Trust = False,
    attention: options.Attention = "sdpa",
    quantize: options.Quantize = "",
    opset: options.Opset = 0,
    provider: options.Provider = "auto",
    fixed_batch: options.FixedBatch = False,
    device: options.Device = None,
) -> None:
    """Draw a guided, labelled set as WebDataset shards; killed or grown, the same command goes on."""
    from synthkd.dfkd.presets import load_preset
    from synthkd.dfkd.rounds import DrawOptions, draw_set
    from synthkd.engine.remote import open_output

    writing = Writing(encoder, encoders)
    asked = options.Asked(
        model=model, teacher=teacher, recipe=recipe, classes=classes, prompts=prompts, targets=targets,
        loras=lora or (), scale=scale, rounds=rounds, alpha=alpha, beta=beta, gamma=gamma, divergence=divergence,
        patches=patches, patch=patch_weight,
        allow_code=allow_code, decoder=decoder, fuse=fuse, compile=compile, micro_batch=micro_batch,
        backends=backend or (), artifacts=artifacts, trust=trust, attention=attention,
        quantize=quantize, opset=opset, provider=provider, fixed_batch=fixed_batch, strict_bits=strict_bits,
    )  # fmt: skip
    job = options.build_job(load_preset(preset).job if preset else None, asked, device)
    request = Request(num_samples=num_samples, seed=seed)
    part = options.part_of_run(shard_index, num_shards)
    order = options.parse_shards(shards, Plan(job.recipe, request).num_shards)
    if part is not None and order is not None:
        raise SynthkdError("--shards and --shard-index both choose shards; use one of them")
    workers = options.check_workers(workers)
    options.check_seconds("--deadline", deadline)
    cluster = options.cluster_of(ray, ray_actors, ray_wheel, deadline, device)
    if cluster is None:
        encoder_for(encoder, job.recipe.image_format, job.device)  # refused before anything is loaded
    else:
        check_encoder(encoder, job.recipe.image_format)  # the cluster's device is known once it is joined
    if cluster is not None and workers is not None:
        raise SynthkdError("--workers are processes of this machine, --ray-actors those of a cluster; use one of them")
    options.check_seconds("--grace", grace)
    folder, remote = open_output(out_dir, spool, part)
    how = DrawOptions(shards=order, part=part, deadline=deadline, writing=writing, cluster=cluster, remote=remote)
    with remote.told() if remote else nullcontext(), Bars(out) as bars, StopFlag(grace) as stop:
        summary = draw_set(job, request, folder, "synthesize", workers, bars, stop.is_set, how)
    if summary.drawn:
        out.print(_rates(summary), soft_wrap=True, highlight=False)
    if summary.stopped:
        raise typer.Exit(stop.exit_code(out, "the same command goes on from here"))
    out.print(f"{out_dir}: {summary.present} images, {summary.drawn} drawn now", soft_wrap=True, highlight=False)


def _rates(summary: WriteSummary) -> str:
    """What `synth` says of its speed."""
    rate, beside = f"{summary.images_per_second:.1f} images/s", summary.encoding + summary.writing
    if not summary.bytes:  # written elsewhere, by actors
        return rate
    return (
        f"{rate}, {summary.bytes / 2**20:.1f} MiB; of {summary.seconds:.1f} s the drawing waited "
        f"{summary.stalled:.2f} s ({summary.stall_percent:.1f} %) for the writing, which took {beside:.1f} s beside it"
    )


@app.command(epilog="Example: synthkd replay sets/digits --id 42 --out 42.png")
def replay(
    set_dir: Annotated[Path, typer.Argument(help="Folder of a synthetic set.")],
    sample_id: Annotated[int, typer.Option("--id", help="Sample to redraw.")],
    target: Annotated[Path | None, typer.Option("--out", help="Where to write it (or ID.EXTENSION here).")] = None,
    model: Annotated[str | None, typer.Option(help="Where the model lies now, if it moved.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Where the teacher card lies now, if it moved.")] = None,
    allow_code: options.AllowCode = False,
    fuse: Annotated[str | None, typer.Option(help="Fused modules (default: as the image was drawn).")] = None,
    artifacts: options.Artifacts = None,
    device: options.Device = None,
) -> None:
    """Draw one image again from the manifest alone and compare it with the stored one."""
    from synthkd.dfkd.replay import replay_sample

    where = options.pick_device(device)
    path, verdict = replay_sample(
        set_dir, sample_id, target, where, allow_code, fuse, artifacts, model=model, teacher=teacher
    )
    out.print(f"{path}: {verdict}", soft_wrap=True, highlight=False)


@app.command(epilog="Example: synthkd report runs/digits")
def report(run_dir: Annotated[Path, typer.Argument(help="Folder of a run, a comparison, a set or a student.")]) -> None:
    """Write report.html, one self-contained page, for a run, a comparison, a set or a student."""
    from synthkd.dfkd.compare import COMPARISON
    from synthkd.dfkd.report import write_report
    from synthkd.dfkd.report_compare import write_comparison
    from synthkd.dfkd.report_student import is_student, write_student_report

    write = write_student_report if is_student(run_dir) else write_report
    write = write_comparison if (run_dir / COMPARISON).is_file() else write
    out.print(str(write(run_dir)), soft_wrap=True, highlight=False)


@app.command(epilog="Example: synthkd info")
def info() -> None:
    """Show versions, devices, presets and embedded models."""
    from synthkd.dfkd.methods.base import method_names
    from synthkd.dfkd.presets import preset_names

    table = Table(show_header=False)
    for name, version in versions("triton").items():
        table.add_row(name, version)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    table.add_row("GPU", torch.cuda.get_device_name() if here == "cuda" else "none")
    table.add_row("kernels", {"triton": "Triton", "reference": "plain torch"}[backend(torch.device(here))])
    table.add_row("CPU", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    for name, why_not in available().items():
        table.add_row(f"backend {name}", escape(why_not) or "yes")
    table.add_row("artifacts", str(default_store()))
    table.add_row("presets", ", ".join(preset_names()))
    table.add_row("methods", ", ".join(method_names()))
    table.add_row("embedded models", "embedded:digits, embedded:segments (a dense teacher)")
    out.print(table)


def _add_plugins() -> None:
    for entry in sorted(entry_points(group="synthkd.commands"), key=lambda e: e.name):
        app.add_typer(entry.load(), name=entry.name)


def _say_what_is_logged() -> None:
    """What a job does differently than one may think (no statistics, no refiner), on standard error."""
    log, handler = logging.getLogger("synthkd"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("synthkd: %(message)s"))
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


def main() -> None:
    """Run the command; a wrong input ends in one line on standard error and its exit code."""
    _say_what_is_logged()
    _add_plugins()
    try:
        app()
    except SynthkdError as error:
        print(f"synthkd: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (OSError, SafetensorError) as error:
        print(f"synthkd: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
