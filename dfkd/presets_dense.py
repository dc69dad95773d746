"""The preset of the segmentation task: a dense teacher of handwritten digits, and letters as what else there is."""

from synthkd.dfkd.cards import card_path, read_card
from synthkd.dfkd.dense_task import POOL, SIDE
from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.presets import Preset
from synthkd.engine import Recipe

TEACHER = "embedded:segments"
STUDENT = {"widths": [8, 16, 32, 32], "blocks": [1, 1, 1, 1], "pyramid": 24}
# Small players, which learn with every step of the student. A balance of 10, as published, would have no ground left:
# of label maps it is the mean over pixels, nine tenths of which are ground.
MOSAIC = {"widths": [64, 32, 16], "patch_width": 32, "balance": 0.5, "student_steps": 1, "lr": 2e-3, "batch": 32}


def segments() -> Preset:
    """Scenes of digits, 48x48, eleven classes; for the methods that take a dense teacher (`--method mosaickd`, `pool`).

    The prior that a job names is never loaded: what a diffusion model draws is guided by classifiers alone.
    """
    classes = read_card(card_path(TEACHER)).classes
    recipe = Recipe(classes=classes, prompts=("{class}",), height=SIDE, width=SIDE)
    return Preset(
        name="segments",
        job=SynthJob(model="embedded:digits", teacher=TEACHER, recipe=recipe),
        num_images=2000,
        distill=DistillSpec(arch="deeplab", arch_args=STUDENT, steps=2000, batch_size=48, ema=0.98, temperature=2.0),
        test_set="segments:test",
        pool=POOL,
        methods={"mosaickd": MOSAIC},
        compared=("mosaickd", "pool"),
    )
