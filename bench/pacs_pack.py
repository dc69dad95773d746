"""PACS as the `pacs-sketch` presets want it, from the evaluation pack: `python -m synthkd.bench.pacs_pack PACK OUT`.

OUT/pool.npz (all photos, art paintings and cartoons, with captions: for priors and pool methods), OUT/train.npz and
OUT/test.npz (sketches: the teacher's own data, and what scores). PACS: Li et al. 2017 (arXiv 1710.03077).
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from synthkd.bench.cifar_pack import check_sums
from synthkd.dfkd.decode import decode, stored_size
from synthkd.dfkd.npz_files import UNREADABLE, check_archive, write_arrays
from synthkd.dfkd.presets_pacs import DOMAINS, POOL, TEST, TRAIN
from synthkd.engine.errors import SynthkdError

# Domain in captions -> (its file in the pack, its name as `engine.declared` names data sets)
_FILES: Mapping[str, tuple[str, str]] = {
    "photo": ("pacs_photo.npz", "pacs/photo"),
    "art painting": ("pacs_art.npz", "pacs/art_painting"),
    "cartoon": ("pacs_cartoon.npz", "pacs/cartoon"),
}
_SKETCH, _SKETCH_NAME = "pacs_sketch.npz", "pacs/sketch"
_MOST_PIXELS, _MOST_BYTES = 2**20, 2**29  # of one image; of all arrays of a file
_SIDES = range(8, 513)
Pixels = NDArray[np.uint8]


class Domain:
    """One file of the pack: encoded images, their classes [N] and whether they are for testing, bool [N]."""

    def __init__(self, path: Path) -> None:
        """Raises SynthkdError for a file that is missing, damaged or of another kind."""
        self.path, data = path, _arrays(path)
        self._blob, self._ends = data["blob"], data["off"].astype(np.int64)
        self.labels, self.test = data["y"].astype(np.int64), data["test"].astype(bool)
        self.classes = tuple(str(name) for name in data["classes"].tolist())
        self._check()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def _check(self) -> None:
        count, ends = len(self), self._ends
        if count == 0 or self.labels.shape != (count,) or self.test.shape != (count,) or ends.shape != (count + 1,):
            shapes = f"y {self.labels.shape}, test {self.test.shape}, off {ends.shape}"
            raise SynthkdError(f"pack {self.path}: {shapes}; expected [N], [N] and [N+1], N at least 1")
        if self._blob.dtype != np.uint8 or ends[0] != 0 or ends[-1] != self._blob.size or (np.diff(ends) <= 0).any():
            raise SynthkdError(f"pack {self.path}: off does not cut the {self._blob.size} bytes of blob into images")
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            found = f"{self.labels.min()}..{self.labels.max()}"
            raise SynthkdError(f"pack {self.path}: y is {found}; there are {len(self.classes)} classes")

    def images(self, side: int, rows: NDArray[np.int64] | None = None) -> Pixels:
        """Images of rows (all by default) as uint8 [M,side,side,3], resized (bilinear, antialiased).

        Grey becomes three equal channels. Raises SynthkdError for what is no PNG, JPEG or WebP, is not square, or
        giant.
        """
        rows = np.arange(len(self)) if rows is None else rows
        out = np.empty((len(rows), side, side, 3), np.uint8)
        for place, row in enumerate(rows.tolist()):
            file = self._blob[self._ends[row] : self._ends[row + 1]].tobytes()
            out[place] = _resized(file, f"pack {self.path}: image {row}", side)
        return out


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """What a domain's file holds, read without pickles, its size bounded before anything is unpacked."""
    names = ("blob", "off", "y", "test", "classes")
    try:
        check_archive(path, _MOST_BYTES)
        with np.load(path, allow_pickle=False) as data:
            found = {name: data[name] for name in names}
        wrong = next((n for n in names if found[n].ndim != 1 or found[n].dtype.kind not in "uibU"), None)
        if wrong is not None:
            raise ValueError(f"{wrong} is {found[wrong].dtype} {found[wrong].shape}")
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:120]
        raise SynthkdError(f"pack {path}: expected arrays {', '.join(names)} ({reason})") from error
    return found


def _resized(data: bytes, where: str, side: int) -> Pixels:
    """Image file -> uint8 [side,side,3]."""
    height, width = stored_size(data, where)
    if height * width > _MOST_PIXELS or height != width:
        raise SynthkdError(f"{where}: {width}x{height} pixels; expected a square of at most {_MOST_PIXELS} pixels")
    image = torch.from_numpy(decode(data, where).copy()).permute(2, 0, 1)[None].float()
    small = F.interpolate(image, size=[side, side], mode="bilinear", antialias=True)[0]
    pixels: Pixels = small.clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return pixels


def _domains() -> list[tuple[str, str]]:
    """Files and names of the pool's domains, in the order of captions."""
    return [_FILES[domain] for domain in DOMAINS]


def read_domain(pack: Path, name: str, classes: tuple[str, ...] | None = None) -> Domain:
    """A file of the pack; raises SynthkdError, also where its classes are not those of another domain."""
    domain = Domain(pack / name)
    if classes is not None and domain.classes != classes:
        raise SynthkdError(f"pack {domain.path}: classes {list(domain.classes)}; {_SKETCH} has {list(classes)}")
    return domain


def make(pack: Path, out: Path, side: int = 64) -> dict[str, int]:
    """Write pool, train and test part, and return how many images each has; raises SynthkdError."""
    if side not in _SIDES:
        raise SynthkdError(f"--side is {side}; expected {_SIDES.start} to {_SIDES.stop - 1}")
    check_sums(pack, [_SKETCH, *(name for name, _ in _domains())])
    sketch = read_domain(pack, _SKETCH)
    if sketch.test.all() or not sketch.test.any():
        raise SynthkdError(f"pack {sketch.path}: test is {sketch.test[0]} for all images; expected both parts")
    out.mkdir(parents=True, exist_ok=True)
    pool = _write_pool(pack, out / POOL, sketch.classes, side)
    parts = {TRAIN: np.flatnonzero(~sketch.test), TEST: np.flatnonzero(sketch.test)}
    for name, rows in parts.items():
        where = f"{_SKETCH_NAME}/{Path(name).stem}"
        x = sketch.images(side, rows)
        write_arrays(out / name, x=x, y=sketch.labels[rows], classes=np.array(sketch.classes), trained_on=[where])
    return {"pool": pool, "train": len(parts[TRAIN]), "test": len(parts[TEST])}


def _write_pool(pack: Path, path: Path, classes: tuple[str, ...], side: int) -> int:
    """All images of the other domains; a caption for each domain and class. Returns how many images."""
    domains = [read_domain(pack, name, classes) for name, _ in _domains()]
    captions = [f"{domain} {name}" for domain in DOMAINS for name in classes]
    x = np.concatenate([domain.images(side) for domain in domains])
    y = np.concatenate([domain.labels + i * len(classes) for i, domain in enumerate(domains)])
    write_arrays(path, x=x, y=y, captions=np.array(captions), trained_on=[name for _, name in _domains()])
    return len(x)


def main(words: Sequence[str]) -> int:
    """The command: 0, or 2 after one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m synthkd.bench.pacs_pack", description=__doc__)
    parser.add_argument("pack", type=Path, help="folder of the evaluation pack")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--side", type=int, default=64, help="side of the images in pixels (64)")
    args = parser.parse_args(words)
    try:
        found = make(args.pack, args.out, args.side)
    except (SynthkdError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {found['pool']} images of other domains, {found['train']} and {found['test']} sketches")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
