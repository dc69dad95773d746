"""A card's `arch` -> a fresh classifier. The only file that imports timm, torchvision and transformers' classifiers."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synthkd.dfkd.cards import TRANSFORMERS, TeacherCard
from synthkd.dfkd.nets import ARCHITECTURES, build_net
from synthkd.engine.errors import SynthkdError, suggest

_TIMM, _TORCHVISION = "timm:", "torchvision:"
# Arguments by which a library would fetch or unpickle weights: those come from the card, checked.
_REFUSED_ARGS = {"checkpoint_path", "cache_dir", "num_classes", "weights", "weights_backbone"}
_LOADING = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, AssertionError)


def build_classifier(card: TeacherCard, *, allow_code: bool = False) -> nn.Module:
    """The network of a card: [B,3,H,W], normalised -> logits [B,K]; weights are the caller's to load.

    Only a `transformers:` folder without the card's own `weights` comes with its weights, from safetensors.
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
    """AutoModelForImageClassification, whose output is made the logits; only safetensors, no remote code."""
    where, count = _folder_or_id(card), len(card.classes)
    if card.arch_args:
        raise SynthkdError(f"arch {card.arch!r}: arch_args do not fit; the folder's config.json says how it is built")
    library = _import_transformers()
    auto = library.AutoModelForImageClassification
    try:
        config = library.AutoConfig.from_pretrained(where, trust_remote_code=False)
        if config.num_labels != count:
            raise SynthkdError(
                f"arch {card.arch!r}: its config.json has {config.num_labels} labels (num_labels), the card names "
                f"{count} classes; they must agree"
            )
        if card.weights is not None:
            return _giving_logits(auto.from_config(config, trust_remote_code=False).float())
        net, info = auto.from_pretrained(
            where, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except _LOADING as error:
        raise SynthkdError(f"arch {card.arch!r}: cannot be loaded: {_reason(error)}") from error
    lost = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lost:  # transformers fills these with random values and goes on
        raise SynthkdError(f"arch {card.arch!r}: its weights lack {len(lost)} tensors, {lost[0]!r} first")
    return _giving_logits(net)


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


def _giving_logits(net: nn.Module) -> nn.Module:
    """The same module, tensor and layer names kept; a call returns its output's `logits`."""
    net.register_forward_hook(_logits)
    return net


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


def _called(arch: str, args: Mapping[str, Any], make: Callable[[], object]) -> nn.Module:
    refused = sorted(name for name in args if name in _REFUSED_ARGS or name.startswith("pretrained"))
    if refused:
        raise SynthkdError(f"arch {arch!r}: arch_args may not hold {refused[0]!r}; weights and classes are the card's")
    try:
        net = make()
    except _LOADING as error:
        raise SynthkdError(f"arch {arch!r}: arch_args do not fit: {_reason(error)}") from error
    if not isinstance(net, nn.Module):
        raise SynthkdError(f"arch {arch!r} gave a {type(net).__name__}; expected a torch.nn.Module")
    return net


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
