"""Label maps in step with their images; losses and scores per pixel against loops."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from synthkd.dfkd.dense import (
    IGNORE,
    DenseImages,
    class_iou,
    dense_confusion,
    dense_hard_loss,
    dense_kd_loss,
    mean_iou,
    turned_labels,
)
from synthkd.dfkd.feed import Order, ReadOptions, Request
from synthkd.dfkd.sight import Sight, ask, batch_of
from synthkd.dfkd.views import ViewSpec, draw_views, looks
from synthkd.engine.errors import SynthkdError

N, K, H, W = 6, 5, 9, 14


def _coded() -> DenseImages:
    """A label map whose value stands in the image's first channel, 20 for each label."""
    masks = torch.randint(0, K, (N, H, W), generator=torch.Generator().manual_seed(0))
    masks[:, 2, 3] = IGNORE
    codes = torch.where(masks == IGNORE, 12, masks) * 20
    images = codes[:, None].expand(-1, 3, -1, -1).to(torch.uint8).contiguous()
    return DenseImages(images, masks, [f"class {k}" for k in range(K)])


def _label(value: Tensor) -> Tensor:
    """The label that a first channel stands for."""
    found = (value / 20).round().long()
    return torch.where(found == 12, IGNORE, found)


@pytest.mark.parametrize("size", [(H, W), (2 * H, 2 * W)])
def test_crops_and_flips_in_step(size: tuple[int, int]) -> None:
    """Pixel (y,x) of a mask is its image's: exactly where nothing is resized, at crops' inner pixels where it is."""
    source = _coded()
    views = draw_views(ViewSpec(crop=0.4, flip=True), 3, 1, np.arange(N), N)
    whole = draw_views(ViewSpec(flip=True), 3, 1, np.arange(N), N)
    asked = [Request(np.arange(N), v) for v in (whole, views)]
    plain, cropped = source.reader(size, ReadOptions()).read(asked)
    assert views.flip.any()
    assert not views.flip.all()
    assert cropped.images.shape == (N, 3, *size)
    if size == (H, W):
        assert torch.equal(_label(plain.images[:, 0].float()), plain.masks)
    row = int(np.argmin(views.box[:, 2]))  # by hand: the crop's nearest source pixels, mirrored or not
    top, left, height, width = (views.box[row] * np.array([H, W, H, W])).tolist()
    height, width = max(1, round(height)), max(1, round(width))
    top, left = min(int(top), H - height), min(int(left), W - width)
    part = source.masks[row, top : top + height, left : left + width]
    for y, x in itertools.product(range(size[0]), range(size[1])):
        column = size[1] - 1 - x if views.flip[row] else x
        wanted = part[int((y + 0.5) * height / size[0]), int((column + 0.5) * width / size[1])]
        assert cropped.masks[row, y, x] == wanted


def test_whole_pixel_shifts_and_a_half_turn_in_step() -> None:
    """Where bilinear lands on pixels, the mask is what the image says; and it moves."""
    source = _coded()
    views = draw_views(ViewSpec(shift=0.2), 0, 0, np.arange(N), N)
    views.affine[:, 0] = np.array([0, 0, 0, np.pi, 0, np.pi])
    views.affine[:, 2] = np.array([0, 2, -4, 0, 2, 2]) / H  # in halves of the side
    views.affine[:, 3] = np.array([2, 0, 4, 0, -2, 0]) / W
    spec = ViewSpec(shift=0.2, rotate=0.1)
    square = source.images[..., :H], source.masks[..., :H].contiguous()
    views.affine[:, 3] *= W / H
    seen = looks(square[0], views, spec)[:, 0] * 255
    found = turned_labels(square[1], views)
    assert torch.equal(_label(seen), found)
    assert (found != square[1]).any(dim=(1, 2)).all()


def test_batches_of_the_loop_have_masks_in_step() -> None:
    """Through order and views of a training run: image and label map of a batch show the same, in every epoch."""
    source = _coded()
    sight, order = Sight(ViewSpec(flip=True), 7, 0, N), Order(N, 4, 7)
    asked = [ask(order, sight, step) for step in range(3)]
    for one, pixels in zip(asked, source.reader((H, W), ReadOptions()).read(a.request for a in asked), strict=True):
        batch = batch_of(source, one, pixels)
        assert batch.masks is not None
        assert torch.equal(_label(batch.images[:, 0].float()), batch.masks)
        assert batch.labels.tolist() == source.labels[batch.rows].tolist()
    sight = Sight(ViewSpec(rotate=0.5), 7, 0, N)
    one = ask(order, sight, 0)
    (pixels,) = source.reader((H, W), ReadOptions()).read([one.request])
    turned = batch_of(source, one, pixels).masks
    assert turned is not None
    assert (turned != source.masks[one.request.rows]).any()


def test_refusals() -> None:
    """One line for blends, labels, shapes and dtypes."""
    source = _coded()
    views = draw_views(ViewSpec(mix=1.0), 0, 0, np.arange(N), N)
    with pytest.raises(SynthkdError, match="label maps cannot be blended"):
        next(source.reader((H, W), ReadOptions()).read([Request(np.arange(N), views)]))
    with pytest.raises(SynthkdError, match="hold label 4; expected 0 to 3"):
        DenseImages(source.images, source.masks, source.classes[:4])
    with pytest.raises(SynthkdError, match=r"masks are int64 \[6, 9, 13\]; expected int64 \[6, 9, 14\]"):
        DenseImages(source.images, source.masks[..., 1:], source.classes)
    with pytest.raises(SynthkdError, match="images are float32"):
        DenseImages(source.images.float(), source.masks, source.classes)


def test_source() -> None:
    """What the loader asks of a source; the digest sees a pixel of a mask."""
    source = _coded()
    moved = source.masks.clone()
    moved[0, 0, 0] = (moved[0, 0, 0] + 1) % K
    assert source.digest != DenseImages(source.images, moved, source.classes).digest
    assert source.keys(np.array([3, 0])) == ("000000003", "000000000")
    counts = [int((source.masks[2] == k).sum()) for k in range(K)]
    assert counts[source.labels[2]] == max(counts)
    assert len(source) == N


def _kl(s: Tensor, t: Tensor, temperature: float) -> float:
    p, q = (t / temperature).softmax(0), (s / temperature).softmax(0)
    return float((p * (p.log() - q.log())).sum()) * temperature**2


def test_losses_are_the_equations() -> None:
    """Per pixel in loops, ignored ones out; gradients by differences; another size; nothing to count; saturated."""
    generator = torch.Generator().manual_seed(1)
    s, t = (torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    masks = torch.randint(0, 3, (2, 2, 4), generator=generator)
    masks[0, 1, 2:] = IGNORE
    places = [p for p in itertools.product(range(2), range(2), range(4)) if masks[p] != IGNORE]
    soft = sum(_kl(s[b, :, y, x], t[b, :, y, x], 2.5) for b, y, x in places) / len(places)
    hard = sum(float(-s[b, :, y, x].log_softmax(0)[masks[b, y, x]]) for b, y, x in places) / len(places)
    assert dense_kd_loss(s, t, 2.5, masks).item() == pytest.approx(soft, rel=1e-12)
    assert dense_hard_loss(s, masks).item() == pytest.approx(hard, rel=1e-12)
    s.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda s: dense_kd_loss(s, t, 2.5, masks), s)
    assert torch.autograd.gradcheck(lambda s: dense_hard_loss(s, masks), s)
    (slope,) = torch.autograd.grad(dense_kd_loss(s, t, 2.5, masks), s)
    assert (slope[0, :, 1, 2:] == 0).all()
    assert dense_kd_loss(s, t, 2.5).item() == pytest.approx(dense_kd_loss(s, t, 2.5, masks * 0).item())
    large = torch.nn.functional.interpolate(t, size=(5, 7), mode="bilinear")
    assert dense_kd_loss(large[..., :2, :4] * 0 + 1, large, 1.0).isfinite()
    assert dense_hard_loss(large.float(), masks).isfinite()
    nothing = torch.full_like(masks, IGNORE)
    assert dense_kd_loss(s, t, 2.5, nothing) == 0
    assert dense_hard_loss(s, nothing) == 0
    saturated = torch.zeros(1, 2, 1, 2).half()
    saturated[:, 0] = 6e4
    assert dense_kd_loss(saturated, -saturated, 1.0).isfinite()


def test_scores_by_hand() -> None:
    """A confusion matrix and its IoUs; a class that nobody names does not count."""
    masks = torch.tensor([[[0, 0, 1], [1, 1, IGNORE]]])
    predicted = torch.tensor([[[0, 1, 1], [1, 2, 0]]])
    confusion = dense_confusion(predicted, masks, 4)
    assert confusion.tolist() == [[1, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert class_iou(confusion) == [50.0, 50.0, 0.0, None]
    assert mean_iou(confusion) == pytest.approx(100 / 3, abs=1e-3)
    assert mean_iou(torch.zeros(2, 2, dtype=torch.int64)) == 0
