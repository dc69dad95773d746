"""Presets on CIFAR-10: published teachers, a prior and a pool of CIFAR-100 without CIFAR-10's classes.

Files lie under $SYNTHKD_DATA/cifar10 (data/cifar10 by default): `make prior-cifar` makes them; all but the prior
`python -m synthkd.bench.cifar_pack PACK data/cifar10` alone.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from synthkd.dfkd.cards import read_card
from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.presets import Preset, data_folder
from synthkd.engine import GuidanceSpec, Recipe, SynthkdError

NAME = "cifar10"
TEACHERS = {name: f"teacher/{name}.toml" for name in ("resnet20", "resnet56")}
TEST, POOL = "test.npz", "pool.npz"
CONTROLS = ("pool", "fastdfkd")
_COMPARED = ("mosaickd", "fastdfkd", "pool")
# The prior knows no class of CIFAR-10: captions on whose images ResNet-56 says the class most often, as
# `python -m synthkd.bench.kin` finds them; the guidance does the rest.
WORDS = {
    "airplane": "shark|mountain|plain|road|trout|whale",
    "automobile": "motorcycle|lawn mower|clock|plate|bowl|telephone",
    "bird": "worm|skunk|sunflower|cup|flatfish|shrew",
    "cat": "possum|apple|hamster|wardrobe|mouse|orange",
    "deer": "kangaroo|cattle|elephant|forest|spider|rabbit",
    "dog": "chimpanzee|girl|hamster|baby|woman|boy",
    "frog": "oak tree|crab|crocodile|bee|snake|lizard",
    "horse": "cattle|elephant|camel|bicycle|man|motorcycle",
    "ship": "sea|bridge|skyscraper|rocket|castle|whale",
    "truck": "television|house|train|wardrobe|castle|can",
}


def cifar10() -> Preset:
    """ResNet-56 (93.39 %) to a fresh ResNet-20 over 50,000 images of the base prior: for a GPU.

    The student is trained as such networks are on the real images: SGD with cosine decay from 0.1, flips and shifts of
    four pixels.
    """
    student = _student(
        steps=40_000, batch_size=256, optimizer="sgd", learning_rate=0.1, momentum=0.9, weight_decay=5e-4,
        warmup_steps=0, select="last",
    )  # fmt: skip
    recipe = {"samples_per_class": 20, "groups_per_shard": 5}  # groups of 200, which fill a GPU
    return replace(_drawn(_preset("cifar10", "resnet56", student, 50_000), "base", recipe), controls=CONTROLS)


def cifar10_small() -> Preset:
    """ResNet-56 to a fresh ResNet-20 over 5,000 images of the small prior: a short run for a CPU."""
    mosaic = {"widths": [64, 32, 16], "patch_width": 32, "lr": 2e-3}
    options: dict[str, dict[str, Any]] = {"mosaickd": mosaic, "fastdfkd": {"samples_per_class": 8, "warmup": 5}}
    made = _preset("cifar10-small", "resnet56", _student(steps=1200, batch_size=128, ema=0.98), 5_000)
    made = _drawn(made, "small", {"samples_per_class": 4, "groups_per_shard": 10})
    return replace(made, methods=options, controls=CONTROLS)


def cifar10_mosaickd() -> Preset:
    """ResNet-56 (93.39 %) to a fresh ResNet-20 with MosaicKD's published settings (arXiv 2110.15094): for a GPU.

    39,200 steps of the players and five of the student each, on 256 made images and 256 of the pool; SGD with cosine
    decay, temperature 1, the last weights. Crop is 4 of 32 pixels of padding, as a shift whose border repeats.
    """
    student = _student(
        steps=196_000, batch_size=512, optimizer="sgd", learning_rate=0.1, momentum=0.9, weight_decay=1e-4,
        warmup_steps=0, select="last", temperature=1.0,
    )  # fmt: skip
    return _preset("cifar10-mosaickd", "resnet56", student, 50_000)


def _student(**settings: Any) -> DistillSpec:
    """ResNet-20, seen mirrored and shifted by up to four pixels."""
    return DistillSpec(arch="resnet20", held_out=0.02, flip=True, shift=0.125, rotate=0.0, zoom=0.0, **settings)


def _preset(name: str, teacher: str, student: DistillSpec, num_images: int) -> Preset:
    """Without a prior; raises SynthkdError where the files are not there."""
    folder = data_folder(NAME)
    card = folder / TEACHERS[teacher]
    for path in (card, folder / POOL, folder / TEST):
        if not path.is_file():
            made_by = f"python -m synthkd.bench.cifar_pack PACK {folder}"
            raise SynthkdError(f"preset {name}: {path} not found; make it with `{made_by}` ($SYNTHKD_DATA/{NAME})")
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
        compared=_COMPARED,
        teachers={name: str(folder / path) for name, path in TEACHERS.items()},
    )


def _drawn(preset: Preset, size: str, fields: Mapping[str, Any]) -> Preset:
    """The preset with a prior of ours, which is looked for where it is needed; fields: more of the recipe's."""
    pipeline = data_folder(NAME) / f"prior-{size}" / "pipeline"
    recipe = replace(
        preset.job.recipe,
        class_words=_words(preset.job.recipe.classes, Path(preset.job.teacher)),
        steps=20,
        guidance_scale=2.0,
        cfg_start=0.5,
        guidance=GuidanceSpec(scale=0.8, start=0.4, decoder="vae"),
        classes_per_group=10,
        **fields,
    )
    missing = f"preset {preset.name}: {pipeline} not found; make it with `make prior-cifar SIZE={size}`"
    job = replace(preset.job, model=str(pipeline), recipe=recipe, alpha=0.3, beta=1.0, model_missing=missing)
    return replace(preset, job=job)


def _words(classes: tuple[str, ...], card: Path) -> tuple[str, ...]:
    """What the prior is asked for, class by class; raises SynthkdError for a card with a class of no CIFAR-10."""
    wrong = next((name for name in classes if name not in WORDS), None)
    if wrong is not None:
        raise SynthkdError(f"teacher card {card}: class {wrong!r}; expected CIFAR-10's: {', '.join(WORDS)}")
    return tuple(WORDS[name] for name in classes)
