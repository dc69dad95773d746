"""Errors a user can act on: each is one line that names what was found, what was expected and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class SynthkdError(Exception):
    """A wrong input; the command line prints it as one line and exits with `exit_code`."""

    exit_code = 2


class NonFiniteError(SynthkdError):
    """A group stayed non-finite after every attempt; nothing of it was written."""

    exit_code = 3


class NotYetError(SynthkdError):
    """Another run has to finish its part first; the same command goes on then."""

    exit_code = 75


class WorkerLostError(SynthkdError):
    """A worker process ended unasked; every finished group is safe."""


class HeldError(SynthkdError):
    """Another run writes there."""


def suggest(name: str, known: Iterable[str]) -> str:
    """The tail of an unknown-name message: the nearest right name, then all of them."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(names)}"
