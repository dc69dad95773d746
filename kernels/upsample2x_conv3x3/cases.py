"""Workloads of `upsample2x_conv3x3`, each checked against the unfolded convolution of the doubled input."""

import torch
from torch import Tensor

from synthkd.kernels.case import Arguments, Case, Maker, Suite, Tolerance
from synthkd.kernels.upsample2x_conv3x3 import fold_upsample_weight, reference, upsample2x_conv3x3


def _op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return upsample2x_conv3x3(x, fold_upsample_weight(weight), bias)


def _case(
    name: str, shape: tuple[int, int, int, int], out: int, *, last: bool = False, bias: bool = True, measured: str = ""
) -> Case:
    """shape: of x; out: output channels."""
    n, channels, h, w = shape
    phases = 4 * out * (h + 1) * (w + 1)

    def make(m: Maker) -> Arguments:
        # scales under which the result and both gradients are sums of size 1
        return {
            "x": m.randn(*shape, channels_last=last, scale=(4 * n * h * w) ** -0.5),
            "weight": m.randn(out, channels, 3, 3, scale=(9 * max(out, channels)) ** -0.5),
            "bias": m.randn(out) if bias else None,
        }

    def traffic(size: int) -> tuple[int, int]:
        """x read, phases written and read, the result written; backward the same, for x alone."""
        moved = n * (shape[1] * h * w + 2 * phases + 4 * out * h * w) * size
        return moved, moved

    return Case(
        name=name,
        arguments=make,
        # benchmarks take the gradient of x alone, as a frozen decoder does
        differentiable=("x",) if measured else ("x", "weight", "bias") if bias else ("x", "weight"),
        traffic=traffic,
        measured=measured,
    )


SUITE = Suite(
    name="upsample2x_conv3x3",
    op=_op,
    reference=reference,
    cases=(
        _case("one position", (1, 4, 1, 1), 3),
        _case("odd", (2, 3, 31, 33), 5),
        _case("odd, channels_last", (2, 3, 15, 33), 5, last=True),
        _case("one row, no bias", (33, 5, 1, 30), 1, bias=False),
        _case("one column, channels_last", (3, 2, 5, 1), 3, last=True),
        _case("wide, channels_last, no bias", (1, 2, 1, 3), 131, last=True, bias=False),
        _case("SD decoder, 8 x 8", (1, 64, 8, 8), 64, measured="cpu"),
        _case("SD decoder, 128 x 128 x 8", (8, 512, 128, 128), 512, last=True, measured="gpu"),
        _case("SD decoder, 256 x 256 x 8", (8, 256, 256, 256), 256, last=True, measured="gpu"),
        _case("SD decoder, 128 x 128 x 8, contiguous", (8, 512, 128, 128), 512, measured="gpu"),
    ),
    tolerances={
        torch.float32: Tolerance(rtol=1e-5, atol=5e-6, reason="sums of up to 4 Ci N H W products in another order"),
        torch.float16: Tolerance(rtol=2**-9, atol=4e-3, reason="folded weights and phases are rounded to 11 bits"),
        torch.bfloat16: Tolerance(
            rtol=2**-6, atol=3e-2, reason="folded weights and phases are rounded to 8 bits; the interpreter truncates"
        ),
    },
)
