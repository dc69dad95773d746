"""Classifiers from a TOML card: frozen, with their preprocessing and BatchNorm taps. No card runs code."""

import contextlib
import pickle
import struct
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from synthkd.dfkd.nets import build_net, count_parameters
from synthkd.engine.assets import embedded_path
from synthkd.engine.errors import SynthkdError, suggest
from synthkd.engine.models import EMBEDDED
from synthkd.kernels import BatchNormStats, batchnorm_stats

_FIELDS = ("arch", "weights", "input_size", "mean", "std", "classes", "arch_args", "about")


@dataclass(frozen=True, kw_only=True)
class TeacherCard:
    """What a classifier is: architecture, weights file, input in pixels, normalisation, class names."""

    arch: str
    weights: Path
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    arch_args: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


class Tap(NamedTuple):
    """Statistics of one BatchNorm layer's input beside the layer's running ones, [C] each."""

    name: str
    stats: BatchNormStats
    running_mean: Tensor
    running_var: Tensor


class Teacher(nn.Module):
    """A frozen classifier with its preprocessing: images in [0,1] go in, logits come out."""

    def __init__(
        self,
        net: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        input_size: tuple[int, int],
        classes: Sequence[str],
    ) -> None:
        """net: any classifier [B,3,H,W] -> [B,K]; it is set to eval mode and frozen."""
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.classes, self.input_size = tuple(classes), (input_size[0], input_size[1])
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def preprocess(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in [0,1] -> resized (bilinear, antialiased) to input_size and normalised."""
        images = images.to(self.get_buffer("mean").dtype)
        if tuple(images.shape[-2:]) != self.input_size:
            images = F.interpolate(
                images, size=list(self.input_size), mode="bilinear", antialias=True, align_corners=False
            )
        return (images - self.get_buffer("mean")) / self.get_buffer("std")

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in [0,1] -> logits [B,K]."""
        logits: Tensor = self.net(self.preprocess(images))
        return logits

    def with_taps(self, images: Tensor) -> tuple[Tensor, list[Tap]]:
        """Logits [B,K] and the statistics of every BatchNorm layer's input, in forward order."""
        taps: list[Tap] = []
        with _tapped(self.net, taps):
            logits = self(images)
        return logits, taps

    def features(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in [0,1] -> what the last linear layer reads, [B,D].

        Raises SynthkdError for a network without a linear layer.
        """
        linear = [layer for layer in self.net.modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise SynthkdError("teacher: its network has no linear layer, so it has no features to compare")
        read: list[Tensor] = []
        handle = linear[-1].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            self(images)
        finally:
            handle.remove()
        return read[0]

    def train(self, mode: bool = True) -> "Teacher":
        """A teacher stays in eval mode."""
        return super().train(False)


@contextlib.contextmanager
def _tapped(net: nn.Module, taps: list[Tap]) -> Iterator[None]:
    """Hooks on every BatchNorm layer for the length of one forward pass; none is left behind."""
    handles = []
    for name, layer in net.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            handles.append(layer.register_forward_pre_hook(_tap(name, taps)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tap(name: str, taps: list[Tap]) -> Any:
    def hook(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        taps.append(Tap(name, batchnorm_stats(inputs[0]), layer.running_mean, layer.running_var))

    return hook


def card_path(reference: str) -> Path:
    """Path of a card: a file, or `embedded:digits` (`embedded:digits/judge` for another card of the default)."""
    if not reference.startswith(EMBEDDED):
        return Path(reference)
    name, _, card = reference.removeprefix(EMBEDDED).partition("/")
    return embedded_path(name) / f"{card or 'teacher'}.toml"


def read_card(path: Path) -> TeacherCard:
    """Read and check a card without touching its weights.

    Raises SynthkdError naming the field that is missing, unknown or of the wrong kind.
    """
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise SynthkdError(f"teacher card {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SynthkdError(f"teacher card {path}: not valid TOML ({error})") from error
    for name in data:
        if name not in _FIELDS:
            raise SynthkdError(f"teacher card {path}: unknown field {name!r}; {suggest(name, _FIELDS)}")
    missing = [name for name in _FIELDS[:6] if name not in data]
    if missing:
        raise SynthkdError(f"teacher card {path}: field {missing[0]!r} is missing; expected {', '.join(_FIELDS[:6])}")
    _check_card(path, data)
    weights = path.parent / data["weights"]
    if not weights.is_file():
        raise SynthkdError(f"teacher card {path}: weights {str(weights)!r} not found")
    sequences = {name: tuple(data[name]) for name in ("input_size", "mean", "std", "classes")}
    return TeacherCard(**{**data, **sequences, "weights": weights})


def _check_card(path: Path, data: Mapping[str, Any]) -> None:
    def numbers(name: str, count: int) -> bool:
        value = data[name]
        return isinstance(value, list) and len(value) == count and all(isinstance(v, (int, float)) for v in value)

    kinds = {
        "arch": (isinstance(data["arch"], str), "a name"),
        "weights": (isinstance(data["weights"], str), "a file name"),
        "input_size": (numbers("input_size", 2) and min(data["input_size"]) >= 1, "[height, width] in pixels"),
        "mean": (numbers("mean", 3), "three numbers"),
        "std": (numbers("std", 3) and min(data["std"]) > 0, "three numbers above 0"),
        "classes": (
            isinstance(data["classes"], list) and bool(data["classes"]) and len(set(data["classes"])) > 1,
            "at least two class names",
        ),
        "arch_args": (isinstance(data.get("arch_args", {}), dict), "a table"),
    }
    for name, (ok, expected) in kinds.items():
        if not ok:
            raise SynthkdError(f"teacher card {path}: {name} is {data[name]!r}; expected {expected}")


def load_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from safetensors, or from a torch file that holds tensors only.

    Raises SynthkdError for a damaged file, and refuses a pickle that would run code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SynthkdError(
            f"weights {path}: refused, this pickle holds more than tensors and could run code; save a state dict or "
            "safetensors"
        ) from error
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        EOFError,
        LookupError,
        struct.error,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise SynthkdError(f"weights {path}: cannot be read ({' '.join(str(error).split())[:160]})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise SynthkdError(f"weights {path}: expected a state dict of tensors")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_teacher(reference: str, device: str | torch.device = "cpu") -> Teacher:
    """Build the network of a card, load its weights strictly, freeze it.

    Raises SynthkdError where weights are missing, misnamed or of another shape, or where the output count
    differs from the card's classes.
    """
    card = read_card(card_path(reference))
    net = build_net(card.arch, len(card.classes), card.arch_args)
    state = load_weights(card.weights)
    _check_state(card, net.state_dict(), state)
    net.load_state_dict(state)
    teacher = Teacher(net, mean=card.mean, std=card.std, input_size=card.input_size, classes=card.classes)
    _try_out(reference, card, teacher)
    return teacher.to(device)


def _try_out(reference: str, card: TeacherCard, teacher: Teacher) -> None:
    """One forward pass on a black image: raises SynthkdError where the network does not take the card's input."""
    try:
        with torch.no_grad():
            teacher(torch.zeros(1, 3, *card.input_size))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        size = "x".join(map(str, (3, *card.input_size)))
        raise SynthkdError(
            f"teacher {reference!r}: arch {card.arch!r} does not take {size} images ({reason})"
        ) from error


def _check_state(card: TeacherCard, want: Mapping[str, Tensor], have: Mapping[str, Tensor]) -> None:
    """Compare names and shapes, the classifier's output count first of all."""
    last = list(want)[-1]
    if last in have and have[last].shape[0] != len(card.classes):
        raise SynthkdError(
            f"teacher {card.weights}: the network has {have[last].shape[0]} outputs, the card names "
            f"{len(card.classes)} classes; they must agree"
        )
    for name in want:
        if name not in have:
            raise SynthkdError(f"teacher {card.weights}: tensor {name!r} is missing for arch {card.arch!r}")
        if have[name].shape != want[name].shape:
            shapes = f"{tuple(have[name].shape)}; arch {card.arch!r} expects {tuple(want[name].shape)}"
            raise SynthkdError(f"teacher {card.weights}: tensor {name!r} has shape {shapes}")
    extra = sorted(have.keys() - want.keys())
    if extra:
        raise SynthkdError(f"teacher {card.weights}: tensor {extra[0]!r} does not belong to arch {card.arch!r}")


__all__ = ["Tap", "Teacher", "TeacherCard", "card_path", "count_parameters", "load_teacher", "read_card"]
