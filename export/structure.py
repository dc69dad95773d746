"""How a result is nested (tuples, lists, dicts, named tuples, None) as plain values, and results built again."""

from collections import namedtuple
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor

from synthkd.export.errors import ExportError


def structure_of(value: Any, tensors: list[Tensor]) -> Any:
    """Plain values that say how a result is nested; its tensors are appended in order.

    Raises ExportError for anything but tensors, None, tuples, lists, and dicts of strings.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return "tensor"
    if value is None:
        return None
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": [[key, structure_of(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple | list):
        items = [structure_of(item, tensors) for item in value]
        if hasattr(value, "_fields"):
            return {"named": [type(value).__name__, list(value._fields), items]}
        return {type(value).__name__: items}
    found = type(value).__name__
    raise ExportError(f"the function returns a {found}; expected tensors in tuples, lists or dicts")


def built(structure: Any, tensors: Iterator[Tensor]) -> Any:
    """The result again; a named tuple is one of the same name and fields."""
    if structure == "tensor":
        return next(tensors)
    if structure is None:
        return None
    ((kind, items),) = structure.items()
    if kind == "dict":
        return {key: built(item, tensors) for key, item in items}
    if kind == "named":
        name, fields, inner = items
        return _named(name, tuple(fields))(*[built(item, tensors) for item in inner])
    values = [built(item, tensors) for item in items]
    return tuple(values) if kind == "tuple" else values


@cache
def _named(name: str, fields: tuple[str, ...]) -> Any:
    return namedtuple(name, fields)
