"""`synthkd distill` and `synthkd labels`: a student from a set, and the teacher's labels of it for all students."""

import json
import logging
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from synthkd.dfkd import cli_options as options
from synthkd.dfkd.apart import check_set, student_seen
from synthkd.dfkd.cli_progress import Bars, StopFlag
from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.parallel import Ranks, joined
from synthkd.dfkd.progress import Progress, Silent
from synthkd.dfkd.report import STUDENT_LOG
from synthkd.dfkd.report_student import TRAINING, write_student_report
from synthkd.dfkd.sets import SetSource, open_set
from synthkd.dfkd.ship import KINDS, export_student
from synthkd.dfkd.soft_labels import store_labels
from synthkd.dfkd.student import (
    Hooks,
    Stopped,
    Student,
    TrainOptions,
    identity_of,
    opened_reader,
    save_student,
    split,
)
from synthkd.dfkd.student import distill as train
from synthkd.dfkd.teachers import Teacher, load_teacher
from synthkd.dfkd.training import CHECKPOINT, LogRow, sight_of
from synthkd.engine.errors import SynthkdError, suggest
from synthkd.engine.rows import write_atomically

out = Console()

Set = Annotated[Path, typer.Argument(help="Folder of a synthetic set.")]
TeacherCard = Annotated[str | None, typer.Option(help="Teacher card (default: the one that guided the set).")]
Preset = Annotated[str | None, typer.Option(help="Take student and training settings from a preset.")]
Spec = Annotated[Path | None, typer.Option("--spec", help="TOML file of DistillSpec fields.")]
Limit = Annotated[int | None, typer.Option(help="Use only the first so many images.")]
Previews = Annotated[bool, typer.Option(help="Train on the set's clean-latent previews too, if it has any.")]
Views = Annotated[
    int | None, typer.Option(help="Views of each image, taken in turn by the epochs (0: new ones each epoch).")
]
Reader = Annotated[str, typer.Option(help="Who decodes: dali, torch, or auto, the faster one on this machine.")]
Cache = Annotated[
    str, typer.Option(help="Where decoded images are kept: auto (if they fit), memory, device (the GPU), off.")
]
Threads = Annotated[int, typer.Option(help="Threads that decode (0: one per core, eight at most).")]
Strict = Annotated[bool, typer.Option("--strict", help="A damaged image ends the command; else it is named, skipped.")]
Precision = Annotated[
    str, typer.Option(help="Of the networks: auto (bfloat16 on a GPU that has it), float32, bfloat16.")
]


def distill(
    set_dir: Set,
    out_dir: options.Out,
    teacher: TeacherCard = None,
    preset: Preset = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step, over all processes.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Softmax temperature of the KL loss.")] = None,
    spec_file: Spec = None,
    soft_labels: Annotated[
        str | None, typer.Option(help="teacher: it runs in the loop; stored: its labels of all --views, made once.")
    ] = None,
    views: Views = None,
    limit: Limit = None,
    previews: Previews = True,
    export: Annotated[
        list[str] | None, typer.Option("--export", help="Ship the student as onnx or pt2, preprocessing inside.")
    ] = None,
    reader: Reader = "auto",
    cache: Cache = "auto",
    threads: Threads = 0,
    strict: Strict = False,
    compile: Annotated[
        str,
        typer.Option(help="The step: auto (where it pays), off, default, reduce-overhead (CUDA graphs), max-autotune."),
    ] = "auto",
    precision: Precision = "auto",
    checkpoint_seconds: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 30.0,
    seed: options.Seed = 0,
    allow_code: options.AllowCode = False,
    device: options.Device = None,
) -> None:
    """Train a student on a synthetic set under its teacher; killed, the same command goes on to the same student.

    The weights kept are those that agree with the teacher on most held-out synthetic images; `synthkd evaluate` scores
    them on real ones, once. Several GPUs of a machine: `torchrun --standalone --nproc-per-node 8 --no-python synthkd
    distill SET --out DIR`.
    """
    wanted = tuple(export or ())
    for name in wanted:
        if name not in KINDS:
            raise SynthkdError(f"--export {name!r}: {suggest(name, KINDS)}")
    spec = options.distill_spec(preset, spec_file, steps, batch_size, temperature, seed)
    spec = with_labels(spec, soft_labels, views)
    with joined(options.pick_device(device)) as ranks:
        how = TrainOptions(
            reader=reader, cache=cache, threads=threads, strict=strict, device=ranks.device, compile=compile,
            precision=precision, checkpoint_seconds=checkpoint_seconds,
        )  # fmt: skip
        card, source, network = opened(set_dir, teacher, limit, previews, ranks.device, allow_code)
        job = _Job(set_dir, out_dir, card, spec, how, ranks)
        if not job.is_done(source, network):
            job.run(source, network)
        if ranks.first:
            _ship(out_dir, wanted)


def with_labels(spec: DistillSpec, soft_labels: str | None, views: int | None) -> DistillSpec:
    """A spec with what `--soft-labels` and `--views` say on top; stored labels are of eight views unless told."""
    changes: dict[str, Any] = {} if views is None else {"views": views}
    if soft_labels is not None:
        changes["soft_labels"] = soft_labels
    if soft_labels == "stored" and views is None and spec.views == 0:
        changes["views"] = 8
    return replace(spec, **changes)


def opened(
    set_dir: Path, teacher: str | None, limit: int | None, previews: bool, device: str, allow_code: bool
) -> tuple[str, SetSource, Teacher]:
    """The teacher's card, the set and the teacher; raises SynthkdError where they do not fit each other."""
    card = teacher or options.set_teacher(set_dir)
    check_set(set_dir, card)
    network = load_teacher(card, device, allow_code=allow_code)
    options.check_limit(limit, options.set_size(set_dir))
    source = open_set(set_dir, limit, previews)
    ours, theirs = len(source.classes), len(network.classes)
    if ours != theirs:
        raise SynthkdError(f"teacher {card!r} has {theirs} outputs, the set has {ours} classes")
    return card, source, network


class _Job:
    """One training with its folder: checkpoints, log and summary."""

    def __init__(
        self, set_dir: Path, out_dir: Path, card: str, spec: DistillSpec, how: TrainOptions, ranks: Ranks
    ) -> None:
        self.set_dir, self.out_dir, self.card, self.spec, self.how, self.ranks = (
            set_dir, out_dir, card, spec, how, ranks,
        )  # fmt: skip
        self.rows: list[LogRow] = []
        self.size = (1, 1)

    def is_done(self, source: SetSource, network: Teacher) -> bool:
        """Whether this very student is there already; says so."""
        path = self.out_dir / TRAINING
        try:
            there = json.loads(path.read_text())["identity"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        identity = json.loads(json.dumps(identity_of(self.spec, source, network)))
        if there != identity or not (self.out_dir / "student.toml").exists():
            return False
        self._say(f"{self.out_dir / 'student.toml'}: this student is trained already")
        return True

    def run(self, source: SetSource, network: Teacher) -> None:
        """Train, save, summarise; exits with 75 or 130 where it is stopped."""
        if self.ranks.first:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            (self.out_dir / TRAINING).unlink(missing_ok=True)  # from here on it is no word on what lies beside it
        else:
            logging.getLogger("synthkd").setLevel(logging.WARNING)  # the first process says the rest
        self.ranks.wait()
        began = time.perf_counter()
        with (Bars(out) if self.ranks.first else nullcontext(Silent())) as told, StopFlag() as stop:
            self.size = network.input_size
            hooks = self._hooks(told, stop, source)
            try:
                student = train(
                    source, network, self.spec, options=self.how, ranks=self.ranks, folder=self.out_dir,
                    labels_root=self.set_dir, hooks=hooks,
                )  # fmt: skip
            except Stopped:
                hint = "the same command goes on from its checkpoint"
                raise typer.Exit(stop.exit_code(out, hint, "training step")) from None
        if self.ranks.first:
            self._save(student, source, network, time.perf_counter() - began)

    def _hooks(self, told: Progress, stop: StopFlag, source: SetSource) -> Hooks:
        spec, done = self.spec, 0
        if spec.soft_labels == "stored":
            count, _ = split(source, spec.held_out, self.size)
            told.begin("soft labels", count * spec.views // self.ranks.world, "images")
        told.begin("distill", spec.steps, "steps")

        def on_step(step: int) -> None:
            nonlocal done
            told.advance("distill", step - done)
            done = step

        return Hooks(
            on_step=on_step,
            on_row=lambda row: self._note(row, told),
            on_labels=lambda n: told.advance("soft labels", n),
            should_stop=stop.is_set,
        )

    def _note(self, row: LogRow, told: Progress) -> None:
        """Show a log row and write the log so far."""
        self.rows.append(row)
        if not self.ranks.first:
            return
        if isinstance(told, Bars):
            told.note("distill", f"{row['images_per_second']:.0f} images/s, wait {row['data_wait']:.1f} %")
        with (self.out_dir / STUDENT_LOG).open("w" if len(self.rows) == 1 else "a") as f:
            f.write(json.dumps(row) + "\n")

    def _save(self, student: Student, source: SetSource, network: Teacher, seconds: float) -> None:
        about = {"teacher": self.card, "set": self.set_dir.name, "images": len(source), **student_seen(self.card)}
        path = save_student(student, self.spec, self.out_dir, about)
        summary = {
            "identity": identity_of(self.spec, source, network),
            "execution": asdict(self.how) | {"processes": self.ranks.world},
            "agreement": student.agreement,
            "seconds": round(seconds, 2),
            "damaged": dict(student.damaged),
            **averages(student.log),
        }
        write_atomically(self.out_dir / TRAINING, json.dumps(summary, indent=2, sort_keys=True) + "\n")
        write_student_report(self.out_dir)
        (self.out_dir / CHECKPOINT).unlink(missing_ok=True)
        says = f"agrees with the teacher on {student.agreement:.1f} % of held-out synthetic images"
        rates = f"{summary['images_per_second']:.0f} images/s, data wait {summary['data_wait']:.1f} %"
        self._say(f"{path}: {says}; {rates}")
        if student.damaged:
            first = ", ".join(list(student.damaged)[:3])
            self._say(f"{len(student.damaged)} damaged images skipped ({first}); run `synthkd verify {self.set_dir}`")

    def _say(self, text: str) -> None:
        if self.ranks.first:
            out.print(text, soft_wrap=True, highlight=False)


def averages(log: list[LogRow]) -> dict[str, float]:
    """Images per second and percent of time waited, over the rows after the first, which holds what is done once."""
    rows = [r for r in log[1:] if r.get("images_per_second")] or [r for r in log if r.get("images_per_second")]
    seconds = [1 / float(r["images_per_second"] or 1) for r in rows]
    waits = [float(r["data_wait"] or 0) * s for r, s in zip(rows, seconds, strict=True)]
    if not rows:
        return {"images_per_second": 0.0, "data_wait": 0.0}
    return {
        "images_per_second": round(len(rows) / sum(seconds), 1),
        "data_wait": round(sum(waits) / sum(seconds), 2),
    }


def _ship(out_dir: Path, formats: tuple[str, ...]) -> None:
    if not formats:
        return
    net = load_teacher(str(out_dir / "student.toml"))
    for name in formats:
        path = export_student(net, out_dir / f"student.{name}", name)
        out.print(f"{path}: checked against the student itself", soft_wrap=True, highlight=False)


def labels(
    set_dir: Set,
    teacher: TeacherCard = None,
    preset: Preset = None,
    spec_file: Spec = None,
    views: Views = None,
    limit: Limit = None,
    previews: Previews = True,
    reader: Reader = "auto",
    cache: Cache = "auto",
    threads: Threads = 0,
    strict: Strict = False,
    seed: options.Seed = 0,
    allow_code: options.AllowCode = False,
    device: options.Device = None,
) -> None:
    """Store the teacher's logits of a set's views, so that no student's training needs the teacher.

    Views are those of the training to come: give its --preset or --spec, its --seed and its --views. Stopped, the same
    command goes on. `synthkd distill --soft-labels stored` does this by itself where it has not been done.
    """
    spec = with_labels(options.distill_spec(preset, spec_file, None, None, None, seed), "stored", views)
    where = options.pick_device(device)
    how = TrainOptions(reader=reader, cache=cache, threads=threads, strict=strict, device=where)
    _, source, network = opened(set_dir, teacher, limit, previews, where, allow_code)
    rows, _ = split(source, spec.held_out, network.input_size)
    with Bars(out) as bars, StopFlag() as stop:
        bars.begin("soft labels", rows * spec.views, "images")
        images = opened_reader(source, network, spec, how)
        try:
            stored, told = store_labels(
                set_dir, source, images, network, sight_of(spec, rows),
                on_images=lambda n: bars.advance("soft labels", n), should_stop=stop.is_set,
            )  # fmt: skip
        finally:
            images.close()
    if stored is None:
        raise typer.Exit(stop.exit_code(out, "the same command goes on from here", "file of labels"))
    size = f"{told.bytes / 1e6:.1f} MB for {spec.views} views of {rows} images"
    speed = f"{told.images_per_second:.0f} images/s" if told.labelled else "all there already"
    out.print(f"{told.folder}: {size}, {speed}", soft_wrap=True, highlight=False)
