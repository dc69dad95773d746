"""What a network was trained on, as declared beside its weights; a prior that has seen the teacher's data is refused.

A data set has a name of parts, from the whole to the part: `pacs`, `pacs/sketch`, `pacs/sketch/train`. Two names
overlap where one begins with the other. A declaration is a promise of whoever trained; nothing here can check it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from synthkd.engine.errors import SynthkdError
from synthkd.engine.rows import write_atomically
from synthkd.engine.untrusted import parse_note, read_plain

DECLARATION = "trained_on.json"
FORMAT = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*(/[a-z0-9][a-z0-9_.-]*)*")
# Data sets that hold others: who trained on the left has seen what is on the right.
_HOLDS = {"tiny-images": ("cifar10", "cifar100"), "imagenet21k": ("imagenet1k",), "imagenet1k": ("tiny-imagenet",)}


def check_names(where: str, names: Any) -> tuple[str, ...]:
    """Names of data sets; raises SynthkdError, which begins with `where`, for anything else."""
    listed = isinstance(names, (list, tuple)) and all(isinstance(n, str) and len(n) <= 200 for n in names)
    wrong = None if listed else names
    if listed:
        wrong = next((n for n in names if not _NAME.fullmatch(n)), None)
    if wrong is not None:
        raise SynthkdError(
            f"{where} is {repr(wrong)[:100]}; expected names of data sets in lower case, such as \"pacs/sketch/train\""
        )
    return tuple(names)


def overlap(ours: Iterable[str], theirs: Iterable[str]) -> tuple[str, str] | None:
    """The first pair of names, one of each side, that mean common images; None where there is none."""
    known = list(theirs)
    for one in ours:
        for other in known:
            if _within(one, other) or _within(other, one) or _held(one, other) or _held(other, one):
                return one, other
    return None


def _within(part: str, whole: str) -> bool:
    return part == whole or part.startswith(whole + "/")


def _held(whole: str, part: str) -> bool:
    """Whether a data set that is known to hold others holds this one, or a part of it."""
    held = _HOLDS.get(whole.partition("/")[0], ())
    return any(_within(part, name) or _held(name, part) for name in held)


def check_apart(what: str, ours: Sequence[str], teacher: Sequence[str]) -> None:
    """Raise SynthkdError where `what` was trained on data that the teacher declares as its own."""
    found = overlap(ours, teacher)
    if found is not None:
        raise SynthkdError(
            f"{what} was trained on {found[0]!r}, the teacher on {found[1]!r}: that is not data-free; use one that has "
            "not seen the teacher's data"
        )


def write_declaration(folder: Path, trained_on: Sequence[str], data_sha256: str) -> dict[str, str]:
    """Write trained_on.json into a model's folder; returns the SHA-256 of its weight files, which it holds too."""
    names = check_names("trained_on", list(trained_on))
    files = sorted(folder.rglob("*.safetensors"))
    sums = {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    told = {"format": FORMAT, "trained_on": list(names), "data_sha256": data_sha256, "sha256": sums}
    write_atomically(folder / DECLARATION, json.dumps(told, indent=2) + "\n")
    return sums


def read_declaration(folder: Path) -> tuple[str, ...] | None:
    """What a model's folder declares, None where it declares nothing.

    Raises SynthkdError for a declaration that cannot be read: a broken promise is none.
    """
    path = folder / DECLARATION
    if not path.exists():
        return None
    try:
        told = parse_note(read_plain(path, None))
    except (OSError, ValueError, RecursionError) as error:
        raise SynthkdError(f"{path}: cannot be read ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise SynthkdError(f"{path}: not of format {FORMAT}, which this version reads")
    return check_names(f"{path}: trained_on", told.get("trained_on"))
