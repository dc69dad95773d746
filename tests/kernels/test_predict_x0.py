"""predict_x0: the equations, guidance in diffusers' convention, and the dtype contract."""

import pytest
import torch

from synthkd.kernels import predict_x0

SHAPES = [(1, 4, 1, 1), (2, 3, 63, 65), (33, 4, 5, 9)]


def _case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    x0, eps, other = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(3))
    alpha = torch.tensor(0.8, dtype=torch.float64)
    return x0, eps, other, alpha, (1 - alpha.square()).sqrt()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_recovers_the_clean_latent(shape: tuple[int, ...], kind: str) -> None:
    x0, eps, _, a, s = _case(shape, torch.float64)
    out = {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}[kind]
    torch.testing.assert_close(predict_x0(a * x0 + s * eps, out, None, 5.0, a, s, kind), x0, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_classifier_free_guidance_is_linear_from_the_unconditional_output(scale: float) -> None:
    z, cond, uncond, a, s = _case((2, 3, 5, 9), torch.float64)
    mixed = uncond + scale * (cond - uncond)
    got = predict_x0(z, cond, uncond, scale, a, s)
    torch.testing.assert_close(got, predict_x0(z, mixed, None, 1.0, a, s), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    z, cond, uncond, a, s = _case((33, 4, 5, 9), dtype)
    wide = predict_x0(z.float(), cond.float(), uncond.float(), 7.5, a.float(), s.float())
    got = predict_x0(z, cond, uncond, 7.5, a.float(), s.float())
    assert got.dtype == dtype
    assert torch.equal(got, wide.to(dtype))


def test_gradient_flows_to_the_latent() -> None:
    z, cond, uncond, a, s = _case((2, 3, 2, 2), torch.float64)
    assert torch.autograd.gradcheck(lambda z: predict_x0(z, cond * z, uncond, 3.0, a, s), z.requires_grad_())


@pytest.mark.usefixtures("kernels_on")
def test_coefficients_that_require_a_gradient_take_the_reference(device: torch.device) -> None:
    z, cond, uncond, a, s = (x.to(device, torch.float32) for x in _case((2, 3, 2, 2), torch.float32))
    predict_x0(z, cond, uncond, 3.0, a.requires_grad_(), s).sum().backward()
    assert a.grad is not None
    assert float(a.grad) != 0.0


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels do not take CPU tensors there")
@pytest.mark.parametrize("inside", [True, False])
def test_kernels_need_a_device_that_runs_them(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`triton` on a CPU without the interpreter: plain torch, not Triton's own words about pointers."""
    from synthkd.kernels import dispatch
    from synthkd.kernels.launch import recorded

    monkeypatch.setattr(dispatch, "_INTERPRETED", inside)
    z, cond, _, a, s = _case((1, 4, 2, 2), torch.float32)
    with recorded() as launches:
        predict_x0(z, cond, None, 1.0, a, s)
    assert len(launches) == inside


def test_unknown_prediction_type_is_refused() -> None:
    z, cond, _, a, s = _case((1, 4, 1, 1), torch.float32)
    with pytest.raises(ValueError, match=r"prediction_type 'eps'.*epsilon"):
        predict_x0(z, cond, None, 1.0, a, s, "eps")
