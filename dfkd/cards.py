"""Teacher cards: a classifier or a dense network in a small TOML file beside its weights. Reading one runs no code."""

import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from synthkd.dfkd.fields import TABLE, Kind, are_texts, check_fields, check_value, is_number, is_whole, kind_of
from synthkd.dfkd.toml_files import read_toml
from synthkd.engine.assets import embedded_path
from synthkd.engine.declared import check_names, is_name
from synthkd.engine.errors import SynthkdError, suggest
from synthkd.engine.models import EMBEDDED

TRANSFORMERS = "transformers:"
_REQUIRED = ("arch", "weights", "input_size", "mean", "std", "classes")
CLASSIFICATION, SEGMENTATION = TASKS = ("classification", "segmentation")
_FIELDS = (*_REQUIRED, "task", "arch_args", "moments", "about")
# ImageNet's mean and deviation are near 0.45 and 0.22 for images in [0,1], near 115 and 57 for 0..255.
_LARGEST = 1.5
# Of `about`: what the network saw in training, and what the one saw whose answers it learned.
TRAINED_ON, TEACHER_TRAINED_ON = _SEEN = ("trained_on", "teacher_trained_on")
_UNIT_SCALE = Kind(
    lambda v: max(map(abs, v)) <= _LARGEST,
    "values for images in [0,1] (for a network trained on 0..255, divide mean and std by 255)",
)


def _numbers(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(is_number, value))


def _size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_whole(v, 1, 2**31) for v in value)


_KINDS: Mapping[str, Kind] = {
    "arch": kind_of(str, "a name"),
    "weights": kind_of(str, "a file name"),
    "input_size": Kind(_size, "[height, width] in pixels, whole numbers >= 1"),
    "mean": Kind(_numbers, "three numbers"),
    "std": Kind(lambda v: _numbers(v) and min(v) > 0, "three numbers above 0"),
    "classes": Kind(lambda v: are_texts(v) and len(set(v)) == len(v) >= 2, "at least two distinct class names (texts)"),
    "task": Kind(lambda v: v in TASKS, " or ".join(repr(task) for task in TASKS)),
    "arch_args": TABLE,
    "moments": kind_of(str, "a file name"),
    "about": TABLE,
}


@dataclass(frozen=True, kw_only=True)
class TeacherCard:
    """What a classifier is: architecture, weights file, input in pixels, normalisation, class names.

    task: `classification`, logits [B,K], or `segmentation`, logits [B,K,h,w] that are resized to the images;
    arch: a built-in network, `transformers:FOLDER_OR_ID`, `timm:NAME`, `torchvision:NAME` or `module:function`;
    weights: None only where a `transformers:` folder brings them; moments: input statistics of the norm layers
    that keep none, as `synthkd teacher moments` writes them; folder: where the card lies.
    """

    arch: str
    weights: Path | None
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    task: str = CLASSIFICATION
    arch_args: Mapping[str, Any] = field(default_factory=dict)
    moments: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = Path()

    @property
    def trained_on(self) -> tuple[str, ...] | None:
        """Names of data sets whose images, or what they taught, are in the network; None where it declares none.

        Of a student those of its teacher too: an image of them is no news to it. Sentences declare nothing.
        """
        found = [name for field_ in _SEEN for name in _names_in(self.about.get(field_))]
        return tuple(dict.fromkeys(found)) or None


def _names_in(value: object) -> tuple[str, ...]:
    """Names of a checked field: a list of them, or one alone."""
    if isinstance(value, str):
        return (value,) if is_name(value) else ()
    return tuple(value) if isinstance(value, (list, tuple)) else ()


def card_path(reference: str) -> Path:
    """Path of a card: a file, or `embedded:digits` (`embedded:digits/judge` for another card of the default)."""
    if not reference.startswith(EMBEDDED):
        return Path(reference)
    name, _, card = reference.removeprefix(EMBEDDED).partition("/")
    return embedded_path(name, "teacher.toml") / f"{card or 'teacher'}.toml"


def read_card(path: Path, *, moments: bool = True) -> TeacherCard:
    """Read and check a card without touching its weights.

    moments: False passes over the field of that name, for the command that is about to make the file.
    Raises SynthkdError naming the field that is missing, unknown or of the wrong kind, or the file not there.
    """
    data = read_toml(path, f"teacher card {path}")
    for name in data:
        if name not in _FIELDS:
            raise SynthkdError(f"teacher card {path}: unknown field {name!r}; {suggest(name, _FIELDS)}")
    brings_weights = str(data.get("arch", "")).startswith(TRANSFORMERS)
    required = [name for name in _REQUIRED if name != "weights" or not brings_weights]
    missing = [name for name in required if name not in data]
    if missing:
        raise SynthkdError(f"teacher card {path}: field {missing[0]!r} is missing; expected {', '.join(required)}")
    _check_card(path, data)
    sequences = {name: tuple(data[name]) for name in ("input_size", "mean", "std", "classes")}
    files = {"weights": _file(path, data, "weights"), "moments": _file(path, data, "moments") if moments else None}
    return TeacherCard(**{**data, **sequences, **files, "folder": path.parent})


def _file(path: Path, data: Mapping[str, Any], name: str) -> Path | None:
    """A file that the card names, relative to the card."""
    if name not in data:
        return None
    found = path.parent / data[name]
    if not found.is_file():
        raise SynthkdError(f"teacher card {path}: {name} {str(found)!r} not found")
    return found


def _check_card(path: Path, data: Mapping[str, Any]) -> None:
    check_fields(f"teacher card {path}", {name: data[name] for name in _FIELDS if name in data}, _KINDS)
    for name in ("mean", "std"):
        check_value(f"teacher card {path}: {name}", data[name], _UNIT_SCALE)
    for name in _SEEN:
        found = data.get("about", {}).get(name)
        sentence = isinstance(found, str) and len(found.split()) > 1  # for readers
        if found is not None and not sentence:
            check_names(f"teacher card {path}: about.{name}", [found] if isinstance(found, str) else found)


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
