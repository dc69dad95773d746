"""8-bit floats (e4m3) for the wide Linear and Conv2d layers of a UNet: weights once, activations as they come.

q(x) = e4m3(x / s), s = max|x| / 448 (arXiv 2209.05433, section 3); a product is one scaled matrix product in fp8. s is
of an output channel for weights and, so that no image hangs on the others in its batch, of a token for a Linear's input
and of a sample for a Conv2d's, which is unrolled to rows of kernel x kernel x channels in fp8 first. torchao 0.18 can
take the Linear layers; its convolutions need compute capability 10 and mslk, leave out the bias and share one s over
the batch.
"""

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from synthkd.export.errors import ExportError

E4M3_MAX = 448.0  # torch.finfo(torch.float8_e4m3fn).max
CAPABILITY = (8, 9)  # the first with fp8 matrix products
# Below this many output channels quantising costs more than the product saves. Unrolling a 3x3 convolution writes and
# reads 18 bytes where its product takes 18 N operations; at 4.3 TB/s and 1580 against 790 TFLOP/s (an H200's) that pays
# for N > 370, and reading the input twice to quantise it moves that to about 450.
SMALLEST = 512
# Against the unquantised model's images, see `quality`: below it, an error of 5.6 % of the range, a caller refuses the
# option. The embedded model, emulated, has 40 to 45 dB; with its convolutions' scales 1.5 times too large, 22 to 25.
PSNR = 25.0  # dB

_FIRST_AND_LAST = ("conv_in", "conv_out", "proj_out_1", "proj_out_2", "pos_embed")
_ONCE_PER_IMAGE = ("time_embedding", "add_embedding", "class_embedding", "time_emb_proj", "norm1", "encoder_hid_proj")
_OF_THE_TEXT = ("attn2.to_k", "attn2.to_v", "add_k_proj", "add_v_proj")

Through = Literal["torch", "torchao"]


def eligible(name: str, module: nn.Module, smallest: int = SMALLEST) -> bool:
    """Whether a layer of this name in a UNet is worth 8 bits, see `why_left`."""
    return not why_left(name, module, smallest)


def why_left(name: str, module: nn.Module, smallest: int = SMALLEST) -> str:
    """Why a layer stays as it is; "" for one that is quantised.

    smallest: in and out channels. First and last layers, embeddings of time and size and residual shortcuts reach all
    later layers unfiltered, and are a few percent of the arithmetic.
    """
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"is a {type(module).__name__}"
    parts = name.split(".")
    for why, names in (("is a first or last layer", _FIRST_AND_LAST), ("is computed once per image", _ONCE_PER_IMAGE)):
        if any(part in names for part in parts):
            return why
    if "conv_shortcut" in parts:
        return "is a shortcut"
    if any(name.endswith(tail) for tail in _OF_THE_TEXT):
        return "sees the few tokens of a prompt"
    return _unfit(module) or _small(module, smallest)


def _unfit(module: Any) -> str:
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
        if not plain or isinstance(module.padding, str):
            return "is grouped, dilated or padded in another way than with zeros"
    odd = any(channels % 16 for channels in module.weight.shape[:2])
    return "has channels that are no multiple of 16" if odd else ""


def _small(module: Any, smallest: int) -> str:
    out, taken = module.weight.shape[:2]
    return f"has {min(out, taken)} channels, below {smallest}" if min(out, taken) < smallest else ""


def quantized(
    unet: nn.Module, *, smallest: int = SMALLEST, emulate: bool = False, linear: Through = "torch"
) -> nn.Module:
    """A twin of the network with fp8 layers: everything else, tensors included, is shared; `unet` is left as it was.

    unet: a live, unfused denoiser in eval mode; memory grows by a byte for each quantised weight. smallest: channels,
    see `eligible`. emulate: round as fp8 does and compute in float32, on any device. linear: `torchao` for its layers
    in place of ours, bfloat16 only. The twin has no gradient, and pays under torch.compile alone.
    Raises ExportError for no GPU of compute capability 8.9, a missing torchao, and where no layer is eligible.
    """
    if not emulate:
        _refuse_device(next(unet.parameters()).device)
    make = {"torch": Float8Linear, "torchao": _torchao_linear}[linear]
    shared: dict[int, Any] = {id(x): x for x in (*unet.parameters(), *unet.buffers())}
    twin = copy.deepcopy(unet, shared)
    found = [(name, module) for name, module in twin.named_modules() if eligible(name, module, smallest)]
    if not found:
        raise ExportError(f"fp8: no layer of this {type(unet).__name__} has {smallest} channels; leave fp8 out")
    for name, module in found:
        kind = Float8Conv2d if isinstance(module, nn.Conv2d) else make
        twin.set_submodule(name, kind(module, emulate))
    return twin


def _refuse_device(device: torch.device) -> None:
    found: Any = device.type
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= CAPABILITY:
            return
        found = ".".join(map(str, capability))
    raise ExportError(f"fp8 needs a GPU of compute capability 8.9 or newer, found {found}")


def _torchao_linear(module: Any, emulate: bool) -> nn.Module:
    """torchao's own: a scale of each token and of each output channel too."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as error:
        raise ExportError("torchao is not installed: pip install 'synthkd[fp8]'") from error
    if emulate or module.weight.dtype != torch.bfloat16:
        raise ExportError(f"fp8 through torchao needs bfloat16 weights on a GPU, found {module.weight.dtype}")
    alone = nn.Sequential(copy.copy(module))
    alone[0].__dict__["_parameters"] = dict(module._parameters)
    quantize_(alone, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False))
    return alone[0]


class _Float8(nn.Module):
    """Weights [N,K] in fp8, kept as bytes, which a move of dtype leaves alone; a scale each row; a borrowed bias."""

    bytes8: Tensor
    scale: Tensor

    def __init__(self, module: Any, rows: Tensor, emulate: bool) -> None:
        super().__init__()
        data, scale = quantise(rows.detach(), (1,))
        self.register_buffer("bytes8", data.view(torch.uint8), persistent=False)
        self.register_buffer("scale", scale.T.contiguous(), persistent=False)
        self.bias, self.emulate, self._dtype = module.bias, emulate, module.weight.dtype

    def _product(self, rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """rows [M,K] in fp8 and their scale [M,1] -> [M,N] in dtype, with bias."""
        weight = self.bytes8.view(torch.float8_e4m3fn).T
        if self.emulate:
            out = (rows.float() * scale) @ (weight.float() * self.scale.float())
        else:  # a scale each row takes and gives bfloat16 alone
            out = torch._scaled_mm(
                rows, weight, scale, self.scale.float(), out_dtype=torch.bfloat16, use_fast_accum=rows.is_cuda
            )
        out = out.to(dtype)
        return out if self.bias is None else out + self.bias.to(dtype)


class Float8Linear(_Float8):
    """In place of nn.Linear: [...,K] -> [...,N] in the input's dtype."""

    def __init__(self, module: nn.Linear, emulate: bool = False) -> None:
        """Borrows the bias; the weight is quantised."""
        super().__init__(module, module.weight, emulate)
        self.in_features, self.out_features = module.in_features, module.out_features

    @property
    def weight(self) -> Tensor:
        """What it stands for, [N,K] in the original's dtype."""
        return (self.bytes8.view(torch.float8_e4m3fn).float() * self.scale.T).to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Raises ExportError where a gradient is asked for."""
        _refuse_gradient(x)
        data, scale = quantise(x.reshape(-1, self.in_features), (1,))
        return self._product(data, scale, x.dtype).view(*x.shape[:-1], self.out_features)


class Float8Conv2d(_Float8):
    """In place of nn.Conv2d: [B,C,H,W] -> [B,N,H',W'] in the input's dtype, in channels_last memory."""

    def __init__(self, module: nn.Conv2d, emulate: bool = False) -> None:
        """Borrows the bias; the weight [N,C,kh,kw] is quantised as rows of kh x kw x C."""
        super().__init__(module, module.weight.permute(0, 2, 3, 1).flatten(1), emulate)
        self.in_channels, self.out_channels = module.in_channels, module.out_channels
        self.kernel_size, self.stride = module.kernel_size, module.stride
        self.padding: Any = module.padding

    @property
    def weight(self) -> Tensor:
        """What it stands for, [N,C,kh,kw] in the original's dtype."""
        rows = self.bytes8.view(torch.float8_e4m3fn).float() * self.scale.T
        return rows.view(self.out_channels, *self.kernel_size, self.in_channels).permute(0, 3, 1, 2).to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Raises ExportError where a gradient is asked for."""
        _refuse_gradient(x)
        data, scale = quantise(x, (1, 2, 3))
        rows, (height, width) = self._unrolled(data.view(torch.uint8))
        scale = scale.view(-1, 1).repeat_interleave(height * width, 0)
        out = self._product(rows.view(torch.float8_e4m3fn), scale, x.dtype)
        return out.view(len(x), height, width, self.out_channels).permute(0, 3, 1, 2)

    def _unrolled(self, data: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Bytes [B,C,H,W] -> [B H' W', kh kw C] and (H', W'); a byte of 0 is the number 0."""
        (kh, kw), (sh, sw), (ph, pw) = self.kernel_size, self.stride, self.padding
        data = data.permute(0, 2, 3, 1)
        if ph or pw:
            data = nn.functional.pad(data, (0, 0, pw, pw, ph, ph))
        windows = data.unfold(1, kh, sh).unfold(2, kw, sw).permute(0, 1, 2, 4, 5, 3)
        height, width = windows.shape[1:3]
        return windows.reshape(-1, kh * kw * self.in_channels), (height, width)


def quantise(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x -> (e4m3 of its shape, scale float32 with ones in `dims`, over which it is shared): x is about e4m3 * scale."""
    x = x.float()
    scale = x.abs().amax(dims, keepdim=True).clamp(min=1e-30) / E4M3_MAX
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale  # out of range would be NaN


def _refuse_gradient(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ExportError("fp8 layers have no gradient; use guidance.gradient 'x0', or leave fp8 out")


def quality(reference: Tensor, images: Tensor) -> dict[str, float]:
    """How near images [B,3,H,W] (uint8, or floats in [0,1]) are to the reference, drawn from the same noise.

    psnr: dB over all images, worst_psnr: of the worst one (both at most 120); max_abs; cosine: of the images less the
    reference's mean. Raises ExportError for other shapes.
    """
    if reference.shape != images.shape or images.ndim != 4:
        raise ExportError(f"quality: images are {tuple(images.shape)}, the reference {tuple(reference.shape)}")
    a, b = (x.float() / (1.0 if x.is_floating_point() else 255.0) for x in (reference, images))
    error = (a - b).square().mean((1, 2, 3))
    mean = a.mean()
    return {
        "psnr": _decibels(float(error.mean())),
        "worst_psnr": _decibels(float(error.max())),
        "max_abs": float((a - b).abs().max()),
        "cosine": float(nn.functional.cosine_similarity((a - mean).flatten(), (b - mean).flatten(), dim=0)),
    }


def _decibels(error: float) -> float:
    return -10.0 * math.log10(max(error, 1e-12)) if math.isfinite(error) else 0.0
