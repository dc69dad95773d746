"""Labelled images in memory: synthetic sets from shards, real test sets for scoring."""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from synthkd.dfkd.npz_files import UNREADABLE
from synthkd.engine.assets import embedded_path
from synthkd.engine.errors import SynthkdError, suggest
from synthkd.engine.index import read_manifest
from synthkd.engine.reading import decode_image, read_set

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True)
class LabelledImages:
    """images: uint8 [N,3,H,W]; labels: int64 [N]; classes: names in label order; previews: bool [N], which images are.

    None where none is.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    previews: Tensor | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)


def load_synthetic(
    folder: Path, limit: int | None = None, size: tuple[int, int] | None = None, previews: bool = True
) -> LabelledImages:
    """The first `limit` samples of a synthetic set (all by default) in id order, resized to `size` pixels if given.

    previews: with the clean-latent previews of these samples, where the set has them, each after its sample.
    Raises SynthkdError where a shard is damaged or unfinished.
    """
    manifest = read_manifest(folder)
    each = 1 + (len(manifest["recipe"].get("previews", ())) if previews else 0)
    wanted, labels = each * min(limit or manifest["num_samples"], manifest["num_samples"]), []
    shown = (sample for sample in read_set(folder) if previews or sample.preview is None)
    images, marks = None, []
    for position, sample in enumerate(islice(shown, wanted)):
        image = _fitted(sample.pixels, size)
        images = torch.empty(wanted, *image.shape, dtype=torch.uint8) if images is None else images
        images[position] = image
        labels.append(int(sample.meta["label"]))
        marks.append(sample.preview is not None)
    if images is None or len(labels) < wanted:
        raise SynthkdError(
            f"{folder}: {len(labels)} of {wanted} images are in finished shards; finish the set with the command that "
            "began it, or use fewer"
        )
    marked = torch.tensor(marks) if any(marks) else None
    return LabelledImages(images, torch.tensor(labels), tuple(manifest["recipe"]["classes"]), marked)


def _fitted(pixels: NDArray[np.uint8], size: tuple[int, int] | None) -> Tensor:
    """uint8 [H,W,3] -> uint8 [3,h,w], resized (bilinear, antialiased) where the size differs."""
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    if size is None or tuple(image.shape[1:]) == size:
        return image
    resized = F.interpolate(image[None].float(), size=list(size), mode="bilinear", antialias=True)
    return resized.clamp(0, 255).round().to(torch.uint8)[0]


def real_digits(part: str) -> LabelledImages:
    """scikit-learn's handwritten digits, `train` (1,000, the teacher's) or `test` (797), as 32x32 RGB.

    8x8 values 0..16 are scaled to 0..1, enlarged bilinearly and rounded to uint8.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SynthkdError("scikit-learn is not installed: pip install 'synthkd[digits]'") from error
    folder = embedded_path("digits")
    index = json.loads((folder / "digits_split.json").read_text())[part]
    digits = load_digits()
    small = torch.from_numpy(digits.images[index] / 16.0).float()[:, None]
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.mul(255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return LabelledImages(images, torch.from_numpy(digits.target[index].astype(np.int64)), names)


def load_test_set(reference: str, classes: tuple[str, ...], size: tuple[int, int]) -> LabelledImages:
    """A real labelled set: `digits:test`, a folder with one sub-folder per class, or an .npz of `x` and `y`.

    npz: x uint8 [N,H,W,3] or [N,H,W], y integers [N]. Images of a folder are resized to `size`.
    Raises SynthkdError where names, shapes or labels do not fit.
    """
    if reference.startswith("digits:"):
        part = reference.removeprefix("digits:")
        if part not in ("test", "train"):
            raise SynthkdError(f"data {reference!r}: {suggest(part, ('test', 'train'))}")
        if len(classes) != 10:
            raise SynthkdError(f"data {reference!r}: has 10 classes, the network {len(classes)}")
        return real_digits(part)
    path = Path(reference)
    if path.suffix == ".npz":
        return _from_npz(path, classes)
    if not path.is_dir():
        raise SynthkdError(f"data {reference!r}: expected digits:test, an .npz file or a folder of class folders")
    return _from_folder(path, classes, size)


def _from_npz(path: Path, classes: tuple[str, ...]) -> LabelledImages:
    x, y = labelled_arrays(path)
    if y.ndim != 1:
        raise SynthkdError(f"data {path}: y has shape {y.shape}; expected a label for each image, [N]")
    if y.min() < 0 or y.max() >= len(classes):
        raise SynthkdError(f"data {path}: labels {y.min()}..{y.max()}; the teacher has {len(classes)} classes")
    return LabelledImages(x, torch.from_numpy(y), classes)


def labelled_arrays(path: Path) -> tuple[Tensor, NDArray[np.int64]]:
    """Images uint8 [N,3,H,W] and labels int64, [N] or [N,H,W], of an .npz of x and y; raises SynthkdError otherwise."""
    try:
        with np.load(path, allow_pickle=False) as data:
            x, y = data["x"], data["y"].astype(np.int64)
    except UNREADABLE as error:
        raise SynthkdError(f"data {path}: expected arrays x and y without pickles ({error})") from error
    if not _are_pixels(x) or y.ndim not in (1, 3) or len(x) != len(y):
        raise SynthkdError(f"data {path}: x is {x.dtype} {x.shape}, y {y.shape}; expected uint8 [N,H,W,3] and [N]")
    return _channels_first(x), y


def images_from_npz(path: Path, what: str) -> Tensor:
    """The images `x` of an .npz, uint8 [N,3,H,W]; raises SynthkdError, which begins with `what`, for anything else."""
    try:
        with np.load(path, allow_pickle=False) as data:
            x = data["x"]
    except UNREADABLE as error:
        raise SynthkdError(f"{what} {path}: expected an array x without pickles ({error})") from error
    if not _are_pixels(x):
        raise SynthkdError(f"{what} {path}: x is {x.dtype} {x.shape}; expected uint8 [N,H,W,3] or [N,H,W]")
    return _channels_first(x)


def _are_pixels(x: NDArray[np.uint8]) -> bool:
    """Whether an array is grey or RGB images, one at least."""
    return x.dtype == np.uint8 and (x.ndim == 3 or (x.ndim == 4 and x.shape[3] == 3)) and x.size > 0


def _channels_first(x: NDArray[np.uint8]) -> Tensor:
    """uint8 [N,H,W,3] or [N,H,W] -> uint8 [N,3,H,W]."""
    x = np.repeat(x[..., None], 3, axis=3) if x.ndim == 3 else x
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def _from_folder(path: Path, classes: tuple[str, ...], size: tuple[int, int]) -> LabelledImages:
    missing = [name for name in classes if not (path / name).is_dir()]
    if 0 < len(missing) < len(classes):
        raise SynthkdError(f"data {path}: no folder for class {missing[0]!r}; expected one per class of the network")
    images, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(f for f in (path / name).glob("*") if f.suffix.lower() in _SUFFIXES)
        for file in files:
            images.append(_fitted(decode_image(file.read_bytes(), str(file)), size))
            labels.append(label)
    if not images:
        raise SynthkdError(f"data {path}: no images in sub-folders named {', '.join(classes[:3])}, …")
    return LabelledImages(torch.stack(images), torch.tensor(labels), classes)
