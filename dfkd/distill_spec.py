"""How a student is trained, as declared: the student is a function of this, the set and the teacher."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from synthkd.dfkd.fields import (
    ABOVE_ZERO,
    AMOUNT,
    TABLE,
    TEXT,
    YES_NO,
    Kind,
    check_fields,
    check_value,
    is_number,
    is_whole,
    whole,
)
from synthkd.engine.errors import SynthkdError

OPTIMIZERS, SELECTIONS, SOFT_LABELS = ("adamw", "sgd"), ("best", "last"), ("teacher", "stored")
_SHARE = Kind(lambda v: is_number(v) and 0 <= v <= 1, "0 to 1")
_BELOW_ONE = Kind(lambda v: is_number(v) and 0 <= v < 1, "0 <= share < 1")


def _one_of(names: tuple[str, ...]) -> Kind:
    return Kind(lambda v: v in names, " or ".join(repr(n) for n in names))


_KINDS: Mapping[str, Kind] = {
    "arch": TEXT,
    "arch_args": TABLE,
    "steps": whole(1),
    "batch_size": whole(2),
    "accumulate": whole(1),
    "optimizer": _one_of(OPTIMIZERS),
    "learning_rate": ABOVE_ZERO,
    "momentum": _BELOW_ONE,
    "weight_decay": AMOUNT,
    "warmup_steps": Kind(lambda v: is_whole(v, 0, 2**31), "a whole number >= 0, below 2**31"),
    "ema": _BELOW_ONE,
    "select": _one_of(SELECTIONS),
    "held_out": Kind(lambda v: is_number(v) and 0 < v < 1, "0 < share < 1"),
    "temperature": ABOVE_ZERO,
    "kl": AMOUNT,
    "hard": AMOUNT,
    "cam": AMOUNT,
    "grad_cam": AMOUNT,
    "features": AMOUNT,
    "crop": Kind(lambda v: is_number(v) and 0 < v <= 1, "0 < share <= 1"),
    "flip": YES_NO,
    "shift": AMOUNT,
    "rotate": AMOUNT,
    "zoom": _BELOW_ONE,
    "mix": _SHARE,
    "views": Kind(lambda v: is_whole(v, 0, 2**20), "a whole number >= 0, below 2**20"),
    "soft_labels": _one_of(SOFT_LABELS),
    "seed": Kind(lambda v: is_whole(v, 0, 2**63), "0 <= seed < 2**63"),
}


@dataclass(frozen=True, kw_only=True)
class DistillSpec:
    """How a student is trained; the same for guided sets and their unguided controls.

    arch, arch_args: a built-in network (`dfkd/nets.py`) and its arguments.
    steps of batch_size images over all ranks, each taken in `accumulate` parts; optimizer: adamw, or sgd with
    Nesterov's momentum; learning_rate with cosine decay after warmup_steps; ema: decay of the weights' running mean,
    which then is the student (0: none); select: the weights that agree with the teacher on most held-out images, or
    the last ones; held_out: share of the set kept for that.
    kl, hard, cam, grad_cam, features: weights of the losses (see `dfkd/objective.py`); temperature of the KL.
    crop: least share of an image's area that a random crop keeps (1: no crop); flip: mirrored half of the time; shift,
    rotate (radians), zoom: reach of the affine augmentation; mix: share of images blended with another one of the set
    (arXiv 1710.09412). views: how many views of each image there are, epochs take them in turn (0: new ones each
    epoch).
    soft_labels: the teacher in the loop, or its logits of all views stored beforehand, which needs views >= 1.
    """

    arch: str = "resnet"
    arch_args: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1000
    batch_size: int = 128
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 4e-3
    momentum: float = 0.9
    weight_decay: float = 0.02
    warmup_steps: int = 50
    ema: float = 0.0
    select: str = "best"
    held_out: float = 0.1
    temperature: float = 4.0
    kl: float = 1.0
    hard: float = 0.0
    cam: float = 0.0
    grad_cam: float = 0.0
    features: float = 0.0
    crop: float = 1.0
    flip: bool = False
    shift: float = 0.1
    rotate: float = 0.2
    zoom: float = 0.1
    mix: float = 0.0
    views: int = 0
    soft_labels: str = "teacher"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise SynthkdError for a value of the wrong type or outside its range; 4 and 4.0 are one temperature."""
        check_fields("distill", {f.name: getattr(self, f.name) for f in fields(self)}, _KINDS)
        for f in fields(self):
            if f.type is float:
                object.__setattr__(self, f.name, float(getattr(self, f.name)))
        check_parts(self, 1)
        if self.soft_labels == "stored" and self.views == 0:
            raise SynthkdError("distill: soft_labels are stored, but views is 0; set how many views to store, say 8")
        if self.soft_labels == "stored" and (self.cam or self.grad_cam or self.features):
            raise SynthkdError(
                "distill: soft_labels are stored, but cam, grad_cam and features compare maps with the teacher's; set "
                "these to 0, or soft_labels to 'teacher'"
            )
        if not any((self.kl, self.hard, self.cam, self.grad_cam, self.features)):
            raise SynthkdError("distill: kl, hard, cam, grad_cam and features are all 0; a student needs one of them")


def check_parts(spec: DistillSpec, world: int) -> None:
    """Raise SynthkdError where `world` processes cannot cut batch_size into equal parts of two images or more."""
    parts = world * spec.accumulate
    if spec.batch_size % parts or spec.batch_size < 2 * parts:
        found = f"batch_size {spec.batch_size} over {world} processes in {spec.accumulate} parts each"
        raise SynthkdError(f"distill: {found}; expected equal parts of two images or more")


def spec_from(data: Any, where: str, base: DistillSpec | None = None) -> DistillSpec:
    """A DistillSpec from plain values on top of `base` (the defaults).

    Raises SynthkdError that begins with `where` for a field it does not have, of the wrong type or out of range.
    """
    check_value(where, data, TABLE)
    check_fields(where, data, _KINDS)
    return replace(base or DistillSpec(), **data)


def learning_rate(spec: DistillSpec, step: int) -> float:
    """Linear warm-up, then half a cosine to zero (arXiv 1608.03983, eq. 5)."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    share = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
