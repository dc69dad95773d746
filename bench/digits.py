"""The main job over several seeds, with student accuracy at smaller sets for the guided run and its control."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from synthkd.bench.record import stamped
from synthkd.dfkd.data import load_test_set
from synthkd.dfkd.evaluate import evaluate
from synthkd.dfkd.presets import Preset
from synthkd.dfkd.progress import Progress
from synthkd.dfkd.run import Run
from synthkd.dfkd.students import StudentJob, train_students
from synthkd.dfkd.teachers import load_teacher

SIZES = (250, 1000)
_LEFT_OUT = ("confusion", "classes", "versions")


def run_seed(preset: Preset, seed: int, out: Path, progress: Progress, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """One row: the fields of result.json, and accuracy at each size up to the full number of images."""
    result = Run(preset, out, seed, progress=progress).execute()
    at: dict[str, dict[str, float]] = {
        "guided": {str(result["num_images"]): result["student_accuracy"]},
        "unguided": {str(result["num_images"]): result["unguided_student_accuracy"]},
    }
    small = [size for size in sizes if size < result["num_images"]]
    for (name, size), accuracy in _at_sizes(preset, seed, out, small).items():
        at[name][str(size)] = accuracy
    row = {k: v for k, v in result.items() if k not in _LEFT_OUT}
    return stamped({**row, "accuracy_at": at})


def _at_sizes(preset: Preset, seed: int, out: Path, sizes: Sequence[int]) -> dict[tuple[str, int], float]:
    """Accuracy of students of the first images of each set: same steps and settings as the full ones."""
    if not sizes or preset.test_set is None:
        return {}
    roots = {"guided": out, "unguided": out / "control"}
    pairs = [(name, size) for size in sizes for name in roots]
    jobs = [
        StudentJob(
            set_dir=roots[name] / "shards",
            out_dir=roots[name] / f"first-{size}",
            teacher=preset.job.teacher,
            spec=replace(preset.distill, seed=seed),
            device=preset.job.device,
            limit=size,
        )
        for name, size in pairs
    ]
    scores = {}
    for pair, card in zip(pairs, train_students(jobs), strict=True):
        net = load_teacher(str(card))
        scores[pair] = round(evaluate(net, load_test_set(preset.test_set, net.classes, net.input_size)).accuracy, 2)
    return scores
