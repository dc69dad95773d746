"""Errors a user can act on: each is one line that names what was found, what was expected and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class ExportError(Exception):
    """A module, an input, an artifact or a package that is not as it must be."""


def suggest(name: str, known: Iterable[str]) -> str:
    """The tail of an unknown-name message, as in `engine.errors`, which must not load torch and so not this package."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(names)}"
