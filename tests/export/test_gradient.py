"""The gradient as forward operators: each one written here against autograd, and no autograd where it runs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from synthkd.export import ExportError, build
from synthkd.export.gradient import exported_gradient
from synthkd.export.graph import call_of, foreign_operators

W = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1))
GROUPED = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(2))
ASKEW = torch.randn(6, 4, 2, 5, generator=torch.Generator().manual_seed(3))
BACK = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(4))

CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "conv": lambda x: F.conv2d(x, W, padding=1),
    "conv without padding": lambda x: F.conv2d(x, W),
    "conv with wide padding": lambda x: F.conv2d(x, W, padding=4),
    "conv of stride 2": lambda x: F.conv2d(x, W, stride=2, padding=1),
    "conv of stride 3 and 2": lambda x: F.conv2d(x, W, stride=(3, 2), padding=(0, 1)),
    "conv, dilated": lambda x: F.conv2d(x, W, padding=2, dilation=2),
    "conv in groups": lambda x: F.conv2d(x, GROUPED, padding=1, groups=2),
    "conv, not square": lambda x: F.conv2d(x, ASKEW, padding=(1, 2)),
    "conv, transposed": lambda x: F.conv_transpose2d(x, BACK, stride=2, padding=1, output_padding=1),
    "nearest doubling": lambda x: F.interpolate(x, scale_factor=2.0),
    "nearest, 3 by 2": lambda x: F.interpolate(x, size=(27, 22)),
    "resize down": lambda x: F.interpolate(x, size=[5, 4], mode="bilinear", antialias=True),
    "resize up": lambda x: F.interpolate(x, size=[16, 13], mode="bilinear", antialias=True),
    "mean of cells": lambda x: F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False),
    "mean, overlapping": lambda x: F.avg_pool2d(x, 3, stride=2, padding=1),
    "mean, padding not counted": lambda x: F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False),
    "mean, a rest": lambda x: F.avg_pool2d(x, (2, 5), stride=(2, 3)),
    "largest of cells": lambda x: F.max_pool2d(x, 2),
    "largest, overlapping": lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
    "largest, a rest": lambda x: F.max_pool2d(x, (3, 2), stride=2, ceil_mode=True),
    "adaptive mean": lambda x: F.adaptive_avg_pool2d(x, 1),
    "group norm": lambda x: F.group_norm(x, 2),
    "activations": lambda x: F.silu(x) + F.gelu(x) * F.hardswish(x) + torch.sigmoid(x).log() + F.relu6(3 * x),
    "attention": lambda x: F.scaled_dot_product_attention(x.flatten(2), x.flatten(2), x.flatten(2) * 2),
    "powers": lambda x: (x.square() + (x + 9).pow(3) + (x.abs() + 1).sqrt()) * (x.abs() + 1).pow(-0.5),
    "norms": lambda x: torch.linalg.vector_norm(x, dim=1) + F.normalize(x, dim=1).sum(1) + x.var(1),
    "choices": lambda x: torch.where(x > 0, x * 2, x / 3).clamp(-1, 0.5) + F.log_softmax(x, dim=1),
    "pieces": lambda x: torch.cat([x[:, :2] * 2, x[:, 1:3].flip(3)], 1) * F.pixel_shuffle(x, 2)[..., :9, 4:15],
}


def gradient_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """d/dx of a sum in which no position counts like another."""

    def gradient(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            out = function(leaf)
            weight = torch.linspace(-1, 2, out[0].numel(), dtype=out.dtype).view(out[0].shape)
            (grad,) = torch.autograd.grad((out * weight).sum() + out.mean() ** 2, leaf)
        return grad

    return gradient


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dynamic", [True, False])
def test_against_autograd(name: str, dynamic: bool) -> None:
    """In float64, at the batch of the example and, where it is free, at another; [B,4,9,11]."""
    function = gradient_of(CASES[name])
    x = torch.randn(3, 4, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    weights = (W, GROUPED, ASKEW, BACK)
    try:
        for w in weights:
            w.data = w.data.double()
        program = exported_gradient(call_of(function, (x,)), dynamic)
        graph = program.module()
        assert not foreign_operators(program)
        assert not [n for n in program.graph.nodes if "backward" in str(n.target)]
        for z in (x, x[:2], x[:1]) if dynamic else (x,):
            with torch.no_grad():
                torch.testing.assert_close(graph(z)[0], function(z), rtol=1e-9, atol=1e-9)
    finally:
        for w in weights:
            w.data = w.data.float()


def test_what_is_not_written_says_so() -> None:
    """One line each, no wrong numbers."""
    weight = torch.randn(6, 4, 3, 3, requires_grad=True)
    cases: dict[str, Callable[[Tensor], Tensor]] = {
        "resize from 9x11 to": lambda x: F.interpolate(x, size=(13, 11)),
        "resize by 2.1": lambda x: F.interpolate(x, scale_factor=2.1),
        "corners aligned: True": lambda x: torch.ops.aten._upsample_bilinear2d_aa(x, [5, 4], True),
        "dilated max pooling": lambda x: F.max_pool2d(x, 2, dilation=2),
        "freeze the networks": lambda x: F.conv2d(x, weight),
    }
    for line, function in cases.items():
        wanted = gradient_of(function)
        if "freeze" in line:

            def wanted(x: Tensor) -> Tensor:
                leaf = x.detach().requires_grad_()
                with torch.enable_grad():
                    return torch.autograd.grad(F.conv2d(leaf, weight).sum(), [leaf, weight])[0]

        with pytest.raises(ExportError, match=line) as error:
            exported_gradient(call_of(wanted, (torch.randn(2, 4, 9, 11),)), False)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dynamic", [True, False])
def test_in_onnxruntime(dynamic: bool, tmp_path: Path) -> None:
    """Convolutions of both kinds, pooling, norms and attention in one graph; float32, relative error <= 1e-5."""
    pytest.importorskip("onnxruntime", reason="part of the onnx extra")

    def loss(x: Tensor) -> Tensor:
        x = F.group_norm(F.interpolate(x, scale_factor=2.0), 2)
        x = F.silu(F.conv2d(F.conv2d(x, W, stride=2, padding=1), BACK.transpose(0, 1).flatten(1)[:4, :6, None, None]))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        return F.scaled_dot_product_attention(x.flatten(2), x.flatten(2), x.flatten(2))

    function = gradient_of(loss)
    x = torch.randn(3, 4, 9, 11, generator=torch.Generator().manual_seed(6))
    compiled = build(function, (x,), gradient=True, dynamic=dynamic, store=tmp_path, name="gradient")
    for z in (x, x[:1]) if dynamic else (x,):
        wanted = function(z)
        assert float((compiled(z) - wanted).norm() / wanted.norm()) < 1e-5
