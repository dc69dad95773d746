"""Attention by name while a group is drawn: torch's own choice, a pinned kernel of torch's, or xformers.

torch chooses its kernel when a call is traced, so a choice holds in a compiled call too, where that is first called
inside `attending`. A graph does not look at the choice again: a compiled function belongs to one choice, and the key
of torch's compile cache on disk, which does not know it, is told (pytorch issue 185449).
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from synthkd.engine.errors import SynthkdError, suggest

AttentionChoice = Literal["sdpa", "cudnn", "flash", "xformers"]
ATTENTIONS = ("sdpa", "cudnn", "flash", "xformers")

# The named kernel first; a call that it cannot compute (head size, dtype, mask) takes the next: `check_attention` says.
_KERNELS: Mapping[str, list[SDPBackend]] = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
_PLAIN = "AttnProcessor2_0"  # diffusers' caller of scaled_dot_product_attention, which xformers' computes the same as
_TOKENS = 64  # of the call that torch is asked about; what a kernel can do does not hang on it
_log = logging.getLogger("synthkd")


def check_attention(networks: Iterable[nn.Module], choice: str, device: torch.device) -> tuple[str, ...]:
    """Names of the attention layers that cannot be computed as chosen and fall back, which one log line tells.

    Call it once, before the first `attending`. Raises SynthkdError for an unknown name, a device that is no GPU, a
    missing xformers, and where no layer at all could be computed so.
    """
    _refuse(choice, device)
    if choice == "sdpa":
        return ()
    layers = _layers(networks)
    left = tuple(name for name, layer in layers.items() if not _usable(choice, layer, device))
    if left and len(left) == len(layers):
        raise SynthkdError(
            f"attention {choice!r}: none of the {len(layers)} attention layers can be computed so "
            f"({left[0]}: {_form(layers[left[0]])}); use float16 or bfloat16, or attention 'sdpa'"
        )
    if left:
        named = ", ".join(f"{name} ({_form(layers[name])})" for name in left[:3]) + (", ..." if len(left) > 3 else "")
        _log.info(f"attention {choice!r}: {len(left)} of {len(layers)} layers fall back to torch's choice: {named}")
    return left


@contextmanager
def attending(networks: Iterable[nn.Module], choice: str, device: torch.device) -> Iterator[None]:
    """Attention computed as chosen inside, as before outside; nothing for `sdpa`, which is torch's own choice.

    `cudnn`, `flash`: torch's kernel of that name comes first for every call of scaled_dot_product_attention in this
    process, a classifier's too. `xformers`: in the diffusers layers of `networks` alone. Errors as `check_attention`.
    """
    _refuse(choice, device)
    with ExitStack() as stack:
        if choice in _KERNELS:
            tag = f"{torch.compiler.config.cache_key_tag} attention {choice}"
            stack.enter_context(torch.compiler.config.patch(cache_key_tag=tag))  # type: ignore[attr-defined]
            stack.enter_context(sdpa_kernel(_KERNELS[choice], set_priority=True))
        elif choice == "xformers":
            stack.enter_context(_through_xformers(networks))
        yield


@contextmanager
def _through_xformers(networks: Iterable[nn.Module]) -> Iterator[None]:
    """diffusers' processor for xformers in the layers that have the plain one; the very same ones come back."""
    from synthkd.engine.models import xformers_processor

    made, before = xformers_processor(), []
    try:
        for layer in _layers(networks).values():
            if _is_plain(layer):
                before.append((layer, layer.processor))
                layer.processor = made
        yield
    finally:
        for layer, processor in before:
            layer.processor = processor


def _refuse(choice: str, device: torch.device) -> None:
    if choice not in ATTENTIONS:
        raise SynthkdError(f"attention {choice!r}: {suggest(choice, ATTENTIONS)}")
    if choice != "sdpa" and device.type != "cuda":
        raise SynthkdError(f"attention {choice!r}: needs a CUDA GPU, found {device.type}; use attention 'sdpa'")
    if choice == "xformers" and find_spec("xformers") is None:
        raise SynthkdError("attention 'xformers': xformers is not installed: pip install 'synthkd[xformers]'")


def _layers(networks: Iterable[nn.Module]) -> dict[str, Any]:
    """diffusers' attention layers, each once, by name; a text encoder has none: its states are kept for each prompt."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for network in networks:
        for name, layer in network.named_modules():
            if type(layer).__name__ == "Attention" and hasattr(layer, "processor"):
                found.setdefault(id(layer), (f"{type(network).__name__}.{name}", layer))
    return dict(found.values())


def _usable(choice: str, layer: Any, device: torch.device) -> bool:
    """Whether a layer can be computed as chosen, without its gradient; of its own kernels torch itself is asked."""
    if choice == "xformers":
        return _is_plain(layer)
    weight = layer.to_q.weight
    q = torch.empty(1, layer.heads, _TOKENS, _head_size(layer), dtype=weight.dtype, device=device)
    asked = {"cudnn": can_use_cudnn_attention, "flash": can_use_flash_attention}[choice]
    with sdpa_kernel(_KERNELS[choice], set_priority=True):
        return asked(SDPAParams(q, q, q, None, 0.0, False, False), False)


def _is_plain(layer: Any) -> bool:
    """An adapter's or user's processor, and norms of queries and keys, are what diffusers' for xformers cannot do."""
    norms = (getattr(layer, name, None) for name in ("norm_q", "norm_k"))
    return type(layer.processor).__name__ == _PLAIN and all(norm is None for norm in norms)


def _head_size(layer: Any) -> int:
    return int(layer.to_q.weight.shape[0]) // int(layer.heads)


def _form(layer: Any) -> str:
    dtype = str(layer.to_q.weight.dtype).removeprefix("torch.")
    return f"head size {_head_size(layer)}, {dtype}, {type(layer.processor).__name__}"
