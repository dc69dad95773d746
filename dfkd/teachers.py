"""Classifiers and dense networks of a TOML card: frozen, with preprocessing, taps, features; no code unless allowed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthkd.dfkd.cards import (
    CLASSIFICATION,
    SEGMENTATION,
    TRANSFORMERS,
    TeacherCard,
    card_path,
    load_weights,
    read_card,
)
from synthkd.dfkd.model_zoo import build_classifier
from synthkd.dfkd.nets import count_parameters
from synthkd.dfkd.taps import Moments, Tap, Taps, batchnorm_layers, merged_taps, read_moments
from synthkd.engine.errors import SynthkdError
from synthkd.export.artifacts import weights_sha256


class Look(NamedTuple):
    """What one forward pass shows: logits [B,K], taps in forward order, and what the last linear layer read, [B,D].

    taps: of BatchNorm layers; stored: of layers whose moments came in a file; features: None where no linear layer
    was called.
    """

    logits: Tensor
    taps: list[Tap]
    stored: list[Tap]
    features: Tensor | None


class Teacher(nn.Module):
    """A frozen classifier, or dense network, with its preprocessing: images in [0,1] go in, logits come out."""

    def __init__(
        self,
        net: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        input_size: tuple[int, int],
        classes: Sequence[str],
        moments: Moments | None = None,
        task: str = CLASSIFICATION,
    ) -> None:
        """net: any classifier [B,3,H,W] -> [B,K]; it is set to eval mode and frozen.

        task: `segmentation` for a net whose logits are [B,K,h,w]; moments: stored input statistics of norm layers that
        keep none.
        """
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.moments, self.task = moments, task
        self.classes, self.input_size = tuple(classes), (input_size[0], input_size[1])
        self._taps = Taps(self.net, moments, self.classifier)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @property
    def dense(self) -> bool:
        """Whether logits are label maps' [B,K,h,w], at whatever size."""
        return self.task == SEGMENTATION

    @property
    def has_statistics(self) -> bool:
        """Whether a group's statistics can be compared: with BatchNorm's or with stored moments."""
        return self.moments is not None or bool(batchnorm_layers(self.net))

    @property
    def classifier(self) -> nn.Linear | None:
        """The last linear layer with an output per class; the last one of all where none has.

        None without any, and of dense networks, whose linear layers read positions.
        """
        if self.dense:
            return None
        layers = [layer for layer in self.net.modules() if isinstance(layer, nn.Linear)]
        fitting = [layer for layer in layers if layer.out_features == len(self.classes)]
        return next(reversed(fitting or layers), None)

    def preprocess(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in [0,1] -> resized (bilinear, antialiased) to input_size and normalised."""
        images = images.to(self.get_buffer("mean").dtype)
        if tuple(images.shape[-2:]) != self.input_size:
            images = F.interpolate(
                images, size=list(self.input_size), mode="bilinear", antialias=True, align_corners=False
            )
        return (images - self.get_buffer("mean")) / self.get_buffer("std")

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in [0,1] -> logits [B,K], of a dense network [B,K,h,w]."""
        logits: Tensor = self.net(self.preprocess(images))
        return logits

    def attached(self) -> AbstractContextManager[None]:
        """Within it the taps stay on, so that `look` can be traced into one graph; no hook is left behind."""
        return self._taps.attached()

    def look(self, images: Tensor) -> Look:
        """images [B,3,H,W] in [0,1] -> logits, statistics and features of one forward pass."""
        if not self._taps.on:
            with self.attached():
                return self.look(images)
        logits, seen = self._taps.reading(lambda: self(images))
        return Look(logits, seen.bn, seen.stored, _pooled(seen.features[-1]) if seen.features else None)

    def features(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in [0,1] -> what the last linear layer reads, [B,D].

        Raises SynthkdError for a network without a linear layer.
        """
        features = self.look(images).features
        if features is None:
            raise SynthkdError("teacher: its network has no linear layer, so it has no features to compare")
        return features

    def train(self, mode: bool = True) -> "Teacher":
        """A teacher stays in eval mode."""
        return super().train(False)


def merged_looks(parts: Sequence[Look]) -> Look:
    """The look at a group from looks at its runs, in order."""
    if len(parts) == 1:
        return parts[0]
    features = [x.features for x in parts if x.features is not None]
    return Look(
        torch.cat([x.logits for x in parts]),
        merged_taps([x.taps for x in parts]),
        merged_taps([x.stored for x in parts]),
        torch.cat(features) if len(features) == len(parts) else None,
    )


def _pooled(x: Tensor) -> Tensor:
    """[B,D], or the mean over what lies between in [B,*,D]."""
    return x if x.dim() == 2 else x.flatten(1, -2).mean(dim=1)


def teacher_digest(teacher: Teacher) -> str:
    """SHA-256 of what a teacher says of an image: tensors, architecture, input size, classes."""
    parts = [weights_sha256([teacher]), repr(teacher.net), list(teacher.input_size), list(teacher.classes)]
    parts += [teacher.task] if teacher.dense else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load_teacher(
    reference: str, device: str | torch.device = "cpu", *, allow_code: bool = False, moments: bool = True
) -> Teacher:
    """Build the network of a card, load its weights strictly, freeze it.

    allow_code: let `arch = "module:function"` import and call that function; moments: read the card's `moments`.
    Raises SynthkdError where weights are missing, misnamed or of another shape, where the output count differs from
    the card's classes, and where moments do not fit the network.
    """
    card = read_card(card_path(reference), moments=moments)
    net = build_classifier(card, allow_code=allow_code)
    if card.weights is not None and not card.arch.startswith(TRANSFORMERS):
        state = load_weights(card.weights)
        _check_state(card, card.weights, net.state_dict(), state)
        net.load_state_dict(state)
    stored = read_moments(card.moments, net) if card.moments else None
    teacher = Teacher(
        net, mean=card.mean, std=card.std, input_size=card.input_size, classes=card.classes, moments=stored,
        task=card.task,
    )  # fmt: skip
    _try_out(reference, card, teacher)
    return teacher.to(device)


def _try_out(reference: str, card: TeacherCard, teacher: Teacher) -> None:
    """One forward pass on a black image: raises SynthkdError where the network does not take the card's input.

    Or where what it returns is not [1, classes], of a dense network [1, classes, h, w].
    """
    try:
        with torch.no_grad():
            found: object = teacher(torch.zeros(1, 3, *card.input_size))
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        size = "x".join(map(str, (3, *card.input_size)))
        raise SynthkdError(
            f"teacher {reference!r}: arch {card.arch!r} does not take {size} images ({reason})"
        ) from error
    if wrong := wrong_shape(found, teacher):
        raise SynthkdError(f"teacher {reference!r}: arch {card.arch!r} {wrong} of the card (task {card.task!r})")


def wrong_shape(found: object, net: Teacher) -> str:
    """What is wrong with the outputs for one image, as "returns …; expected …, one per class"; "" where nothing is."""
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    count = len(net.classes)
    fits = isinstance(found, Tensor) and found.dim() == (4 if net.dense else 2) and found.shape[:2] == (1, count)
    if fits and found.numel():  # type: ignore[attr-defined]
        return ""
    return f"returns {shape}; expected logits (1, {count}{', h, w' if net.dense else ''}), one per class"


def _check_state(card: TeacherCard, path: object, want: Mapping[str, Tensor], have: Mapping[str, Tensor]) -> None:
    """Compare names and shapes, the classifier's output count first of all."""
    last = list(want)[-1] if want else ""
    count = len(card.classes)
    is_output = last in have and want[last].dim() > 0 < have[last].dim() and want[last].shape[0] == count
    if is_output and have[last].shape[0] != count:
        raise SynthkdError(
            f"teacher {path}: the network has {have[last].shape[0]} outputs, the card names "
            f"{count} classes; they must agree"
        )
    for name in want:
        if name not in have:
            if name.endswith("num_batches_tracked"):  # files older than this counter lack it; eval mode needs none
                continue
            raise SynthkdError(f"teacher {path}: tensor {name!r} is missing for arch {card.arch!r}")
        if have[name].shape != want[name].shape:
            shapes = f"{tuple(have[name].shape)}; arch {card.arch!r} expects {tuple(want[name].shape)}"
            raise SynthkdError(f"teacher {path}: tensor {name!r} has shape {shapes}")
    extra = sorted(have.keys() - want.keys())
    if extra:
        raise SynthkdError(f"teacher {path}: tensor {extra[0]!r} does not belong to arch {card.arch!r}")


__all__ = [
    "Look",
    "Tap",
    "Teacher",
    "TeacherCard",
    "card_path",
    "count_parameters",
    "load_teacher",
    "load_weights",
    "read_card",
    "teacher_digest",
    "wrong_shape",
]
