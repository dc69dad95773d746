"""What may be chosen of a preset by name: its teacher, its student, and the methods that a run compares with."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from synthkd.dfkd.cards import card_path, read_card
from synthkd.dfkd.methods.base import method_names
from synthkd.dfkd.nets import ARCHITECTURES
from synthkd.dfkd.presets import Preset
from synthkd.engine.errors import SynthkdError, suggest
from synthkd.engine.models import EMBEDDED

NONE = "none"
_DONE = {"diffdfkd": "guided set", "diffusion": "unguided control"}  # by every run
_OF_A_POOL = ("pool", "mosaickd", "dda")
_WITHOUT_POOL = ("fastdfkd", "deepinversion")


def with_teacher(preset: Preset, asked: str) -> Preset:
    """The preset with one of its teachers by name, or with any card by its path.

    Raises SynthkdError where there is no such teacher, or its classes are not those of the preset's own.
    """
    card = preset.teachers.get(asked)
    if card is None:
        if not asked.startswith(EMBEDDED) and not Path(asked).is_file():
            known = suggest(asked, preset.teachers) if preset.teachers else f"preset {preset.name} names none"
            raise SynthkdError(f"--teacher {asked!r}: no card there and no name; {known}; or give the path of a card")
        card = asked
    theirs, ours = (read_card(card_path(c)).classes for c in (card, preset.job.teacher))
    if theirs != ours:
        raise SynthkdError(f"--teacher {asked!r}: {_difference(theirs, ours, preset.name)}")
    return replace(preset, job=replace(preset.job, teacher=card))


def _difference(found: Sequence[str], expected: Sequence[str], preset: str) -> str:
    """How many classes there are, where the numbers differ; else the first that does."""
    if len(found) != len(expected):
        return f"it has {len(found)} classes; expected the {len(expected)} of preset {preset}, from {expected[0]!r} on"
    place = next(i for i, (theirs, ours) in enumerate(zip(found, expected, strict=True)) if theirs != ours)
    return f"its class {place} is {found[place]!r}; expected {expected[place]!r}, as preset {preset} has it"


def teacher_name(preset: Preset) -> str:
    """The name of the preset's teacher, or the path of its card where it has none."""
    return next((name for name, card in preset.teachers.items() if card == preset.job.teacher), preset.job.teacher)


def with_student(preset: Preset, arch: str) -> Preset:
    """The preset with another network as its student; the preset's arch_args go with its own.

    Raises SynthkdError, with the nearest right name, for one that is not built in.
    """
    if arch not in ARCHITECTURES:
        raise SynthkdError(f"--student {arch!r}: {suggest(arch, ARCHITECTURES)}")
    spec = preset.distill
    return preset if arch == spec.arch else replace(preset, distill=replace(spec, arch=arch, arch_args={}))


def with_controls(preset: Preset, text: str) -> Preset:
    """The preset with the controls of `a,b`, or with none of them; raises SynthkdError as `check_controls` does."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise SynthkdError(f"--controls {text!r}: expected methods such as pool,fastdfkd, or {NONE}")
    made = replace(preset, controls=() if names == (NONE,) else names)
    check_controls(made)
    return made


def takes_pool(preset: Preset) -> bool:
    """Whether a control sees the pool's images, or may: one that is not ours is not known not to."""
    return any(name not in _WITHOUT_POOL for name in preset.controls)


def check_controls(preset: Preset) -> None:
    """Raise SynthkdError for a control that is no method, is named twice, is done anyway, or lacks its pool."""
    known = [name for name in method_names() if name not in _DONE]
    for name in preset.controls:
        if name in _DONE:
            raise SynthkdError(f"controls: {name!r} is the {_DONE[name]} that every run has; leave it out")
        if name not in known:
            raise SynthkdError(f"controls: {name!r} is no method; {suggest(name, [*known, NONE])}")
        if name in _OF_A_POOL and preset.pool is None:
            raise SynthkdError(f"controls: {name!r} needs out-of-domain images, and preset {preset.name} names no pool")
    if len(set(preset.controls)) < len(preset.controls):
        raise SynthkdError(f"controls: {', '.join(preset.controls)}; expected distinct names")
