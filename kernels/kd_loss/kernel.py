"""Triton kernels of `kd_loss`: a row per program, in registers where it fits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from synthkd.kernels.launch import cdiv, launch, next_power_of_2

WHOLE = 8192  # the longest row that is kept in registers
CHUNK = 2048
SCALED = 1024

# K is a constexpr: one value per student, and loads are as wide as its divisibility allows


@triton.jit
def _terms(s, t, most_s, most_t, log_s, log_t, inverse):
    """q, p and p (log p - log q) where log p = (t - max t)/T - log sum."""
    log_q = (s - most_s) * inverse - log_s
    log_p = (t - most_t) * inverse - log_t
    q, p = tl.exp(log_q), tl.exp(log_p)
    return q, p, p * (log_p - log_q)


@triton.jit
def _whole(s, t, losses, grad, temperature, inverse, K: tl.constexpr, WANT_GRAD: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * K
    at = tl.arange(0, BLOCK)
    inside = at < K
    xs = tl.load(s + start + at, mask=inside, other=-float("inf")).to(tl.float32)
    xt = tl.load(t + start + at, mask=inside, other=-float("inf")).to(tl.float32)
    most_s, most_t = tl.max(xs, 0), tl.max(xt, 0)
    log_s = tl.log(tl.sum(tl.exp((xs - most_s) * inverse), 0))
    log_t = tl.log(tl.sum(tl.exp((xt - most_t) * inverse), 0))
    xs, xt = tl.where(inside, xs, most_s), tl.where(inside, xt, most_t)  # no infinity minus infinity
    q, p, term = _terms(xs, xt, most_s, most_t, log_s, log_t, inverse)
    total = tl.sum(tl.where(inside, term, 0.0), 0)
    tl.store(losses + tl.program_id(0), temperature * temperature * total)
    if WANT_GRAD:
        tl.store(grad + start + at, temperature * (q - p), mask=inside)


@triton.jit
def _chunked(s, t, losses, grad, temperature, inverse, K: tl.constexpr, WANT_GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """K >= BLOCK, so that every lane has met a logit after the first chunk."""
    start = tl.program_id(0).to(tl.int64) * K
    lane = tl.arange(0, BLOCK)
    best_s = tl.load(s + start + lane).to(tl.float32)
    best_t = tl.load(t + start + lane).to(tl.float32)
    sum_s = tl.full([BLOCK], 1.0, tl.float32)
    sum_t = tl.full([BLOCK], 1.0, tl.float32)
    for k in range(BLOCK, K, BLOCK):
        inside = k + lane < K
        xs = tl.load(s + start + k + lane, mask=inside, other=-float("inf")).to(tl.float32)
        xt = tl.load(t + start + k + lane, mask=inside, other=-float("inf")).to(tl.float32)
        new_s, new_t = tl.maximum(best_s, xs), tl.maximum(best_t, xt)
        sum_s = sum_s * tl.exp((best_s - new_s) * inverse) + tl.exp((xs - new_s) * inverse)
        sum_t = sum_t * tl.exp((best_t - new_t) * inverse) + tl.exp((xt - new_t) * inverse)
        best_s, best_t = new_s, new_t
    most_s, most_t = tl.max(best_s, 0), tl.max(best_t, 0)
    log_s = tl.log(tl.sum(sum_s * tl.exp((best_s - most_s) * inverse), 0))
    log_t = tl.log(tl.sum(sum_t * tl.exp((best_t - most_t) * inverse), 0))
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(0, K, BLOCK):  # the second read is served by the cache
        inside = k + lane < K
        xs = tl.load(s + start + k + lane, mask=inside, other=0.0).to(tl.float32)
        xt = tl.load(t + start + k + lane, mask=inside, other=0.0).to(tl.float32)
        q, p, term = _terms(xs, xt, most_s, most_t, log_s, log_t, inverse)
        total += tl.where(inside, term, 0.0)
        if WANT_GRAD:
            tl.store(grad + start + k + lane, temperature * (q - p), mask=inside)
    tl.store(losses + tl.program_id(0), temperature * temperature * tl.sum(total, 0))


@triton.jit
def _scaled(grad, upstream, out, n, K: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(grad + at, mask=inside).to(tl.float32)
    u = tl.load(upstream + at // K, mask=inside).to(tl.float32)
    tl.store(out + at, g * u, mask=inside)


def forward(s: Tensor, t: Tensor, temperature: float, want_grad: bool, kept: torch.dtype) -> tuple[Tensor, Tensor]:
    """Losses per row [B], float32, and the gradients of each in s [B,K] (empty unless wanted); s and t contiguous."""
    b, k = s.shape
    losses = s.new_empty(b, dtype=torch.float32)
    grad = s.new_empty(s.shape if want_grad else 0, dtype=kept)
    whole = k <= WHOLE
    block = next_power_of_2(k) if whole else CHUNK
    launch(
        _whole if whole else _chunked, (b,), s, t, losses, grad, temperature, 1.0 / temperature,
        K=k, WANT_GRAD=want_grad, BLOCK=block, num_warps=min(max(block // 512, 1), 16) if whole else 8,
    )  # fmt: skip
    return losses, grad


def backward(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """grad [B,K] times upstream [B] per row, rounded once to dtype."""
    out = torch.empty_like(grad, dtype=dtype)
    launch(
        _scaled, (cdiv(grad.numel(), SCALED),), grad, upstream, out, grad.numel(),
        K=grad.shape[1], BLOCK=SCALED,
    )  # fmt: skip
    return out
