"""Workloads of `kd_loss`."""

from collections.abc import Callable

import torch

from synthkd.kernels.case import Arguments, Case, Maker, Suite, Tolerance
from synthkd.kernels.kd_loss import kd_loss, reference


def _arguments(b: int, k: int, temperature: float) -> Callable[[Maker], Arguments]:
    return lambda m: {
        "student_logits": m.randn(b, k, scale=3.0),
        "teacher_logits": m.randn(b, k, scale=5.0),
        "temperature": temperature,
    }


def _case(name: str, b: int, k: int, temperature: float = 4.0, measured: str = "") -> Case:
    n = b * k
    return Case(
        name=name,
        arguments=_arguments(b, k, temperature),
        differentiable=("student_logits",),
        traffic=lambda size: (2 * n * size, n * size),  # the gradient is written once
        measured=measured,
    )


SUITE = Suite(
    name="kd_loss",
    op=kd_loss,
    reference=reference,
    cases=(
        _case("one logit", 1, 1),
        _case("two classes", 3, 2, 30.0),
        _case("batch 33", 33, 10),
        _case("1,000 classes", 7, 1000),
        _case("1,000 classes, T 30", 7, 1000, 30.0),
        _case("more than registers hold", 5, 8193),
        _case("more than registers hold, T 30", 5, 8193, 30.0),
        _case("ImageNet x 128", 128, 1000, 4.0, "cpu"),
        _case("ImageNet x 1024", 1024, 1000, 4.0, "gpu"),
        _case("ImageNet-21k x 1024", 1024, 21841, 4.0, "gpu"),
    ),
    tolerances={
        torch.float32: Tolerance(
            rtol=1e-5, atol=3e-6, reason="exponentials of arguments up to 20; q - p, of which little may be left"
        ),
        torch.float16: Tolerance(rtol=2**-10, atol=3e-6, reason="one rounding of the gradient to 11 bits"),
        torch.bfloat16: Tolerance(
            rtol=2**-6, atol=3e-6, reason="the gradient is rounded to 8 bits twice; the interpreter truncates"
        ),
    },
)
