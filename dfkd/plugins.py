"""What comes by name: our own by import path, others' through entry points, which are read from installed packages."""

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from synthkd.engine.errors import SynthkdError, suggest


def names_of(group: str, own: Mapping[str, str]) -> list[str]:
    """Names of a group, sorted; own: name -> `module:attribute`, there without any installation."""
    return sorted({*own, *(entry.name for entry in entry_points(group=group))})


def load(group: str, own: Mapping[str, str], name: str, what: str) -> Any:
    """The object of a name; raises SynthkdError with the nearest right one. A name of ours is ours."""
    if name in own:
        module, _, attribute = own[name].partition(":")
        return getattr(import_module(module), attribute)
    found = {entry.name: entry for entry in entry_points(group=group)}
    if name not in found:
        raise SynthkdError(f"{what} {name!r} is unknown; {suggest(name, names_of(group, own))}")
    return found[name].load()
