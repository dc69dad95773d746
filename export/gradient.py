"""A function that takes gradients inside -> a graph of forward operators alone.

`make_fx` records forward and backward as one list of aten operators. What backends have no operator for (the backward
of a convolution, of a resize, of pooling) is written with forward ones, so that no autograd is needed where it runs.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes

from synthkd.export.errors import ExportError
from synthkd.export.graph import Call, Flat, dynamic_dims, first_line

aten = torch.ops.aten


def exported_gradient(call: Call, dynamic: bool) -> ExportedProgram:
    """The graph of a function that calls `torch.autograd.grad`, in forward operators; dynamic: of any batch.

    Weights must need no gradient. Raises ExportError, one line, where the function cannot be traced so.
    """
    example = call.at(max(call.batch, 2)) if dynamic else call.tensors
    try:
        graph = _recorded(call, example, dynamic)
        with torch.no_grad():
            return torch.export.export(
                _Varargs(graph), tuple(example), dynamic_shapes=dynamic_dims(call, dynamic), strict=False
            )
    except ExportError:
        raise
    except Exception as error:  # tracers raise anything
        raise ExportError(f"the gradient cannot be traced ({first_line(error)})") from error


class _Varargs(torch.nn.Module):
    """A recorded graph under the argument name that `dynamic_dims` speaks of."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.graph_module = graph

    def forward(self, *flat: Tensor) -> Any:
        return self.graph_module(*flat)


def _recorded(call: Call, example: list[Tensor], dynamic: bool) -> GraphModule:
    """Attention in plain operators: its fused kernels have no backward in other runtimes."""
    with sdpa_kernel(SDPBackend.MATH):
        if not dynamic:
            graph = make_fx(Flat(call), decomposition_table=table())(*example)
        else:
            mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
            fakes = [_fake(mode, x, batched) for x, batched in zip(example, call.batched, strict=True)]
            with mode, enable_python_dispatcher():  # sizes stay symbols on their way through autograd
                graph = make_fx(Flat(call), decomposition_table=table(), _allow_non_fake_inputs=True)(*fakes)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _fake(mode: FakeTensorMode, x: Tensor, batched: bool) -> Tensor:
    """x without values, its batch any number."""
    sizes = [DimDynamic.DYNAMIC if batched and axis == 0 else DimDynamic.STATIC for axis in range(x.dim())]
    return mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


def table() -> dict[Any, Callable[..., Any]]:
    """What each operator is written as: torch's own decompositions, and those below."""
    return {
        **core_aten_decompositions(),
        aten.pow.Tensor_Scalar: power,
        aten.convolution_backward.default: convolution_backward,
        aten.upsample_nearest2d_backward.default: upsample_nearest2d_backward,
        aten._upsample_bilinear2d_aa.default: upsample_bilinear2d_aa,
        aten._upsample_bilinear2d_aa_backward.default: upsample_bilinear2d_aa_backward,
        aten.avg_pool2d_backward.default: avg_pool2d_backward,
        aten.max_pool2d_with_indices.default: max_pool2d,
        aten.max_pool2d_with_indices_backward.default: max_pool2d_backward,
    }


def power(x: Tensor, exponent: float) -> Any:
    """A square as a product and x^1, which the gradient of a square has, as x: onnxruntime's Pow takes its time."""
    return x * x if exponent == 2 else x.clone() if exponent == 1 else NotImplemented


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, mask: Any,
) -> tuple[Tensor | None, None, None]:  # fmt: skip
    """The gradient [B,C,H,W] of a convolution's input, as a convolution.

    Of stride 1: with the kernel turned round, its channels exchanged and padding d (k - 1) - p, which every runtime is
    fast at; else the transposed convolution; of a transposed one the plain one. Weights are constants here.
    """
    if mask[1] or mask[2]:
        raise ExportError("the gradient of a weight is asked for; freeze the networks")
    if not mask[0]:
        return None, None, None
    rank, conv = len(stride), aten.convolution.default
    if transposed:
        return conv(grad, weight, None, stride, padding, dilation, False, [0] * rank, groups), None, None
    reach = [dilation[i] * (weight.shape[2 + i] - 1) for i in range(rank)]
    if groups == 1 and all(s == 1 for s in stride) and all(reach[i] >= padding[i] for i in range(rank)):
        turned = weight.flip(tuple(range(2, 2 + rank))).transpose(0, 1)
        around = [reach[i] - padding[i] for i in range(rank)]
        return conv(grad, turned, None, stride, around, dilation, False, [0] * rank, 1), None, None
    left = [
        x.shape[2 + i] - ((grad.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + reach[i] + 1) for i in range(rank)
    ]
    return conv(grad, weight, None, stride, padding, dilation, True, left, groups), None, None


def upsample_nearest2d_backward(
    grad: Tensor, output_size: Any, input_size: Any, scales_h: Any = None, scales_w: Any = None
) -> Tensor:
    """Each position's gradient is the sum over its copies; whole factors only."""
    _check_scales(output_size, input_size, scales_h, scales_w)
    height, width = input_size[2:]
    up, across = output_size[0] // height, output_size[1] // width
    if (height * up, width * across) != tuple(output_size):
        raise ExportError(f"the gradient of a resize from {height}x{width} to {output_size} is not written yet")
    return grad.reshape(grad.shape[0], grad.shape[1], height, up, width, across).sum((3, 5))


def _check_scales(output_size: Any, input_size: Any, scales_h: Any, scales_w: Any, aligned: bool = False) -> None:
    """Refuse a resize by another factor than its sizes have, or one with aligned corners: not written yet."""
    for axis, scale in ((0, scales_h), (1, scales_w)):
        if aligned or (scale is not None and scale * input_size[2 + axis] != output_size[axis]):
            raise ExportError(f"the gradient of a resize by {scale} (corners aligned: {aligned}) is not written yet")


def _resize_matrix(have: int, want: int, like: Tensor) -> Tensor:
    """The matrix [want,have] of a bilinear antialiased resize along one axis, a constant of the graph."""
    with _disable_current_modes():
        dtype = torch.promote_types(like.dtype, torch.float32)
        lines = torch.eye(have, device=like.device, dtype=dtype)[None, None]
        matrix = F.interpolate(lines, size=[want, have], mode="bilinear", antialias=True, align_corners=False)
        return matrix[0, 0].to(like.dtype).clone()


def upsample_bilinear2d_aa(
    x: Tensor, output_size: Any, align_corners: bool, scales_h: Any = None, scales_w: Any = None
) -> Tensor:
    """A resize as two matrix products."""
    _check_scales(output_size, x.shape, scales_h, scales_w, align_corners)
    rows = _resize_matrix(x.shape[2], output_size[0], x)
    columns = _resize_matrix(x.shape[3], output_size[1], x)
    return torch.matmul(torch.matmul(rows, x), columns.mT)


def upsample_bilinear2d_aa_backward(
    grad: Tensor, output_size: Any, input_size: Any, align_corners: bool, scales_h: Any = None, scales_w: Any = None
) -> Tensor:
    """The same two matrices the other way round."""
    _check_scales(output_size, input_size, scales_h, scales_w, align_corners)
    rows = _resize_matrix(input_size[2], output_size[0], grad)
    columns = _resize_matrix(input_size[3], output_size[1], grad)
    return torch.matmul(torch.matmul(rows.mT.contiguous(), grad), columns)


def avg_pool2d_backward(
    grad: Tensor, x: Tensor, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, include_pad: bool, divisor: Any
) -> Tensor:
    """Windows side by side give each position its share; those that overlap are transposed depthwise convolutions."""
    stride, channels = list(stride) or list(kernel), x.shape[1]
    counts = _window_sizes(x, grad, kernel, stride, padding, include_pad, divisor)
    ones = torch.ones(channels, 1, *kernel, dtype=grad.dtype, device=grad.device)
    wide = aten.convolution.default(grad / counts, ones, None, stride, [0, 0], [1, 1], True, [0, 0], channels)
    height, width = x.shape[2:]
    down, right = padding[0] + height - wide.shape[2], padding[1] + width - wide.shape[3]
    wide = F.pad(wide, (0, max(right, 0), 0, max(down, 0)))
    return wide[:, :, padding[0] : padding[0] + height, padding[1] : padding[1] + width]


def _window_sizes(
    x: Tensor, grad: Tensor, kernel: Any, stride: Any, padding: Any, include_pad: bool, divisor: Any
) -> Tensor:
    """Positions that each window [h,w] is a mean over."""
    sides = []
    for axis in (0, 1):
        have, edge = int(x.shape[2 + axis]), int(padding[axis])
        low, high = (-edge, have + edge) if include_pad else (0, have)
        starts = [i * stride[axis] - edge for i in range(int(grad.shape[2 + axis]))]
        sides.append([max(min(s + kernel[axis], high) - max(s, low), 1) for s in starts])
    sizes = [[divisor or a * b for b in sides[1]] for a in sides[0]]
    return torch.tensor(sizes, dtype=grad.dtype, device=grad.device)


def _windows(x: Tensor, kernel: Any, stride: Any, padding: Any, size: Any) -> Tensor:
    """What each window sees: [B,C,k*k,h,w] of x [B,C,H,W], the dtype's least number outside."""
    least = torch.finfo(x.dtype).min
    down = (size[0] - 1) * stride[0] + kernel[0] - x.shape[2] - padding[0]
    right = (size[1] - 1) * stride[1] + kernel[1] - x.shape[3] - padding[1]
    wide = F.pad(x, (padding[1], max(right, 0), padding[0], max(down, 0)), value=least)
    views = [
        wide[:, :, i : i + (size[0] - 1) * stride[0] + 1 : stride[0], j : j + (size[1] - 1) * stride[1] + 1 : stride[1]]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return torch.stack(views, dim=2)


def _pool_size(x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> list[int]:
    with _disable_current_modes():
        probe = torch.empty(1, 1, int(x.shape[2]), int(x.shape[3]), device="meta")
        found = aten.max_pool2d_with_indices.default(probe, kernel, stride, padding, dilation, ceil_mode)[0]
    return [int(n) for n in found.shape[2:]]


def max_pool2d(
    x: Tensor, kernel: Any, stride: Any = (), padding: Any = (0, 0), dilation: Any = (1, 1), ceil_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """Values [B,C,h,w], and which position of its window each comes from (not torch's indices: only the backward below
    reads them)."""
    if any(d != 1 for d in dilation):
        raise ExportError("the gradient of a dilated max pooling is not written yet")
    stride = list(stride) or list(kernel)
    seen = _windows(x, kernel, stride, padding, _pool_size(x, kernel, stride, padding, dilation, ceil_mode))
    return seen.amax(dim=2), seen.argmax(dim=2)


def max_pool2d_backward(
    grad: Tensor, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, indices: Tensor
) -> Tensor:
    """Each window hands its gradient to the position it took: a transposed depthwise convolution of what was taken."""
    stride, count, channels = list(stride) or list(kernel), kernel[0] * kernel[1], x.shape[1]
    places = torch.arange(count, device=grad.device)[:, None, None]
    taken = indices[:, :, None] == places
    parts = torch.where(taken, grad[:, :, None], torch.zeros_like(grad)[:, :, None]).flatten(1, 2)
    kernels = torch.eye(count, dtype=grad.dtype, device=grad.device).view(1, count, *kernel)
    kernels = kernels.expand(channels, count, *kernel).reshape(channels * count, 1, *kernel)
    wide = aten.convolution.default(parts, kernels, None, stride, [0, 0], [1, 1], True, [0, 0], channels * count)
    wide = wide.unflatten(1, (channels, count)).sum(2)
    height, width = x.shape[2:]
    down, right = padding[0] + height - wide.shape[2], padding[1] + width - wide.shape[3]
    wide = F.pad(wide, (0, max(right, 0), 0, max(down, 0)))
    return wide[:, :, padding[0] : padding[0] + height, padding[1] : padding[1] + width]
