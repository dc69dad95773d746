"""What a set is worth: a student of it, what an independent judge and the teacher read in it, how varied it is."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor

from synthkd.bench.engine_cases import Entrant
from synthkd.dfkd.data import LabelledImages, load_test_set
from synthkd.dfkd.evaluate import evaluate, predict
from synthkd.dfkd.metrics import set_features
from synthkd.dfkd.run import reading
from synthkd.dfkd.student import DistillSpec, distill
from synthkd.dfkd.teachers import load_teacher
from synthkd.engine import Plan, Request
from synthkd.engine.pool import follow_parent
from synthkd.engine.workers import cores

FIELDS = (
    "student_accuracy",
    "short_student_accuracy",
    "judge_agreement",
    "teacher_agreement",
    "class_balance",
    "intra_class_feature_distance",
)
# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom; beyond, the last one is on the safe side.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class QualityJob:
    """A set to draw with a seed, and to score."""

    entrant: Entrant
    seed: int
    num_images: int


def unknown() -> dict[str, Any]:
    """The columns of a row where there is nothing to score with."""
    return dict.fromkeys(FIELDS)


def drawn_set(job: QualityJob) -> LabelledImages:
    """The images of a set, in memory."""
    drawer, recipe = job.entrant.build(), job.entrant.preset.job.recipe
    plan = Plan(recipe, Request(num_samples=job.num_images, seed=job.seed))
    batches = [drawer.run(unit, job.seed) for unit in plan.units()]
    shown = [(b.images, *(p.images for p in b.previews)) for b in batches]
    images = torch.cat([torch.stack(each, 1).flatten(0, 1).cpu() for each in shown])  # a sample, then its previews
    each = 1 + len(recipe.previews)
    labels = torch.cat([b.labels.cpu() for b in batches]).repeat_interleave(each)
    marks = (torch.arange(len(images)) % each > 0) if each > 1 else None
    return LabelledImages(images, labels, recipe.classes, marks)


def finished(data: LabelledImages) -> LabelledImages:
    """Without previews, for whoever reads or counts."""
    if data.previews is None:
        return data
    keep = ~data.previews
    return LabelledImages(data.images[keep], data.labels[keep], data.classes)


def score(job: QualityJob) -> dict[str, Any]:
    """Draw, distil and score; the same call gives the same row. On a CPU with one thread."""
    preset = job.entrant.preset
    if preset.job.device == "cpu":
        torch.set_num_threads(1)
    teacher, everything = load_teacher(preset.job.teacher, preset.job.device), drawn_set(job)
    data = finished(everything)
    found = unknown() | {"teacher_agreement": reading(teacher, data)}
    if preset.judge:
        judge = load_teacher(preset.judge, preset.job.device)
        found["judge_agreement"] = reading(judge, data)
        found["class_balance"] = class_balance(predict(judge, data.images).argmax(dim=1), len(data.classes))
        found["intra_class_feature_distance"] = spread(set_features(judge, data.images), data.labels)
    if preset.test_set:
        test = load_test_set(preset.test_set, teacher.classes, teacher.input_size)
        for name, spec in (("student", preset.distill), ("short_student", short(preset.distill))):
            spec = replace(spec, seed=job.seed, soft_labels="teacher")  # the same views, of images in memory
            student = distill(everything, teacher, spec).net
            found[f"{name}_accuracy"] = round(evaluate(student, test).accuracy, 2)
    return found


def short(spec: DistillSpec) -> DistillSpec:
    """A fifth of the steps: far from the ceiling, where sets can differ."""
    return replace(spec, steps=max(1, spec.steps // 5))


def class_balance(read: Tensor, classes: int) -> float:
    """Entropy of the shares of classes read, int64 [N], over that of equal shares: 1 balanced, 0 all of one class."""
    share = torch.bincount(read, minlength=classes).double() / len(read)
    return round(-float(torch.special.xlogy(share, share).sum()) / math.log(classes), 4)


def spread(features: Tensor, labels: Tensor) -> float:
    """Mean Euclidean distance of features [N,D] to the mean of their class, labels int64 [N]."""
    means = torch.stack([features[labels == c].mean(dim=0) for c in range(int(labels.max()) + 1)])
    return round(float((features - means[labels]).norm(dim=1).mean()), 4)


def score_all(jobs: Mapping[Any, QualityJob], workers: int | None = None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(key, score) of each job as it ends, or (key, {"failed": why}); on a CPU in processes, a thread each."""
    if not jobs:
        return
    if next(iter(jobs.values())).entrant.preset.job.device != "cpu":
        yield from ((key, _tried(lambda job=job: score(job))) for key, job in jobs.items())  # type: ignore[misc]
        return
    with ProcessPoolExecutor(workers or min(2, cores()), get_context("spawn"), initializer=follow_parent) as pool:
        waiting: dict[Future[dict[str, Any]], Any] = {pool.submit(score, job): key for key, job in jobs.items()}
        for future in as_completed(waiting):
            yield waiting[future], _tried(future.result)


def _tried(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return call()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


class Difference(NamedTuple):
    """Of paired values: the mean difference and the lower end of its two-sided 95 % t interval (None of one pair)."""

    mean: float
    lower: float | None
    pairs: int


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """ours - theirs, pair by pair (Student 1908)."""
    deltas = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, n = statistics.fmean(deltas), len(deltas)
    if n < 2:
        return Difference(round(mean, 4), None, n)
    reach = _T95[min(n - 1, len(_T95)) - 1] * statistics.stdev(deltas) / math.sqrt(n)
    return Difference(round(mean, 4), round(mean - reach, 4), n)


def accuracies(rows: Iterable[Mapping[str, Any]], variant: str) -> dict[int, float]:
    """Student accuracy by seed of one variant's rows that have one."""
    return {r["seed"]: r["student_accuracy"] for r in rows if r["variant"] == variant and r.get("student_accuracy")}
