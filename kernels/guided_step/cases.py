"""Workloads of `guided_step`."""

from collections.abc import Callable
from math import prod

import torch

from synthkd.kernels.case import Arguments, Case, Maker, Suite, Tolerance
from synthkd.kernels.guided_step import guided_step, reference

_EXTRAS = ("noise", "before", "grad", "map", "steps", "views", "wide", "rederive", "keep")


def _arguments(shape: tuple[int, ...], extras: str, last: bool, step: float) -> Callable[[Maker], Arguments]:
    def make(m: Maker) -> Arguments:
        has, b = set(extras.split()), shape[0]
        assert has <= set(_EXTRAS), extras
        out: Arguments = {name: m.randn(*shape, channels_last=last) for name in ("z", "x0")}
        out |= {name: m.scalar(v) for name, v in (("alpha", 0.6), ("sigma", 0.8), ("to_x0", 0.8), ("to_eps", 0.6))}
        if "noise" in has:
            out |= {"noise": m.randn(*shape, channels_last=last), "to_noise": m.scalar(0.3)}
        if "before" in has:
            out |= {"before": m.randn(*shape), "to_history": m.scalar(-0.4)}  # contiguous whatever z is
        if "grad" in has:
            grad = m.randn(*shape, channels_last=last, scale=1e-3, dtype=torch.float32 if "wide" in has else None)
            size = m.place(torch.linspace(0.1, step, b, dtype=torch.float32)) if "steps" in has else m.scalar(step)
            sumsq = m.place(grad.double().square().sum(dim=(1, 2, 3)).float().cpu())
            if "views" in has:  # every second of memory, and one number for all
                sumsq, size = sumsq.repeat_interleave(2)[::2], m.scalar(step).expand(b)
            out |= {"grad": grad, "sumsq": sumsq, "step": size}
        if "map" in has:
            out["src_map"] = m.integers(b, b, *shape[2:], dtype=torch.int32)
        return out | {"rederive_eps": "rederive" in has, "keep": "keep" in has}

    return make


def _case(
    name: str, shape: tuple[int, ...], extras: str, measured: str = "", *, last: bool = False, step: float = 0.3
) -> Case:
    has = extras.split()
    latents = 3 + ("grad" in has) + ("noise" in has) + ("before" in has) + ("keep" in has)
    floor = 4 * shape[0] * prod(shape[2:]) * ("map" in has)
    return Case(
        name=name,
        arguments=_arguments(shape, extras, last, step),
        traffic=lambda size: (latents * prod(shape) * size + floor, 0),
        measured=measured,
    )


SUITE = Suite(
    name="guided_step",
    op=guided_step,
    reference=reference,
    cases=(
        _case("one position", (1, 4, 1, 1), "grad"),
        _case("unguided", (2, 3, 63, 65), ""),
        _case("unguided, exchanged", (33, 4, 5, 9), "map"),
        _case("guided", (2, 3, 63, 65), "grad"),
        _case("guided, exchanged", (33, 4, 5, 9), "grad map steps"),
        _case("eps from the shifted x0", (3, 5, 7, 9), "grad rederive map"),
        _case("2M, exchanged", (5, 4, 9, 7), "grad map before keep"),
        _case("ancestral, exchanged", (5, 4, 9, 7), "grad map noise"),
        _case("a float32 gradient, as beside float16 latents", (3, 4, 5, 9), "grad wide map keep"),
        _case("a step per sample, views", (6, 3, 4, 5), "grad views map"),
        _case("everything, many channels", (3, 37, 5, 3), "grad map noise before keep steps"),
        _case("channels_last", (3, 5, 17, 9), "grad map keep before", last=True),
        _case("SD latents x 16", (16, 4, 64, 64), "grad map", "cpu"),
        _case("SDXL latents x 64, unguided", (64, 4, 128, 128), "", "gpu"),
        _case("SDXL latents x 64", (64, 4, 128, 128), "grad map", "gpu"),
        _case("SDXL latents x 64, 2M", (64, 4, 128, 128), "grad map before keep", "gpu"),
        _case("SDXL latents x 64, channels_last", (64, 4, 128, 128), "grad map", "gpu", last=True),
    ),
    tolerances={
        torch.float32: Tolerance(rtol=1e-6, atol=3e-6, reason="ten roundings of values up to 6; sqrt and / to 2 ulp"),
        torch.float16: Tolerance(rtol=2**-10, atol=3e-6, reason="one rounding of the result to 11 bits"),
        torch.bfloat16: Tolerance(
            rtol=2**-7, atol=3e-6, reason="one rounding to 8 bits; the interpreter truncates, so a whole unit"
        ),
    },
)
