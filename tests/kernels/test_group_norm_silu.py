"""group_norm_silu and its add variant: against torch's own modules, at the ends of the range, and traced."""

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from synthkd.kernels import add_group_norm_silu, group_norm_silu
from synthkd.kernels.launch import recorded


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _affine(c: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return (1 + 0.3 * _randn(c, seed=1)).to(device), (0.3 * _randn(c, seed=2)).to(device)


def test_the_reference_is_torch_s_group_norm_and_silu() -> None:
    x, weight, bias = _randn(3, 6, 5, 9, dtype=torch.float64), _randn(6, seed=1).double(), _randn(6, seed=2).double()
    want = F.silu(F.group_norm(x, 3, weight, bias, 1e-5))
    torch.testing.assert_close(group_norm_silu(x, 3, weight, bias, 1e-5), want, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("kernels_on")
def test_a_group_of_one_value(device: torch.device) -> None:
    """Its variance is 0: rstd is 1 / sqrt(eps), the value its own mean, the output silu(bias), the gradient 0."""
    from synthkd.kernels.group_norm_silu import kernel

    x, (weight, bias) = (_randn(5, 4, 1, 1) * 100).to(device), _affine(4, device)
    out, _, mean, rstd = kernel.forward(x, None, 4, weight, bias, 1e-6)
    torch.testing.assert_close(rstd, torch.full_like(rstd, 1e3), rtol=1e-6, atol=0)
    torch.testing.assert_close(mean, x.view(5, 4), rtol=0, atol=0)
    torch.testing.assert_close(out.view(5, 4), F.silu(bias).expand(5, 4), rtol=1e-6, atol=1e-7)
    leaf = x.requires_grad_()
    (grad,) = torch.autograd.grad(group_norm_silu(leaf, 4, weight, bias, 1e-6).sum(), leaf)
    assert not grad.isnan().any()
    assert grad.abs().max() <= 1e-3  # 1e3 times the rounding of w du - c1


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_half_values_do_not_overflow(channels_last: bool, device: torch.device) -> None:
    """Squares of 3e4 pass the end of float16 (6.5e4); a huge gradient and a saturated silu give no NaN."""
    x = (_randn(2, 6, 9, 7).sign() * 3e4 + 500 * _randn(2, 6, 9, 7, seed=3)).half().to(device)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    weight, bias = (v.half() * 100 for v in _affine(6, device))
    leaf = x.requires_grad_()
    out = group_norm_silu(leaf, 2, weight, bias, 1e-6)
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    wide = x.detach().double().requires_grad_()
    want = group_norm_silu(wide, 2, weight.double(), bias.double(), 1e-6)
    (want_grad,) = torch.autograd.grad(want.sum(), wide)
    torch.testing.assert_close(out.double(), want, rtol=2**-10, atol=1e-4)
    torch.testing.assert_close(grad.double(), want_grad, rtol=2e-2, atol=2**-14)


@pytest.mark.usefixtures("kernels_on")
def test_a_mean_far_from_zero(device: torch.device) -> None:
    """float32 values of mean 1000 and deviation 1 are normalised as in float64."""
    x, (weight, bias) = _randn(2, 6, 31, 33).add(1000).to(device), _affine(6, device)
    want = group_norm_silu(x.double(), 2, weight.double(), bias.double(), 1e-6)
    torch.testing.assert_close(group_norm_silu(x, 2, weight, bias, 1e-6).double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("channels_last", [False, True])
def test_runs_of_many_tiles(channels_last: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """What only large inputs do: several tiles a program, the last run of a sample partly empty."""
    x, (weight, bias) = _randn(2, 6, 67, 65).to(device), _affine(6, device)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    group_norm_silu(x[:, :, :1, :1], 2, weight, bias, 1e-6)  # imports the kernels
    monkeypatch.setattr(sys.modules["synthkd.kernels.moments"], "PROGRAMS", 1)
    tensors = [v.requires_grad_() for v in (x, weight, bias)]
    with recorded() as launches:
        out = group_norm_silu(x, 2, weight, bias, 1e-6)
        grads = torch.autograd.grad(out, tensors, torch.cos(out.detach()))
    assert [launch.constexprs.get("STEPS", 0) > 1 for launch in launches] == [True, False, True, True, False, True]
    wide = [v.detach().double().requires_grad_() for v in tensors]
    want = group_norm_silu(wide[0], 2, wide[1], wide[2], 1e-6)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    for got, expected in zip(grads, torch.autograd.grad(want, wide, torch.cos(want.detach())), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics_are_those_of_the_rounded_sum(channels_last: bool, device: torch.device) -> None:
    """float16, which the interpreter rounds as a GPU does: total has the bits of x + residual, out those of total's."""
    x, residual = (_randn(2, 6, 9, 7, seed=s, dtype=torch.float16).to(device) for s in (3, 4))
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    out, total = add_group_norm_silu(x, residual, 3, *_affine(6, device), 1e-6)
    assert torch.equal(total, x + residual)
    ulp = 2**-10 if device.type == "cuda" else 0.0  # programs of other widths there: sums in another order
    alone = group_norm_silu(total, 3, *_affine(6, device), 1e-6)
    torch.testing.assert_close(out, alone, rtol=ulp, atol=ulp / 100)
    assert out.stride() == total.stride() == x.stride()


@pytest.mark.usefixtures("kernels_on")
def test_the_output_alone_can_be_differentiated(device: torch.device) -> None:
    """total left unused; x and residual share a gradient."""
    x, residual = (_randn(2, 6, 5, 9, seed=s).to(device).requires_grad_() for s in (3, 4))
    out, _ = add_group_norm_silu(x, residual, 3, *_affine(6, device), 1e-6)
    dx, dresidual = torch.autograd.grad(out, (x, residual), torch.cos(out.detach()))
    leaf = (x + residual).detach().requires_grad_()
    alone = group_norm_silu(leaf, 3, *_affine(6, device), 1e-6)
    (want,) = torch.autograd.grad(alone, leaf, torch.cos(alone.detach()))
    torch.testing.assert_close(dx, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(dx, dresidual)


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("add", [False, True])
def test_the_traced_gradient_is_the_eager_one(add: bool, device: torch.device) -> None:
    """Inside a compiled function that asks for a gradient itself, as the guided step does; weights are frozen."""
    x, (weight, bias) = _randn(2, 6, 5, 9).to(device).requires_grad_(), _affine(6, device)

    def step(leaf: Tensor) -> Tensor:
        if add:
            out, total = add_group_norm_silu(leaf, torch.sin(leaf), 3, weight, bias, 1e-6)
            out = out + total
        else:
            out = group_norm_silu(leaf, 3, weight, bias, 1e-6)
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        return grad

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    assert compiled.abs().max() > 0.1
    torch.testing.assert_close(compiled, step(x), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("kernels_on")
def test_three_launches_each_way_in_either_layout(device: torch.device) -> None:
    """Neither layout is copied, and both are kept."""
    x, (weight, bias) = _randn(2, 6, 5, 9).to(device).requires_grad_(), _affine(6, device)
    for layout in (torch.contiguous_format, torch.channels_last):
        with recorded() as launches:
            out = group_norm_silu(x.to(memory_format=layout), 3, weight, bias, 1e-6)
            out.backward(torch.ones_like(out))
        assert len(launches) == 6
        assert out.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("op", [group_norm_silu, add_group_norm_silu])
def test_wrong_arguments_are_refused(op: Any) -> None:
    x, weight = torch.zeros(2, 6, 3, 3), torch.ones(6)
    more = (x,) if op is add_group_norm_silu else ()
    with pytest.raises(ValueError, match="4 groups; expected a divisor of the 6 channels"):
        op(x, *more, 4, weight, weight, 1e-6)
    with pytest.raises(ValueError, match="0 groups"):
        op(x, *more, 0, weight, weight, 1e-6)
    with pytest.raises(ValueError, match=r"bias is \(5,\); expected \(6,\)"):
        op(x, *more, 3, weight, weight[:5], 1e-6)
    with pytest.raises(ValueError, match="empty"):
        op(x[:0], *(m[:0] for m in more), 3, weight, weight, 1e-6)


def test_a_residual_of_another_shape_is_refused() -> None:
    x, weight = torch.zeros(2, 6, 3, 3), torch.ones(6)
    with pytest.raises(ValueError, match="residual is"):
        add_group_norm_silu(x, x[:1], 3, weight, weight, 1e-6)
