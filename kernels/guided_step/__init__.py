"""Guidance update, solver step and Latent CutMix gather, as one op."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from synthkd.kernels.dispatch import refuse_empty, runs_kernel, together
from synthkd.kernels.guided_step.reference import gather_source, normalised_direction
from synthkd.kernels.guided_step.reference import guided_step as reference
from synthkd.kernels.layout import dense, like

__all__ = ["gather_source", "guided_step", "normalised_direction", "reference"]


def guided_step(
    z: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    to_x0: Tensor,
    to_eps: Tensor,
    *,
    noise: Tensor | None = None,
    to_noise: Tensor | None = None,
    before: Tensor | None = None,
    to_history: Tensor | None = None,
    grad: Tensor | None = None,
    sumsq: Tensor | None = None,
    step: Tensor | None = None,
    src_map: Tensor | None = None,
    rederive_eps: bool = False,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One solver step from a shifted clean latent, then Latent CutMix of everything the solver carries on.

    x0' = x0 - step * grad / rms(grad) per sample; eps = (z - alpha x0) / sigma, from x0 (the shift is a
    correction of the clean latent alone, as in MPGD, arXiv 2311.16424) or, with rederive_eps, from x0';
    z_next = to_x0 x0' + to_eps eps [+ to_history (x0' - before)] [+ to_noise noise]
    which is DDIM (arXiv 2010.02502, eq. 12), Euler, DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2) or a
    consistency step (arXiv 2310.04378, algorithm 3), as the coefficients say.

    z, x0, grad, noise, before: [B,C,H,W], contiguous or channels_last; sumsq: [B], the per-sample sum of squares of
    grad in at least float32 (`sum_of_squares`); step: 0-d or [B]; the coefficients: 0-d tensors on z's device;
    src_map: integers [B,H,W] in 0..B-1 (not checked), or None; keep: whether the next call needs this one's x0'.
    Returns z_next and x0' (None unless kept), [B,C,H,W] in the dtype and layout of z, both gathered through src_map:
    a position takes z, x0, grad, history, noise and norm from its source sample (arXiv 2504.00870, Latent CutMix).
    One launch. Where a gradient is asked for, the reference serves.
    Raises ValueError for an empty latent, shapes that differ, and noise, before or grad without what belongs to it.
    """
    _check(z, src_map, {"x0": x0, "noise": noise, "before": before, "grad": grad})
    _check_pairs(len(z), noise, to_noise, before, to_history, grad, sumsq, step)
    latents, rest = (z, x0, noise, before, grad), (alpha, sigma, to_x0, to_eps, to_noise, to_history, sumsq, step)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*latents, *rest))
    if wanted or not runs_kernel(*latents) or not together(z, *latents, *rest, src_map):
        return reference(
            z, x0, alpha, sigma, to_x0, to_eps, noise=noise, to_noise=to_noise, before=before, to_history=to_history,
            grad=grad, sumsq=sumsq, step=step, src_map=src_map, rederive_eps=rederive_eps, keep=keep,
        )  # fmt: skip
    z_next, kept = _op(
        z, x0, alpha, sigma, to_x0, to_eps, noise, to_noise, before, to_history, grad, sumsq, step, src_map,
        rederive_eps, keep,
    )  # fmt: skip
    return z_next, kept if keep else None


def _check(z: Tensor, src_map: Tensor | None, others: dict[str, Tensor | None]) -> None:
    refuse_empty("guided_step", z)
    for name, x in others.items():
        if x is not None and x.shape != z.shape:
            raise ValueError(f"guided_step: {name} is {tuple(x.shape)}, z {tuple(z.shape)}; expected the same shape")
    if src_map is not None and src_map.shape != (z.shape[0], *z.shape[2:]):
        expected = (z.shape[0], *z.shape[2:])
        raise ValueError(f"guided_step: src_map is {tuple(src_map.shape)}; expected {expected}")


def _check_pairs(
    samples: int,
    noise: Tensor | None,
    to_noise: Tensor | None,
    before: Tensor | None,
    to_history: Tensor | None,
    grad: Tensor | None,
    sumsq: Tensor | None,
    step: Tensor | None,
) -> None:
    if noise is not None and to_noise is None:
        raise ValueError("guided_step: noise needs to_noise beside it")
    if before is not None and to_history is None:
        raise ValueError("guided_step: before needs to_history beside it")
    if grad is None:
        return
    if sumsq is None or step is None:
        raise ValueError("guided_step: grad needs sumsq and step beside it")
    if sumsq.shape != (samples,) or step.shape not in ((), (samples,)):
        found = f"sumsq is {tuple(sumsq.shape)}, step {tuple(step.shape)}"
        raise ValueError(f"guided_step: {found}; expected ({samples},) and () or ({samples},)")


@torch.library.custom_op("synthkd::guided_step", mutates_args=())
def _op(
    z: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    to_x0: Tensor,
    to_eps: Tensor,
    noise: Tensor | None,
    to_noise: Tensor | None,
    before: Tensor | None,
    to_history: Tensor | None,
    grad: Tensor | None,
    sumsq: Tensor | None,
    step: Tensor | None,
    src_map: Tensor | None,
    rederive_eps: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    from synthkd.kernels.guided_step import kernel

    z = dense(z)
    fresh = None if noise is None or to_noise is None else (like(noise, z), to_noise)
    history = None if before is None or to_history is None else (like(before, z), to_history)
    shift = None
    if grad is not None and sumsq is not None and step is not None:
        shift = like(grad, z), sumsq.contiguous(), step.contiguous()
    source = None if src_map is None else src_map.contiguous()
    coefficients = alpha, sigma, to_x0, to_eps
    return kernel.guided_step(z, like(x0, z), coefficients, fresh, history, shift, source, rederive_eps, keep)


@_op.register_fake
def _(z: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    z = dense(z)
    return torch.empty_like(z), torch.empty_like(z) if args[-1] else z.new_empty(0)


@register_flop_formula(torch.ops.synthkd.guided_step)
def _flops(z: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Per value: six for the step, and two each for a gradient, a history and fresh noise."""
    present = sum(x is not None for x in (args[5], args[7], args[9]))
    return int(torch.Size(z).numel()) * (6 + 2 * present)
