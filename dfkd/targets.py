"""Per-class targets from a TOML file: how many images of each class, which are left out, what prompts call them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synthkd.dfkd.fields import TEXT, YES_NO, Kind, check_value, kind_of, whole
from synthkd.dfkd.toml_files import read_toml
from synthkd.engine.errors import SynthkdError, suggest

_KINDS: Mapping[str, Kind] = {"weight": whole(0), "exclude": YES_NO, "words": TEXT}


def read_targets(path: Path, classes: Sequence[str]) -> dict[str, Any]:
    """Recipe fields class_weights and class_words from tables named after classes.

    A table has `weight` (a whole number, 1 by default), `exclude = true`, or `words`, the text that stands for the
    class in prompts (for a class-conditional prior: its label; `a|b`: one of two, drawn per sample). Raises
    SynthkdError for an unknown class or field, and for a value of the wrong type.
    """
    data = read_toml(path, f"--targets {path}")
    for name in data:
        if name not in classes:
            raise SynthkdError(f"--targets {path}: no class {name!r}; {_nearest(name, classes)}")
    tables = {name: _table(path, name, data.get(name, {})) for name in classes}
    weights = [0 if t.get("exclude") else t.get("weight", 1) for t in tables.values()]
    words = [t.get("words", name) for name, t in tables.items()]
    if not any(weights):
        raise SynthkdError(f"--targets {path}: every class is left out; expected at least one with a weight above 0")
    out: dict[str, Any] = {"class_weights": weights} if weights != [1] * len(classes) else {}
    return out | ({"class_words": words} if words != list(classes) else {})


def _nearest(name: str, classes: Sequence[str]) -> str:
    return (
        suggest(name, classes) if len(classes) <= 20 else suggest(name, classes).partition("known:")[0] + "not a class"
    )


def _table(path: Path, name: str, table: Any) -> Mapping[str, Any]:
    check_value(f"--targets {path}: {name}", table, kind_of(Mapping, f"a table [{name}]"))
    for key, value in table.items():
        if key not in _KINDS:
            raise SynthkdError(f"--targets {path}: [{name}] has unknown field {key!r}; {suggest(key, _KINDS)}")
        check_value(f"--targets {path}: [{name}] {key}", value, _KINDS[key])
    found: Mapping[str, Any] = table
    return found
