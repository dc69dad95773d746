"""Whether a network fits into float16: the largest activation of each layer, found in float32 on probe inputs."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HALF_MAX = 65504.0  # the largest finite float16
SQUARE_MAX = math.sqrt(HALF_MAX)  # about 256: above it a square is no float16
# One binade for what the probe did not see: the largest of n normal values grows as sqrt(2 ln n), 1.3 times from the
# probe's 1024 positions to the 65536 of a 1024-pixel image, and a guided latent is up to 1.5 times as wide.
SAFETY = 2.0
SCALES = (0.0, 0.5, 1.0, 2.0)  # of the probe's standard deviation: a flat picture, a faint, a usual and a loud one

_NORMS = ("GroupNorm", "InstanceNorm2d", "LayerNorm")


@dataclass(frozen=True)
class Overflow:
    """The layer that comes nearest to a limit: its name ("" is the network), its largest |value|, the limit."""

    layer: str
    value: float
    limit: float = HALF_MAX

    @property
    def margin(self) -> float:
        """limit / value: below 1 it overflowed on the probe, below the safety factor it is not trusted."""
        return self.limit / self.value

    def __str__(self) -> str:
        """A clause for a log line."""
        return f"{self.layer or 'the input or output'} reaches {self.value:.3g} (float16 holds {self.limit:.5g})"


def largest_activation(
    module: nn.Module, call: Callable[..., Any], inputs: Sequence[Tensor], *, taken: bool = False
) -> dict[str, float]:
    """Name of each layer that ran -> the largest |x| of its outputs, over all its calls, in the order they came.

    module: in float32, run by `call(*inputs)` without gradient; it is left as it was, hooks included.
    taken: of its inputs instead. Inputs of the whole call count as the output of "". A value that is not finite is inf.
    """
    found: dict[str, Tensor] = {}

    def see(name: str, values: Any) -> None:
        for x in _floating(values):
            peak = x.detach().abs().amax().float()
            found[name] = torch.maximum(found[name], peak) if name in found else peak

    see("", inputs)
    with torch.no_grad(), _watched(module, see, taken):
        see("", call(*inputs))
    return {name: value if math.isfinite(value := float(peak)) else math.inf for name, peak in found.items()}


@contextmanager
def _watched(module: nn.Module, see: Callable[[str, Any], None], taken: bool) -> Iterator[None]:
    handles = []
    try:
        for name, layer in module.named_modules():

            def hook(_: nn.Module, args: Any, out: Any, name: str = name) -> None:
                see(name, args if taken else out)

            handles.append(layer.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _floating(values: Any) -> Iterator[Tensor]:
    """Tensors of floating point that are not empty, in nested tuples, lists and mappings (diffusers' outputs too)."""
    if isinstance(values, Tensor):
        if values.is_floating_point() and values.numel():
            yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _floating(value)
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _floating(value)


def half_overflow(
    module: nn.Module, call: Callable[..., Any], inputs: Sequence[Tensor], *, safety: float = SAFETY
) -> Overflow | None:
    """The first layer to end whose |output| times `safety` is no float16; None where all fit.

    The first, for what is large after it is large because of it. "", the whole call, is named only where no layer is.
    See `largest_activation`.
    """
    found = largest_activation(module, call, inputs)
    over = [Overflow(name, value) for name, value in found.items() if value * safety > HALF_MAX]
    over.sort(key=lambda one: one.layer == "")  # a stable sort: the whole call last
    return over[0] if over else None


def square_overflow(module: nn.Module, call: Callable[..., Any], inputs: Sequence[Tensor]) -> Overflow | None:
    """The norm with the largest input, where that input's square is no float16 (|x| above 255.9); else None.

    No reason to leave float16 in torch, whose norms, like this project's, add up their moments in float32. It is one
    where a norm is lowered to something that squares in float16: InstanceNormalization below ONNX opset 21.
    """
    kinds = {name for name, layer in module.named_modules() if type(layer).__name__ in _NORMS}
    found = largest_activation(module, call, inputs, taken=True)
    norms = [Overflow(name, value, SQUARE_MAX) for name, value in found.items() if name in kinds]
    worst = max(norms, key=lambda one: one.value, default=None)
    return worst if worst is not None and worst.value > SQUARE_MAX else None


def probe_latents(channels: int, side: int = 16, device: torch.device | str = "cpu") -> Tensor:
    """Latents [4,C,side,side], float32, as a denoiser sees them: standard normal times each of SCALES, always the same.

    Drawn on the host, so that every device gets the same.
    """
    noise = torch.randn(channels, side, side, generator=torch.Generator().manual_seed(0))
    return torch.stack([noise * scale for scale in SCALES]).to(device)


def wide_dtype(device: torch.device) -> torch.dtype:
    """What takes float16's place where that overflows: bfloat16 where the device computes it itself, else float32."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32
