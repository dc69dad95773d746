"""Workloads of `group_norm_silu` and `add_group_norm_silu`."""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from synthkd.kernels.case import Arguments, Case, Maker, Suite, Tolerance
from synthkd.kernels.group_norm_silu import add_group_norm_silu, add_reference, group_norm_silu, reference


def _arguments(
    shape: tuple[int, ...], groups: int, add: bool, last: bool, mixed: bool, wide: bool
) -> Callable[[Maker], Arguments]:
    def make(m: Maker) -> Arguments:
        dtype = torch.float32 if wide else m.dtype
        if add:  # multiples of 1/16, whose sum is exact in every dtype: what rounding it does is tested on its own
            halves = {"x": _coarse(m, shape, last), "residual": _coarse(m, shape, last != mixed)}
        else:
            halves = {"x": m.randn(*shape, channels_last=last)}
        weight = m.place(1 + m.randn(shape[1], dtype=dtype, scale=0.3))
        bias = m.randn(shape[1], dtype=dtype, scale=0.3)
        return {**halves, "num_groups": groups, "weight": weight, "bias": bias, "eps": 1e-6}

    return make


def _coarse(m: Maker, shape: tuple[int, ...], last: bool) -> Tensor:
    values = m.randn(*shape, dtype=torch.float32).mul(16).round().div(16).clamp(-3.875, 3.875)
    return m.place(values.to(m.dtype), channels_last=last)


def _case(
    name: str,
    shape: tuple[int, ...],
    groups: int,
    measured: str = "",
    *,
    add: bool = False,
    last: bool = False,
    mixed: bool = False,
    wide: bool = False,
    frozen: bool = False,
) -> Case:
    """wide: weight and bias in float32 beside half inputs; frozen: they need no gradient, as when guiding."""
    n = prod(shape)
    inputs = ("x", "residual") if add else ("x",)
    return Case(
        name=name,
        arguments=_arguments(shape, groups, add, last, mixed, wide),
        differentiable=inputs if frozen else (*inputs, "weight", "bias"),
        traffic=lambda size: (5 * n * size, 6 * n * size) if add else (3 * n * size, 5 * n * size),
        measured=measured,
    )


_DECODER = [("SD VAE decoder 512 px x 8", (8, 128, 512, 512)), ("SD VAE decoder 256 px x 8", (8, 256, 256, 256))]


def _measured(add: bool) -> tuple[Case, ...]:
    cpu = _case("SD VAE decoder, a corner", (1, 128, 64, 64), 32, "cpu", add=add, frozen=True)
    gpu = [
        _case(name + (", channels_last" if last else ""), shape, 32, "gpu", add=add, last=last, frozen=True)
        for name, shape in _DECODER
        for last in (False, True)
    ]
    return (cpu, *gpu)


_TOLERANCES = {
    torch.float32: Tolerance(
        rtol=1e-5, atol=1e-5, reason="sums of up to 1e4 values of size 1 in float32; weight gradients add them all"
    ),
    torch.float16: Tolerance(rtol=2**-10, atol=1e-5, reason="one rounding of the result to 11 bits"),
    torch.bfloat16: Tolerance(
        rtol=2**-7, atol=1e-5, reason="one rounding to 8 bits; the interpreter truncates, so a whole unit"
    ),
}

SUITE = Suite(
    name="group_norm_silu",
    op=group_norm_silu,
    reference=reference,
    cases=(
        _case("one position", (2, 6, 1, 1), 2),
        _case("odd", (2, 3, 63, 65), 3),
        _case("odd, channels_last, one group", (2, 3, 63, 65), 1, last=True, frozen=True),
        _case("33 samples", (33, 6, 5, 9), 2, wide=True),
        _case("groups of 5 channels, channels_last", (3, 20, 5, 9), 4, last=True),
        _case("blocks of channels, channels_last", (1, 160, 7, 9), 16, last=True, wide=True),
        _case("vectors", (3, 130), 5),
        *_measured(False),
    ),
    tolerances=_TOLERANCES,
)

ADD_SUITE = Suite(
    name="add_group_norm_silu",
    op=add_group_norm_silu,
    reference=add_reference,
    cases=(
        _case("one position", (2, 6, 1, 1), 2, add=True),
        _case("odd", (1, 3, 63, 65), 3, add=True, frozen=True),
        _case("33 samples, mixed layouts", (33, 6, 5, 9), 1, add=True, mixed=True),
        _case("channels_last", (2, 96, 9, 7), 8, add=True, last=True, wide=True),
        _case("channels_last, mixed layouts", (2, 20, 17, 9), 5, add=True, last=True, mixed=True),
        *_measured(True),
    ),
    tolerances=_TOLERANCES,
)
