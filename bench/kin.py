"""Words for classes that a prior does not know: `python -m synthkd.bench.kin POOL.npz TEACHER.toml [--each 6]`.

The teacher reads the captioned images that a prior is trained on. A caption belongs to a class in proportion to how
much of the teacher's word on its images goes there, and a class is called by the captions that have most of it. What
is printed is a file for `synthkd synth --targets`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from synthkd.dfkd.prior_data import Captioned, load_captioned
from synthkd.dfkd.teachers import Teacher, load_teacher
from synthkd.engine.errors import SynthkdError

_BATCH = 256


@torch.no_grad()
def shares(data: Captioned, teacher: Teacher, most: int) -> Tensor:
    """float64 [captions, classes]: the teacher's mean probabilities over the first `most` images of each caption."""
    count, found = len(data.captions), torch.zeros(len(data.captions), len(teacher.classes), dtype=torch.float64)
    for caption in range(count):
        rows = torch.nonzero(data.labels == caption).flatten()[:most]
        parts = [teacher(data.images[part].float() / 255).softmax(dim=1) for part in torch.split(rows, _BATCH)]
        if len(rows):  # a caption without images has no word
            found[caption] = torch.cat(parts).double().mean(dim=0)
    return found


def kin(found: Tensor, each: int) -> list[list[int]]:
    """Of each class the `each` captions with the largest share, largest first; never one without images."""
    shown = torch.nonzero(found.sum(1)).flatten()
    return [shown[found[shown, k].argsort(descending=True, stable=True)[:each]].tolist() for k in range(found.shape[1])]


def main(words: Sequence[str]) -> int:
    """The command: 0, or 2 after one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m synthkd.bench.kin", description="Words for unknown classes.")
    parser.add_argument("pool", type=Path, help="captioned .npz that the prior is trained on")
    parser.add_argument("teacher", help="teacher card")
    parser.add_argument("--each", type=int, default=6, help="captions of each class")
    parser.add_argument("--images", type=int, default=100, help="images of each caption that the teacher reads")
    asked = parser.parse_args(words)
    try:
        if min(asked.each, asked.images) < 1:
            raise SynthkdError("--each and --images: expected whole numbers >= 1")
        data, teacher = load_captioned(asked.pool), load_teacher(asked.teacher)
        found = shares(data, teacher, asked.images)
    except (SynthkdError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, rows in zip(teacher.classes, kin(found, asked.each), strict=True):
        told = ", ".join(f"{data.captions[r]} {100 * found[r, teacher.classes.index(name)]:.0f} %" for r in rows)
        print(f"[{json.dumps(name)}]\nwords = {json.dumps('|'.join(data.captions[r] for r in rows))}  # {told}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
