"""The main job: a preset goes in; sets, students, scores and a report come out. Finished stages are kept."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from synthkd.dfkd.apart import check_pool
from synthkd.dfkd.choices import takes_pool, teacher_name
from synthkd.dfkd.controls import Controls, arm_spec
from synthkd.dfkd.data import LabelledImages, load_synthetic, load_test_set
from synthkd.dfkd.evaluate import Score, evaluate, predict
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.metrics import NEAR_COPY, near_duplicates, set_distances, set_features
from synthkd.dfkd.nets import count_parameters
from synthkd.dfkd.presets import Preset, unguided
from synthkd.dfkd.progress import Progress, Silent
from synthkd.dfkd.report import write_report
from synthkd.dfkd.rounds import DrawOptions, draw_set
from synthkd.dfkd.scores import kept_score
from synthkd.dfkd.spent import Spent, cpu_seconds
from synthkd.dfkd.student import fresh_student
from synthkd.dfkd.students import StudentJob, train_students
from synthkd.dfkd.teachers import Teacher, load_teacher
from synthkd.dfkd.training import Stopped
from synthkd.engine import Request
from synthkd.engine.environment import environment, versions
from synthkd.engine.index import MANIFEST
from synthkd.engine.rows import all_group_rows, write_atomically
from synthkd.engine.workers import default_workers

STAGES, TEACHER_SCORE = "stages.json", "teacher_score.json"
_FIELD = {
    "teacher": "teacher_accuracy",
    "student": "student_accuracy",
    "unguided": "unguided_student_accuracy",
}


class Interrupted(Stopped):
    """The run was asked to stop and did, after a whole group or step; the same command goes on later."""


@dataclass
class Run:
    """One run of a preset in a folder: `shards/` guided, `control/` the same with guidance scale 0.

    `controls/NAME/` has each method that the preset's `controls` name, at the same budget.
    """

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
        """Do what is left to do, write result.json and report.html, return the result.

        Raises SynthkdError before anything is drawn where teacher, student and controls do not fit; Interrupted where
        it was asked to stop.
        """
        started, count = time.perf_counter(), self.num_images or self.preset.num_images
        resumed = (self.out / "shards" / MANIFEST).exists()
        teacher, controls = self._checked()
        with self._stage("evaluate_teacher"):
            test = self._test_set(teacher)
            scores = {"teacher": self._teacher_score(teacher, test)} if test else {}
        for name, this in (("synthesize", self.preset.job), ("synthesize_unguided", unguided(self.preset.job))):
            with self._stage(name):
                self._synthesize(name, this, count)
        with self._stage("distill"):
            cards = self._distill(count)
        with self._stopping():
            compared = controls.execute()
        self._unless_asked()
        scores |= {name: evaluate(load_teacher(str(c)), test) for name, c in cards.items()} if test else {}
        self._unless_asked()
        result = self._result(teacher, scores, count, cards) | self._arms(compared, count)
        return self._told(result | {"resumed": resumed}, started)

    def _checked(self) -> tuple[Teacher, Controls]:
        """The teacher and the controls; raises SynthkdError where they, the student and the pool do not fit."""
        job = self.preset.job
        job.check()
        if takes_pool(self.preset):
            check_pool(self.preset.pool, job.teacher)
        teacher = load_teacher(job.teacher, job.device, allow_code=job.allow_code)
        with torch.random.fork_rng(devices=[]):
            fresh_student(teacher, self.preset.distill)
        controls = Controls(self.preset, self.out, self.seed, self.num_images, self.progress, self.should_stop)
        controls.check(teacher)
        return teacher, controls

    def _told(self, result: dict[str, Any], started: float) -> dict[str, Any]:
        """The result with its seconds, as result.json and report.html say it too."""
        result["seconds"] = round(time.perf_counter() - started, 2)
        result["stage_seconds"] = {k: round(v, 2) for k, v in self._seconds.items()}
        write_atomically(self.out / "result.json", json.dumps(result, indent=2) + "\n")
        write_report(self.out)
        return result

    def _teacher_score(self, teacher: Teacher, test: LabelledImages) -> Score:
        """Taken once, however many parts the run has."""
        return kept_score(self.out / TEACHER_SCORE, self.preset.job.teacher, teacher, test)

    def _unless_asked(self) -> None:
        if self.should_stop():
            raise Interrupted

    def folder(self, name: str) -> Path:
        """Folder of the guided run, or of its control."""
        return self.out / "control" if "unguided" in name else self.out

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[name] = time.perf_counter() - started

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        try:
            yield
        except Stopped as stop:
            raise Interrupted from stop

    def _test_set(self, teacher: Teacher) -> LabelledImages | None:
        if self.preset.test_set is None:
            return None
        return load_test_set(self.preset.test_set, teacher.classes, teacher.input_size)

    def _synthesize(self, name: str, job: SynthJob, count: int) -> None:
        folder, spent, started = self.folder(name) / "shards", self._spent(), (time.perf_counter(), cpu_seconds())
        summary = draw_set(
            job, Request(num_samples=count, seed=self.seed), folder, name, self.workers, self.progress,
            self.should_stop, DrawOptions(deadline=self.deadline),
        )  # fmt: skip
        if summary.drawn:
            spent.add(name, time.perf_counter() - started[0], cpu_seconds() - started[1])
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
        jobs = self._students(count)
        self.progress.begin("distill", len(jobs), "students")
        with self._stopping():
            cards = train_students(
                list(jobs.values()), lambda n: self.progress.advance("distill", n), self.should_stop
            )
        self.progress.end("distill")
        return dict(zip(jobs, cards, strict=True))

    def _students(self, count: int) -> dict[str, StudentJob]:
        """The guided student and that of the control."""
        job, spec = self.preset.job, replace(arm_spec(self.preset), seed=self.seed)
        return {
            name: StudentJob(
                set_dir=folder / "shards", out_dir=folder, teacher=job.teacher, spec=spec, device=job.device,
                limit=count, allow_code=job.allow_code,
            )
            for name, folder in (("student", self.out), ("unguided", self.out / "control"))
        }  # fmt: skip

    def _spent(self) -> Spent:
        """Seconds of the drawing over all calls, however many images were asked for."""
        return Spent(self.out / STAGES, json.dumps({"job": self.preset.job.declared(), "seed": self.seed}))

    def _arms(self, controls: Mapping[str, Any], count: int) -> dict[str, Any]:
        """What a result says more where a preset has teachers by name or controls.

        arm_seconds: drawing and training of guided and unguided, over all calls, but for those that were killed.
        """
        if not controls and not self.preset.teachers:
            return {}
        spec, drawn, jobs = self.preset.distill, self._spent().seconds, self._students(count)
        stages = {"guided": ("synthesize", "student"), "unguided": ("synthesize_unguided", "unguided")}
        return {
            "teacher": teacher_name(self.preset),
            "student": spec.arch,
            "steps": spec.steps,
            "batch_size": spec.batch_size,
            "arm_seconds": {n: round(drawn.get(a, 0.0) + jobs[b].seconds, 2) for n, (a, b) in stages.items()},
            "controls": dict(controls),
        }

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
