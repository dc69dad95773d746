"""The teacher's logits of every view of every image, stored beside a set: no teacher is left in the training loop.

Fast Knowledge Distillation (arXiv 2112.01528) stores views and labels once for all students. A set's images never
change; its labels lie in `soft_labels/KEY/`, where KEY hashes (set, teacher, view seed, reach of the views, decoder).
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthkd.dfkd.feed import Reader, Rows, Source
from synthkd.dfkd.parallel import Ranks
from synthkd.dfkd.sight import Asked, Sight, batch_of, request_for
from synthkd.dfkd.teachers import Teacher, teacher_digest
from synthkd.dfkd.tensor_files import read_tensors, write_tensors
from synthkd.dfkd.views import Views, looks, view_of_epoch
from synthkd.engine.errors import SynthkdError

CHUNK = 8192  # rows of a file
BATCH = 256
FOLDER, NOTE = "soft_labels", "labels.json"
_VIEW = ("box", "flip", "affine", "partner", "share")


@dataclass(frozen=True)
class Stored:
    """What one call of `store_labels` did: the folder, bytes in it, and views of images labelled now, per second."""

    folder: Path
    bytes: int
    labelled: int
    images_per_second: float


@dataclass(frozen=True)
class StoredLabels:
    """Labels of a set's first `sight.count` rows in `sight.views` views; float16 where that holds them."""

    folder: Path
    sight: Sight
    classes: int

    def of(self, rows: Rows, epochs: Rows) -> Tensor:
        """Logits [B,K] of rows in the view of their epoch; raises SynthkdError for files that are not whole."""
        out: Tensor | None = None
        views = np.array([view_of_epoch(int(e), self.sight.views) for e in epochs])
        for view in np.unique(views):
            here = views == view
            table = _table(self.folder, self.sight, int(view), self.classes)
            found = table[torch.from_numpy(rows[here])].float()
            out = found.new_empty(len(rows), found.shape[1]) if out is None else out
            out[torch.from_numpy(here)] = found
        assert out is not None
        return out


def labels_folder(root: Path, source: Source, teacher: Teacher, sight: Sight, decoder: str) -> tuple[Path, Any]:
    """Where a set's labels lie, and what they are a function of."""
    parts: dict[str, Any] = {
        "set": source.digest,
        "teacher": teacher_digest(teacher),
        "seed": sight.seed,
        "reach": asdict(sight.spec),
        "rows": sight.count,
        "decoder": decoder,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return root / FOLDER / key, parts


def store_labels(
    root: Path,
    source: Source,
    reader: Reader,
    teacher: Teacher,
    sight: Sight,
    ranks: Ranks | None = None,
    on_images: Callable[[int], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[StoredLabels | None, Stored]:
    """Label what is not labelled yet: files of 8,192 rows a view, each written whole; None where it was stopped.

    ranks: processes among which the files are shared out; all of them come back together, with the same answer.
    The logits are of the decoded file under the view's crop, flip, affine part and blend. Raises SynthkdError for
    logits that are not finite and for a folder that cannot be written.
    """
    ranks = ranks or Ranks()
    folder, parts = labels_folder(root, source, teacher, sight, reader.decoder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if ranks.first and not (folder / NOTE).exists():
            temporary = folder / f"{NOTE}.{os.getpid()}.tmp"  # two trainings may label one set
            temporary.write_text(json.dumps(parts, indent=2, sort_keys=True) + "\n")
            temporary.replace(folder / NOTE)
    except OSError as error:
        raise SynthkdError(f"{folder}: cannot be written ({error.strerror}); make the set's folder writable") from error
    began, labelled, stopped = time.perf_counter(), 0, False
    files = [(view, first) for view in range(sight.views) for first in range(0, sight.count, CHUNK)]
    for view, first in files[ranks.rank :: ranks.world]:
        path, rows = _file(folder, view, first), np.arange(first, min(first + CHUNK, sight.count))
        if path.exists():
            on_images(len(rows))
            continue
        tensors = _label(source, reader, teacher, sight, view, rows, on_images, should_stop)
        if stopped := tensors is None:
            break
        write_tensors(path, tensors or {}, {"view": view, "first": first})
        labelled += len(rows)
    stopped = ranks.any(stopped)
    return None if stopped else StoredLabels(folder, sight, len(teacher.classes)), _told(folder, labelled, began)


def _told(folder: Path, labelled: int, began: float) -> Stored:
    size = sum(p.stat().st_size for p in folder.glob("view-*.safetensors"))
    return Stored(folder, size, labelled, labelled / max(time.perf_counter() - began, 1e-9))


def _file(folder: Path, view: int, first: int) -> Path:
    return folder / f"view-{view:04d}-{first:09d}.safetensors"


@torch.no_grad()
def _label(
    source: Source,
    reader: Reader,
    teacher: Teacher,
    sight: Sight,
    view: int,
    rows: Rows,
    on_images: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> dict[str, Tensor] | None:
    """Logits and views of some rows in one view."""
    device, logits, seen, under_way = teacher.get_buffer("mean").device, [], [], list[Asked]()

    def requests() -> Iterator[Any]:
        for part in np.array_split(rows, -(-len(rows) // BATCH)):
            under_way.append(request_for(part, np.full(len(part), view), sight, 0))
            yield under_way[-1].request

    for pixels in reader.read(requests()):
        if should_stop():
            return None
        asked = under_way.pop(0)
        batch = batch_of(source, asked, pixels)
        partners = batch.partners if batch.partners is None else batch.partners.to(device)
        logits.append(teacher(looks(batch.images.to(device), batch.views, sight.spec, partners)).float().cpu())
        seen.append(asked.request.views.take(slice(0, asked.size)))
        on_images(len(batch))
    found, views = torch.cat(logits), Views.cat(seen)
    return {"logits": _packed(found), **{name: torch.from_numpy(np.array(getattr(views, name))) for name in _VIEW}}


def _packed(logits: Tensor) -> Tensor:
    """float16, or float32 where that overflows; raises SynthkdError where a logit is not finite."""
    if not torch.isfinite(logits).all():
        raise SynthkdError("soft labels: the teacher's logits are not finite on some image; check its card and weights")
    half = logits.half()
    return half if torch.isfinite(half).all() else logits


@lru_cache(maxsize=2)
def _table(folder: Path, sight: Sight, view: int, classes: int) -> Tensor:
    """Logits [count,K] of one view; raises SynthkdError for files that are not whole, or of other views than drawn."""
    parts = [_chunk(folder, sight, view, first, classes) for first in range(0, sight.count, CHUNK)]
    return torch.cat([p.float() for p in parts]) if len({p.dtype for p in parts}) > 1 else torch.cat(parts)


def _chunk(folder: Path, sight: Sight, view: int, first: int, classes: int) -> Tensor:
    """Logits of one file, checked against what it ought to hold."""
    path, rows = _file(folder, view, first), np.arange(first, min(first + CHUNK, sight.count))
    tensors, note = read_tensors(path)
    logits, drawn = tensors.get("logits"), sight.of(rows, np.full(len(rows), view))
    fits = logits is not None and tuple(logits.shape) == (len(rows), classes)
    fits = fits and logits is not None and logits.is_floating_point() and bool(torch.isfinite(logits).all())
    if not fits or logits is None or note != {"view": view, "first": first}:
        raise SynthkdError(f"{path}: holds no labels of {len(rows)} images; delete it and run the command again")
    read = _views_of(tensors)
    if read is None or not all(np.array_equal(read[name], getattr(drawn, name)) for name in _VIEW):
        raise SynthkdError(f"{path}: is of other views than this version draws; delete its folder and label anew")
    return logits


def _views_of(tensors: dict[str, Tensor]) -> dict[str, NDArray[Any]] | None:
    """The views that a file's labels are of; None where one is missing."""
    return {name: tensors[name].numpy() for name in _VIEW} if set(_VIEW) <= set(tensors) else None
