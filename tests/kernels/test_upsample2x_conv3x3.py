"""upsample2x_conv3x3: the fold is exact, the public contract, and the traced gradient."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from synthkd.kernels import fold_upsample_weight, upsample2x_conv3x3
from synthkd.kernels.upsample2x_conv3x3 import reference


def _tensors(shape: tuple[int, ...], out: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (shape, (out, shape[1], 3, 3), (out,))
    x, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    return x, weight, bias


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 3, 7, 4), (33, 1, 3, 5), (1, 2, 1, 6)])
def test_folding_is_exact(shape: tuple[int, ...], last: bool) -> None:
    x, weight, bias = _tensors(shape, 5)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    leaves = [t.requires_grad_() for t in (x.detach().clone(), weight, bias)]
    got, want = upsample2x_conv3x3(leaves[0], fold_upsample_weight(weight), bias), reference(*leaves)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(want.shape, dtype=torch.float64)
    grads = zip(torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(want, leaves, cotangent), strict=True)
    for found, expected in grads:
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_folding_sums_in_float32() -> None:
    weight = torch.full((1, 1, 3, 3), 1.0, dtype=torch.bfloat16)
    weight[0, 0, 1:, 1:] = torch.tensor([[256.0, 1.0], [1.0, 1.0]])
    folded = fold_upsample_weight(weight)
    assert folded.dtype == torch.bfloat16
    assert folded[0, 0, 1, 1] == 260  # 256 + 1 + 1 + 1 in bfloat16 stays 256
    assert fold_upsample_weight(weight.double()).dtype == torch.float64


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("last", [False, True])
def test_layout_goes_through(last: bool, device: torch.device) -> None:
    x, weight, bias = (t.to(device) for t in _tensors((2, 3, 4, 5), 6, torch.float32))
    layout = torch.channels_last if last else torch.contiguous_format
    out = upsample2x_conv3x3(x.contiguous(memory_format=layout), fold_upsample_weight(weight), bias)
    assert out.is_contiguous(memory_format=layout)


@pytest.mark.usefixtures("kernels_on")
def test_traced_gradient_is_the_eager_one(traced: Callable[..., Tensor], device: torch.device) -> None:
    x, weight, bias = (t.to(device) for t in _tensors((2, 3, 4, 5), 6, torch.float32))
    folded = fold_upsample_weight(weight)

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(upsample2x_conv3x3(x, folded, bias).square().sum(), x)[0]

    x.requires_grad_()  # outside: torch 2.11 cannot trace it
    want = gradient(x)
    assert want.abs().max() > 1
    torch.testing.assert_close(traced(gradient)(x), want)


@pytest.fixture
def traced() -> Iterator[Callable[..., Callable[..., Tensor]]]:
    """Compile a function that takes a gradient itself."""
    before = torch._dynamo.config.trace_autograd_ops
    torch._dynamo.config.trace_autograd_ops = True
    yield lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")
    torch._dynamo.config.trace_autograd_ops = before
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("shape", "folded", "bias", "message"),
    [
        ((1, 2, 0, 3), (4, 2, 2, 2), 1, "empty"),
        ((1, 2, 3, 3), (4, 3, 2, 2), 1, r"expected \[N,3,H,W\]"),
        ((1, 2, 3, 3), (5, 2, 2, 2), 1, r"folded is \(5, 2, 2, 2\)"),
        ((1, 2, 3, 3), (4, 2, 3, 3), 1, r"folded is \(4, 2, 3, 3\)"),
        ((1, 2, 3, 3), (8, 2, 2, 2), 3, r"bias is \(3,\); expected \[2\]"),
    ],
)
def test_refusals(shape: tuple[int, ...], folded: tuple[int, ...], bias: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upsample2x_conv3x3(torch.zeros(shape), torch.zeros(folded), torch.zeros(bias))


def test_only_a_3x3_kernel_is_folded() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 1, 1\); expected \[Co,Ci,3,3\]"):
        fold_upsample_weight(torch.zeros(1, 2, 1, 1))
