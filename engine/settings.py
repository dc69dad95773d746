"""What beside its tensors decides what a network computes, as plain values: for the identity of a set."""

import hashlib
import inspect
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

# What a library notes of itself when it saves; none of it changes an output.
_NOTES = ("transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "return_dict")


def settings_of(part: Any) -> dict[str, Any]:
    """The config of a diffusers or transformers network, or a tokenizer's vocabulary as a digest; {} for other things.

    Values that are the defaults of the installed library are left out, so that a release which adds one does not
    make another model of an old folder.
    """
    part = getattr(part, "_orig_mod", part)  # of torch.compile
    if hasattr(part, "get_vocab"):
        words = json.dumps(sorted(part.get_vocab().items()))
        return {"vocabulary": hashlib.sha256(words.encode()).hexdigest(), "length": int(part.model_max_length)}
    config: Any = getattr(part, "config", None)
    if hasattr(config, "to_diff_dict"):
        values: Mapping[str, Any] = config.to_diff_dict()
    elif isinstance(config, Mapping):
        known = inspect.signature(type(part).__init__).parameters
        values = {n: v for n, v in config.items() if n not in known or _plain(v) != _plain(known[n].default)}
    else:
        return {}
    return {n: _plain(v) for n, v in values.items() if not n.startswith("_") and n not in _NOTES}


def architecture_of(net: nn.Module) -> list[Any]:
    """Class and plain settings (strides, eps, flags) of every module by name: what the weights leave open.

    Not `repr`, whose words change between releases of torch.
    """
    out = []
    for name, module in net.named_modules():
        plain = {n: _plain(v) for n, v in vars(module).items() if n[0] != "_" and n != "training" and _is_plain(v)}
        out.append([name, type(module).__name__, plain])
    return out


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


def _plain(value: Any) -> Any:
    """JSON's view of a value: tuples are lists, anything foreign is its text."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))
