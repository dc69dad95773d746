"""The stages of `synthkd bench distill`: readers, steps and short trainings, made ready to be timed in rounds."""

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthkd.bench.distill_cases import MEAN, PAIRS, STD, STUDENTS, Pair, picture, teacher_for, training, write_set
from synthkd.bench.distill_references import Member, PillowImages, PlainStep, members, pillow_loader
from synthkd.bench.distill_variants import (
    END,
    ENDS,
    READ,
    READ_BAR,
    READERS,
    SIZES,
    STAGES,
    STEP,
    STEP_BAR,
    STEPS,
    DistillBench,
    Entry,
    Reading,
    Stepping,
    attempted,
)
from synthkd.dfkd.cli_distill import averages
from synthkd.dfkd.data_dali import dali_available
from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.feed import Batch, Order, Reader, ReadOptions, Request
from synthkd.dfkd.loader import Loader
from synthkd.dfkd.objective import Objective
from synthkd.dfkd.parallel import Ranks
from synthkd.dfkd.sets import SetSource, open_set
from synthkd.dfkd.sight import Sight, ask
from synthkd.dfkd.soft_labels import store_labels
from synthkd.dfkd.step import Step
from synthkd.dfkd.student import distill, fresh_student, split
from synthkd.dfkd.teachers import Teacher
from synthkd.dfkd.train_options import TrainOptions
from synthkd.dfkd.training import sight_of
from synthkd.dfkd.views import Views, ViewSpec, draw_views
from synthkd.engine.workers import one_thread

Tell = Callable[[str], None]
TrainStep = Callable[[int], Tensor | float]
Seen = tuple[Tensor, Tensor, tuple[str, ...]]  # float32 [B,3,h,w] normalised, labels [B], keys
_CLASSES = tuple(f"class {i}" for i in range(10))
_CHECKED = 512  # images whose pixels are compared
_LEAST = 0.5  # seconds of one round of a step, which is repeated in it
_WARM = 5  # steps of the optimizer before losses are compared
_VIEWS = 2  # of stored labels
_END_STEPS, _END_IMAGES = (52, 402), {32: (1280, 16384), 224: (640, 4096)}  # on a CPU and on a GPU


@dataclass(frozen=True)
class Setting:
    """What is timed in one interleaved run. rounds: by default; facts: of all its rows.

    bar: how many times the reference is aimed at, by the fastest of `defaults`.
    """

    stage: str
    case: str
    size: int
    rounds: int
    opened: Callable[[Tell], AbstractContextManager[dict[str, Entry]]]
    facts: dict[str, Any] = field(default_factory=dict)
    bar: float | None = None
    defaults: tuple[str, ...] = ()


def settings(spec: DistillBench) -> list[Setting]:
    """All that a run is asked for and that this device can do, in the order of the stages."""
    sizes = [size for size in SIZES if size in (spec.sizes or SIZES)]
    makers: Mapping[str, Callable[[DistillBench, int], Iterator[Setting]]] = {READ: _reads, STEP: _steps, END: _ends}
    stages = [stage for stage in STAGES if stage in (spec.stages or STAGES)]
    return [found for stage in stages for size in sizes for found in makers[stage](spec, size)]


def _reads(spec: DistillBench, size: int) -> Iterator[Setting]:
    sized = SIZES[size]
    facts = {
        "image_format": spec.image_format, "stored": sized.stored, "crop": sized.crop, "workers": spec.workers,
        "batch_size": spec.batch_size or sized.batch[spec.cuda], "images": spec.images or sized.images[spec.cuda],
        "torch_threads": torch.get_num_threads() if spec.cuda else 1,
    }  # fmt: skip
    bar = READ_BAR if size == 32 else None
    yield Setting(READ, f"{size} px", size, 5, partial(_readers, spec, size, facts), facts, bar, ("dali",))


@contextmanager
def _readers(spec: DistillBench, size: int, facts: Mapping[str, Any], tell: Tell) -> Iterator[dict[str, Entry]]:
    """Every reader over one set, after a first round each, in which pixels, keys and labels are compared.

    On a CPU torch has one thread: those that wait for its small sums would take turns with the threads that decode.
    """
    found: dict[str, Entry] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack, one_thread(spec.device):
        root = write_set(Path(folder) / "set", facts["images"], facts["stored"], spec.image_format, _CLASSES)
        work = _Work(spec, size, facts, open_set(root), members(root))
        for name in spec.chosen(READ):
            entry, how = Entry(), READERS[name]
            found[name] = entry
            if how is not None and how.reader == "dali" and not dali_available():
                entry.skipped = "DALI is not installed: pip install 'synthkd[dali]'"
            else:
                with attempted(entry):
                    batches = work.pillow() if how is None else work.ours(how, entry, stack)
                    entry.facts |= work.compared(batches())
                    entry.run = partial(work.timed, batches)
            tell(f"read, {size} px, {name}: {entry.skipped or entry.failed or 'warm'}")
        yield found


@dataclass
class _Work:
    """One round: whole batches of a set in a fixed order and fixed views."""

    spec: DistillBench
    size: int
    facts: Mapping[str, Any]
    source: SetSource
    files: list[Member]

    def __post_init__(self) -> None:
        self.view = ViewSpec(crop=self.facts["crop"], flip=True)
        self.order = Order(len(self.source), self.facts["batch_size"], 0)
        self.sight = Sight(self.view, 0, 1, len(self.source))
        self.steps = max(1, len(self.source) // self.order.batch_size)
        asked = [ask(self.order, self.sight, step).request for step in range(self.steps)]
        request = Request(np.concatenate([r.rows for r in asked]), Views.cat([r.views for r in asked]))
        self.plain = PillowImages(self.files, request, self.facts["stored"], self.size)
        self.mean, self.std = (torch.tensor(v, device=self.spec.device).view(1, 3, 1, 1) for v in (MEAN, STD))

    def pillow(self) -> Callable[[], Iterator[Seen]]:
        """The reference's batches, on the device."""
        loader = pillow_loader(self.plain, self.order.batch_size, self.spec.workers, self.spec.cuda)

        def batches() -> Iterator[Seen]:
            done = 0
            for images, labels in loader:
                keys = tuple(m.key for m in self.plain.images[done : done + len(labels)])
                done += len(labels)
                yield images.to(self.spec.device, non_blocking=True), labels, keys

        return batches

    def ours(self, how: Reading, entry: Entry, stack: ExitStack) -> Callable[[], Iterator[Seen]]:
        """A reader's batches as a training gets them, normalised in one buffer: fresh memory costs more than that."""
        reader = self.source.reader((self.size, self.size), how.options(self.spec.device, self.view.crop < 1))
        stack.callback(reader.close)
        entry.facts |= {"decoder": reader.decoder, "threads": how.threads or "auto"}
        loader = Loader(self.source, reader, self.order, self.sight, self.spec.device)
        out = torch.empty(self.order.batch_size, 3, self.size, self.size, device=self.spec.device)

        def batches() -> Iterator[Seen]:
            for batch in loader.batches(0, self.steps):
                x = out.copy_(batch.images).sub_(255 * self.mean).div_(255 * self.std)
                yield x, batch.labels, batch.keys

        return batches

    def timed(self, batches: Callable[[], Iterator[Seen]]) -> float:
        """Images per second of a round."""
        began, count = time.perf_counter(), 0
        for images, _, _ in batches():
            count += len(images)
        _finished(self.spec.device)
        return count / (time.perf_counter() - began)

    def compared(self, batches: Iterator[Seen]) -> dict[str, Any]:
        """A whole round; its first images beside those of Pillow, pixels in 255ths."""
        done, most, total, keys, labels = 0, 0.0, 0.0, True, True
        for x, said, names in batches:
            if done < _CHECKED:
                some = range(done, done + len(x))
                wanted = torch.stack([self.plain[i][0] for i in some]).to(x.device)
                apart = ((x - wanted) * self.std).abs() * 255
                most, total = max(most, apart.max().item()), total + apart.mean().item() * len(x)
                keys = keys and list(names) == [self.plain.images[i].key for i in some]
                labels = labels and said.tolist() == [self.plain.images[i].label for i in some]
                done += len(x)
        mean = round(total / max(done, 1), 4)
        return {
            "max_pixel_difference": round(most, 2), "mean_pixel_difference": mean, "same_keys": keys,
            "same_labels": labels, "compared_images": done,
        }  # fmt: skip


def _finished(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _steps(spec: DistillBench, size: int) -> Iterator[Setting]:
    defaults = ("bfloat16", "compiled-bfloat16") if spec.cuda else ("eager", "compiled")
    for student, gpu in STUDENTS[size]:
        if student in spec.students or (not spec.students and (spec.cuda or not gpu)):
            batch = spec.batch_size or (SIZES[size].batch[1] if spec.cuda else 128)
            facts = {"student": student, "batch_size": batch, "torch_threads": torch.get_num_threads()}
            opened = partial(_stepped, spec, size, student, batch)
            yield Setting(STEP, student, size, 5, opened, facts, STEP_BAR, defaults)


@contextmanager
def _stepped(spec: DistillBench, size: int, student: str, batch_size: int, tell: Tell) -> Iterator[dict[str, Entry]]:
    """Every variant from the same weights, after some steps on the same batch, whose loss is compared."""
    torch.compiler.reset()
    found: dict[str, Entry] = {}
    train = training(student, batch_size=batch_size)
    batch = _fixed_batch(train, size, batch_size, spec.device)
    for name in spec.chosen(STEP):
        entry, how = Entry(), STEPS[name]
        found[name] = entry
        with attempted(entry), _nothing_compiled_before():
            step = _step_of(how, student, train, size, batch)
            entry.facts |= {"dtype": _dtype(how), "compile": how.mode if how and how.mode else "off"}
            entry.run = _warm(entry, step, batch_size, spec.device)
        tell(f"step, {student}, {name}: {entry.failed or 'warm'}")
    yield found


@contextmanager
def _nothing_compiled_before() -> Iterator[None]:
    """Within it torch.compile finds nothing of earlier runs, so that its seconds are those of a first one."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
            os.environ.update({"TORCHINDUCTOR_CACHE_DIR": before} if before else {})


def _dtype(how: Stepping | None) -> str:
    return str(how.dtype if how else torch.float32).removeprefix("torch.")


def _step_of(how: Stepping | None, student: str, train: DistillSpec, size: int, batch: Batch) -> TrainStep:
    """Number of a step -> its loss. The teacher is never called: its logits are given."""
    assert batch.logits is not None
    device = batch.images.device
    teacher = teacher_for("resnet8", size, len(_CLASSES), device)
    fresh = fresh_student(teacher, train)
    if how is None:
        images = batch.images.contiguous().float() / 255
        turns = torch.from_numpy(batch.views.affine).to(device)
        return partial(PlainStep(fresh, train).run, images, turns, batch.logits)
    fresh.net.to(memory_format=torch.channels_last).requires_grad_(True).train()  # type: ignore[call-overload]
    step = Step(Objective(fresh, teacher, train).to(device), train, Ranks(device=str(device)), how.dtype, how.mode)
    return lambda number: step.run(batch, number)[0]


def _fixed_batch(train: DistillSpec, size: int, batch_size: int, device: torch.device) -> Batch:
    """A batch on the device with logits, its views those of the student's training."""
    rows = np.arange(batch_size)
    images = torch.from_numpy(np.stack([picture(0, i, size) for i in range(batch_size)])).permute(0, 3, 1, 2)
    logits = 3 * torch.randn(batch_size, len(_CLASSES), generator=torch.Generator().manual_seed(0))
    labels = logits.argmax(1).to(device)
    return Batch(
        step=0, images=images.to(device), labels=labels, partner_labels=labels, rows=rows,
        keys=tuple(f"{i:09d}" for i in rows), views=draw_views(ViewSpec.of(train), 0, 0, rows, batch_size),
        logits=logits.to(device),
    )  # fmt: skip


def _warm(entry: Entry, step: TrainStep, batch_size: int, device: torch.device) -> Callable[[], float]:
    """A round of steps; the entry learns the loss after five of them, and what the first one took beyond the others."""
    seconds, loss = [], 0.0
    for number in range(_WARM + 1):
        began = time.perf_counter()
        loss = float(step(number))
        seconds.append(time.perf_counter() - began)
    steady = statistics.median(seconds[2:])
    entry.facts |= {"loss": loss, "loss_after_steps": _WARM}
    entry.facts["compile_seconds"] = round(seconds[0] - steady, 2) if entry.facts["compile"] != "off" else None
    count = max(3, min(300, math.ceil(_LEAST / steady)))

    def run() -> float:
        began = time.perf_counter()
        for _ in range(count):
            step(_WARM + 1)
        _finished(device)
        return count * batch_size / (time.perf_counter() - began)

    return run


def _ends(spec: DistillBench, size: int) -> Iterator[Setting]:
    for pair in PAIRS:
        asked = pair.student in spec.students or (not spec.students and (spec.cuda or not pair.gpu))
        if pair.size == size and asked:
            train = _short(spec, pair, "teacher")
            facts: dict[str, Any] = {
                "teacher": pair.teacher, "student": pair.student, "batch_size": train.batch_size, "steps": train.steps,
                "images": spec.images or _END_IMAGES[size][spec.cuda], "views": train.views,
                "image_format": spec.image_format, "torch_threads": torch.get_num_threads(),
            }  # fmt: skip
            opened = partial(_ended, spec, pair, facts["images"])
            yield Setting(END, pair.name, size, 3, opened, facts, pair.bar, ("stored-labels",))


def _short(spec: DistillBench, pair: Pair, soft_labels: str) -> DistillSpec:
    sized = SIZES[pair.size]
    return training(
        pair.student, steps=spec.steps or _END_STEPS[spec.cuda], views=_VIEWS, soft_labels=soft_labels,
        batch_size=spec.batch_size or (sized.batch[1] if spec.cuda else 128), crop=sized.crop, flip=sized.crop < 1,
    )  # fmt: skip


@contextmanager
def _ended(spec: DistillBench, pair: Pair, images: int, tell: Tell) -> Iterator[dict[str, Entry]]:
    """Short trainings on one set; its labels are made before, once."""
    found: dict[str, Entry] = {}
    with tempfile.TemporaryDirectory() as folder:
        root, teacher = Path(folder) / "set", teacher_for(pair.teacher, pair.size, len(_CLASSES), spec.device)
        source = open_set(write_set(root, images, SIZES[pair.size].stored, spec.image_format, teacher.classes))
        labels = _labels(root, source, teacher, _short(spec, pair, "stored"))
        tell(f"end-to-end, {pair.name}: {labels['labels_seconds']} s for stored labels")
        for name in spec.chosen(END):
            how = ENDS[name]
            entry = found[name] = Entry(facts=dict(labels) if how.soft_labels == "stored" else {})
            options = TrainOptions(device=str(spec.device), cache=how.cache)
            train = _short(spec, pair, how.soft_labels)
            call = partial(distill, source, teacher, train, options=options, labels_root=root)
            entry.run = partial(_trained, entry, call)
        yield found


def _labels(root: Path, source: SetSource, teacher: Teacher, train: DistillSpec) -> dict[str, Any]:
    """Store the teacher's labels of all views: what that takes, once for all students."""
    rows, _ = split(source, train.held_out, teacher.input_size)
    device = str(teacher.get_buffer("mean").device)
    reader: Reader = source.reader(teacher.input_size, ReadOptions(device=device))
    began = time.perf_counter()
    try:
        _, told = store_labels(root, source, reader, teacher, sight_of(train, rows))
    finally:
        reader.close()
    seconds = round(time.perf_counter() - began, 2)
    return {"labels_seconds": seconds, "labels_megabytes": round(told.bytes / 1e6, 3), "labelled": told.labelled}


def _trained(entry: Entry, train: Callable[[], Any]) -> float:
    """Images per second of a training, without its first and last log rows, which hold what is done once."""
    torch.compiler.reset()
    began = time.perf_counter()
    student = train()
    rates = averages(student.log[:-1] or student.log)
    waits = [*entry.facts.get("waits", []), rates["data_wait"]]
    entry.facts |= {
        "seconds": round(time.perf_counter() - began, 2), "agreement": student.agreement,
        "loss": student.log[-1]["loss"], "waits": waits, "data_wait": statistics.median(waits),
    }  # fmt: skip
    return rates["images_per_second"]
