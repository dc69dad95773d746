"""Workloads of `batchnorm_stats`: inputs with means of their own, so that a wrong centre shows."""

from math import prod

import torch
from torch import Tensor

from synthkd.kernels.batchnorm_stats import batchnorm_stats, reference
from synthkd.kernels.case import Arguments, Case, Maker, Suite, Tolerance


def _op(x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    stats = batchnorm_stats(x, shift)
    return stats.mean, stats.var


def _reference(x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    stats = reference(x, shift)
    return stats.mean, stats.var


def _case(name: str, shape: tuple[int, ...], measured: str = "", *, last: bool = False, shift: bool = True) -> Case:
    def make(m: Maker) -> Arguments:
        centre = m.randn(shape[1], dtype=torch.float32)
        values = m.randn(*shape) + centre.view(-1, *[1] * (len(shape) - 2)).to(m.dtype)
        near = m.place(centre + 0.1 * m.randn(shape[1], dtype=torch.float32))
        return {"x": m.place(values, channels_last=last), "shift": near if shift else None}

    n = prod(shape)
    return Case(
        name=name,
        arguments=make,
        differentiable=("x",),
        traffic=lambda size: (n * size, 2 * n * size),
        measured=measured,
    )


_GPU = [
    ("ResNet-50 stem at 224 x 256", (256, 64, 112, 112)),
    ("ResNet-50 layer1 at 224 x 64", (64, 256, 56, 56)),
    ("ResNet-50 layer4 at 224 x 256", (256, 512, 7, 7)),
]

SUITE = Suite(
    name="batchnorm_stats",
    op=_op,
    reference=_reference,
    cases=(
        _case("one value", (1, 3, 1, 1), shift=False),
        _case("odd", (2, 3, 63, 65)),
        _case("odd, channels_last", (2, 3, 63, 65), last=True, shift=False),
        _case("33 samples, no shift", (33, 5, 5, 9), shift=False),
        _case("33 samples, channels_last", (33, 5, 5, 9), last=True),
        _case("vectors", (33, 130)),
        _case("tokens", (3, 192, 11), last=True),
        _case("volumes", (2, 3, 3, 5, 7)),
        _case("ResNet layer x 8", (8, 64, 56, 56), "cpu"),
        *(_case(name, shape, "gpu") for name, shape in _GPU),
        *(_case(f"{name}, channels_last", shape, "gpu", last=True) for name, shape in _GPU),
    ),
    tolerances={
        torch.float32: Tolerance(rtol=2e-6, atol=1e-6, reason="sums of up to 1e4 values of size 1 in float32"),
        torch.float16: Tolerance(rtol=2**-10, atol=2e-6, reason="gradients are rounded to 11 bits, and to 2^-24"),
        torch.bfloat16: Tolerance(
            rtol=2**-7, atol=2e-6, reason="gradients are rounded to 8 bits; the interpreter truncates, so a whole unit"
        ),
    },
)
