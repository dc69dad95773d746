"""A card's `arch` -> a fresh network. The only file that imports timm, torchvision and transformers' vision models."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from synthkd.dfkd.cards import SEGMENTATION, TRANSFORMERS, TeacherCard, load_weights
from synthkd.dfkd.nets import ARCHITECTURES, build_net
from synthkd.engine.errors import SynthkdError, suggest

_TIMM, _TORCHVISION = "timm:", "torchvision:"
# Arguments by which a library would fetch or unpickle weights: those come from the card, checked.
_REFUSED_ARGS = {"checkpoint_path", "cache_dir", "num_classes", "weights", "weights_backbone"}
_LOADING = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    AssertionError,
    SafetensorError,
)


def build_classifier(card: TeacherCard, *, allow_code: bool = False) -> nn.Module:
    """The network of a card: [B,3,H,W], normalised -> logits [B,K]; weights are the caller's to load.

    For the task segmentation a network of transformers is one for semantic segmentation, logits [B,K,h,w].
    Only a `transformers:` network comes with its weights: the card's own, or the folder's from safetensors.
    `module:function` is imported from the Python path and called with num_classes=K and arch_args, if allow_code.
    Raises SynthkdError for an unknown name, a missing library or folder, arguments that do not fit, a folder of another
    number of labels, and code that was not allowed.
    """
    count, args = len(card.classes), dict(card.arch_args)
    if card.arch.startswith(TRANSFORMERS):
        return _transformers(card)
    if card.arch.startswith(_TIMM):
        return _timm(card.arch, count, args)
    if card.arch.startswith(_TORCHVISION):
        return _torchvision(card.arch, count, args)
    if ":" in card.arch:
        return _from_code(card.arch, count, args, allow_code)
    if card.arch not in ARCHITECTURES:
        others = f"{TRANSFORMERS}FOLDER, {_TIMM}NAME, {_TORCHVISION}NAME or module:function"
        raise SynthkdError(f"arch {card.arch!r} is unknown; {suggest(card.arch, ARCHITECTURES)}; or {others}")
    return build_net(card.arch, count, args)


def _transformers(card: TeacherCard) -> nn.Module:
    """AutoModelForImageClassification, or AutoModelForSemanticSegmentation, whose output is made the logits.

    Only safetensors, no remote code.
    """
    where = _folder_or_id(card)
    if card.arch_args:
        raise SynthkdError(f"arch {card.arch!r}: arch_args do not fit; the folder's config.json says how it is built")
    state = load_weights(card.weights) if card.weights is not None else None
    try:
        net, info = _pretrained(_import_transformers(), card, where, state)
    except SynthkdError:
        raise
    except Exception as error:  # a hub that is not reached has errors of its own
        raise SynthkdError(f"arch {card.arch!r}: cannot be loaded: {_reason(error)}") from error
    wrong = {"lack": [*info["missing_keys"], *info["mismatched_keys"]]}
    if state is not None:
        wrong["have in excess"] = list(info["unexpected_keys"])
    for what, keys in wrong.items():  # transformers fills what is missing with random values and goes on
        if keys:
            first = min(map(str, keys))
            raise SynthkdError(f"arch {card.arch!r}: its weights {what} {len(keys)} tensors, {first!r} first")
    net.register_forward_hook(_logits)  # no wrapper, so that layers keep the names they have in transformers
    return net


def _pretrained(
    library: Any, card: TeacherCard, where: str, state: Mapping[str, Tensor] | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The network and what its loading left open; the number of labels is checked before weights are read."""
    dense = card.task == SEGMENTATION
    auto = library.AutoModelForSemanticSegmentation if dense else library.AutoModelForImageClassification
    config = library.AutoConfig.from_pretrained(where, trust_remote_code=False)
    if config.num_labels != len(card.classes):
        raise SynthkdError(
            f"arch {card.arch!r}: its config.json has {config.num_labels} labels (num_labels), the card names "
            f"{len(card.classes)} classes; they must agree"
        )
    _check_args(card.arch, getattr(config, "model_args", None) or {})  # a config.json that stands for a timm model
    config._attn_implementation = None  # a config.json may name a kernel on a hub, which would be fetched and run
    options = {"dtype": torch.float32, "output_loading_info": True, "config": config}
    if state is None:
        return auto.from_pretrained(where, use_safetensors=True, trust_remote_code=False, **options)
    # from_pretrained knows the names of saved files as well as those of this release's modules.
    kind = type(auto.from_config(config, trust_remote_code=False))
    return kind.from_pretrained(None, state_dict=dict(state), **options)


def _folder_or_id(card: TeacherCard) -> str:
    """A folder beside the card (or from the root), else a hub id OWNER/NAME."""
    name = card.arch.removeprefix(TRANSFORMERS)
    folder = card.folder / name
    if (folder / "config.json").is_file():
        return str(folder)
    looks_local = Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1
    if looks_local or folder.exists():
        raise SynthkdError(
            f"arch {card.arch!r}: no config.json in {str(folder)!r}; expected a saved transformers model"
        )
    return name


def _logits(net: nn.Module, inputs: object, output: Any) -> Tensor:
    found: Tensor = output.logits
    return found


def _import_transformers() -> Any:
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise SynthkdError("transformers is not installed: pip install 'synthkd[diffusers]'") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def _timm(arch: str, count: int, args: Mapping[str, Any]) -> nn.Module:
    """timm.create_model by a name of its own registry: never a hub or folder reference, never pretrained."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise _not_there(arch, error) from error
    name = arch.removeprefix(_TIMM)
    _check_name(arch, name, timm.list_models())
    return _called(arch, args, lambda: timm.create_model(name, pretrained=False, num_classes=count, **args))


def _torchvision(arch: str, count: int, args: Mapping[str, Any]) -> nn.Module:
    """torchvision.models.get_model, without weights."""
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        raise _not_there(arch, error) from error
    name = arch.removeprefix(_TORCHVISION)
    _check_name(arch, name, models.list_models(module=models))
    return _called(arch, args, lambda: models.get_model(name, weights=None, num_classes=count, **args))


def _not_there(arch: str, error: Exception) -> SynthkdError:
    """torchvision raises RuntimeError where it was built for another torch."""
    library = arch.partition(":")[0]
    return SynthkdError(f"arch {arch!r}: cannot import {library} ({_reason(error)}): pip install 'synthkd[{library}]'")


def _from_code(arch: str, count: int, args: Mapping[str, Any], allow_code: bool) -> nn.Module:
    if not allow_code:
        raise SynthkdError(
            f"arch {arch!r} would import and run code; pass --allow-code (allow_code=True) if you trust it"
        )
    module, _, function = arch.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise SynthkdError(f"arch {arch!r}: cannot be imported: {_reason(error)}") from error
    return _called(arch, {}, lambda: make(num_classes=count, **args))


def _check_name(arch: str, name: str, known: Iterable[str]) -> None:
    """The nearest names only: the libraries know hundreds."""
    names = list(known)
    if name not in names:
        hint = suggest(name, names).partition("? ")[0]
        near = f"{hint}?" if hint.startswith("did you mean") else f"expected one of its {len(names)} classifiers"
        raise SynthkdError(f"arch {arch!r} is unknown to {arch.partition(':')[0]}; {near}")


def _check_args(arch: str, args: Iterable[str]) -> None:
    refused = sorted(name for name in args if name in _REFUSED_ARGS or name.startswith("pretrained"))
    if refused:
        raise SynthkdError(f"arch {arch!r}: arch_args may not hold {refused[0]!r}; weights and classes are the card's")


def _called(arch: str, args: Mapping[str, Any], make: Callable[[], object]) -> nn.Module:
    _check_args(arch, args)
    try:
        net = make()
    except _LOADING as error:
        raise SynthkdError(f"arch {arch!r}: arch_args do not fit: {_reason(error)}") from error
    if not isinstance(net, nn.Module):
        raise SynthkdError(f"arch {arch!r} gave a {type(net).__name__}; expected a torch.nn.Module")
    return net


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
