"""Workloads of `to_uint8`."""

from collections.abc import Callable
from math import prod

import torch

from synthkd.kernels.case import Arguments, Case, Maker, Suite, Tolerance
from synthkd.kernels.to_uint8 import reference, to_uint8


def _arguments(shape: tuple[int, ...], last: bool) -> Callable[[Maker], Arguments]:
    # normal values: a third below 0, a third above 1 in units of the scale, the rest between
    return lambda m: {"images": m.randn(*shape, channels_last=last)}


def _case(name: str, shape: tuple[int, ...], measured: str = "", last: bool = False) -> Case:
    n = prod(shape)
    return Case(
        name=name, arguments=_arguments(shape, last), traffic=lambda size: (n * (size + 1), 0), measured=measured
    )


EXACT = Tolerance(rtol=0.0, atol=0.5, reason="whole numbers: half of one is allowed, so none differs")

SUITE = Suite(
    name="to_uint8",
    op=to_uint8,
    reference=reference,
    cases=(
        _case("one position", (1, 3, 1, 1)),
        _case("odd", (2, 3, 63, 65)),
        _case("odd, channels_last", (2, 3, 63, 65), last=True),
        _case("batch 33, five channels", (33, 5, 5, 9)),
        _case("grey", (2, 1, 17, 9)),
        _case("digits x 64", (64, 3, 32, 32), "cpu"),
        _case("512 x 32", (32, 3, 512, 512), "gpu"),
        _case("512 x 32, channels_last", (32, 3, 512, 512), "gpu", last=True),
    ),
    tolerances={torch.float32: EXACT, torch.float16: EXACT, torch.bfloat16: EXACT},
)
