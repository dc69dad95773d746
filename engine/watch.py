"""Limits in time that hold even where the main thread hangs: a thread ends the process, and says why."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

TRY_AGAIN = 75  # EX_TEMPFAIL: what is on disk is safe, and the same command goes on
_FLUSH = 1.0  # seconds that a stuck standard output may hold the end up


def end_process(code: int, line: str) -> NoReturn:
    """End this process now, from any thread, without waiting for another; line: told on standard error.

    What is on disk is safe as after SIGKILL: a group is there or it is not.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"\nsynthkd: {line}\n".encode())
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(_FLUSH)
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


@contextlib.contextmanager
def limited(seconds: float | None, what: str) -> Iterator[None]:
    """End the process with exit code 75 where the block takes longer; no limit for None.

    A kernel that hangs cannot be interrupted, only left behind with its process.
    """
    if seconds is None:
        yield
        return
    over = f"{what} took longer than the deadline of {seconds:g} s; the same command goes on from here"
    timer = threading.Timer(seconds, end_process, (TRY_AGAIN, over))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
