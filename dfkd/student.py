"""Set -> student: the network, its teacher and its held-out images put together for `dfkd/training.py`; its files."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from synthkd.dfkd.cached import MemorySource
from synthkd.dfkd.data import LabelledImages
from synthkd.dfkd.distill_spec import DistillSpec, check_parts, learning_rate, spec_from
from synthkd.dfkd.evaluate import named
from synthkd.dfkd.feed import Order, Pixels, Reader, Request, Rows, Source
from synthkd.dfkd.loader import Loader
from synthkd.dfkd.nets import build_net, count_parameters
from synthkd.dfkd.parallel import Ranks
from synthkd.dfkd.reader_choice import READERS
from synthkd.dfkd.sight import Labels
from synthkd.dfkd.soft_labels import store_labels
from synthkd.dfkd.teachers import Teacher, wrong_shape
from synthkd.dfkd.train_options import TrainOptions
from synthkd.dfkd.training import LogRow, Stopped, Training, identity_of, reader_of, sight_of
from synthkd.dfkd.views import Views
from synthkd.engine.errors import SynthkdError
from synthkd.engine.rows import write_atomically

_HELD_BYTES, _HELD_LEAST = 2**28, 512  # of held-out images in memory: an accuracy needs no more than some thousands


@dataclass(frozen=True)
class Student:
    """A trained network with its preprocessing, its training log, and its agreement with the teacher in percent.

    damaged: keys of images that could not be read, with the reason.
    """

    net: Teacher
    log: list[LogRow]
    agreement: float
    damaged: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Who is told what: finished steps, log rows, labelled images; and who may stop the training."""

    on_step: Callable[[int], None] = lambda _: None
    on_row: Callable[[LogRow], None] = lambda _: None
    on_labels: Callable[[int], None] = lambda _: None
    should_stop: Callable[[], bool] = lambda: False


def distill(
    data: LabelledImages | Source,
    teacher: Teacher,
    spec: DistillSpec,
    on_step: Callable[[int], None] = lambda _: None,
    *,
    options: TrainOptions | None = None,
    ranks: Ranks | None = None,
    folder: Path | None = None,
    labels_root: Path | None = None,
    hooks: Hooks | None = None,
) -> Student:
    """Train a fresh student on synthetic images under the teacher's outputs.

    Previews are trained on like any image; agreement is measured on finished images alone, which decides which weights
    are kept. folder: where checkpoints are written and looked for; labels_root: where stored soft labels lie, the set's
    folder. on_step: told the number of finished steps. ranks: see `dfkd/parallel.py`.
    Raises SynthkdError for a set too small to split, for an arch that does not take the teacher's images, for a loss
    that is not finite; Stopped where hooks ask for it.
    """
    device = teacher.get_buffer("mean").device
    ranks = ranks or Ranks(device=str(device))
    options, hooks = options or TrainOptions(device=str(device)), hooks or Hooks(on_step=on_step)
    source = MemorySource(data) if isinstance(data, LabelledImages) else data
    student = fresh_student(teacher, spec)
    feed = SetFeed.opened(source, teacher, spec, options, ranks, folder, labels_root, hooks)
    try:
        training = Training(
            student=student, teacher=teacher, feed=feed, held=feed.held,
            wanted=named(teacher, feed.held), spec=spec, options=options, ranks=ranks,
            reading=feed.reading, damaged=feed.damaged, identity=identity_of(spec, source, teacher), folder=folder,
            on_step=hooks.on_step, on_row=hooks.on_row, should_stop=hooks.should_stop,
        )  # fmt: skip
        agreement = training.run()
    finally:
        feed.close()
    return Student(student, training.log, agreement, ranks.texts(dict(feed.damaged)))


class SetFeed(Loader):
    """A finished set as a Feed: its last images are held out, uint8 [M,3,h,w], for the agreement with the teacher."""

    held: Tensor
    made: int = 0  # synthetic images of the source, where somebody counts them

    @classmethod
    def opened(
        cls,
        source: Source,
        teacher: Teacher,
        spec: DistillSpec,
        options: TrainOptions,
        ranks: Ranks | None = None,
        folder: Path | None = None,
        labels_root: Path | None = None,
        hooks: Hooks | None = None,
    ) -> "SetFeed":
        """See `distill`, whose arguments these are; `close` gives the reader back."""
        ranks = ranks or Ranks(device=options.device)
        check_parts(spec, ranks.world)
        rows, held = split(source, spec.held_out, teacher.input_size)
        reader = opened_reader(source, teacher, spec, options, ranks, folder)
        try:
            stored = _labels(source, reader, teacher, spec, rows, labels_root, ranks, hooks or Hooks())
            order = Order(rows, spec.batch_size, spec.seed, ranks.rank, ranks.world)
            feed = cls(source, reader, order, sight_of(spec, rows), torch.device(ranks.device), stored)
            feed.held = read_plain(reader, held)
        except BaseException:
            reader.close()
            raise
        return feed

    @property
    def reading(self) -> dict[str, str]:
        """Which reader and decoder read the images."""
        return {"reader": self.reader.name, "decoder": self.reader.decoder}

    @property
    def damaged(self) -> dict[str, str]:
        """What could not be read, by key; filled as it goes."""
        return self.reader.damaged

    def close(self) -> None:
        """Give the reader back."""
        self.reader.close()


def opened_reader(
    source: Source,
    teacher: Teacher,
    spec: DistillSpec,
    options: TrainOptions,
    ranks: Ranks | None = None,
    folder: Path | None = None,
) -> Reader:
    """A reader of the teacher's images: a checkpoint's where there is one, the first process's for all of them."""
    ranks, options = ranks or Ranks(), replace(options, crops=spec.crop < 1)
    known = reader_of(folder) if folder and options.reader == "auto" else None
    options = replace(options, reader=known) if known else options
    if ranks.world == 1 or options.reader != "auto":
        return source.reader(teacher.input_size, options)
    first = source.reader(teacher.input_size, options) if ranks.first else None
    name = ranks.texts({"reader": first.name} if first else {})["reader"]
    return first or source.reader(teacher.input_size, replace(options, reader=name if name in READERS else "auto"))


def split(source: Source, share: float, size: tuple[int, int]) -> tuple[int, Rows]:
    """How many of the first rows are trained on, and the finished rows behind them, which leave with their previews.

    Raises SynthkdError where fewer than two are left to train on.
    """
    finals = np.flatnonzero(~source.previews)
    most = max(_HELD_LEAST, _HELD_BYTES // (3 * size[0] * size[1]))
    count = len(finals) - min(max(1, round(len(finals) * share)), most)
    rows = int(finals[count]) if count >= 1 else 0
    if rows < 2:
        raise SynthkdError(f"distill: the set has {len(source)} images; expected at least 4")
    return rows, finals[count:].astype(np.int64)


def read_plain(reader: Reader, rows: Rows, batch_size: int = 256) -> Tensor:
    """Whole images, uint8 [N,3,h,w] on the CPU; a damaged one's place is taken by a readable one."""
    parts = np.array_split(rows, max(1, len(rows) // batch_size))  # no small rest, in which none may be readable
    found: list[Pixels] = list(reader.read(Request(part, Views.plain(part)) for part in parts))
    return torch.cat([p.images.cpu() for p in found])


def _labels(
    source: Source,
    reader: Reader,
    teacher: Teacher,
    spec: DistillSpec,
    rows: int,
    root: Path | None,
    ranks: Ranks,
    hooks: Hooks,
) -> Labels | None:
    """Stored soft labels where the spec wants them, made by all processes where they are not there yet."""
    if spec.soft_labels != "stored":
        return None
    if root is None:
        raise SynthkdError("distill: soft_labels are stored, but the images are not a set in a folder")
    sight = sight_of(spec, rows)
    labels, _ = store_labels(root, source, reader, teacher, sight, ranks, hooks.on_labels, hooks.should_stop)
    if labels is None:
        raise Stopped
    return labels


def fresh_student(teacher: Teacher, spec: DistillSpec) -> Teacher:
    """An untrained student with the teacher's preprocessing; its weights hang on the spec's seed alone."""
    device = teacher.get_buffer("mean").device
    torch.manual_seed(spec.seed)
    net = build_net(spec.arch, len(teacher.classes), spec.arch_args).to(device)
    student = Teacher(
        net,
        mean=teacher.get_buffer("mean").flatten().tolist(),
        std=teacher.get_buffer("std").flatten().tolist(),
        input_size=teacher.input_size,
        classes=teacher.classes,
        task=teacher.task,
    ).to(device)
    _try_out(student, spec)
    return student


def _try_out(student: Teacher, spec: DistillSpec) -> None:
    """One forward pass on a black image: raises SynthkdError where the network does not take it, or is no such one."""
    try:
        with torch.no_grad():
            found = student(torch.zeros(1, 3, *student.input_size, device=student.get_buffer("mean").device))
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        size, reason = "x".join(map(str, (3, *student.input_size))), " ".join(str(error).split())[:160]
        raise SynthkdError(f"distill: arch {spec.arch!r} does not take {size} images ({reason})") from error
    if wrong := wrong_shape(found, student):
        raise SynthkdError(f"distill: arch {spec.arch!r} {wrong} of the teacher (task {student.task!r})")


def save_student(student: Student, spec: DistillSpec, folder: Path, about: Mapping[str, Any]) -> Path:
    """Write student.safetensors, its card student.toml (loads like a teacher's), student.md and student_log.jsonl.

    about: short texts for the model card. Returns the card's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in student.net.net.state_dict().items()}
    fresh = folder / "student.safetensors.tmp"
    save_file(state, fresh, metadata={"card": json.dumps(_card(student, spec, about))})
    fresh.replace(folder / "student.safetensors")
    write_atomically(folder / "student.toml", card_toml(_card(student, spec, about)))
    write_atomically(folder / "student_log.jsonl", "".join(json.dumps(row) + "\n" for row in student.log))
    write_atomically(folder / "student.md", _model_card(student, spec, about))
    return folder / "student.toml"


def _card(student: Student, spec: DistillSpec, about: Mapping[str, Any]) -> dict[str, Any]:
    net = student.net
    return {
        **({"task": net.task} if net.dense else {}),
        "arch": spec.arch,
        "weights": "student.safetensors",
        "input_size": list(net.input_size),
        "mean": net.get_buffer("mean").flatten().tolist(),
        "std": net.get_buffer("std").flatten().tolist(),
        "classes": list(net.classes),
        "arch_args": dict(spec.arch_args),
        "about": dict(about),
    }


def card_toml(card: Mapping[str, Any]) -> str:
    """A card as TOML; JSON's strings, numbers and arrays are TOML's."""
    top = [f"{k} = {json.dumps(v)}" for k, v in card.items() if not isinstance(v, Mapping)]
    for name, table in card.items():
        if isinstance(table, Mapping):
            top += ["", f"[{name}]", *(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in table.items())]
    return "\n".join(top) + "\n"


def _model_card(student: Student, spec: DistillSpec, about: Mapping[str, Any]) -> str:
    images = "synthetic images, a pool's, or both" if "pool" in about else "synthetic images only"
    lines = [
        "# Student model card",
        "",
        f"Trained by synthkd on {images}: no image of the teacher's training set was read.",
        "",
        f"- Parameters: {count_parameters(student.net.net):,}",
        f"- Input: {student.net.input_size[0]}x{student.net.input_size[1]} RGB in [0,1], normalised as in student.toml",
        f"- Classes: {', '.join(student.net.classes)}",
        f"- Agreement with the teacher on held-out synthetic images: {student.agreement:.1f} %",
        *(f"- {name}: {value}" for name, value in about.items()),
        "",
        "## Training",
        "",
        *(f"- {name}: {value}" for name, value in asdict(spec).items()),
        "",
        'Load it: `from synthkd.dfkd import load_teacher; net = load_teacher("student.toml")`.',
    ]
    return "\n".join(lines) + "\n"


__all__ = [
    "DistillSpec",
    "Hooks",
    "Stopped",
    "Student",
    "TrainOptions",
    "card_toml",
    "distill",
    "identity_of",
    "learning_rate",
    "opened_reader",
    "read_plain",
    "save_student",
    "spec_from",
    "split",
]
