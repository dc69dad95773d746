"""Is the disagreement with a student worth its place? The same set with and without the term, seed by seed."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from synthkd.bench.quality import short
from synthkd.bench.record import stamped
from synthkd.dfkd.data import load_synthetic, load_test_set
from synthkd.dfkd.evaluate import evaluate
from synthkd.dfkd.metrics import near_duplicates
from synthkd.dfkd.presets import Preset
from synthkd.dfkd.progress import Progress
from synthkd.dfkd.rounds import draw_set
from synthkd.dfkd.run import reading
from synthkd.dfkd.students import StudentJob, train_students
from synthkd.dfkd.teachers import load_teacher
from synthkd.engine import Request


def variants(preset: Preset, gamma: float, rounds: int) -> Mapping[str, Preset]:
    """The preset without the term, with its KL and with its JS form; nothing else differs."""
    recipe = replace(preset.job.recipe, rounds=rounds)
    forms = {kind: replace(preset.job, recipe=recipe, gamma=gamma, divergence=kind) for kind in ("kl", "js")}
    return {"without": preset, **{kind: replace(preset, job=job) for kind, job in forms.items()}}


def run_seed(preset: Preset, gamma: float, rounds: int, seed: int, out: Path, progress: Progress) -> dict[str, Any]:
    """One row: per variant the accuracy of a student and of one of fewer steps, what others read, near-copies."""
    made = variants(preset, gamma, rounds)
    for name, this in made.items():
        draw_set(this.job, Request(num_samples=this.num_images, seed=seed), out / name / "shards", name, None, progress)
    cards = _students(made, seed, out)
    found = {name: _scores(this, out / name / "shards", cards[name]) for name, this in made.items()}
    settings = {"preset": preset.name, "gamma": gamma, "rounds": rounds, "num_images": preset.num_images, "seed": seed}
    return stamped({**settings, "short_steps": short(preset.distill).steps, "variants": found})


def _students(made: Mapping[str, Preset], seed: int, out: Path) -> dict[str, dict[str, Path]]:
    """Per variant the cards of a student of the preset's steps and of a short one."""
    specs = {
        (name, kind): (this, spec)
        for name, this in made.items()
        for kind, spec in (("student", this.distill), ("short_student", short(this.distill)))
    }
    jobs = [
        StudentJob(
            set_dir=out / name / "shards",
            out_dir=out / name / kind,
            teacher=this.job.teacher,
            spec=replace(spec, seed=seed),
            device=this.job.device,
        )
        for (name, kind), (this, spec) in specs.items()
    ]
    cards = dict(zip(specs, train_students(jobs), strict=True))
    return {name: {kind: cards[name, kind] for kind in ("student", "short_student")} for name in made}


def _scores(preset: Preset, shards: Path, cards: Mapping[str, Path]) -> dict[str, float]:
    """Accuracies on the real test images, percent read as intended by teacher and judge, near-copies in the set."""
    teacher = load_teacher(preset.job.teacher, preset.job.device)
    images = load_synthetic(shards, None, teacher.input_size, previews=False)
    out: dict[str, float] = {"teacher_agreement": reading(teacher, images)}
    if preset.test_set:
        test = load_test_set(preset.test_set, teacher.classes, teacher.input_size)
        for kind, card in cards.items():
            out[f"{kind}_accuracy"] = round(evaluate(load_teacher(str(card)), test).accuracy, 2)
    if preset.judge:
        out["judge"] = reading(load_teacher(preset.judge, preset.job.device), images)
    return out | {"near_duplicates": near_duplicates(images.images).count}
