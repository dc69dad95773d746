"""A loss on images -> the gradient on the latent. What the loss is, is the caller's business."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from synthkd.engine.augment import Look, viewed
from synthkd.engine.config import GuidanceSpec

Terms = dict[str, Tensor]
Decode = Callable[[Tensor], Tensor]
Latent = Callable[[slice, Tensor], Tensor]

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


@runtime_checkable
class GroupGuidance(Guidance, Protocol):
    """A guidance in two halves, which a group larger than the memory needs, and one with a memory of earlier calls.

    Calling it is `judge([look(images)], targets, begin())`: `look` runs the networks on some of the group's
    images, `judge` makes the loss of all that was seen. The memory starts as what `begin` gives; it lives for a group.
    """

    def look(self, images: Tensor) -> Any:
        """What the networks show of images [b,3,H,W]: tensors in tuples, lists or dicts."""
        ...

    def judge(self, seen: Sequence[Any], targets: Tensor, memory: Any) -> tuple[Tensor, Terms, Any]:
        """Loss and terms of the group, its looks in order, and the memory for the next call."""
        ...

    def begin(self) -> Any:
        """The memory that a group starts with, tensors in tuples or dicts; None for a guidance without one."""
        ...

    def attached(self) -> AbstractContextManager[None]:
        """Within it `look` changes nothing of a network, so that it can be traced into one graph."""
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


class GuidanceStep(NamedTuple):
    """The gradient, like its leaf (float32 where that is float16); the loss []; terms of the plain view; the memory."""

    grad: Tensor
    loss: Tensor
    terms: Terms
    memory: Any


def guidance_gradient(
    loss_of: Guidance,
    decode: Decode,
    x0: Tensor,
    leaf: Tensor,
    targets: Tensor,
    looks: Sequence[Look] = (),
    memory: Any = None,
) -> GuidanceStep:
    """Gradient of the loss of decode(x0) with respect to `leaf` (x0 itself, or what it was computed from).

    x0, leaf: latents [B,C,h,w]; looks: further views of the decoded images, over which and the plain one the loss is a
    mean (arXiv 2403.12404); memory: of a GroupGuidance. Returns the gradient like leaf (float32 where leaf is float16,
    whose range it may leave); the loss []; and the detached terms of the plain view.
    """
    images = decode(x0).clamp(0.0, 1.0)
    loss, terms, after = _judged(loss_of, [images], targets, memory)
    for look in looks:
        loss = loss + _judged(loss_of, [viewed(images, look)], targets, memory)[0]
    loss = loss / (1 + len(looks))
    half = x0.dtype == torch.float16
    (grad,) = torch.autograd.grad(loss * HALF_LOSS_SCALE if half else loss, leaf)
    return _finished(grad, half, loss, terms, after)


def _judged(loss_of: Any, images: list[Tensor], targets: Tensor, memory: Any) -> tuple[Tensor, Terms, Any]:
    if memory is not None:  # without one a guidance is what it is when called
        judged: tuple[Tensor, Terms, Any] = loss_of.judge([loss_of.look(x) for x in images], targets, memory)
        return judged
    loss, terms = loss_of(images[0], targets)
    return loss, terms, memory


def _finished(grad: Tensor, half: bool, loss: Tensor, terms: Terms, memory: Any) -> GuidanceStep:
    grad = grad.detach().float() / HALF_LOSS_SCALE if half else grad.detach()
    kept = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, memory)
    return GuidanceStep(grad, loss.detach(), {name: term.detach() for name, term in terms.items()}, kept)


def parts_of(size: int, chunk: int) -> list[slice]:
    """A group in runs of at most `chunk` samples, 0 for all at once."""
    return [slice(i, min(i + (chunk or size), size)) for i in range(0, size, chunk or size)]


def chunked_gradient(
    loss_of: GroupGuidance,
    decode: Decode,
    latent: Latent,
    zero: Tensor,
    targets: Tensor,
    looks: Sequence[Look],
    memory: Any,
    chunk: int,
) -> GuidanceStep:
    """The same gradient with `chunk` samples at a time in memory, exactly, by two passes.

    latent(part, zero) -> x0 [b,C,h,w] of a run of the group, with zero [b,C,h,w] added where the gradient is taken.
    The first pass keeps what the networks show of each run, from which the group's loss and its gradient with respect
    to all that was shown follow; the second pulls these back through each run. So statistics of the whole group, class
    means and per-sample terms alike are those of the group at once: averaging the gradients of runs is not, since a
    distance of statistics is no mean over samples.
    """
    half = zero.dtype == torch.float16

    def seen(part: slice, look: Look | None) -> Any:
        with torch.no_grad():
            return view_of(loss_of, decode, look)(latent(part, zero[part]))

    def pulled(part: slice, look: Look | None, wanted: list[Tensor | None]) -> Tensor:
        leaf = zero[part].detach().requires_grad_()
        with torch.enable_grad():
            return pulled_back(view_of(loss_of, decode, look)(latent(part, leaf)), wanted, leaf)

    def judged(shown: list[Any]) -> Any:
        return judged_apart(loss_of, shown, targets, memory, half)

    return two_passes(parts_of(len(zero), chunk), looks, seen, judged, pulled, half, memory is not None)


def two_passes(
    parts: Sequence[slice],
    looks: Sequence[Look],
    look: Callable[[slice, Look | None], Any],
    judge: Callable[[list[Any]], tuple[tuple[Tensor, Terms, Any], list[list[Tensor | None]]]],
    pull: Callable[[slice, Look | None, list[Tensor | None]], Tensor],
    half: bool,
    remembers: bool,
) -> GuidanceStep:
    """A group's gradient from its runs: `look` at each, `judge` all, `pull` the judgement back through each.

    The look of a view is the run's part of it; remembers: the loss has a memory.
    """
    total: Tensor | None = None
    found: list[tuple[Tensor, Terms, Any]] = []
    for view in (None, *looks):
        views = [None if view is None else view.part(part) for part in parts]
        shown = [look(part, seen_as) for part, seen_as in zip(parts, views, strict=True)]
        judged, cotangents = judge(shown)
        found.append(judged)
        rows = zip(parts, views, cotangents, strict=True)
        grads = torch.cat([_unscaled(pull(part, seen_as, wanted), half) for part, seen_as, wanted in rows])
        total = grads if total is None else total + grads
    assert total is not None
    loss = torch.stack([value for value, _, _ in found]).sum() / len(found)
    return _finished(total / len(found), False, loss, found[0][1], found[0][2] if remembers else None)


def _unscaled(grad: Tensor, half: bool) -> Tensor:
    return grad.float() / HALF_LOSS_SCALE if half else grad


def view_of(loss_of: GroupGuidance, decode: Decode, look: Look | None) -> Callable[[Tensor], Any]:
    """What the networks show of the images of clean latents [b,C,h,w], in a view."""

    def view(x0: Tensor) -> Any:
        images = decode(x0).clamp(0.0, 1.0)
        return loss_of.look(images if look is None else viewed(images, look))

    return view


def judged_apart(
    loss_of: GroupGuidance, seen: list[Any], targets: Tensor, memory: Any, half: bool
) -> tuple[tuple[Tensor, Terms, Any], list[list[Tensor | None]]]:
    """Loss, terms and memory of a group, and the loss's gradient with respect to every tensor that was seen."""
    flat, spec = tree_flatten(seen)
    leaves = [x.detach().requires_grad_() if _differentiable(x) else x for x in flat]
    with torch.enable_grad():
        judged = loss_of.judge(tree_unflatten(leaves, spec), targets, memory)
        loss = judged[0] * HALF_LOSS_SCALE if half else judged[0]
        given = [x for x in leaves if _differentiable(x)]
        grads = iter(torch.autograd.grad(loss, given, allow_unused=True))
    everything = [next(grads) if _differentiable(x) else None for x in leaves]
    counts = [len(tree_flatten(x)[0]) for x in seen]
    return judged, [everything[sum(counts[:k]) : sum(counts[: k + 1])] for k in range(len(counts))]


def pulled_back(seen: Any, wanted: Sequence[Tensor | None], leaf: Tensor) -> Tensor:
    """The gradient like leaf of sum(wanted * seen), over the tensors of `seen` in order."""
    pairs = [
        (x, g)
        for x, g in zip(tree_flatten(seen)[0], wanted, strict=True)
        if g is not None and isinstance(x, Tensor) and x.requires_grad
    ]
    (grad,) = torch.autograd.grad([x for x, _ in pairs], leaf, [g for _, g in pairs])
    return grad


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


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
