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
    half = checkpoint_of(path.parent, path.stem)
    begun = _found(half, note)
    sizes = [len(rows) for rows, _ in parts]
    done = _parts_in(sizes, 0 if begun is None else len(begun))
    made = [] if begun is None else [begun]
    progress.begin(path.stem, sum(sizes), "images")
    progress.advance(path.stem, sum(sizes[:done]))
    saved = time.monotonic()
    for rows, mirrored in parts[done:]:
        made.append(encode(rows, mirrored))
        progress.advance(path.stem, len(rows))
        stop = should_stop()
        if stop or time.monotonic() - saved > SAVE_SECONDS:
            made = [torch.cat(made)]
            write_tensors(half, {"latents": made[0]}, note)
            saved = time.monotonic()
        if stop:
            progress.end(path.stem)
            raise Stopped
    latents = torch.cat(made)
    write_tensors(path, {"latents": latents}, note)
    half.unlink(missing_ok=True)
    progress.end(path.stem)
    return latents


def _found(path: Path, note: Mapping[str, Any]) -> Tensor | None:
    """Latents that a file holds of the same autoencoder and images, with one leading axis."""
    if not path.is_file():
        return None
    tensors, found = read_tensors(path)
    if found != note or "latents" not in tensors:
        return None
    latents = tensors["latents"]
    return latents.flatten(0, 1) if latents.dim() == 5 else latents  # [F,N,C,h,w] of an earlier version


def _parts_in(sizes: Sequence[int], count: int) -> int:
    """How many parts so many rows are."""
    for done in range(len(sizes) + 1):
        if sum(sizes[:done]) >= count:
            return done
    return len(sizes)
