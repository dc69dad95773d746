"""Dense tasks (segmentation): label maps in step with images' views, losses and scores per pixel, a set in memory."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from synthkd.dfkd.feed import Pixels, ReadOptions, Request, Rows
from synthkd.dfkd.losses import wide
from synthkd.dfkd.views import Views, ViewSpec, affine, pixel_boxes
from synthkd.engine.errors import SynthkdError
from synthkd.kernels import kd_loss

IGNORE = 255  # the label of pixels that no loss and no score counts
Size = tuple[int, int]
_AS_IT_IS = np.array([0, 1, 0, 0], np.float32)  # of `Views.affine`


def check_dense_views(spec: ViewSpec) -> None:
    """Raise SynthkdError for views that label maps cannot follow."""
    if spec.mix:
        raise SynthkdError(f"distill: mix is {spec.mix}, but label maps cannot be blended; set mix to 0")


def cut(image: Tensor, box: Sequence[int], flip: bool, size: Size) -> Tensor:
    """An image [C,H,W] -> its crop `box` (top, left, height, width in pixels), mirrored, at `size`.

    uint8 is resized bilinearly with antialiasing and rounded; int64 is a label map, whose nearest pixels are taken (of
    equal centres, as in bilinear resizing).
    """
    top, left, height, width = (int(v) for v in box)
    part = image[:, top : top + height, left : left + width]
    part = part.flip(2) if flip else part
    if (height, width) == tuple(size):
        return part
    if image.dtype == torch.int64:
        return resized_labels(part, size)
    found = F.interpolate(part[None].float(), size=list(size), mode="bilinear", antialias=True)[0]
    return found.round().clamp(0, 255).to(torch.uint8)


def resized_labels(masks: Tensor, size: Size) -> Tensor:
    """Label maps int64 [B,h,w] at another size, nearest pixels; labels below 2**24."""
    if tuple(masks.shape[1:]) == tuple(size):
        return masks
    return F.interpolate(masks[:, None].float(), size=list(size), mode="nearest-exact")[:, 0].long()


def turned_labels(masks: Tensor, views: Views) -> Tensor:
    """The affine part of views on label maps int64 [B,h,w], as `views.looks` does it on images; the border repeats."""
    if (views.affine == _AS_IT_IS).all():
        return masks
    turn = torch.from_numpy(views.affine).to(masks.device, non_blocking=True)
    return affine(masks[:, None].float(), turn, mode="nearest")[:, 0].round().long()


def dense_kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, masks: Tensor | None = None
) -> Tensor:
    """Distillation loss per pixel, T^2 KL(softmax(t/T) || softmax(s/T)), mean over pixels that count, a scalar.

    arXiv 1503.02531 on every position, by the op `kd_loss`. student_logits, teacher_logits: [B,K,h,w]; the student's
    are resized (bilinear) to the teacher's size where it differs. masks: int64 [B,H,W]; pixels of IGNORE are left out,
    masks of another size are resized (nearest). Zero where no pixel counts. Computed in float32; float64 stays.
    """
    s, t = _at(student_logits, _size(teacher_logits)), wide(teacher_logits).detach()
    s, t = _rows(s), _rows(t)
    if masks is None:
        return kd_loss(s, t, temperature)
    counts = resized_labels(masks, _size(teacher_logits)).flatten() != IGNORE
    # An ignored pixel's student is replaced by its teacher: its loss and gradient are zero, no pixel is looked for.
    loss = kd_loss(torch.where(counts[:, None], s, t.to(s.dtype)), t, temperature)
    return loss * len(counts) / counts.sum().clamp_min(1)


def dense_hard_loss(student_logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy per pixel in nats, mean over pixels that count (zero for none), a scalar; float32 at least.

    student_logits: [B,K,h,w], resized (bilinear) to the masks; masks: int64 [B,H,W], IGNORE left out.
    """
    total = F.cross_entropy(_at(student_logits, _size(masks)), masks, ignore_index=IGNORE, reduction="sum")
    return total / (masks != IGNORE).sum().clamp_min(1)


def dense_confusion(predicted: Tensor, masks: Tensor, num_classes: int) -> Tensor:
    """Counts of pixels int64 [K,K], rows true, columns predicted, IGNORE left out.

    predicted, masks: int64 of one shape.
    """
    pairs = torch.where(masks == IGNORE, num_classes**2, masks * num_classes + predicted)
    return torch.bincount(pairs.flatten(), minlength=num_classes**2 + 1)[:-1].view(num_classes, num_classes)


def class_iou(confusion: Tensor) -> list[float | None]:
    """Intersection over union of each class in percent; None for one that is neither there nor predicted."""
    counts = confusion.double()
    both = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - both
    return [round(100 * float(b / u), 4) if u > 0 else None for b, u in zip(both, union, strict=True)]


def mean_iou(confusion: Tensor) -> float:
    """Mean intersection over union in percent, over the classes that are there or predicted; 0 where none is."""
    known = [value for value in class_iou(confusion) if value is not None]
    return round(sum(known) / len(known), 4) if known else 0.0


@dataclass(frozen=True)
class DensePixels(Pixels):
    """Pixels with their label maps, int64 [B,h,w], cropped and mirrored as the images are."""

    masks: Tensor


class DenseImages:
    """Images with label maps in memory, a `Source`. Its reader's Pixels are DensePixels."""

    def __init__(
        self, images: Tensor, masks: Tensor, classes: Sequence[str], previews: NDArray[np.bool_] | None = None
    ) -> None:
        """images: uint8 [N,3,H,W]; masks: int64 [N,H,W], labels below K or IGNORE; classes: K names in label order.

        Raises SynthkdError for shapes, dtypes and labels that do not fit.
        """
        shape = (len(images), *images.shape[2:])
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or not len(images):
            raise SynthkdError(f"dense set: images are {_says(images)}; expected uint8 [N,3,H,W], one at least")
        if masks.dtype != torch.int64 or tuple(masks.shape) != shape:
            raise SynthkdError(f"dense set: masks are {_says(masks)}; expected int64 {list(shape)}")
        if not 1 <= len(classes) <= IGNORE:
            raise SynthkdError(f"dense set: {len(classes)} classes; expected 1 to {IGNORE}, {IGNORE} means ignore")
        wrong = ((masks < 0) | (masks >= len(classes))) & (masks != IGNORE)
        if bool(wrong.any()):
            label = int(masks[wrong][0])
            raise SynthkdError(
                f"dense set: masks hold label {label}; expected 0 to {len(classes) - 1}, or {IGNORE} to ignore a pixel"
            )
        self.images, self.masks, self.classes = images, masks, tuple(classes)
        self.previews = np.zeros(len(images), bool) if previews is None else previews
        self.labels: Rows = np.array([_commonest(m, len(classes)) for m in masks], np.int64)
        self.digest = _digest(images, masks, self.classes)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def keys(self, rows: Rows) -> tuple[str, ...]:
        """Row numbers in nine digits."""
        return tuple(f"{int(row):09d}" for row in rows)

    def reader(self, size: Size, options: ReadOptions) -> "DenseReader":
        """A reader at height x width; nothing is decoded, so no option matters but the device."""
        return DenseReader(self, size, options.device)


class DenseReader:
    """Reads a DenseImages: a `Reader` whose Pixels have masks."""

    name, decoder = "memory", "none"

    def __init__(self, source: DenseImages, size: Size, device: str) -> None:
        """See `DenseImages.reader`."""
        self.source, self.size, self.device = source, size, device
        self.damaged: dict[str, str] = {}

    def read(self, requests: Iterable[Request]) -> Iterator[DensePixels]:
        """Images and label maps of each request, in order. Raises SynthkdError for views that blend images."""
        for request in requests:
            if request.views.blended.any():
                check_dense_views(ViewSpec(mix=1.0))
            yield self._read(request)

    def _read(self, request: Request) -> DensePixels:
        boxes = pixel_boxes(request.views.box, *self.source.images.shape[2:])
        rows = list(zip(request.rows.tolist(), boxes.tolist(), request.views.flip.tolist(), strict=True))
        images = torch.stack([cut(self.source.images[r], box, flip, self.size) for r, box, flip in rows])
        masks = torch.stack([cut(self.source.masks[r][None], box, flip, self.size)[0] for r, box, flip in rows])
        images = images.contiguous(memory_format=torch.channels_last)
        return DensePixels(images.to(self.device), np.arange(len(rows)), masks.to(self.device))

    def close(self) -> None:
        """Nothing is held."""


def _commonest(mask: Tensor, num_classes: int) -> int:
    """The label of most pixels that count; 0 where none does."""
    return int(torch.bincount(mask[mask != IGNORE].flatten(), minlength=num_classes).argmax())


def _digest(images: Tensor, masks: Tensor, classes: Sequence[str]) -> str:
    found = hashlib.sha256(repr((tuple(images.shape), classes)).encode())
    for image, mask in zip(images, masks, strict=True):
        found.update(image.contiguous().numpy().tobytes())
        found.update(mask.to(torch.uint8).contiguous().numpy().tobytes())
    return found.hexdigest()


def _says(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _size(x: Tensor) -> Size:
    return int(x.shape[-2]), int(x.shape[-1])


def _at(logits: Tensor, size: Size) -> Tensor:
    """Logits [B,K,h,w] at another size, float32 at least."""
    scores = wide(logits)
    return scores if _size(scores) == size else F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


def _rows(logits: Tensor) -> Tensor:
    """[B,K,h,w] -> [B*h*w,K]."""
    return logits.movedim(1, 3).reshape(-1, logits.shape[1])
