"""Presets on CIFAR-10 with a pool of CIFAR-100: published teachers, no diffusion prior, data made by one command.

Files lie under $SYNTHKD_DATA (default ./data/cifar10): `python -m synthkd.bench.cifar_pack PACK OUT` makes them.
"""

import os
from pathlib import Path

from synthkd.dfkd.cards import read_card
from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.presets import Preset
from synthkd.engine import GuidanceSpec, Recipe, SynthkdError

TEACHERS = {name: f"teacher/{name}.toml" for name in ("resnet20", "resnet56")}
TEST, POOL = "test.npz", "pool.npz"
_MADE_BY = "python -m synthkd.bench.cifar_pack PACK OUT"


def cifar10() -> Preset:
    """ResNet-20 (91.73 %) to a fresh ResNet-20, a short run for a CPU."""
    student = DistillSpec(
        arch="resnet20", steps=400, batch_size=128, ema=0.98, held_out=0.02, flip=True, shift=0.125, rotate=0.0,
        zoom=0.0,
    )  # fmt: skip
    small: dict[str, object] = {"widths": [64, 32, 16], "patch_width": 32, "lr": 2e-3}
    options: dict[str, dict[str, object]] = {"mosaickd": small, "fastdfkd": {"samples_per_class": 8, "warmup": 5}}
    return _preset("cifar10", "resnet20", student, 5_000, options)


def cifar10_mosaickd() -> Preset:
    """ResNet-56 (93.39 %) to a fresh ResNet-20 with MosaicKD's published settings (arXiv 2110.15094): for a GPU.

    39,200 steps of the players and five of the student each, on 256 made images and 256 of the pool; SGD with cosine
    decay, temperature 1, the last weights. Crop is 4 of 32 pixels of padding, as a shift whose border repeats.
    """
    student = DistillSpec(
        arch="resnet20", steps=196_000, batch_size=512, optimizer="sgd", learning_rate=0.1, momentum=0.9,
        weight_decay=1e-4, warmup_steps=0, select="last", held_out=0.02, temperature=1.0, flip=True, shift=0.125,
        rotate=0.0, zoom=0.0,
    )  # fmt: skip
    return _preset("cifar10-mosaickd", "resnet56", student, 50_000, {})


def _preset(
    name: str, teacher: str, student: DistillSpec, num_images: int, options: dict[str, dict[str, object]]
) -> Preset:
    """Raises SynthkdError where the files are not there."""
    folder = Path(os.environ.get("SYNTHKD_DATA", "data/cifar10"))
    card = folder / TEACHERS[teacher]
    for path in (card, folder / POOL, folder / TEST):
        if not path.is_file():
            raise SynthkdError(f"preset {name}: {path} not found; make it with {_MADE_BY} and set SYNTHKD_DATA to OUT")
    recipe = Recipe(
        classes=read_card(card).classes, prompts=("{class}",), height=32, width=32, guidance=GuidanceSpec(scale=0.0)
    )
    return Preset(
        name=name,
        job=SynthJob(model="", teacher=str(card), recipe=recipe),
        num_images=num_images,
        distill=student,
        test_set=str(folder / TEST),
        pool=str(folder / POOL),
        methods=options,
        compared=("mosaickd", "fastdfkd", "pool"),
    )
