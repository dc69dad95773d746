"""The main job: a preset goes in; sets, students, scores and a report come out. Finished stages are kept."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from synthkd.dfkd.apart import check_pool, student_seen
from synthkd.dfkd.data import LabelledImages, load_synthetic, load_test_set
from synthkd.dfkd.evaluate import Score, evaluate, predict
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.metrics import NEAR_COPY, near_duplicates, set_distances, set_features
from synthkd.dfkd.nets import count_parameters
from synthkd.dfkd.presets import Preset, unguided
from synthkd.dfkd.progress import Progress, Silent
from synthkd.dfkd.report import write_report
from synthkd.dfkd.rounds import DrawOptions, draw_set
from synthkd.dfkd.sets import open_set
from synthkd.dfkd.student import DistillSpec, distill, save_student
from synthkd.dfkd.teachers import Teacher, load_teacher
from synthkd.dfkd.training import CHECKPOINT, OtherTrainingError
from synthkd.engine import Request
from synthkd.engine.environment import environment, versions
from synthkd.engine.errors import WorkerLostError
from synthkd.engine.index import MANIFEST
from synthkd.engine.pool import follow_parent
from synthkd.engine.rows import all_group_rows, read_index, write_atomically
from synthkd.engine.workers import cores, default_workers

_FIELD = {
    "teacher": "teacher_accuracy",
    "student": "student_accuracy",
    "unguided": "unguided_student_accuracy",
}


class Interrupted(Exception):  # noqa: N818 - not an error: the same command goes on later
    """The run was asked to stop and did, after a whole group."""


@dataclass
class Run:
    """One run of a preset in a folder: `shards/` guided, `control/` the same with guidance scale 0."""

    preset: Preset
    out: Path
    seed: int = 0
    num_images: int | None = None
    workers: int | None = None
    progress: Progress = field(default_factory=Silent)
    should_stop: Callable[[], bool] = lambda: False
    deadline: float | None = None
    _seconds: dict[str, float] = field(default_factory=dict)
    _drawn: dict[str, int] = field(default_factory=dict)

    def execute(self) -> dict[str, Any]:
        """Do what is left to do, write result.json and report.html, return the result."""
        started, job = time.perf_counter(), self.preset.job
        job.check()
        check_pool(self.preset.pool, job.teacher)
        count = self.num_images or self.preset.num_images
        resumed = (self.out / "shards" / MANIFEST).exists()
        with self._stage("evaluate_teacher"):
            teacher = load_teacher(job.teacher, job.device, allow_code=job.allow_code)
            test = self._test_set(teacher)
            scores = {"teacher": evaluate(teacher, test)} if test else {}
        for name, this in (("synthesize", job), ("synthesize_unguided", unguided(job))):
            with self._stage(name):
                self._synthesize(name, this, count)
        with self._stage("distill"):
            cards = self._distill(count)
        scores |= {name: evaluate(load_teacher(str(c)), test) for name, c in cards.items()} if test else {}
        result = self._result(teacher, scores, count, cards)
        result["resumed"] = resumed
        result["seconds"] = round(time.perf_counter() - started, 2)
        result["stage_seconds"] = {k: round(v, 2) for k, v in self._seconds.items()}
        write_atomically(self.out / "result.json", json.dumps(result, indent=2) + "\n")
        write_report(self.out)
        return result

    def folder(self, name: str) -> Path:
        """Folder of the guided run, or of its control."""
        return self.out / "control" if "unguided" in name else self.out

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - started

    def _test_set(self, teacher: Teacher) -> LabelledImages | None:
        if self.preset.test_set is None:
            return None
        return load_test_set(self.preset.test_set, teacher.classes, teacher.input_size)

    def _synthesize(self, name: str, job: SynthJob, count: int) -> None:
        folder = self.folder(name) / "shards"
        summary = draw_set(
            job, Request(num_samples=count, seed=self.seed), folder, name, self.workers, self.progress,
            self.should_stop, DrawOptions(deadline=self.deadline),
        )  # fmt: skip
        if summary.stopped or self.should_stop():
            raise Interrupted
        self._drawn[name] = summary.drawn

    def _rate(self, name: str) -> float:
        """Images per second of a stage by the clock, writing and start included; from stage times if it drew less."""
        folder, drawn = self.folder(name) / "shards", self._drawn[name]
        if drawn >= (self.num_images or self.preset.num_images):
            return round(drawn / self._seconds[name], 3)
        return images_per_second(folder, self.workers_used)

    def _distill(self, count: int) -> dict[str, Path]:
        """Train both students; a finished one is not trained again."""
        folders = {"student": self.out, "unguided": self.out / "control"}
        spec = replace(self.preset.distill, seed=self.seed)
        job = self.preset.job
        jobs = [
            StudentJob(
                set_dir=f / "shards",
                out_dir=f,
                teacher=job.teacher,
                spec=spec,
                device=job.device,
                limit=count,
                allow_code=job.allow_code,
            )
            for f in folders.values()
        ]
        self.progress.begin("distill", len(jobs), "students")
        cards = train_students(jobs, lambda n: self.progress.advance("distill", n))
        self.progress.end("distill")
        return dict(zip(folders, cards, strict=True))

    def _result(
        self, teacher: Teacher, scores: Mapping[str, Score], count: int, cards: Mapping[str, Path]
    ) -> dict[str, Any]:
        sets = {"guided": self.out / "shards", "unguided": self.out / "control" / "shards"}
        images = {name: load_synthetic(f, count, teacher.input_size, previews=False) for name, f in sets.items()}
        judge = load_teacher(self.preset.judge, self.preset.job.device) if self.preset.judge else None
        real = self._test_set(teacher)
        return {
            "preset": self.preset.name,
            "seed": self.seed,
            **{_FIELD[name]: round(score.accuracy, 2) for name, score in scores.items()},
            "num_images": count,
            "images_per_second": self._rate("synthesize_unguided"),
            "guided_images_per_second": self._rate("synthesize"),
            "seconds": 0.0,
            "teacher_agreement": {name: reading(teacher, data) for name, data in images.items()},
            "judge": {name: reading(judge, data) for name, data in images.items()} if judge else {},
            "feature_distance": {"network": "judge" if judge else "teacher"}
            | feature_distance(judge or teacher, {**images, "real": real} if real else images),
            "near_duplicates": repeats(images),
            "classes": list(teacher.classes),
            "parameters": {
                "teacher": count_parameters(teacher.net),
                "student": count_parameters(load_teacher(str(cards["student"])).net),
            },
            "confusion": {name: score.confusion for name, score in scores.items()},
            "test_set": self.preset.test_set or "none",
            "declared": self.preset.job.trained_on(),
            "device": environment(torch.device(self.preset.job.device), 0)["device"],
            "workers": self.workers_used,
            "versions": versions(),
        }

    @property
    def workers_used(self) -> int:
        """Processes that draw."""
        return self.workers or default_workers(self.preset.job.device)


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
        """What the student is a function of."""
        parts = {
            "spec": repr(self.spec),
            "set": _set_digest(self.set_dir),
            "limit": self.limit,
            "teacher": self.teacher,
        } | ({} if self.previews else {"previews": False})
        return json.dumps(parts, sort_keys=True)


def train_student(job: StudentJob) -> Path:
    """Train and save a student, unless the same one is there; on a CPU with one thread. Returns its card."""
    marker, card = job.out_dir / ".student-of", job.out_dir / "student.toml"
    if marker.exists() and marker.read_text() == job.stamp and card.exists():
        return card
    if job.device == "cpu":
        torch.set_num_threads(1)
    teacher = load_teacher(job.teacher, job.device, allow_code=job.allow_code)
    source = open_set(job.set_dir, job.limit, job.previews)
    job.out_dir.mkdir(parents=True, exist_ok=True)
    where: dict[str, Any] = {"folder": job.out_dir, "labels_root": job.set_dir}
    try:
        student = distill(source, teacher, job.spec, **where)
    except OtherTrainingError:  # left by a training that was killed before the run got other settings, or more images
        (job.out_dir / CHECKPOINT).unlink()
        student = distill(source, teacher, job.spec, **where)
    about = {"teacher": job.teacher, "images": len(source), **student_seen(job.teacher)}
    save_student(student, job.spec, job.out_dir, about)
    write_atomically(marker, job.stamp)
    (job.out_dir / CHECKPOINT).unlink(missing_ok=True)
    return card


def train_students(jobs: Sequence[StudentJob], advance: Callable[[int], None] = lambda _: None) -> list[Path]:
    """Train students side by side, one core each; on a GPU one after the other. Returns their cards."""
    if jobs[0].device == "cpu" and cores() > 1:
        try:
            with ProcessPoolExecutor(2, get_context("spawn"), initializer=follow_parent) as pool:
                return [_told(card, advance) for card in pool.map(train_student, jobs)]
        except BrokenProcessPool as error:
            raise WorkerLostError(
                "a training process ended unasked (out of memory?); run the same command again"
            ) from error
    return [_told(train_student(job), advance) for job in jobs]


def _told(card: Path, advance: Callable[[int], None]) -> Path:
    advance(1)
    return card


def _set_digest(folder: Path) -> list[str]:
    return [row.sha256 for _, row in sorted(read_index(folder).items())]


def reading(net: Teacher, data: LabelledImages) -> float:
    """Percent of images that a network reads as their label says."""
    return round(100 * (predict(net, data.images).argmax(dim=1) == data.labels).float().mean().item(), 2)


def feature_distance(net: Teacher, sets: Mapping[str, LabelledImages]) -> dict[str, Any]:
    """Distances between the sets in a network's features; empty for a network without a linear layer."""
    if not any(isinstance(layer, nn.Linear) for layer in net.modules()):
        return {}
    return set_distances({name: set_features(net, data.images) for name, data in sets.items()})


def repeats(sets: Mapping[str, LabelledImages]) -> dict[str, Any]:
    """Images of each set that repeat an earlier one: how many, and example pairs [earlier id, later id, likeness]."""
    found = {name: near_duplicates(data.images) for name, data in sets.items()}
    examples = {name: [[c.earlier, c.later, round(c.likeness, 4)] for c in f.examples] for name, f in found.items()}
    return {name: f.count for name, f in found.items()} | {"threshold": NEAR_COPY, "examples": examples}


def images_per_second(folder: Path, workers: int) -> float:
    """Rate of a finished set from the time its groups took, scaled to `workers` processes; drawing alone.

    Compiling is left out: it is done once, whatever the size of the set.
    """
    groups = list(all_group_rows(folder))
    spent = sum(t for g in groups for stage, t in g.seconds.items() if stage != "compile")
    return round(sum(g.kept for g in groups) * workers / spent, 3) if spent else 0.0
