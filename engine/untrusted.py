"""Files that somebody else may have made: opened only where they are plain files of the set, read only up to a bound.

A set is a folder that travels. A link in it that leads out of it would make a reader copy foreign files into reports
and exports, and a writer append to them; a pipe would make both wait for ever. Links within the folder are followed.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from synthkd.engine.errors import SynthkdError

MAX_NOTE = 16 * 2**20  # bytes of a JSON file
_DIGITS = 20  # of a whole number: no count, seed or size has more
_OURS = re.compile(r"(manifest\.json|index[.-]|shard-|\.lock|rows$|environments$|rounds$|decoder$)")
_FOLDERS = ("rows", "environments", "rounds", "decoder")


def open_plain(path: Path, home: Path | None) -> int:
    """A descriptor of a plain file that lies in `home` (anywhere for None), for reading; never waits.

    Raises OSError where it cannot be opened, SynthkdError for a link that leaves `home`, a pipe, a device or a folder.
    """
    _check_kind(path, os.stat(path).st_mode)  # noqa: PTH116  before it is opened: opening a device may act
    if home is not None:
        _check_home(path, home)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    return _plain(path, descriptor)


def _plain(path: Path, descriptor: int) -> int:
    """The descriptor, if what was opened is a plain file; else it is closed, and SynthkdError raised."""
    try:
        _check_kind(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_plain(path: Path, home: Path | None, limit: int = MAX_NOTE) -> bytes:
    """All bytes of a plain file in `home`; raises SynthkdError where it has more than `limit`. See `open_plain`."""
    with open(open_plain(path, home), "rb") as f:
        data = f.read(min(limit, os.fstat(f.fileno()).st_size) + 1)  # memory for all that is asked for is taken first
    if len(data) > limit:
        raise SynthkdError(f"{path}: is above {limit} bytes; expected a file of a synthkd set")
    return data


def append_plain(path: Path) -> int:
    """A descriptor of a plain file, made where there is none, for adding to its end; follows no link, never waits.

    Raises OSError where it cannot be opened, SynthkdError for a pipe, a device or a folder.
    """
    more = getattr(os, "O_NOFOLLOW", 0) | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | more, 0o666)
    return _plain(path, descriptor)


def parse_note(data: bytes | str, finite: bool = True) -> Any:
    """JSON without what parsers disagree on; raises ValueError or RecursionError for anything else.

    Refused: a name twice in a table, whole numbers of more than 20 digits, where `finite` also NaN and infinities.
    """
    hooks: dict[str, Any] = {"parse_int": _whole, "object_pairs_hook": _table}
    if finite:
        hooks |= {"parse_constant": _no_constant, "parse_float": _finite}
    return json.loads(data, **hooks)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0:
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one table")
    return found


def refuse_links(folder: Path) -> None:
    """Raise SynthkdError where a name that a run writes is a link out of the folder, a pipe or a device."""
    for entry in _own_entries(folder):
        if entry.is_symlink():
            _check_home(Path(entry.path), folder)
        elif not entry.is_file() and not entry.is_dir():
            _check_kind(Path(entry.path), entry.stat().st_mode)


def _own_entries(folder: Path) -> Iterator["os.DirEntry[str]"]:
    if not folder.is_dir():
        return
    with os.scandir(folder) as found:
        yield from (entry for entry in found if _OURS.match(entry.name))
    below = [folder / name for name in _FOLDERS]
    below += [path for path in (folder / "rounds").glob("*") if path.is_dir()]
    for path in below:
        if path.is_dir() and not path.is_symlink():
            with os.scandir(path) as found:
                yield from found


def _check_kind(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise SynthkdError(f"{path}: is {kind}; expected a plain file of a synthkd set")


def _check_home(path: Path, home: Path) -> None:
    real, root = os.path.realpath(path), os.path.realpath(home)
    if os.path.commonpath([real, root]) != root:
        raise SynthkdError(f"{path}: is a link that leaves the set's folder; put the file itself there")
