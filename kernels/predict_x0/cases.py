"""Workloads of `predict_x0`."""

from collections.abc import Callable
from math import prod

import torch

from synthkd.kernels.case import Arguments, Case, Maker, Suite, Tolerance
from synthkd.kernels.predict_x0 import predict_x0, reference


def _arguments(
    shape: tuple[int, ...], kind: str, cfg: bool, *, last: bool = False, mixed: bool = False
) -> Callable[[Maker], Arguments]:
    def make(m: Maker) -> Arguments:
        return {
            "z": m.randn(*shape, channels_last=last),
            "out_cond": m.randn(*shape, channels_last=last != mixed),
            "out_uncond": m.randn(*shape, channels_last=last) if cfg else None,
            "guidance_scale": 3.0,
            "alpha": m.scalar(0.8),
            "sigma": m.scalar(0.6),
            "prediction_type": kind,
        }

    return make


def _case(name: str, shape: tuple[int, ...], kind: str, cfg: bool, measured: str = "", **layout: bool) -> Case:
    reads, n = 2 + cfg, prod(shape)
    return Case(
        name=name,
        arguments=_arguments(shape, kind, cfg, **layout),
        differentiable=("z", "out_cond", "out_uncond") if cfg else ("z", "out_cond"),
        traffic=lambda size: ((reads + 1) * n * size, (reads + 1) * n * size),
        measured=measured,
    )


SUITE = Suite(
    name="predict_x0",
    op=predict_x0,
    reference=reference,
    cases=(
        _case("one position", (1, 4, 1, 1), "epsilon", True),
        _case("odd, epsilon", (2, 3, 63, 65), "epsilon", True),
        _case("odd, v", (33, 5, 5, 9), "v_prediction", True),
        _case("no guidance, sample", (2, 3, 63, 65), "sample", False),
        _case("no guidance, v", (1, 4, 7, 9), "v_prediction", False),
        _case("channels_last", (3, 5, 17, 9), "epsilon", True, last=True),
        _case("mixed layouts", (3, 5, 17, 9), "epsilon", True, last=True, mixed=True),
        _case("SD latents x 16", (16, 4, 64, 64), "epsilon", True, "cpu"),
        _case("SDXL latents x 64", (64, 4, 128, 128), "epsilon", True, "gpu"),
    ),
    tolerances={
        torch.float32: Tolerance(rtol=1e-6, atol=2e-6, reason="five roundings of values up to 30"),
        torch.float16: Tolerance(rtol=2**-10, atol=2e-5, reason="one rounding of the result to 11 bits"),
        torch.bfloat16: Tolerance(
            rtol=2**-7, atol=2e-5, reason="one rounding to 8 bits; the interpreter truncates, so a whole unit"
        ),
    },
)
