"""One method of one preset in a folder: what it makes, its student, a score. Killed, the same call goes on."""

import json
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from synthkd.dfkd.apart import card_declares, check_pool, pool_declares, student_seen, told
from synthkd.dfkd.choices import teacher_name
from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.evaluate import named, test_scores
from synthkd.dfkd.methods.base import Method, MethodFeed, MethodJob, check_method, load_method
from synthkd.dfkd.nets import count_parameters
from synthkd.dfkd.parallel import Ranks
from synthkd.dfkd.pools import open_images
from synthkd.dfkd.presets import Preset
from synthkd.dfkd.progress import Progress, Silent
from synthkd.dfkd.report import write_report
from synthkd.dfkd.spent import SPENT, Spent
from synthkd.dfkd.student import Student, fresh_student, save_student
from synthkd.dfkd.teachers import Teacher, load_teacher, teacher_digest
from synthkd.dfkd.train_options import TrainOptions
from synthkd.dfkd.training import CHECKPOINT, Stopped, Training
from synthkd.engine.environment import environment, versions
from synthkd.engine.errors import SynthkdError
from synthkd.engine.rows import write_atomically
from synthkd.engine.workers import one_thread

RESULT = "result.json"
# Methods that draw with no prior, and those that take no pool.
_WITHOUT_PRIOR = {"pool", "mosaickd", "fastdfkd", "deepinversion"}
_WITHOUT_POOL = {"diffdfkd", "diffusion", "fastdfkd", "deepinversion"}


@dataclass(kw_only=True)
class MethodRun:
    """method: its name; options: on top of the preset's for it; pool: in place of the preset's; how: execution."""

    preset: Preset
    method: str
    out: Path
    seed: int = 0
    num_images: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    pool: str | None = None
    how: TrainOptions | None = None
    workers: int | None = None
    progress: Progress = field(default_factory=Silent)
    should_stop: Callable[[], bool] = lambda: False

    def execute(self) -> dict[str, Any]:
        """Do what is left to do and return the result, which is in result.json; raises Stopped where that is asked."""
        make = load_method(self.method)
        self.check_apart()
        if self.out.exists() and not self.out.is_dir():
            raise SynthkdError(f"{self.out}: is a file; choose a folder")
        with one_thread(self.preset.job.device):
            asked = self.preset.job
            job = self._job(load_teacher(asked.teacher, asked.device, allow_code=asked.allow_code))
            identity = self._identity(job)
            if (known := _finished(self.out, identity)) is not None:
                return known
            spent = Spent(self.out / SPENT, json.dumps(identity, sort_keys=True))
            student, feed_facts = self._taught(make, job, identity, spent)
            save_student(student, job.spec, self.out, self._about(job))
            result = self._result(job, student, feed_facts, spent) | {"identity": identity}
        write_atomically(self.out / RESULT, json.dumps(result, indent=2) + "\n")
        write_report(self.out)
        (self.out / CHECKPOINT).unlink(missing_ok=True)
        return result

    def identity(self, teacher: Teacher) -> dict[str, Any]:
        """What the student is a function of, for the preset's teacher, loaded; nothing is written.

        Raises SynthkdError for an unknown method, settings that it refuses, a pool that is not there and a student that
        does not fit.
        """
        with torch.random.fork_rng(devices=[]):
            job = self._job(teacher)
            check_method(job)
            return self._identity(job)

    def check_apart(self) -> None:
        """Raise OverlapError where what the method uses, prior or pool, declares that it has seen the teacher's data.

        A method that is not of this package may use both.
        """
        if self.method not in _WITHOUT_PRIOR:
            self.preset.job.check_apart()
        if self.method not in _WITHOUT_POOL:
            check_pool(self.pool or self.preset.pool, self.preset.job.teacher)

    def _declared(self, pool: str | None) -> dict[str, str]:
        """What the teacher and what the method used declare, in words."""
        asked = self.preset.job
        drawn = asked.trained_on() if self.method not in _WITHOUT_PRIOR else told(teacher=card_declares(asked.teacher))
        return drawn | (told(pool=pool_declares(pool)) if pool else {})

    def _about(self, job: MethodJob) -> dict[str, Any]:
        """What the student's card says beside its network."""
        asked, pool = self.preset.job.teacher, job.notes.get("pool")
        shown = {} if pool is None else {"pool": pool}
        return {"teacher": asked, "method": self.method, **shown, **student_seen(asked, pool)}

    def _job(self, teacher: Teacher) -> MethodJob:
        # A method's batches have the teacher beside them: stored labels are of one method's kind of set only.
        spec: DistillSpec = replace(self.preset.distill, seed=self.seed, soft_labels="teacher", views=0)
        return MethodJob(
            preset=self.preset, spec=spec, num_images=self.num_images or self.preset.num_images, folder=self.out,
            teacher=teacher, student=fresh_student(teacher, spec), name=self.method,
            how=self.how or TrainOptions(device=self.preset.job.device),
            options={**self.preset.methods.get(self.method, {}), **self.options},
            pool=self.pool or self.preset.pool, workers=self.workers, progress=self.progress,
            should_stop=self.should_stop,
        )  # fmt: skip

    def _identity(self, job: MethodJob) -> dict[str, Any]:
        """What the student is a function of, as far as it was declared."""
        parts = {
            **asdict(job.spec), "preset": self.preset.name, "method": self.method, "options": dict(job.options),
            "num_images": job.num_images, "pool": open_images(job.pool).digest if job.pool else None,
            "teacher": teacher_digest(job.teacher), "prior": self.preset.job.declared(),
        }  # fmt: skip
        done: dict[str, Any] = json.loads(json.dumps(parts))
        return done

    def _taught(
        self, make: Method, job: MethodJob, identity: dict[str, Any], spent: Spent
    ) -> tuple[Student, dict[str, Any]]:
        with spent("synthesize"):
            feed = make(job)
        self.out.mkdir(parents=True, exist_ok=True)  # now, so that a wrong option leaves nothing behind
        began, done = "distill", 0
        self.progress.begin(began, job.spec.steps, "steps")

        def on_step(step: int) -> None:
            nonlocal done
            self.progress.advance(began, step - done)
            done = step

        try:
            training = Training(
                student=job.student, teacher=job.teacher, feed=feed, held=feed.held,
                wanted=named(job.teacher, feed.held), spec=job.spec, options=job.how,
                ranks=Ranks(device=job.how.device), reading=feed.reading, damaged=feed.damaged, identity=identity,
                folder=self.out, on_step=on_step, should_stop=self.should_stop,
            )  # fmt: skip
            with spent("distill"):
                agreement = training.run()
        finally:
            feed.close()
            self.progress.end(began)
        return Student(job.student, training.log, agreement, dict(feed.damaged)), _facts(feed)

    def _result(
        self, job: MethodJob, student: Student, facts: dict[str, Any], spent: Spent
    ) -> dict[str, Any]:
        scores, pool = dict[str, Any](), job.notes.get("pool")
        if self.preset.test_set is not None:
            for name, net in (("teacher", job.teacher), ("student", student.net)):
                found = test_scores(net, self.preset.test_set)
                scores |= {f"{name}_{score}": value for score, value in found.items()}
        return {
            "preset": self.preset.name,
            "method": self.method,
            "seed": self.seed,
            "teacher": teacher_name(self.preset),
            "student": job.spec.arch,
            "pool": pool,
            "declared": self._declared(pool),
            **scores,
            "agreement": student.agreement,
            **facts,
            "steps": job.spec.steps,
            "batch_size": job.spec.batch_size,
            "seconds": round(sum(spent.seconds.values()), 2),
            "stage_seconds": {name: round(value, 2) for name, value in spent.seconds.items()},
            "cpu_seconds": round(sum(spent.cpu.values()), 2),
            "peak_mb": peak_mb(job.how.device),
            "damaged": len(student.damaged),
            "classes": list(job.teacher.classes),
            "parameters": {
                "teacher": count_parameters(job.teacher.net), "student": count_parameters(student.net.net),
            },
            "test_set": self.preset.test_set or "none",
            "device": environment(torch.device(job.how.device), 0)["device"],
            "versions": versions(),
        }


def _facts(feed: MethodFeed) -> dict[str, Any]:
    """How many images there were to learn from."""
    return {"num_images": feed.made, "reader": feed.reading.get("reader", "none")}


def _finished(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The result of this very run, if it is there."""
    try:
        found = json.loads((folder / RESULT).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    there = isinstance(found, dict) and found.get("identity") == identity and (folder / "student.toml").exists()
    return found if there else None


def peak_mb(device: str) -> float:
    """Most memory that was in use at once, MB: of the GPU, else of this process or of the largest of its workers."""
    if device.startswith("cuda"):
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(most * unit / 1e6, 1)


__all__ = ["RESULT", "MethodRun", "Stopped", "peak_mb"]
