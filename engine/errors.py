"""Errors a user can act on: each is one line that names what was found, what was expected and what to do."""

from synthkd.export.errors import suggest

__all__ = ["NonFiniteError", "SynthkdError", "WorkerLostError", "suggest"]


class SynthkdError(Exception):
    """A wrong input; the command line prints it as one line and exits with `exit_code`."""

    exit_code = 2


class NonFiniteError(SynthkdError):
    """A group stayed non-finite after every attempt; nothing of it was written."""

    exit_code = 3


class WorkerLostError(SynthkdError):
    """A worker process ended unasked; every finished group is safe."""

