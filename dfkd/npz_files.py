"""NumPy archives (.npz) that somebody else may have made: what reading one raises, bounds before it, whole writes."""

import lzma
import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from synthkd.engine.untrusted import open_plain

# What numpy and zipfile raise for a file that is damaged, encrypted (RuntimeError), packed in a way that is not known
# (NotImplementedError, a RuntimeError too), or that claims more than memory holds.
UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error,
    lzma.LZMAError,
)  # fmt: skip
_SMALL, _RATIO = 2**31, 64  # bytes that any file may unpack to; how many times its own size a large one may


def check_archive(path: Path, most: int | None = None) -> None:
    """Raise ValueError where an .npz would unpack to more than `most` bytes, or an array claims more than it holds.

    most: 2 GiB by default, or 64 times the file where that is more. Raises one of UNREADABLE, or SynthkdError for a
    pipe, where the file cannot be read.
    """
    with os.fdopen(open_plain(path, None), "rb") as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        size = sum(member.file_size for member in members)
        allowed = max(_SMALL, _RATIO * path.stat().st_size) if most is None else most
        if size > allowed:
            raise ValueError(f"{size} bytes of arrays; at most {allowed} are read")
        for member in members:
            with archive.open(member) as packed:
                claimed = array_bytes(packed)
            if claimed > member.file_size:
                raise ValueError(f"{member.filename} claims {claimed} bytes and holds {member.file_size}")


def array_bytes(file: IO[bytes]) -> int:
    """Bytes of the array that an .npy's header tells of; raises ValueError for no .npy, or one of another version."""
    readers: dict[tuple[int, int], Any] = {
        (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0,
    }  # fmt: skip
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"an .npy of version {version}")
    shape, _, kind = readers[version](file)
    return math.prod(shape) * int(kind.itemsize)


def write_arrays(path: Path, **arrays: Any) -> None:
    """An .npz, whole or not at all."""
    fresh = path.with_name(f"tmp-{path.name}")
    np.savez(fresh, **arrays)
    fresh.replace(path)
