"""Students of finished sets, a folder each: a finished one is kept, a stopped one goes on; a CPU trains two at once."""

import json
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from synthkd.dfkd.apart import student_seen
from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.scores import card_digest
from synthkd.dfkd.sets import open_set
from synthkd.dfkd.spent import SPENT, Spent
from synthkd.dfkd.student import Hooks, distill, save_student
from synthkd.dfkd.teachers import load_teacher
from synthkd.dfkd.training import CHECKPOINT, OtherTrainingError
from synthkd.engine.errors import WorkerLostError
from synthkd.engine.pool import follow_parent
from synthkd.engine.rows import read_index, write_atomically
from synthkd.engine.workers import cores

_STAGE, _LOOK = "distill", 0.2  # seconds between two looks at whether to stop
_asked_to_stop: Callable[[], bool] | None = None  # of a training process


@dataclass(frozen=True, kw_only=True)
class StudentJob:
    """A student to train: from which set (its first `limit` images), under which teacher, into which folder.

    previews: whether it is shown the set's clean-latent previews too.
    """

    set_dir: Path
    out_dir: Path
    teacher: str
    spec: DistillSpec
    device: str
    limit: int | None = None
    allow_code: bool = False
    previews: bool = True

    @property
    def stamp(self) -> str:
        """What the student is a function of, wherever its teacher lies."""
        return self._stamp(card_digest(self.teacher))

    @property
    def stamps(self) -> tuple[str, str]:
        """That, and as it was written when it had the teacher's path as spelled."""
        return self.stamp, self._stamp(self.teacher)

    def _stamp(self, teacher: str) -> str:
        parts = {
            "spec": repr(self.spec),
            "set": _set_digest(self.set_dir),
            "limit": self.limit,
            "teacher": teacher,
        } | ({} if self.previews else {"previews": False})
        return json.dumps(parts, sort_keys=True)

    @property
    def seconds(self) -> float:
        """What its training took so far, over all calls."""
        return self._spent().seconds.get(_STAGE, 0.0)

    def _spent(self) -> Spent:
        return Spent(self.out_dir / SPENT, *self.stamps)


def train_student(job: StudentJob, should_stop: Callable[[], bool] = lambda: False) -> Path:
    """Train and save a student, unless the same one is there; on a CPU with one thread. Returns its card.

    Raises Stopped where that is asked for; the same call goes on from its checkpoint.
    """
    marker, card = job.out_dir / ".student-of", job.out_dir / "student.toml"
    if marker.exists() and marker.read_text() in job.stamps and card.exists():
        return card
    if job.device == "cpu":
        torch.set_num_threads(1)
    teacher = load_teacher(job.teacher, job.device, allow_code=job.allow_code)
    source = open_set(job.set_dir, job.limit, job.previews)
    job.out_dir.mkdir(parents=True, exist_ok=True)
    how: dict[str, Any] = {
        "folder": job.out_dir, "labels_root": job.set_dir, "hooks": Hooks(should_stop=should_stop)
    }  # fmt: skip
    with job._spent()(_STAGE):
        try:
            student = distill(source, teacher, job.spec, **how)
        except OtherTrainingError:  # left by a training that was killed before the run got other settings, or images
            (job.out_dir / CHECKPOINT).unlink()
            student = distill(source, teacher, job.spec, **how)
    about = {"teacher": job.teacher, "images": len(source), **student_seen(job.teacher)}
    save_student(student, job.spec, job.out_dir, about)
    write_atomically(marker, job.stamp)
    (job.out_dir / CHECKPOINT).unlink(missing_ok=True)
    return card


def train_students(
    jobs: Sequence[StudentJob],
    advance: Callable[[int], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Path]:
    """Train students side by side, one core each; on a GPU one after the other. Returns their cards.

    Raises Stopped where that is asked for, WorkerLostError where a process ends without a word.
    """
    if jobs[0].device == "cpu" and cores() > 1:
        try:
            return _side_by_side(jobs, advance, should_stop)
        except BrokenProcessPool as error:
            raise WorkerLostError(
                "a training process ended unasked (out of memory?); run the same command again"
            ) from error
    return [_told(train_student(job, should_stop), advance) for job in jobs]


def _side_by_side(
    jobs: Sequence[StudentJob], advance: Callable[[int], None], should_stop: Callable[[], bool]
) -> list[Path]:
    context = get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(2, context, initializer=_begin, initargs=(stop,)) as pool:
        futures = [pool.submit(_train_until_stopped, job) for job in jobs]
        try:
            left = set(futures)
            while left:
                done, left = wait(left, _LOOK, FIRST_COMPLETED)
                if done:
                    advance(sum(future.exception() is None for future in done))
                if should_stop():
                    stop.set()
        except BaseException:  # an interrupt here: no training without its run
            stop.set()
            raise
        return [future.result() for future in futures]


def _begin(stop: Any) -> None:
    """A training process: its parent is told of signals, and asks for a stop at a safe point."""
    global _asked_to_stop
    follow_parent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    _asked_to_stop = stop.is_set


def _train_until_stopped(job: StudentJob) -> Path:
    return train_student(job, _asked_to_stop or _never)


def _never() -> bool:
    return False


def _told(card: Path, advance: Callable[[int], None]) -> Path:
    advance(1)
    return card


def _set_digest(folder: Path) -> list[str]:
    return [row.sha256 for _, row in sorted(read_index(folder).items())]
