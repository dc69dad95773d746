"""Workloads of `sum_of_squares`."""

from math import prod

import torch

from synthkd.kernels.case import Case, Suite, Tolerance
from synthkd.kernels.sum_of_squares import reference, sum_of_squares


def _case(name: str, shape: tuple[int, ...], measured: str = "", *, last: bool = False) -> Case:
    return Case(
        name=name,
        arguments=lambda m: {"x": m.randn(*shape, channels_last=last)},
        traffic=lambda size: (prod(shape) * size + 4 * shape[0], 0),
        measured=measured,
    )


_REASON = "squares are summed in float32, at most 32 to a lane and then by halves"

SUITE = Suite(
    name="sum_of_squares",
    op=sum_of_squares,
    reference=reference,
    cases=(
        _case("one position", (1, 4, 1, 1)),
        _case("one chunk", (33, 3, 5, 9)),
        _case("two chunks, odd", (2, 3, 63, 65)),
        _case("channels_last", (3, 5, 17, 119), last=True),
        _case("SD latents x 16", (16, 4, 64, 64), "cpu"),
        _case("SDXL latents x 64", (64, 4, 128, 128), "gpu"),
    ),
    tolerances={
        d: Tolerance(rtol=2e-6, atol=0.0, reason=_REASON) for d in (torch.float32, torch.float16, torch.bfloat16)
    },
)
