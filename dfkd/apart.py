"""What prior, teacher, pool and set were trained on, as their files declare it, and that none has seen the teacher's.

A folder declares in `trained_on.json` (a pipeline, a LoRA, a fitted decoder, patches, a pool of images), an .npz in its
array `trained_on`, a teacher in its card's `[about]`, a set in its manifest. What declares nothing is let through and
told as `not declared`.
"""

import io
import math
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from synthkd.dfkd.cards import card_path, read_card
from synthkd.dfkd.dense_task import POOL
from synthkd.engine.declared import (
    MAX_DECLARATION,
    check_apart,
    check_names,
    from_words,
    in_words,
    read_declaration,
    write_declaration,
)
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import MANIFEST, read_manifest
from synthkd.engine.models import EMBEDDED, resolve
from synthkd.engine.untrusted import open_plain

Names = tuple[str, ...] | None
PRIOR, TEACHER = "prior", "teacher"
_ARRAY = "trained_on"
_LETTERS = ("letters",)  # what the pools that come with the package show
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def model_declares(reference: str) -> Names:
    """What the folder of a prior declares, or the one that a file of a LoRA lies in; None for a hub id.

    Raises SynthkdError for a declaration that cannot be read.
    """
    where = Path(resolve(reference))
    return read_declaration(where.parent if where.is_file() else where)


def card_declares(teacher: str) -> Names:
    """What a teacher's card declares; raises SynthkdError as `read_card` does."""
    return read_card(card_path(teacher), moments=False).trained_on


def pool_declares(reference: str) -> Names:
    """What a pool declares: an .npz in its array, a folder (a tar's too) in its file, a synthetic set by its prior's.

    Raises SynthkdError for a declaration that cannot be read.
    """
    path = Path(reference)
    if reference.startswith(EMBEDDED) or reference == POOL:
        return _LETTERS
    if path.suffix == ".npz" and path.is_file():
        return _array(path)
    if (path / MANIFEST).is_file():
        return set_declares(path)[PRIOR]
    return read_declaration(path.parent if path.suffix == ".tar" else path)


def set_declares(folder: Path) -> dict[str, Names]:
    """What a set's manifest says that its prior and its teacher declared when it was begun."""
    source = read_manifest(folder).get("source")
    said = source.get("declared") if isinstance(source, Mapping) else None
    return {name: from_words(said.get(name)) if isinstance(said, Mapping) else None for name in (PRIOR, TEACHER)}


def check_parts(parts: Mapping[str, Names], teacher: str) -> None:
    """Raise OverlapError where one of several networks, by what they are called, has seen the teacher's data."""
    seen = card_declares(teacher)
    for what, names in parts.items():
        check_apart(what, names, seen)


def check_pool(pool: str | None, teacher: str) -> None:
    """Raise OverlapError where a pool holds images that the teacher was trained on."""
    if pool is not None:
        check_parts({f"pool {pool!r}": pool_declares(pool)}, teacher)


def check_set(folder: Path, teacher: str) -> None:
    """Raise OverlapError where the prior that drew a set has seen the data of this teacher, who may be another one."""
    check_parts({f"the prior of the set {str(folder)!r}": set_declares(folder)[PRIOR]}, teacher)


def told(**names: Names) -> dict[str, str]:
    """What each declares, in words."""
    return {name: in_words(found) for name, found in names.items()}


def student_seen(teacher: str, pool: str | None = None) -> dict[str, Any]:
    """What a student's card says of data: what its teacher declares, and the pool that it was shown; else nothing."""
    found = {"teacher_trained_on": card_declares(teacher), _ARRAY: pool_declares(pool) if pool is not None else None}
    return {name: list(names) for name, names in found.items() if names is not None}


def hand_down(folder: Path, *names: Names, data_sha256: str = "") -> None:
    """Declare what a network inherits from what it was fitted to, as far as that is declared; else write nothing."""
    known = dict.fromkeys(name for found in names for name in found or ())
    if known:
        write_declaration(folder, tuple(known), data_sha256)


def _array(path: Path) -> Names:
    """The array `trained_on` of an .npz, read without a pickle, and bounded before it is unpacked."""
    member = f"{_ARRAY}.npy"
    try:
        with os.fdopen(open_plain(path, None), "rb") as file, zipfile.ZipFile(file) as found:
            if member not in found.namelist():
                return None
            with found.open(member) as packed:
                data = packed.read(MAX_DECLARATION + 1)
        names = _texts(data)
    except _UNREADABLE as error:
        raise SynthkdError(f"pool {path}: {_ARRAY} cannot be read ({' '.join(str(error).split())[:120]})") from error
    return check_names(f"pool {path}: {_ARRAY}", names)


def _texts(data: bytes) -> list[Any]:
    """The values of a .npy of texts; raises ValueError for one that claims more than it holds."""
    if len(data) > MAX_DECLARATION:
        raise ValueError(f"above {MAX_DECLARATION} bytes")
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an .npy of another version")
    shape, _, kind = np.lib.format.read_array_header_1_0(file)
    if kind.kind != "U" or len(shape) != 1 or math.prod(shape) * kind.itemsize > len(data):
        raise ValueError(f"an array of {kind}, {shape}; expected texts [N]")
    file.seek(0)
    values: list[Any] = np.lib.format.read_array(file, allow_pickle=False).tolist()
    return values
