"""Presets: a name -> everything a run needs. A plugin adds one through the entry-point group `synthkd.presets`."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from synthkd.dfkd import plugins
from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.job import SynthJob
from synthkd.engine import CutMixSpec, GuidanceSpec, Recipe
from synthkd.engine.assets import embedded_path

GROUP = "synthkd.presets"
_OWN = {
    "digits": "synthkd.dfkd.presets:digits",
    "segments": "synthkd.dfkd.presets_dense:segments",
    "cifar10": "synthkd.dfkd.presets_cifar:cifar10",
    "cifar10-small": "synthkd.dfkd.presets_cifar:cifar10_small",
    "cifar10-mosaickd": "synthkd.dfkd.presets_cifar:cifar10_mosaickd",
    "pacs-sketch": "synthkd.dfkd.presets_pacs:pacs_sketch",
    "pacs-sketch-small": "synthkd.dfkd.presets_pacs:pacs_sketch_small",
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A run by name: the synthesis job, how many images, the student, and where the result is scored.

    judge: card of an independent network that only scores; test_set: as for `synthkd evaluate --data`.
    pool: out-of-domain images for the methods that want some (see `dfkd/pools.py`); methods: options by method name;
    compared: the methods that `synthkd compare` takes by itself, all that are installed where empty.
    teachers: cards by the name that `--teacher` takes, the job's own among them; controls: methods that `synthkd run`
    compares with too, at equal steps of the same student, beside guided and unguided images.
    """

    name: str
    job: SynthJob
    num_images: int
    distill: DistillSpec = field(default_factory=DistillSpec)
    judge: str | None = None
    test_set: str | None = None
    pool: str | None = None
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    compared: tuple[str, ...] = ()
    teachers: Mapping[str, str] = field(default_factory=dict)
    controls: tuple[str, ...] = ()

    def on(self, device: str) -> "Preset":
        """The same on another device."""
        return replace(self, job=replace(self.job, device=device))


def data_folder(name: str) -> Path:
    """Where a data set's made files lie: a folder of $SYNTHKD_DATA, which is `data` by default."""
    return Path(os.environ.get("SYNTHKD_DATA") or "data") / name


def unguided(job: SynthJob) -> SynthJob:
    """The control of a job: guidance scale 0, and so no student to disagree with, and nothing else."""
    off = replace(job.recipe.guidance, scale=0.0)
    return replace(job, recipe=replace(job.recipe, guidance=off, rounds=1, groups_per_round=0), gamma=0.0, patch=0.0)


def digits() -> Preset:
    """The embedded default: broad glyph prior, teacher of real handwritten digits, 32x32 images."""
    text: Mapping[str, Any] = tomllib.loads((embedded_path("digits") / "prompts.toml").read_text())
    recipe = Recipe(
        classes=tuple(text["classes"]),
        prompts=tuple(text["prompts"]),
        height=32,
        width=32,
        steps=20,
        guidance_scale=2.0,
        cfg_start=0.5,
        guidance=GuidanceSpec(scale=0.8, start=0.4, decoder="fitted:embedded:digits"),
        cutmix=CutMixSpec(every=8, last_clean=8, alpha=4.0),
        classes_per_group=10,
        samples_per_class=4,
        groups_per_shard=10,
    )
    student = {"widths": [16, 32, 64], "blocks": [1, 1, 1], "stem_stride": 2}
    between = DistillSpec(arch="resnet", arch_args=student, steps=250)  # of rounds, where a run has them
    job = SynthJob(
        model="embedded:digits",
        teacher="embedded:digits",
        recipe=recipe,
        alpha=0.3,
        beta=1.0,
        round_student=between,
    )
    small = {"samples_per_class": 4, "widths": [64, 64, 32], "shift": 2, "flip": False}  # a mirrored digit is none
    return Preset(
        name="digits",
        job=job,
        num_images=1200,
        distill=DistillSpec(
            arch="resnet", arch_args=student, steps=1000, ema=0.98, soft_labels="stored", views=16
        ),
        judge="embedded:digits/judge",
        test_set="digits:test",
        pool="embedded:digits/pool",
        methods={
            "deepinversion": {"steps": 100, "lr": 0.1, "tv": 0.016},
            "fastdfkd": {**small, "inner": 10, "bn": 1.0, "warmup": 10},
            "mosaickd": {
                "widths": [64, 32, 16], "patch_width": 32, "keep": True, "student_steps": 2, "align": 4.0, "lr": 2e-3,
            },
        },
    )  # fmt: skip


def preset_names() -> list[str]:
    """Installed presets."""
    return plugins.names_of(GROUP, _OWN)


def load_preset(name: str) -> Preset:
    """A preset by name; raises SynthkdError with the nearest right one."""
    made: Preset = plugins.load(GROUP, _OWN, name, "preset")()
    return made
