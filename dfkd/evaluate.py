"""Scores of a classifier on labelled images, and of a dense network on label maps."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthkd.dfkd.data import LabelledImages, load_test_set
from synthkd.dfkd.dense import DenseImages, class_iou, dense_confusion, mean_iou
from synthkd.dfkd.dense_task import load_dense_set
from synthkd.dfkd.ship import Shipped
from synthkd.dfkd.teachers import Teacher
from synthkd.engine.errors import SynthkdError

BINS = 15  # of the calibration error
DENSE_BATCH = 16  # images a pass, whose logits are as large as images
Network = nn.Module | Shipped
OnBatch = Callable[[int], None]


@dataclass(frozen=True)
class Score:
    """accuracy in percent; confusion: counts [K][K], rows true, columns predicted.

    top5: accuracy of the five likeliest classes, percent, None for K <= 5; class_accuracy: percent [K], None where a
    class has no image; nll: mean negative log-likelihood, nats; calibration_error: see `calibration_error`;
    teacher_agreement: percent of images on which the teacher names the same class; teacher_kl: mean
    KL(teacher || network), nats, both None without a teacher; images_per_second: of the network's passes alone.
    """

    accuracy: float
    confusion: list[list[int]]
    top5: float | None = None
    class_accuracy: list[float | None] | None = None
    nll: float | None = None
    calibration_error: float | None = None
    teacher_agreement: float | None = None
    teacher_kl: float | None = None
    images_per_second: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """What was measured, as JSON's values."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class DenseScore:
    """accuracy: percent of pixels; mean_iou and class_iou: percent, None for a class that nobody names.

    confusion: counts of pixels [K][K], rows true, columns predicted; images_per_second: of the network's passes alone.
    """

    accuracy: float
    mean_iou: float
    class_iou: list[float | None]
    confusion: list[list[int]]
    images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """JSON's values."""
        return asdict(self)


def predict(net: Network, images: Tensor, batch_size: int = 256, on_batch: OnBatch | None = None) -> Tensor:
    """Logits [N,K] on the CPU, for uint8 images [N,3,H,W], of a network that takes images in [0,1] or a shipped one.

    on_batch is told how many images are done after each batch.
    """
    return torch.cat([logits for _, logits in _passes(net, images, batch_size, on_batch)])


def named(net: Teacher, images: Tensor) -> Tensor:
    """Classes int64 [N] that a network names on uint8 images [N,3,H,W]; of a dense one of each pixel, int16 [N,H,W]."""
    if not net.dense:
        return predict(net, images).argmax(dim=1)
    parts = [at_size(logits, images).argmax(dim=1).short() for _, logits in _passes(net, images, DENSE_BATCH, None)]
    return torch.cat(parts)


def at_size(logits: Tensor, images: Tensor) -> Tensor:
    """Logits [B,K,h,w] resized (bilinear) to the height and width of images or label maps, float32."""
    size = list(images.shape[-2:])
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def evaluate(
    net: Network,
    data: LabelledImages,
    *,
    teacher: Network | None = None,
    batch_size: int = 256,
    on_batch: OnBatch | None = None,
) -> Score:
    """Scores on labelled images of a network that takes images in [0,1], or of a shipped one.

    teacher: to compare with, on the same images; on_batch is told of its images as well. Raises SynthkdError for no
    image and for outputs that are not finite.
    """
    if not len(data):
        raise SynthkdError("evaluate: the set has no image; expected one at least")
    start = time.perf_counter()
    logits = predict(net, data.images, batch_size, on_batch).double()
    speed = len(data) / max(time.perf_counter() - start, 1e-9)
    if logits.shape[1] != len(data.classes):
        raise SynthkdError(f"evaluate: the network has {logits.shape[1]} outputs, the set {len(data.classes)} classes")
    _check_finite(logits)
    taught: dict[str, Any] = {}
    if teacher is not None:
        theirs = predict(teacher, data.images, batch_size, on_batch).double()
        _check_finite(theirs, "teacher")
        taught = _beside_teacher(logits, theirs)
    return Score(**_scores(logits, data.labels), **taught, images_per_second=round(speed, 1))


def evaluate_dense(
    net: Network, data: DenseImages, *, batch_size: int = DENSE_BATCH, on_batch: OnBatch | None = None
) -> DenseScore:
    """Scores per pixel of a network whose logits are [B,K,h,w]; they are resized (bilinear) to the masks.

    A batch at a time: logits are never kept. Raises SynthkdError for outputs of another shape or not finite.
    """
    count, place, seconds = len(data.classes), 0, time.perf_counter()
    confusion = torch.zeros(count, count, dtype=torch.int64)
    for part, logits in _passes(net, data.images, batch_size, on_batch):
        if logits.dim() != 4 or logits.shape[1] != count:
            raise SynthkdError(f"evaluate: outputs are {list(logits.shape)}; expected [B,{count},h,w] for a dense set")
        _check_finite(logits, first=place)
        masks = data.masks[place : place + len(part)]
        confusion += dense_confusion(at_size(logits, masks).argmax(dim=1), masks, count)
        place += len(part)
    speed = place / max(time.perf_counter() - seconds, 1e-9)
    right = 100 * float(confusion.diagonal().sum()) / max(1, int(confusion.sum()))
    return DenseScore(
        round(right, 4), mean_iou(confusion), class_iou(confusion), confusion.tolist(), round(speed, 1)
    )


def test_scores(net: Teacher, reference: str) -> dict[str, float]:
    """Percent on a real test set: accuracy, which of dense networks is that of pixels, and their `miou` beside it."""
    if not net.dense:
        return {"accuracy": round(evaluate(net, load_test_set(reference, net.classes, net.input_size)).accuracy, 2)}
    found = evaluate_dense(net, load_dense_set(reference, net.classes))
    return {"miou": round(found.mean_iou, 2), "accuracy": round(found.accuracy, 2)}


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error in percent: sum_m |B_m| / n |acc(B_m) - conf(B_m)| (arXiv 1706.04599, eq. 3).

    probabilities: [N,K]; labels: int64 [N]; bin m holds confidences in ((m - 1) / M, m / M], M = `bins`.
    """
    confidence, predicted = probabilities.double().max(dim=1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = (predicted == labels).double() - confidence
    per_bin = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, gap)
    return round(100 * float(per_bin.abs().sum()) / len(labels), 4)


@torch.no_grad()
def _passes(
    net: Network, images: Tensor, batch_size: int, on_batch: OnBatch | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(uint8 images, logits on the CPU), batch by batch."""
    shipped = isinstance(net, Shipped)
    device = torch.device("cpu") if isinstance(net, Shipped) else _device(net)
    for part in torch.split(images, batch_size):
        yield part, (net(part) if shipped else net(part.to(device).float() / 255).cpu())
        if on_batch is not None:
            on_batch(len(part))


def _device(net: nn.Module) -> torch.device:
    tensors: Iterable[Tensor] = (*net.parameters(), *net.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def _scores(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Of logits float64 [N,K]."""
    count = logits.shape[1]
    log_p, predicted = F.log_softmax(logits, dim=1), logits.argmax(dim=1)
    confusion = torch.bincount(labels * count + predicted, minlength=count**2).view(count, count)
    each = [round(100 * float(r) / float(n), 4) if n else None
            for r, n in zip(confusion.diagonal().tolist(), confusion.sum(1).tolist(), strict=True)]  # fmt: skip
    five = (logits.topk(5, dim=1).indices == labels[:, None]).any(dim=1) if count > 5 else None
    return {
        "accuracy": _percent(predicted == labels),
        "confusion": confusion.tolist(),
        "top5": _percent(five) if five is not None else None,
        "class_accuracy": each,
        "nll": round(float(F.nll_loss(log_p, labels)), 6),
        "calibration_error": calibration_error(log_p.exp(), labels),
    }


def _beside_teacher(logits: Tensor, theirs: Tensor) -> dict[str, float]:
    if theirs.shape != logits.shape:
        shapes = f"{theirs.shape[1]} outputs, the network {logits.shape[1]}"
        raise SynthkdError(f"evaluate: the teacher has {shapes}; they must name the same classes")
    log_q, log_p = F.log_softmax(logits, dim=1), F.log_softmax(theirs, dim=1)
    apart = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return {
        "teacher_agreement": _percent(logits.argmax(dim=1) == theirs.argmax(dim=1)),
        "teacher_kl": round(max(0.0, float(apart)), 6),  # below 0 by rounding alone
    }


def _percent(marks: Tensor) -> float:
    return round(100 * float(marks.double().mean()), 4)


def _check_finite(logits: Tensor, whose: str = "network", first: int = 0) -> None:
    """Raise SynthkdError that names the first image whose outputs are not finite."""
    bad = ~logits.isfinite().flatten(1).all(dim=1)
    if bool(bad.any()):
        where = first + int(bad.int().argmax())
        raise SynthkdError(
            f"evaluate: the {whose}'s outputs for image {where} are not finite; check its weights, mean and std"
        )
