"""to_uint8: bit-equal with plain torch on every half-precision number and round every tie of float32."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.kernels import implementation, to_uint8
from synthkd.kernels.launch import recorded

SIXTEEN = torch.arange(2**16, dtype=torch.int32).to(torch.int16)


def _ties() -> Tensor:
    """float32 within 8 ulp of (k + 0.5) / 255 and of k / 255."""
    levels = torch.arange(0, 511, dtype=torch.float64) / 510
    bits = levels.float().view(torch.int32)[:, None] + torch.arange(-8, 9, dtype=torch.int32)
    return torch.cat([bits.clamp(min=0).view(torch.float32).flatten(), -levels.float(), 1 + levels.float()])


def _both(images: Tensor) -> tuple[Tensor, Tensor]:
    with implementation("triton"), recorded() as launches:
        got = to_uint8(images)
    assert len(launches) == 1
    with implementation("reference"):
        return got, to_uint8(images)


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_sixteen_bits(dtype: torch.dtype, device: torch.device) -> None:
    values = SIXTEEN.view(dtype)
    values = values[torch.isfinite(values)].to(device)
    got, want = _both(values.view(1, 2, -1, 2))
    assert got.dtype == torch.uint8
    assert torch.equal(got, want)


@pytest.mark.usefixtures("kernels_on")
def test_float32_round_every_tie(device: torch.device) -> None:
    got, want = _both(_ties().view(1, 1, 1, -1).to(device))
    assert torch.equal(got, want)


@pytest.mark.usefixtures("kernels_on")
def test_ties_go_to_the_even_level(device: torch.device) -> None:
    """Exact ties exist only where x 255 is rounded to one; they are made here from the product's own values."""
    x = (torch.arange(0, 255, dtype=torch.float64) + 0.5).div(255).float()
    ties = x[(x * 255 - (x * 255).floor()) == 0.5]
    assert len(ties) > 200
    with implementation("triton"):
        got = to_uint8(ties.view(1, 1, 1, -1).to(device)).flatten().cpu()
    assert (got % 2 == 0).all()


@pytest.mark.usefixtures("kernels_on")
def test_infinities_are_clamped_and_nan_is_zero(device: torch.device) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, -math.nan], device=device).view(1, 1, 1, 4)
    with implementation("triton"):
        assert to_uint8(x).flatten().tolist() == [255, 0, 0, 0]


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 4, 4), (2, 4, 1, 1), (1, 3, 33, 17)])
def test_memory_is_channels_last_from_any_layout(shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.rand(shape, device=device)
    strided = torch.rand((*shape[:-1], 2 * shape[-1]), device=device)[..., ::2]
    for images in (x, x.contiguous(memory_format=torch.channels_last), x.movedim(2, 3), strided):
        got, want = _both(images)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(got, want)


@pytest.mark.usefixtures("kernels_on")
def test_compiles_as_one_graph(device: torch.device) -> None:
    x = torch.rand(2, 3, 5, 9, device=device)
    compiled = torch.compile(to_uint8, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), to_uint8(x))


def test_float64_takes_the_reference() -> None:
    with implementation("reference"):
        want = to_uint8(torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64))
    assert torch.equal(to_uint8(torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64)), want)


@pytest.mark.parametrize(("shape", "message"), [((0, 3, 4, 4), "empty"), ((3, 4, 4), r"expected \[B,C,H,W\]")])
def test_wrong_shapes_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_uint8(torch.zeros(shape))


@pytest.mark.usefixtures("kernels_on")
def test_the_synthesizer_calls_the_op(pipeline: Any, recipe: Callable[..., Any], device: torch.device) -> None:
    """One launch per drawn group, and the same pixels as from plain torch."""
    from synthkd.engine import Request, Synthesizer

    synth = Synthesizer.from_pipeline(deepcopy(pipeline).to(device), recipe(steps=1))
    with recorded() as launches:
        batch = next(iter(synth.stream(Request(num_samples=6))))
    assert [x.kernel.fn.__module__ for x in launches].count("synthkd.kernels.to_uint8.kernel") == 1
    with implementation("reference"):
        plain = next(iter(synth.stream(Request(num_samples=6))))
    assert (batch.images.int() - plain.images.int()).abs().max() <= 1
