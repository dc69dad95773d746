"""The latents of all images, made once, in parts that a stop or a kill between them does not lose."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synthkd.dfkd.prior_loop import SAVE_SECONDS, checkpoint_of
from synthkd.dfkd.progress import Progress
from synthkd.dfkd.tensor_files import read_tensors, write_tensors
from synthkd.dfkd.training import Stopped

Encode = Callable[[Tensor, bool], Tensor]


def encode_all(
    encode: Encode,
    parts: Sequence[tuple[Tensor, bool]],
    path: Path,
    note: Mapping[str, Any],
    progress: Progress,
    should_stop: Callable[[], bool],
) -> Tensor:
    """Latents [sum of the parts' rows, C, h, w] in the order of the parts, from the file where `note` is the same.

    encode: (rows, mirrored) of a part -> its latents on the host. Raises Stopped, after a checkpoint.
    """
    known = _found(path, note)
    if known is not None:
        return known
    half, sizes = checkpoint_of(path.parent, path.stem), [len(rows) for rows, _ in parts]
    begun = _found(half, note)
    made = [] if begun is None else [begun]
    done = _parts_in(sizes, sum(map(len, made)))
    progress.begin(path.stem, sum(sizes), "images")
    progress.advance(path.stem, sum(sizes[:done]))
    try:
        latents = _encoded(encode, parts[done:], made, half, note, progress, should_stop)
    finally:
        progress.end(path.stem)
    write_tensors(path, {"latents": latents}, note)
    half.unlink(missing_ok=True)
    return latents


def _encoded(
    encode: Encode,
    parts: Sequence[tuple[Tensor, bool]],
    made: list[Tensor],
    half: Path,
    note: Mapping[str, Any],
    progress: Progress,
    should_stop: Callable[[], bool],
) -> Tensor:
    """The latents in `made` and those of the parts that are left; now and then, and at a stop, in the file `half`."""
    saved = time.monotonic()
    for rows, mirrored in parts:
        made.append(encode(rows, mirrored))
        progress.advance(half.name.partition(".")[0], len(rows))
        stop = should_stop()
        if stop or time.monotonic() - saved > SAVE_SECONDS:
            made = [torch.cat(made)]
            write_tensors(half, {"latents": made[0]}, note)
            saved = time.monotonic()
        if stop:
            raise Stopped
    return torch.cat(made)


def _found(path: Path, note: Mapping[str, Any]) -> Tensor | None:
    """Latents that a file holds of the same autoencoder and images, with one leading axis."""
    if not path.is_file():
        return None
    tensors, found = read_tensors(path)
    if found != note or "latents" not in tensors:
        return None
    return tensors["latents"]


def _parts_in(sizes: Sequence[int], count: int) -> int:
    """How many parts so many rows are."""
    for done in range(len(sizes) + 1):
        if sum(sizes[:done]) >= count:
            return done
    return len(sizes)
