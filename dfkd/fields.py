"""Plain values from files and callers: what kind a field is of, and the one line that says which value is not."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from synthkd.engine.errors import SynthkdError, suggest

_SHOWN = 100


class Kind(NamedTuple):
    """A test of a value, and the words for what passes it."""

    fits: Callable[[Any], bool]
    expected: str


def is_whole(value: object, least: int = 0, below: int | None = None) -> bool:
    """Whether it is a whole number >= least, and under `below` if that is given; True and False are none."""
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return value >= least and (below is None or value < below)


def is_number(value: object) -> bool:
    """Whether it is a finite number that a float can hold; True and False are none."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def are_texts(value: object) -> bool:
    """Whether it is a list of texts."""
    return isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)


def whole(least: int) -> Kind:
    """A whole number from `least` on."""
    return Kind(lambda v: is_whole(v, least), f"a whole number >= {least}")


def kind_of(what: type | tuple[type, ...], expected: str) -> Kind:
    """Any value of a type."""
    return Kind(lambda v: isinstance(v, what), expected)


TEXT, TABLE, YES_NO = kind_of(str, "a text"), kind_of(Mapping, "a table"), kind_of(bool, "true or false")
TEXTS = Kind(are_texts, "a list of texts")
AMOUNT = Kind(lambda v: is_number(v) and v >= 0, "a number >= 0")
ABOVE_ZERO = Kind(lambda v: is_number(v) and v > 0, "a number > 0")
SHARE = Kind(lambda v: is_number(v) and 0 <= v < 1, "0 <= share < 1")


def check_value(where: str, value: object, kind: Kind) -> None:
    """Raise SynthkdError where a value is not of its kind; `where` is its file and field."""
    if not kind.fits(value):
        shown = repr(value)
        shown = shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "…"
        raise SynthkdError(f"{where} is {shown}; expected {kind.expected}")


def check_fields(where: str, values: Mapping[str, Any], kinds: Mapping[str, Kind], joint: str = ": ") -> None:
    """Raise SynthkdError for a field that is not in `kinds`, and for one that is not of its kind.

    joint: between `where` and the field's name in the message.
    """
    for name, value in values.items():
        if name not in kinds:
            raise SynthkdError(f"{where}: unknown field {name!r}; {suggest(name, kinds)}")
        check_value(where + joint + name, value, kinds[name])
