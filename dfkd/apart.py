"""What prior, teacher, pool and set were trained on, as their files declare it, and that none has seen the teacher's.

A folder declares in `trained_on.json` (a pipeline, a LoRA, a fitted decoder, patches, a pool of images), an .npz in its
array `trained_on`, a teacher in its card's `[about]`, a set in its manifest. What declares nothing is let through and
told as `not declared`.
"""

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from synthkd.dfkd.cards import card_path, read_card
from synthkd.dfkd.dense_task import POOL
from synthkd.dfkd.npz_files import UNREADABLE, array_bytes
from synthkd.engine.declared import (
    DECLARATION,
    MAX_DECLARATION,
    check_apart,
    check_names,
    declared_in,
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
    """What a pool declares: an .npz in its array, a folder (a tar's too) in its file, a synthetic set in its manifest.

    Of a set, or one of its tars, it is what the networks that drew it declared, the teacher left out.

    Raises SynthkdError for a declaration that cannot be read.
    """
    path = Path(reference)
    if reference.startswith(EMBEDDED) or reference == POOL:
        return _LETTERS
    if path.suffix == ".npz" and path.is_file():
        return _array(path)
    folder = path.parent if path.suffix == ".tar" else path
    if (folder / MANIFEST).is_file():
        found = set_declares(folder)
        known = dict.fromkeys(name for who, names in found.items() if who != TEACHER for name in names or ())
        return tuple(known) or None
    return read_declaration(folder)


def set_declares(folder: Path) -> dict[str, Names]:
    """What a set's manifest says that prior, teacher, and what else drew it, declared when it was begun.

    Of an older set, which says nothing, what its prior declares today, where it still lies there.
    """
    manifest = read_manifest(folder)
    said, source = declared_in(manifest), manifest.get("source")
    if said is None and isinstance(source, Mapping) and isinstance(source.get("model"), str):
        said = {PRIOR: model_declares(source["model"])}
    return {PRIOR: None, TEACHER: None, **(said or {})}


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
    """Raise OverlapError where what drew a set has seen the data of this teacher, who may be another one."""
    parts = {f"the {who} of the set {str(folder)!r}": names for who, names in set_declares(folder).items()
             if who != TEACHER}  # fmt: skip
    check_parts(parts, teacher)


def told(**names: Names) -> dict[str, str]:
    """What each declares, in words."""
    return {name: in_words(found) for name, found in names.items()}


def student_seen(teacher: str, pool: str | None = None) -> dict[str, Any]:
    """What a student's card says of data: what its teacher declares, and the pool that it was shown; else nothing."""
    found = {"teacher_trained_on": card_declares(teacher), _ARRAY: pool_declares(pool) if pool is not None else None}
    return {name: list(names) for name, names in found.items() if names is not None}


def hand_down(folder: Path, *names: Names, data_sha256: str = "") -> None:
    """Declare what a network inherits from all that it was fitted to, as far as that is declared: this at least.

    Where none of it is, a declaration that an earlier fit left there goes: it is not of these weights.
    """
    known = dict.fromkeys(name for found in names for name in found or ())
    if known:
        write_declaration(folder, tuple(known), data_sha256)
    else:
        (folder / DECLARATION).unlink(missing_ok=True)


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
    except UNREADABLE as error:
        raise SynthkdError(f"pool {path}: {_ARRAY} cannot be read ({' '.join(str(error).split())[:120]})") from error
    return check_names(f"pool {path}: {_ARRAY}", names)


def _texts(data: bytes) -> list[Any]:
    """The values of a .npy of texts; raises ValueError for one that claims more than it holds."""
    if len(data) > MAX_DECLARATION:
        raise ValueError(f"above {MAX_DECLARATION} bytes")
    file = io.BytesIO(data)
    if array_bytes(file) > len(data):
        raise ValueError("it claims more than it holds")
    file.seek(0)
    found = np.lib.format.read_array(file, allow_pickle=False)
    if found.dtype.kind != "U" or found.ndim != 1:
        raise ValueError(f"an array of {found.dtype}, {found.shape}; expected texts [N]")
    values: list[Any] = found.tolist()
    return values
