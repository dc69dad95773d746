"""CIFAR as the `cifar10` presets want it, from the evaluation pack: `python -m synthkd.bench.cifar_pack PACK OUT`.

The presets look for OUT as $SYNTHKD_DATA/cifar10, which is data/cifar10 by default.
OUT/teacher/resnet20.toml and resnet56.toml with weights, OUT/test.npz (CIFAR-10's test images), OUT/pool.npz (those of
CIFAR-100 that are of no CIFAR-10 class, with the names of their own). The pack is lossless: a colour transform, the
median predictor of LOCO-I (Weinberger, Seroussi and Sapiro 2000, IEEE TIP 9, sec. III) and LZMA2.
"""

import hashlib
import json
import lzma
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synthkd.dfkd.npz_files import UNREADABLE, write_arrays
from synthkd.dfkd.presets_cifar import POOL, TEACHERS, TEST
from synthkd.engine.errors import SynthkdError
from synthkd.engine.rows import write_atomically

Pixels = NDArray[np.uint8]
POOL_FROM, TEACHER_FROM = "cifar100/without-cifar10", "cifar10/train"  # as `engine.declared` names data sets
_SUMS, _MOST = "SHA256SUMS", 2**31  # bytes of one file's images
# Of CIFAR-100: bit-identical to a CIFAR-10 image; seen before in the pack; of a class much like one of CIFAR-10's.
_LEFT_OUT = ("in_cifar10", "dup_earlier", "near_cifar10_class")
_CARD = """# akamaster/pytorch_resnet_cifar10, BSD-2-Clause, Copyright (c) 2018, Yerlan Idelbayev
arch = "{name}"
weights = "{name}.safetensors"
input_size = [32, 32]
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
classes = [{classes}]

[about]
trained_on = ["{trained_on}"]
"""


def unpacked(blob: bytes, shape: Sequence[int]) -> Pixels:
    """Images of one packed file, uint8 [N,H,W,3], or [N,H,W] where they are grey.

    blob: XZ of what is left, channel by channel, of each pixel minus its prediction, mod 256; the prediction is the
    median of left, upper, and left + upper - upper left; the first row takes left, the first column upper. Of colours
    the channels are R - G, G, B - G. Raises ValueError where the bytes are not as many as the shape says.
    """
    n, height, width, channels = (int(v) for v in shape)
    count = math.prod((n, height, width, channels))
    if min(n, height, width) < 1 or channels not in (1, 3) or count > _MOST:
        raise ValueError(f"images of shape {(n, height, width, channels)}")
    data = lzma.LZMADecompressor(format=lzma.FORMAT_XZ).decompress(blob, max_length=count + 1)
    if len(data) != count:
        raise ValueError(f"{len(data)} bytes of images; expected {count}")
    left_over = np.frombuffer(data, np.uint8).reshape(channels, n, height, width)
    planes = np.ascontiguousarray(left_over.transpose(2, 3, 1, 0)).astype(np.int16)
    _add_predictions(planes)
    if channels == 3:
        planes[..., 0] += planes[..., 1]
        planes[..., 2] += planes[..., 1]
    images = (planes & 255).astype(np.uint8).transpose(2, 0, 1, 3)
    return np.ascontiguousarray(images if channels == 3 else images[..., 0])


def _add_predictions(planes: NDArray[np.int16]) -> None:
    """int16 [H,W,N,C]: differences become values, pixel by pixel in reading order, of all images at once."""
    height, width = planes.shape[:2]
    for x in range(1, width):
        planes[0, x] = (planes[0, x] + planes[0, x - 1]) & 255
    for y in range(1, height):
        row, above = planes[y], planes[y - 1]
        row[0] = (row[0] + above[0]) & 255
        for x in range(1, width):
            left, upper = row[x - 1], above[x]
            low, high = np.minimum(left, upper), np.maximum(left, upper)
            row[x] = (row[x] + np.clip(left + upper - above[x - 1], low, high)) & 255


def read_packed(path: Path) -> tuple[Pixels, dict[str, NDArray[Any]]]:
    """Images and the labels beside them; raises SynthkdError for a file that is missing, damaged or of another kind."""
    try:
        with np.load(path, allow_pickle=False) as data:
            images = unpacked(data["blob"].tobytes(), data["shape"].tolist())
            beside = {name: data[name] for name in data.files if name not in ("blob", "shape")}
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:120]
        raise SynthkdError(f"pack {path}: cannot be read ({reason}); expected a packed .npz of images") from error
    wrong = [name for name, values in beside.items() if name != "classes" and len(values) != len(images)]
    if wrong:
        raise SynthkdError(f"pack {path}: {wrong[0]} has {len(beside[wrong[0]])} values for {len(images)} images")
    return images, beside


def check_sums(pack: Path, names: Sequence[str]) -> None:
    """Raise SynthkdError for a file that is not there, or not the one that the pack's list of SHA-256 names."""
    sums = pack / _SUMS
    lines = sums.read_text().splitlines() if sums.is_file() else []
    listed = {name.strip().removeprefix("*"): digest for digest, _, name in (line.partition(" ") for line in lines)}
    for name in names:
        path = pack / name
        if not path.is_file():
            raise SynthkdError(f"pack {pack}: {name} is missing; expected the folder of the evaluation pack")
        if name not in listed:
            raise SynthkdError(f"pack {pack}: {_SUMS} does not name {name}; expected the whole evaluation pack")
        if hashlib.sha256(path.read_bytes()).hexdigest() != listed[name]:
            raise SynthkdError(f"pack {path}: its SHA-256 is not the one in {_SUMS}; copy the file again")


def make(pack: Path, out: Path) -> dict[str, int]:
    """Write what the presets read, and return how many images test set and pool have; raises SynthkdError."""
    parts = [f"cifar100_part{i}.npz" for i in range(4)]
    weights = {name: f"cifar10_{name}_akamaster.safetensors" for name in TEACHERS}
    check_sums(pack, ["cifar10_test.npz", *parts, *weights.values()])
    test, beside = read_packed(pack / "cifar10_test.npz")
    out.mkdir(parents=True, exist_ok=True)
    labels, classes = _labels(pack / "cifar10_test.npz", beside)
    write_arrays(out / TEST, x=test, y=labels)
    pool = _write_pool([pack / name for name in parts], out / POOL)
    names = ", ".join(json.dumps(name) for name in classes)
    for name, path in TEACHERS.items():
        (out / path).parent.mkdir(exist_ok=True)
        fresh = (out / path).with_suffix(".tmp")
        shutil.copyfile(pack / weights[name], fresh)
        fresh.replace((out / path).with_suffix(".safetensors"))
        write_atomically(out / path, _CARD.format(name=name, classes=names, trained_on=TEACHER_FROM))
    return {"test": len(test), "pool": pool}


def _write_pool(parts: Sequence[Path], path: Path) -> int:
    """Images of all parts that no flag speaks against, with captions; returns how many."""
    kept = [_out_of_domain(part) for part in parts]
    for part, (_, _, names) in zip(parts, kept, strict=True):
        if names != kept[0][2]:
            raise SynthkdError(f"pack {part}: its classes are not those of {parts[0].name}; copy the files again")
    pool, labels = (np.concatenate(side) for side in zip(*(part[:2] for part in kept), strict=True))
    left = np.unique(labels)  # the classes left out have no caption
    captions = np.array([kept[0][2][int(k)].replace("_", " ") for k in left])
    write_arrays(path, x=pool, y=np.searchsorted(left, labels), captions=captions, trained_on=np.array([POOL_FROM]))
    return len(pool)


def _labels(path: Path, beside: dict[str, NDArray[Any]]) -> tuple[NDArray[np.int64], list[str]]:
    """Labels int64 [N] and the names of classes; raises SynthkdError where one is missing or they do not fit."""
    missing = [name for name in ("y", "classes") if name not in beside]
    if missing:
        raise SynthkdError(f"pack {path}: {missing[0]} is missing; it says which images are of which class")
    y, classes = beside["y"], beside["classes"]
    if y.dtype.kind not in "iu" or y.ndim != 1 or classes.ndim != 1:
        raise SynthkdError(f"pack {path}: y is {y.dtype} {y.shape}, classes {classes.shape}; expected labels [N], [K]")
    if y.size and (y.min() < 0 or y.max() >= len(classes)):
        raise SynthkdError(f"pack {path}: y is {y.min()}..{y.max()}; there are {len(classes)} classes")
    return y.astype(np.int64), [str(name) for name in classes.tolist()]


def _out_of_domain(path: Path) -> tuple[Pixels, NDArray[np.int64], list[str]]:
    """Images of a part of CIFAR-100 that no flag speaks against, their classes, and the names of all classes."""
    images, beside = read_packed(path)
    missing = [name for name in _LEFT_OUT if name not in beside]
    if missing:
        raise SynthkdError(f"pack {path}: {missing[0]} is missing; it says which images are left out")
    labels, classes = _labels(path, beside)
    rows = ~np.logical_or.reduce([beside[name].astype(bool) for name in _LEFT_OUT])
    return images[rows], labels[rows], classes


def main(words: Sequence[str]) -> int:
    """The command: 0, or 2 after one line on standard error."""
    if len(words) != 2:
        print("usage: python -m synthkd.bench.cifar_pack PACK OUT", file=sys.stderr)
        return 2
    try:
        found = make(Path(words[0]), Path(words[1]))
    except (SynthkdError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{words[1]}: {found['test']} test images, {found['pool']} out-of-domain images, {len(TEACHERS)} teachers")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
