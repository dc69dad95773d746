"""A loss on images -> the gradient on the latent. What the loss is, is the caller's business."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Terms = dict[str, Tensor]

# float16 gradients of a mean over many pixels underflow; the step is normalised, so a constant factor is free.
HALF_LOSS_SCALE = 1024.0


@runtime_checkable
class Guidance(Protocol):
    """A loss of a whole group.

    images: float [B,3,H,W], in [0,1]; targets: float [B,K], rows sum to 1. Returns a scalar to lower and the
    terms to log, each of shape [] (a property of the group) or [B]. Define weights so that the ratio of
    terms does not change with B: means over samples, distances of group statistics.
    """

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Terms]:
        """Loss and logged terms."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain values that identify this guidance in a fingerprint."""
        ...

    def annotate(self, images: Tensor) -> dict[str, Tensor]:
        """Per-sample tensors [B,...] to store beside the finished images float [B,3,H,W]; may be empty."""
        ...

    def modules(self) -> Iterable[nn.Module]:
        """Networks inside, to be frozen while a group is drawn."""
        ...


@contextmanager
def frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Weights need no gradient inside (the backward then costs 1x forward, not 2x); restored on leaving."""
    switched = [p for m in modules for p in m.parameters() if p.requires_grad]
    for p in switched:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in switched:
            p.requires_grad_(True)


def guidance_gradient(
    loss_of: Guidance, look: Callable[[Tensor], Tensor], x0: Tensor, leaf: Tensor, targets: Tensor
) -> tuple[Tensor, Terms]:
    """Gradient of loss(look(x0)) with respect to `leaf` (x0 itself, or the z_t it was computed from).

    x0, leaf: latents [B,C,H,W]. Returns the gradient, like leaf and up to one positive constant (the step is
    normalised), and the detached terms.
    """
    images = look(x0).clamp(0.0, 1.0)
    loss, terms = loss_of(images, targets)
    scale = HALF_LOSS_SCALE if x0.dtype == torch.float16 else 1.0
    (grad,) = torch.autograd.grad(loss * scale, leaf)
    return grad.detach(), {name: term.detach() for name, term in terms.items()}


def sum_of_squares(grad: Tensor) -> Tensor:
    """Per-sample sum of squares [B] of a gradient [B,C,H,W], in float32 at least."""
    return grad.to(torch.promote_types(grad.dtype, torch.float32)).square().sum(dim=(1, 2, 3))
