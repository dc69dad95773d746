"""A loss on images -> the gradient on the latent. What the loss is, is the caller's business."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from synthkd.engine.config import GuidanceSpec

Terms = dict[str, Tensor]

# float16 gradients of a mean over many pixels underflow.
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


Look = Callable[[Tensor], Tensor]


def guidance_gradient(
    loss_of: Guidance,
    decode: Callable[[Tensor], Tensor],
    x0: Tensor,
    leaf: Tensor,
    targets: Tensor,
    looks: Sequence[Look] = (),
) -> tuple[Tensor, Tensor, Terms]:
    """Gradient of the loss of decode(x0) with respect to `leaf` (x0 itself, or the z_t it was computed from).

    x0, leaf: latents [B,C,H,W]; looks: further views of the decoded images (images -> images), over which and the
    plain one the loss is a mean (arXiv 2403.12404). Returns the gradient, shaped like leaf, float32 at
    least; the loss []; and the detached terms of the plain view.
    """
    images = decode(x0).clamp(0.0, 1.0)
    loss, terms = loss_of(images, targets)
    for look in looks:
        loss = loss + loss_of(look(images), targets)[0]
    loss = loss / (1 + len(looks))
    scale = HALF_LOSS_SCALE if x0.dtype == torch.float16 else 1.0
    (grad,) = torch.autograd.grad(loss * scale, leaf)
    wide = grad.detach().to(torch.promote_types(grad.dtype, torch.float32))
    return wide / scale, loss.detach(), {name: term.detach() for name, term in terms.items()}


def sum_of_squares(grad: Tensor) -> Tensor:
    """Per-sample sum of squares [B] of a gradient [B,C,H,W], in float32 at least."""
    return grad.to(torch.promote_types(grad.dtype, torch.float32)).square().sum(dim=(1, 2, 3))


def step_size(
    spec: GuidanceSpec, sigma: Tensor, call: int, calls: int, loss: Tensor, sumsq: Tensor, numel: int
) -> Tensor:
    """Root-mean-square size of the update of x0 at a call: 0-d, or [B] where it depends on the gradient.

    constant: scale; sigma: scale sigma_t; cosine: scale (1 + cos(pi i / n)) / 2; polyak: the step that would bring
    the loss to zero were it linear, scale L / ||g||^2 along g (Polyak 1969; for guidance, arXiv 2403.12404), at most
    scale sigma_t per sample. sumsq: [B] of the gradient over `numel` values a sample.
    """
    if spec.schedule == "constant":
        return spec.scale * torch.ones_like(sigma)
    if spec.schedule == "cosine":
        return spec.scale * 0.5 * (1 + math.cos(math.pi * call / calls)) * torch.ones_like(sigma)
    if spec.schedule == "polyak":
        rms = (sumsq / numel).sqrt()
        whole = sumsq.sum().clamp_min(torch.finfo(sumsq.dtype).tiny)
        return spec.scale * torch.minimum(loss.clamp_min(0).to(rms.dtype) * rms / whole, sigma.to(rms.dtype))
    return spec.scale * sigma
