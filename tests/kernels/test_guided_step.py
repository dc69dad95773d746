"""guided_step: the shifted DDIM step against the equations written out per sample, and the source gather."""

import pytest
import torch
from torch import Tensor

from synthkd.kernels import guided_step
from synthkd.kernels.guided_step import gather_source

SHAPES = [(1, 3, 1, 1), (2, 3, 63, 65), (33, 4, 5, 9)]
A, S, A_NEXT, S_NEXT = 0.6, 0.8, 0.8, 0.6


def _coefficients(dtype: torch.dtype) -> list[Tensor]:
    return [torch.tensor(c, dtype=dtype) for c in (A, S, A_NEXT, S_NEXT)]


def _tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]


def _steer(grad: Tensor, step: float) -> dict[str, Tensor]:
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    return {"grad": grad, "sumsq": wide.square().sum(dim=(1, 2, 3)), "step": torch.tensor(step, dtype=wide.dtype)}


@pytest.mark.parametrize("shape", SHAPES)
def test_unguided_step_keeps_x0_and_eps(shape: tuple[int, ...]) -> None:
    x0, eps, _ = _tensors(shape)
    got, _ = guided_step(A * x0 + S * eps, x0, *_coefficients(torch.float64))
    torch.testing.assert_close(got, A_NEXT * x0 + S_NEXT * eps, rtol=0, atol=1e-13)


@pytest.mark.parametrize("rederive", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_x0_moves_by_step_times_the_unit_rms_gradient(shape: tuple[int, ...], rederive: bool) -> None:
    z, x0, grad = _tensors(shape)
    grad *= torch.logspace(-3, 3, shape[0], dtype=grad.dtype).view(-1, 1, 1, 1)  # the size of a gradient is free
    got, _ = guided_step(z, x0, *_coefficients(torch.float64), **_steer(grad, 0.3), rederive_eps=rederive)
    for b in range(shape[0]):
        shifted = x0[b] - 0.3 * grad[b] / grad[b].square().mean().sqrt()
        eps = (z[b] - A * (shifted if rederive else x0[b])) / S
        torch.testing.assert_close(got[b], A_NEXT * shifted + S_NEXT * eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rederive", [False, True])
def test_last_step_returns_the_shifted_x0_itself(rederive: bool) -> None:
    z, x0, grad = _tensors((2, 3, 5, 9))
    a, s = _coefficients(torch.float64)[:2]
    end = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    got, _ = guided_step(z, x0, a, s, *end, **_steer(grad, 0.3), rederive_eps=rederive)
    torch.testing.assert_close((got - x0).square().mean(dim=(1, 2, 3)).sqrt(), torch.full((2,), 0.3).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_zero_gradient_gives_no_shift_and_no_nan(dtype: torch.dtype) -> None:
    z, x0, grad = _tensors((3, 4, 5, 9), dtype)
    grad[1] = 0
    coefficients = _coefficients(torch.promote_types(dtype, torch.float32))
    guided, _ = guided_step(z, x0, *coefficients, **_steer(grad, 0.3))
    plain, _ = guided_step(z, x0, *coefficients)
    assert torch.equal(guided[1], plain[1])
    assert torch.isfinite(guided).all()
    assert not torch.equal(guided[0], plain[0])


@pytest.mark.parametrize("size", [1e-16, 1e-19, 1e-20, 3e-23])
def test_a_vanishing_gradient_never_overflows(size: float) -> None:
    """A confident teacher's cross-entropy leaves gradients whose squares are at the end of float32."""
    z, x0, grad = _tensors((3, 4, 5, 9), torch.float32)
    guided, _ = guided_step(z, x0, *_coefficients(torch.float32), **_steer(grad * size, 0.3))
    plain, _ = guided_step(z, x0, *_coefficients(torch.float32))
    assert torch.isfinite(guided).all()
    shift = (guided - plain).square().mean().sqrt()
    assert shift <= 0.31 * A_NEXT


def test_half_precision_steps_in_float32() -> None:
    z, x0, grad = _tensors((33, 4, 5, 9), torch.bfloat16)
    wide, _ = guided_step(z.float(), x0.float(), *_coefficients(torch.float32), **_steer(grad.float(), 0.3))
    got, _ = guided_step(z, x0, *_coefficients(torch.float32), **_steer(grad, 0.3))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, wide.bfloat16())


@pytest.mark.parametrize("shape", SHAPES)
def test_gather_copies_each_position_from_its_source(shape: tuple[int, ...]) -> None:
    b, _, h, w = shape
    (x, *_), source = _tensors(shape), torch.randint(b, (b, h, w), generator=torch.Generator().manual_seed(2))
    want = torch.stack([x[source[k], :, torch.arange(h)[:, None], torch.arange(w)].permute(2, 0, 1) for k in range(b)])
    assert torch.equal(gather_source(x, source), want)


def test_gather_follows_the_step() -> None:
    z, x0, grad = _tensors((4, 4, 5, 9))
    source = torch.randint(4, (4, 5, 9), generator=torch.Generator().manual_seed(3))
    c, steer = _coefficients(torch.float64), _steer(grad, 0.3)
    got, _ = guided_step(z, x0, *c, **steer, src_map=source)
    assert torch.equal(got, gather_source(guided_step(z, x0, *c, **steer)[0], source))


@pytest.mark.usefixtures("kernels_on")
def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """What a latent of more than 2**31 elements would run."""
    from synthkd.kernels.case import check
    from synthkd.kernels.guided_step import kernel
    from synthkd.kernels.guided_step.cases import SUITE

    monkeypatch.setattr(kernel, "WIDE_FROM", 0)
    for case in SUITE.cases:
        assert case.measured or check(SUITE, case, device, torch.float32).passed


def test_wrong_arguments_are_refused() -> None:
    z, x0, grad = _tensors((2, 3, 4, 5))
    c = _coefficients(torch.float64)
    with pytest.raises(ValueError, match=r"x0 is \(2, 3, 4, 4\), z \(2, 3, 4, 5\)"):
        guided_step(z, x0[..., :4], *c)
    with pytest.raises(ValueError, match="grad needs sumsq and step"):
        guided_step(z, x0, *c, grad=grad)
    with pytest.raises(ValueError, match="noise needs to_noise"):
        guided_step(z, x0, *c, noise=grad)
    with pytest.raises(ValueError, match="before needs to_history"):
        guided_step(z, x0, *c, before=grad)
    for sumsq, step in ((torch.ones(1), torch.ones(())), (torch.ones(2), torch.ones(1)), (torch.ones(2, 1), c[0])):
        with pytest.raises(ValueError, match=r"expected \(2,\) and \(\) or \(2,\)"):
            guided_step(z, x0, *c, grad=grad, sumsq=sumsq, step=step)
    with pytest.raises(ValueError, match=r"src_map is \(2, 4, 4\); expected \(2, 4, 5\)"):
        guided_step(z, x0, *c, src_map=torch.zeros(2, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="empty tensor"):
        guided_step(z[:0], x0[:0], *c)


def test_a_wanted_gradient_takes_the_reference() -> None:
    """Never a zero in silence: through the solver step, too, autograd sees every path."""
    z, x0, grad = _tensors((2, 3, 4, 5))
    smooth = z.requires_grad_(), x0.requires_grad_()
    c = _coefficients(torch.float64)
    assert torch.autograd.gradcheck(lambda z, x0: guided_step(z, x0, *c, **_steer(grad, 0.3))[0], smooth)
