"""What a prior of our own is trained on: images, what each shows in words, and which data sets they are from."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthkd.dfkd.npz_files import UNREADABLE, check_archive
from synthkd.engine.declared import check_names
from synthkd.engine.errors import SynthkdError

_CAPTION = re.compile(r"[a-z]+( [a-z]+)*")


@dataclass(frozen=True)
class Captioned:
    """images: uint8 [N,3,H,W]; labels: int64 [N], rows of `captions`; trained_on: names of data sets (`declared`)."""

    images: Tensor
    labels: Tensor
    captions: tuple[str, ...]
    trained_on: tuple[str, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def words(self) -> tuple[str, ...]:
        """Of all captions, each once."""
        return tuple(dict.fromkeys(word for caption in self.captions for word in caption.split()))

    @property
    def digest(self) -> str:
        """SHA-256 over images, labels and captions."""
        told = hashlib.sha256("\n".join((*self.captions, *self.trained_on)).encode())
        told.update(self.labels.numpy().tobytes())
        told.update(self.images.numpy().tobytes())
        return told.hexdigest()


def load_captioned(path: Path) -> Captioned:
    """An .npz of x (uint8 [N,H,W,3]), y (integers [N]), captions (texts [K]) and trained_on (texts), no pickles.

    Raises SynthkdError where one of them is missing or does not fit, and for a file that would unpack to far more than
    it is (see `check_archive`).
    """
    try:
        check_archive(path)
        with np.load(path, allow_pickle=False) as data:
            if "captions" not in data.files:
                raise ValueError("captions are missing; a file of `bench.cifar_pack` or `bench.pacs_pack` that has "
                                 "none is of an earlier version: make it again")  # fmt: skip
            x, y = data["x"], data["y"]
            captions, trained_on = (_texts(data, name) for name in ("captions", "trained_on"))
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:160]
        raise SynthkdError(f"pool {path}: expected arrays x, y, captions and trained_on ({reason})") from error
    _check(path, x, y, captions)
    check_names(f"pool {path}: trained_on", list(trained_on))
    images, labels = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y.astype(np.int64))
    return Captioned(images, labels, captions, trained_on)


def _texts(data: Any, name: str) -> tuple[str, ...]:
    """A list of texts; raises ValueError for an array of anything else."""
    found = data[name]
    if found.ndim != 1 or found.dtype.kind != "U":
        raise ValueError(f"{name} is {found.dtype} {found.shape}, not a list of texts")
    return tuple(map(str, found.tolist()))


def _check(path: Path, x: NDArray[Any], y: NDArray[Any], captions: tuple[str, ...]) -> None:
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or x.size == 0:
        raise SynthkdError(f"pool {path}: x is {x.dtype} {x.shape}; expected uint8 [N,H,W,3]")
    if y.shape != (len(x),) or y.dtype.kind not in "iu":
        found = f"{y.dtype} {y.shape}"
        raise SynthkdError(f"pool {path}: y is {found}; expected the whole number of a caption for all {len(x)} images")
    if y.min() < 0 or y.max() >= len(captions):
        raise SynthkdError(f"pool {path}: y is {y.min()}..{y.max()}; there are {len(captions)} captions")
    wrong = next((c for c in captions if not _CAPTION.fullmatch(c)), None)
    if wrong is not None:
        raise SynthkdError(f"pool {path}: caption {wrong[:60]!r}; expected words of letters a to z with single spaces")
