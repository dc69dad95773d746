"""Crop, resize and mirror: one image at a time where it is decoded, or a whole batch that is in memory.

A box is whole pixels (`views.pixel_boxes`); resizing is bilinear and antialiased, on a CPU in torch's fixed point.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from synthkd.dfkd.views import Views, pixel_boxes

Box = Sequence[int]
Put = tuple[NDArray[np.uint8], Box, bool, NDArray[np.uint8]]  # what `put` takes
_AT_ONCE = 16  # images that a thread takes at a time


class Boxes:
    """Pixel boxes of a batch's crops, made at once for the size that most images have."""

    def __init__(self, box: NDArray[np.float32], common: tuple[int, int]) -> None:
        """box: float32 [B,4] as in `Views`; common: height and width of a set's images."""
        self._box, self._common = box, common
        self._made: list[Box] = pixel_boxes(box, *common).tolist()

    def at(self, position: int, size: tuple[int, int]) -> Box:
        """Top, left, height and width of an image's crop."""
        if size == self._common:
            return self._made[position]
        found: Box = pixel_boxes(self._box[position : position + 1], *size)[0].tolist()
        return found


def resized(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 [H,W,3] -> uint8 [h,w,3]; the same array where that is its size."""
    if pixels.shape[:2] == size:
        return pixels
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]  # channels_last: torch's kernel of bytes, 4x as fast
    return F.interpolate(image, size=list(size), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def put(pixels: NDArray[np.uint8], box: Box, flip: bool, out: NDArray[np.uint8]) -> None:
    """Write an image's crop, resized and mirrored, to uint8 [h,w,3]; `pixels` may be `out` itself."""
    top, left, height, width = box
    part = resized(pixels[top : top + height, left : left + width], (out.shape[0], out.shape[1]))
    if flip:
        out[...] = part[:, ::-1]
    elif not np.may_share_memory(part, out):
        out[...] = part


def put_all(work: Sequence[Put], pool: Executor | None) -> None:
    """Call `put` for each, on the threads of a pool if there is one."""
    if pool is None:
        _put_some(work)
    else:
        list(pool.map(_put_some, [work[start : start + _AT_ONCE] for start in range(0, len(work), _AT_ONCE)]))


def _put_some(work: Sequence[Put]) -> None:
    for one in work:
        put(*one)


def whole(boxes: NDArray[np.int64], height: int, width: int) -> bool:
    """Whether all of [B,4] boxes are the whole image."""
    return bool((boxes == np.array([0, 0, height, width])).all())


def viewed(images: Tensor, views: Views, size: tuple[int, int], pool: Executor | None = None) -> Tensor:
    """uint8 [B,H,W,3], fresh memory -> uint8 [B,h,w,3], cropped, resized and mirrored as `views` say, where it lies.

    pool: threads for images that are resized on a CPU; pixels are those of `put` there. Elsewhere images are resized by
    one product of matrices in float32 for the batch, which differs from fixed point by 1 at most.
    """
    height, width = images.shape[1:3]
    boxes = pixel_boxes(views.box, height, width)
    plain = whole(boxes, height, width) and (height, width) == size
    if images.device.type == "cpu":
        return _mirrored(images, views.flip) if plain else _one_by_one(images, boxes, views.flip, size, pool)
    out = images if plain else by_matrices(images, boxes, size)
    if not views.flip.any():
        return out
    flip = torch.from_numpy(views.flip).to(out.device, non_blocking=True).view(-1, 1, 1, 1)
    return torch.where(flip, out.flip(2), out)


def _mirrored(images: Tensor, flip: NDArray[np.bool_]) -> Tensor:
    if flip.any():
        where = torch.from_numpy(np.flatnonzero(flip))
        images[where] = images[where].flip(2)
    return images


def _one_by_one(
    images: Tensor, boxes: NDArray[np.int64], flip: NDArray[np.bool_], size: tuple[int, int], pool: Executor | None
) -> Tensor:
    out = torch.empty(len(images), *size, 3, dtype=torch.uint8)
    put_all(list(zip(images.numpy(), boxes.tolist(), flip.tolist(), out.numpy(), strict=True)), pool)
    return out


def by_matrices(images: Tensor, boxes: NDArray[np.int64], size: tuple[int, int]) -> Tensor:
    """Crop and resize uint8 [B,H,W,3] as out = R_y crop R_x^T, R the rows of bilinear weights; uint8 [B,h,w,3]."""
    count, height, width = images.shape[:3]
    b = torch.from_numpy(boxes).to(images.device, non_blocking=True)
    rows = _weights(b[:, 0], b[:, 2], height, size[0])
    columns = _weights(b[:, 1], b[:, 3], width, size[1])
    out = torch.empty(count, *size, 3, dtype=torch.uint8, device=images.device)
    for part in _parts(count, 3 * height * width * 8):
        x = images[part].float().flatten(2)
        tall = (rows[part] @ x).view(-1, size[0], width, 3)
        out[part] = (columns[part, None] @ tall).clamp_(0, 255).round_().to(torch.uint8)
    return out


def _parts(count: int, each: int, most: int = 2**30) -> Iterator[slice]:
    """Slices of a batch whose images take `each` bytes, at most `most` together."""
    step = max(1, most // each)
    yield from (slice(start, start + step) for start in range(0, count, step))


def _weights(start: Tensor, length: Tensor, stored: int, wanted: int) -> Tensor:
    """float32 [B, wanted, stored]: triangle filters as wide as the scale where images shrink, cut off at the crop."""
    scale = (length.float() / wanted)[:, None, None]
    center = (torch.arange(wanted, device=start.device, dtype=torch.float32)[None, :, None] + 0.5) * scale
    place = torch.arange(stored, device=start.device)[None, None, :] - start[:, None, None]
    inside = (place >= 0) & (place < length[:, None, None])
    weight = (1 - ((place + 0.5 - center) / scale.clamp(min=1)).abs()).clamp(min=0) * inside
    return weight / weight.sum(2, keepdim=True)
