"""Is the patch term worth its place in the guidance? The same set with and without it, seed by seed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from synthkd.bench.record import stamped
from synthkd.dfkd.data import load_synthetic, load_test_set
from synthkd.dfkd.evaluate import evaluate
from synthkd.dfkd.fit_patches import PatchSpec, fit_patches
from synthkd.dfkd.patches import save_patches
from synthkd.dfkd.presets import Preset
from synthkd.dfkd.progress import Progress
from synthkd.dfkd.rounds import draw_set
from synthkd.dfkd.run import reading
from synthkd.dfkd.students import StudentJob, train_students
from synthkd.dfkd.teachers import load_teacher
from synthkd.engine import Request


def fitted(preset: Preset, out: Path, progress: Progress, spec: PatchSpec | None = None) -> dict[str, float]:
    """Fit the discriminator of all seeds into a folder; the share of held-out patches that it names rightly."""
    found = fit_patches(preset.job, spec or PatchSpec(), None, progress)
    save_patches(found.critic, out, found.about)
    return found.held_out


def variants(preset: Preset, patches: Path, weights: Sequence[float]) -> Mapping[str, Preset]:
    """The preset without the term, and with it at each weight; nothing else differs."""
    with_term = {
        f"{weight:g}": replace(preset, job=replace(preset.job, patch=weight, patches=str(patches)))
        for weight in weights
    }
    return {"without": preset, **with_term}


def run_seed(
    preset: Preset, patches: Path, held_out: Mapping[str, float], weights: Sequence[float], seed: int, out: Path,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """One row: per variant a student's accuracy, and what teacher and judge read in the set."""
    made, spec = variants(preset, patches, weights), replace(preset.distill, seed=seed)
    for name, this in made.items():
        draw_set(this.job, Request(num_samples=this.num_images, seed=seed), out / name / "shards", name, None, progress)
    jobs = [
        StudentJob(
            set_dir=out / name / "shards", out_dir=out / name, teacher=this.job.teacher, spec=spec,
            device=this.job.device,
        )
        for name, this in made.items()
    ]  # fmt: skip
    cards = dict(zip(made, train_students(jobs), strict=True))
    found = {name: _scores(this, out / name / "shards", cards[name]) for name, this in made.items()}
    settings = {"preset": preset.name, "num_images": preset.num_images, "steps": spec.steps, "seed": seed}
    return stamped({**settings, "held_out": dict(held_out), "variants": found})


def _scores(preset: Preset, shards: Path, card: Path) -> dict[str, float]:
    """Accuracy on the real test images, percent read as intended by teacher and judge."""
    teacher = load_teacher(preset.job.teacher, preset.job.device)
    images = load_synthetic(shards, None, teacher.input_size, previews=False)
    out: dict[str, float] = {"teacher_agreement": reading(teacher, images)}
    if preset.test_set:
        test = load_test_set(preset.test_set, teacher.classes, teacher.input_size)
        out["student_accuracy"] = round(evaluate(load_teacher(str(card)), test).accuracy, 2)
    if preset.judge:
        out["judge"] = reading(load_teacher(preset.judge, preset.job.device), images)
    return out
