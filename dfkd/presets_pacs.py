"""Presets across a domain gap: a teacher of PACS sketches, a prior of photos, art paintings and cartoons, no sketch.

Files lie under $SYNTHKD_DATA/pacs (data/pacs by default): `make prior-pacs` makes them; images are of the size that
`python -m synthkd.bench.pacs_pack` was told (--side), which the teacher's card says. PACS: Li et al. 2017
(arXiv 1710.03077); the gap is that of DiffDFKD's evaluation.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from synthkd.dfkd.cards import TeacherCard, read_card
from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.presets import Preset, data_folder
from synthkd.engine import GuidanceSpec, Recipe, SynthkdError

NAME = "pacs"
TEACHERS = {"resnet": "teacher/resnet.toml"}
TRAIN, TEST, POOL = "train.npz", "test.npz", "pool.npz"
DOMAINS = ("photo", "art painting", "cartoon")  # as the prior's captions begin
_PACK = "python -m synthkd.bench.pacs_pack PACK {0}"
_FIT = "python -m synthkd.bench.fit_teacher {0}/train.npz --test {0}/test.npz --out {0}/teacher"
_MADE_BY = {POOL: _PACK, TEST: _PACK, TEACHERS["resnet"]: _FIT}


def pacs_sketch() -> Preset:
    """21,000 images of the base prior, a long training of the student: for a GPU.

    With images of 128 pixels (--side 128) and an autoencoder of two halvings: `--set vae_widths=[64,128,128]`.
    """
    student = {"steps": 20_000, "batch_size": 128, "ema": 0.999}
    return _preset("pacs-sketch", "base", 21_000, student, {"samples_per_class": 16, "groups_per_shard": 9})


def pacs_sketch_small() -> Preset:
    """1,050 images of the small prior, 64x64: a run for a CPU."""
    student = {"steps": 800, "batch_size": 64, "ema": 0.98}
    made = _preset("pacs-sketch-small", "small", 1_050, student, {"samples_per_class": 4, "groups_per_shard": 15})
    fast = {"samples_per_class": 4, "widths": [64, 64, 32], "warmup": 5}
    mosaic = {"widths": [64, 32, 16], "patch_width": 32, "lr": 2e-3}
    return replace(made, methods={"fastdfkd": fast, "mosaickd": mosaic})


def _preset(name: str, size: str, num_images: int, student: dict[str, Any], recipe: dict[str, Any]) -> Preset:
    """Raises SynthkdError where a file is not there; the prior is looked for where it is needed."""
    folder = data_folder(NAME)
    for path, made_by in _MADE_BY.items():
        if not (folder / path).is_file():
            how = f"make it with `{made_by.format(folder)}` ($SYNTHKD_DATA/{NAME})"
            raise SynthkdError(f"preset {name}: {folder / path} not found; {how}")
    card = folder / TEACHERS["resnet"]
    told = read_card(card)
    return Preset(
        name=name,
        job=_job(name, card, told, folder / f"prior-{size}" / "pipeline", recipe),
        num_images=num_images,
        distill=_student(told, student),
        test_set=str(folder / TEST),
        pool=str(folder / POOL),
        compared=("mosaickd", "fastdfkd", "pool"),
        teachers={teacher: str(folder / path) for teacher, path in TEACHERS.items()},
        controls=("pool", "fastdfkd"),
    )


def _job(name: str, path: Path, card: TeacherCard, pipeline: Path, fields: dict[str, Any]) -> SynthJob:
    """The prior is asked for a class in each of its domains; the teacher's guidance pulls that towards sketches."""
    recipe = Recipe(
        classes=card.classes,
        prompts=tuple(f"{domain} {{class}}" for domain in DOMAINS),
        height=card.input_size[0],
        width=card.input_size[1],
        steps=20,
        guidance_scale=2.0,
        cfg_start=0.5,
        guidance=GuidanceSpec(scale=0.3, start=0.5, decoder="vae"),
        classes_per_group=len(card.classes),
        **fields,
    )
    size = pipeline.parent.name.removeprefix("prior-")
    missing = f"preset {name}: {pipeline} not found; make it with `make prior-pacs SIZE={size}`"
    return SynthJob(model=str(pipeline), teacher=str(path), recipe=recipe, alpha=0.3, beta=1.0, model_missing=missing)


def _student(teacher: TeacherCard, settings: dict[str, Any]) -> DistillSpec:
    """The teacher's network at half its widths, seen as `bench/fit_teacher.py` shows images to the teacher."""
    args = dict(teacher.arch_args)
    if teacher.arch == "resnet" and "widths" in args:
        args["widths"] = [max(1, width // 2) for width in args["widths"]]
    return DistillSpec(
        arch=teacher.arch, arch_args=args, held_out=0.05, flip=True, shift=0.1, rotate=0.2, zoom=0.15, **settings
    )
