"""A decoder whose blocks are computed again in the backward pass instead of being remembered (arXiv 1604.06174)."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from synthkd.engine.decoders import Decoder, evaluating


def checkpointed(decode: Decoder) -> Callable[[Tensor], Tensor]:
    """The same images and gradient as `decode`, latents [B,C,h,w] -> images [B,3,H,W], for one more forward pass.

    A backward pass then holds the inputs of the blocks and the insides of one block at a time. A decoder without
    blocks of two layers or more is one block. For `torch.autograd.grad`; `torch.func` refuses checkpoints.
    """

    def images(latents: Tensor) -> Tensor:
        found = blocks(decode.module)
        if not found:
            return _again(decode.module, decode, latents)
        with _wrapped(found):
            return decode(latents)

    return images


def blocks(network: nn.Module) -> list[nn.Module]:
    """The deepest parts of at least two layers with weights, and the parts of one layer or more beside them."""
    inner = [(child, blocks(child)) for child in _children(network)]
    if any(found for _, found in inner):
        return [part for child, found in inner for part in found or ([child] if _is_part(child) else [])]
    weighted = sum(1 for m in network.modules() if (w := getattr(m, "weight", None)) is not None and w.dim() > 1)
    return [network] if weighted >= 2 else []


def _children(network: nn.Module) -> Iterator[nn.Module]:
    """Children, with those of a list (which is never called itself) in its place."""
    for child in network.children():
        yield from _children(child) if isinstance(child, nn.ModuleList) else (child,)


def _is_part(module: nn.Module) -> bool:
    return next(module.children(), None) is not None and next(module.parameters(), None) is not None


@contextmanager
def _wrapped(found: list[nn.Module]) -> Iterator[None]:
    """Inside, each block checkpoints itself."""
    before = [vars(block).get("forward") for block in found]
    for block in found:
        vars(block)["forward"] = _checkpointing(block, block.forward)
    try:
        yield
    finally:
        for block, own in zip(found, before, strict=True):
            del vars(block)["forward"]
            if own is not None:
                vars(block)["forward"] = own


def _checkpointing(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: _again(block, forward, *args, **kwargs)


def _again(network: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A checkpoint; the second pass runs as the first did, though the network may stand in training mode by then."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), evaluating(network)

    plain = partial(forward, **kwargs)  # a decoder draws no random numbers: their state need not be kept
    return checkpoint(plain, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
