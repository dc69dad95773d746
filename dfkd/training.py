"""The training loop: batches in, a student out; killed anywhere, the same command ends in the same student."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from synthkd.dfkd.distill_spec import DistillSpec, learning_rate
from synthkd.dfkd.evaluate import named
from synthkd.dfkd.feed import Feed, Source
from synthkd.dfkd.objective import Objective
from synthkd.dfkd.parallel import Ranks
from synthkd.dfkd.sight import Sight
from synthkd.dfkd.step import Step
from synthkd.dfkd.teachers import Teacher, teacher_digest
from synthkd.dfkd.tensor_files import read_tensors, write_tensors
from synthkd.dfkd.train_options import TrainOptions
from synthkd.dfkd.views import ViewSpec
from synthkd.engine.errors import SynthkdError

CHECKPOINT = "checkpoint.safetensors"
LogRow = dict[str, float | None]
_log = logging.getLogger("synthkd")


class Stopped(Exception):  # noqa: N818 - not an error: the same command goes on later
    """The training was asked to stop; its checkpoint is written where it has a folder."""


class OtherTrainingError(SynthkdError):
    """A folder's checkpoint is of another training."""


@dataclass(kw_only=True)
class Training:
    """One training: what goes in, where its checkpoints go, and who is told.

    reading: which reader and decoder the feed has; damaged: what it could not read, by key, filled as it goes.
    feed: the batches; held: uint8 [M,3,h,w], images for the agreement, with the teacher's classes `wanted`, as `named`
    gives them, of dense networks for every pixel;
    identity: what the student is a function of; folder: None keeps no checkpoint. on_step is told the number of
    finished steps, on_row the log's rows: loss, learning rate, agreement, images per second, percent of time waited.
    """

    student: Teacher
    teacher: Teacher
    feed: Feed
    held: Tensor
    wanted: Tensor
    spec: DistillSpec
    options: TrainOptions
    ranks: Ranks
    reading: Mapping[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    on_step: Callable[[int], None] = lambda _: None
    on_row: Callable[[LogRow], None] = lambda _: None
    should_stop: Callable[[], bool] = lambda: False
    log: list[LogRow] = field(default_factory=list)
    best: tuple[float, dict[str, Tensor]] = (-1.0, {})

    def run(self) -> float:
        """Train; the student then holds the chosen weights. Returns its agreement on held-out images, in percent.

        Raises SynthkdError for a loss that is not finite, and Stopped.
        """
        self._judge = deepcopy(self.student)  # only looked through, so that training's graphs stay as they are
        net = self.student.net.to(memory_format=torch.channels_last).requires_grad_(True).train()  # type: ignore[call-overload]
        objective = Objective(self.student, self.teacher, self.spec).to(self.ranks.device)
        self._mode = self.options.compile_mode(self._operations(), self.spec.steps)
        self._step = Step(objective, self.spec, self.ranks, self.options.dtype, self._mode)
        self._total, self._counted = torch.zeros((), device=self.ranks.device), 0
        start = self._resume()
        if self.ranks.any(start != int(self.ranks.of_first({"": torch.tensor(start)})[""])):
            raise SynthkdError(f"{self.folder}: processes see different checkpoints; put --out on a shared folder")
        with objective.attached():
            self._loop(start)
        best = self.spec.select == "best"
        chosen = self.best[1] if best else self._step.weights()
        net.load_state_dict(self.ranks.of_first({name: value.clone() for name, value in chosen.items()}))
        net.eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
        agreement = self.best[0] if best else float(self.log[-1]["agreement"] or 0.0)
        return float(self.ranks.of_first({"": torch.tensor(agreement, dtype=torch.float64)})[""])

    def _operations(self) -> float:
        """Floating point operations of the whole training on this process; a backward pass counts as two forward."""
        one = torch.zeros(1, 3, *self.student.input_size, device=self.student.get_buffer("mean").device)
        with FlopCounterMode(display=False) as count, torch.no_grad():
            self._judge(one)
        return 3.0 * count.get_total_flops() * self.spec.steps * self.spec.batch_size / self.ranks.world

    def _loop(self, start: int) -> None:
        spec = self.spec
        every, judged = rhythm(spec.steps)
        clock, saved = _Clock(self.feed, self._counted), time.monotonic()
        with closing(self.feed.batches(start, spec.steps)) as batches:
            for step, batch in enumerate(batches, start):
                loss, *said = self._step.run(batch, step)
                self.feed.learned(batch, *said)
                self._total += loss
                self._counted, done, last = self._counted + 1, step + 1, step + 1 == spec.steps
                if done % every == 0 or last:
                    agreement = self._agreement() if last or done % judged == 0 else None
                    self._note(done, agreement, clock)
                self.on_step(done)
                if last:  # a feed may have something left to do, such as a set to write, and be stopped there
                    self._save(done)
                if self._to_stop(self._counted == 0) and not last:
                    self._save(done)
                    raise Stopped
                due = time.monotonic() - saved >= self.options.checkpoint_seconds
                if due and not last and (self._counted == 0 or self.ranks.world == 1):
                    self._save(done)
                    saved = time.monotonic()

    def _to_stop(self, together: bool) -> bool:
        """Whether to stop now; several processes ask each other only where `together`, at a log row."""
        return self.ranks.any(self.should_stop()) if together or self.ranks.world == 1 else False

    def _note(self, done: int, agreement: float | None, clock: "_Clock") -> None:
        """A log row: the mean loss since the last one, and what was measured."""
        value, rates = self.ranks.mean(self._total / self._counted).item(), clock.read(self._counted)
        self._total, self._counted = torch.zeros_like(self._total), 0
        if not math.isfinite(value):
            raise SynthkdError(f"distill: the loss is {value} at step {done}; lower learning_rate")
        rate = round(learning_rate(self.spec, done - 1), 8)
        rates["images_per_second"] = round(rates["images_per_second"] * self.spec.batch_size, 1)
        row: LogRow = {"step": done, "loss": round(value, 6), "lr": rate, "agreement": agreement, **rates}
        row |= {name: round(term, 6) for name, term in self.feed.terms().items()}
        self.log.append(row)
        self.on_row(row)
        if agreement is not None and agreement >= self.best[0]:  # the later of equals has seen more
            weights = {n: v.detach().to("cpu", copy=True).contiguous() for n, v in self._step.weights().items()}
            self.best = agreement, weights

    def _agreement(self) -> float:
        """Percent of held-out images, or of their pixels, for which teacher and student name one class."""
        self._judge.net.load_state_dict(self._step.weights())
        self._judge.net.eval()
        same = (named(self._judge, self.held) == self.wanted).double().mean().item()
        return round(100 * same, 3)

    def _save(self, done: int) -> None:
        """A checkpoint after `done` steps."""
        if self.folder is None or not self.ranks.first:
            return
        best = {f"best.{name}": value for name, value in self.best[1].items()} | {"total": self._total}
        note = {
            "step": done, "counted": self._counted, "log": self.log, "best": self.best[0], "identity": self.identity,
            "how": self._how(), "damaged": dict(self.damaged),
        }  # fmt: skip
        found = {f"feed.{name}": value for name, value in self.feed.state().items()}
        write_tensors(self.folder / CHECKPOINT, {**_prefixed(self._step.state()), **best, **found}, note)

    def _how(self) -> dict[str, Any]:
        """What decides last bits beside the identity."""
        device = torch.device(self.ranks.device).type
        return {
            **self.reading,
            "precision": str(self.options.dtype),
            "threads": torch.get_num_threads() if device == "cpu" else 0,
            "compile": self._mode,
            "processes": self.ranks.world,
            "device": device,
        }

    def _say_what_changed(self, there: Any) -> None:
        """One warning where a training goes on in another way than it began: its student is then not bit-equal."""
        here, there = self._how(), there if isinstance(there, dict) else {}
        told = [f"{name} was {there.get(name)}, is {here[name]}" for name in here if there.get(name) != here[name]]
        if told and self.ranks.first:
            _log.warning("the training goes on otherwise than it began (%s): last bits will differ", "; ".join(told))

    def _resume(self) -> int:
        """The step to go on from: a checkpoint's, or 0. Raises SynthkdError for one of another training."""
        path = self.folder / CHECKPOINT if self.folder else None
        if path is None or not path.exists():
            return 0
        tensors, note = read_tensors(path)
        _refuse_other(path, note.get("identity"), self.identity)
        self._say_what_changed(note.get("how"))
        try:
            state = {n.removeprefix("step."): v for n, v in tensors.items() if n.startswith("step.")}
            best = {n.removeprefix("best."): v for n, v in tensors.items() if n.startswith("best.")}
            self._step.load(state)
            self.feed.load({n.removeprefix("feed."): v for n, v in tensors.items() if n.startswith("feed.")})
            self.log, self.best = list(note["log"]), (float(note["best"]), best)
            step, self._counted = int(note["step"]), int(note["counted"])
            self.damaged.update({str(key): str(reason) for key, reason in note["damaged"].items()})
            self._total = tensors["total"].to(self.ranks.device)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:120]
            raise SynthkdError(f"{path}: not a checkpoint of this student ({reason}); delete it") from error
        if not 0 <= step <= self.spec.steps:
            raise SynthkdError(f"{path}: is of step {step}; expected {self.spec.steps} at most; delete it")
        for row in self.log:
            self.on_row(row)
        self.on_step(step)
        return step


def rhythm(steps: int) -> tuple[int, int]:
    """Steps between log rows, and between looks at the held-out images, which are some of these rows."""
    every = max(25, steps // 1000)
    return every, every * max(1, round(max(100, steps // 50) / every))


class _Clock:
    """Steps per second, for images to be counted in, and percent of time waited since the last reading."""

    def __init__(self, feed: Feed, before: int) -> None:
        """before: steps of the first reading that an earlier run took."""
        self._feed, self._at, self._waited, self._before = feed, time.perf_counter(), feed.waited, before

    def read(self, steps: int) -> dict[str, float]:
        now, waited = time.perf_counter(), self._feed.waited
        spent = max(now - self._at, 1e-9)
        out = {"images_per_second": (steps - self._before) / spent}
        out["data_wait"] = round(100 * min(1.0, (waited - self._waited) / spent), 2)
        self._at, self._waited, self._before = now, waited, 0
        return out


def reader_of(folder: Path) -> str | None:
    """The reader that a folder's checkpoint was trained with; None where there is none, or it does not say."""
    path = folder / CHECKPOINT
    try:
        found = read_tensors(path)[1]["how"]["reader"] if path.exists() else None
    except (SynthkdError, KeyError, TypeError):  # what is wrong with it is said when it is loaded
        return None
    return found if found in ("torch", "dali") else None


def sight_of(spec: DistillSpec, rows: int) -> Sight:
    """What the images of a training look like, epoch by epoch."""
    return Sight(ViewSpec.of(spec), spec.seed, spec.views, rows)


def _prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"step.{name}": value for name, value in state.items()}


def _refuse_other(path: Path, there: Any, here: dict[str, Any]) -> None:
    """Raise OtherTrainingError, naming the first difference, for a checkpoint of another training."""
    there, here = there if isinstance(there, dict) else {}, json.loads(json.dumps(here))
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            found, wanted = str(there.get(name))[:60], str(here.get(name))[:60]
            raise OtherTrainingError(
                f"{path}: is of another training ({name} is {found} there, {wanted} here); choose another --out, or "
                "delete it"
            )


def identity_of(spec: DistillSpec, source: Source, teacher: Teacher) -> dict[str, Any]:
    """What a student is a function of, as plain values."""
    return {**asdict(spec), "set": source.digest, "teacher": teacher_digest(teacher)}
