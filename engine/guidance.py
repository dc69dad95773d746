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
    plain one the loss is a mean (arXiv 2403.12404). Returns the gradient like leaf (float32 where leaf is float16,
    whose range it may leave); the loss []; and the detached terms of the plain view.
    """
    images = decode(x0).clamp(0.0, 1.0)
    loss, terms = loss_of(images, targets)
    for look in looks:
        loss = loss + loss_of(look(images), targets)[0]
    loss = loss / (1 + len(looks))
    half = x0.dtype == torch.float16
    (grad,) = torch.autograd.grad(loss * HALF_LOSS_SCALE if half else loss, leaf)
    grad = grad.detach().float() / HALF_LOSS_SCALE if half else grad.detach()
    return grad, loss.detach(), {name: term.detach() for name, term in terms.items()}


def step_sizes(spec: GuidanceSpec, sigma: Tensor) -> Tensor:
    """Root-mean-square size of the update of x0 at each call, [n] like sigma [n], made before the loop.

    constant: scale; sigma: scale sigma_t; cosine: scale (1 + cos(pi i / n)) / 2; polyak: its limit,
    scale sigma_t.
    """
    if spec.schedule == "constant":
        return spec.scale * torch.ones_like(sigma)
    if spec.schedule == "cosine":
        n = len(sigma)
        share = [spec.scale * 0.5 * (1 + math.cos(math.pi * i / n)) for i in range(n)]
        return torch.tensor(share, dtype=sigma.dtype).to(sigma.device)
    return spec.scale * sigma


def step_size(spec: GuidanceSpec, planned: Tensor, loss: Tensor, sumsq: Tensor, numel: int) -> Tensor:
    """Root-mean-square size of the update of x0 at a call: what was planned, [], or under Polyak's rule [B].

    polyak: the step that would bring the loss to zero were it linear, scale L / ||g||^2 along g (Polyak 1969; for
    guidance, arXiv 2403.12404), at most as planned. sumsq: [B] of the gradient over `numel` values a sample.
    """
    if spec.schedule != "polyak":
        return planned
    rms = (sumsq / numel).sqrt()
    whole = sumsq.sum().clamp_min(torch.finfo(sumsq.dtype).tiny)
    return torch.minimum(spec.scale * (loss.clamp_min(0).to(rms.dtype) * rms / whole), planned.to(rms.dtype))
