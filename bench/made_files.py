"""Whether a pool that lies there is the one that is asked for: `python -m synthkd.bench.made_files POOL --side 128`."""

import argparse
import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from synthkd.engine.errors import SynthkdError

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


def check_made(pool: Path, side: int) -> None:
    """Raise SynthkdError where a made pool has no captions, or images of another side than `side` pixels."""
    again = f"delete {pool.parent}, or name another folder with $SYNTHKD_DATA, and make its files again"
    try:
        with np.load(pool, allow_pickle=False) as data:
            names, shape = set(data.files), _shape(pool)
    except _UNREADABLE as error:
        raise SynthkdError(f"{pool}: not readable ({' '.join(str(error).split())[:100]}); {again}") from error
    if "captions" not in names:
        raise SynthkdError(f"{pool}: has no captions, so no prior can be trained on it; {again}")
    if shape[1:3] != (side, side):
        found = "x".join(map(str, shape[1:3]))
        raise SynthkdError(f"{pool}: images are {found}; this size of prior takes {side}x{side}; {again}")


def _shape(pool: Path) -> tuple[int, ...]:
    """Of `x`, from its header alone."""
    with zipfile.ZipFile(pool) as files, files.open("x.npy") as header:
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape: tuple[int, ...] = read[np.lib.format.read_magic(header)[0]](header)[0]
    return shape


def main(words: Sequence[str]) -> int:
    """The command: 0 where it is, 2 after one line where it is not."""
    parser = argparse.ArgumentParser(prog="python -m synthkd.bench.made_files", description=__doc__)
    parser.add_argument("pool", type=Path)
    parser.add_argument("--side", type=int, required=True, help="pixels, of height and width")
    args = parser.parse_args(words)
    try:
        check_made(args.pool, args.side)
    except SynthkdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
