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


def test_unknown_prediction_type_is_refused() -> None:
    z, cond, _, a, s = _case((1, 4, 1, 1), torch.float32)
    with pytest.raises(ValueError, match=r"prediction_type 'eps'.*epsilon"):
        predict_x0(z, cond, None, 1.0, a, s, "eps")
