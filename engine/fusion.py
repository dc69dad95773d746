"""Puts the ops of `synthkd.kernels` into diffusers' modules, and takes them out again.

A module that is recognised, by the names of its class and parts, is replaced in its parent by a stand-in that borrows
the original's attributes, children and parameters themselves: moves of dtype and device, training flags and hooks on it
reach both, and `state_dict` has the same names and tensors. Norms, activations and folded convolutions inside are not
called any more: hooks put on those meanwhile do not fire. What is not exactly of the known form stays.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from synthkd.engine.errors import SynthkdError
from synthkd.engine.standins import (
    DecoderStandIn,
    DoubledConvStandIn,
    IdentityStandIn,
    MidBlockStandIn,
    NormSiluStandIn,
    ResnetStandIn,
    StandIn,
    TinyDecoderStandIn,
    UpBlockStandIn,
    UpsampleStandIn,
)
from synthkd.kernels.dispatch import backend

FuseChoice = Literal["auto", "off", "decoder", "all"]
FUSE_CHOICES = ("auto", "off", "decoder", "all")

_UNET = "UNet2DConditionModel"
_MODELS = ("AutoencoderKL", "AutoencoderTiny", _UNET)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Fused:
    """The stand-ins of a module: in place from the start, taken out by `undo` or at the end of a `with` block.

    replaced: names of what was replaced; left: names of what looked like it but was left alone, with the reason.
    Folded weights are copies: `put` makes them, and a call that finds other weights makes them anew. A change through
    `.data` is not seen, nor any by a compiled decoder: call `refold` then.
    """

    def __init__(self, module: nn.Module, channels_last: bool | None = None) -> None:
        """See `fuse`."""
        self.module, self.channels_last = module, channels_last
        self.replaced: tuple[str, ...] = ()
        self.left: dict[str, str] = {}
        self._made: dict[tuple[int, type], StandIn] = {}
        self._in: list[tuple[dict[str, Any], str, StandIn]] = []
        self.put()

    def put(self) -> "Fused":
        """Put the stand-ins in, the same ones as before where the module is as before; nothing where they are in."""
        if self._in:
            return self
        if is_fused(self.module):
            name = type(self.module).__name__
            raise SynthkdError(f"fuse: this {name} is fused already; undo that, or unfuse it, first")
        scan = _Scan(self.module)
        found, self.left = scan.found, scan.left
        if not found:
            raise SynthkdError(_nothing(self.module, self.left))
        made = {(id(m), kind): self._made.get((id(m), kind)) or kind(m) for _, m, kind in found}
        self._made, self.replaced = made, tuple(name for name, _, _ in found)
        homes = {id(child): (m._modules, key) for m in self.module.modules() for key, child in m._modules.items()}
        try:
            for _, original, kind in found:
                self._insert(made[id(original), kind], *homes[id(original)])
        except BaseException:  # a half-fused module is never left behind
            self.undo()
            raise
        return self

    def _insert(self, standin: StandIn, home: dict[str, Any], key: str) -> None:
        standin.borrow()
        standin.refold()
        if isinstance(standin, DecoderStandIn | TinyDecoderStandIn):
            standin.channels_last = self.channels_last
        home[key] = standin
        self._in.append((home, key, standin))

    def undo(self) -> None:
        """Put the very same originals back; nothing where they are."""
        while self._in:
            home, key, standin = self._in.pop()
            standin.give_back()
            if home.get(key) is standin:
                home[key] = standin.original

    def refold(self) -> None:
        """Compute the folded weights anew, after a change of weights."""
        for standin in self._made.values():
            standin.refold()

    def __enter__(self) -> "Fused":
        """Put in."""
        return self.put()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Undo."""
        self.undo()


def fuse(module: nn.Module, *, channels_last: bool | None = None) -> Fused:
    """Make a diffusers AutoencoderKL or AutoencoderTiny (its decoder) or UNet2DConditionModel use this project's ops.

    In place, until `.undo()` of the handle. GroupNorm and SiLU become one op, which also adds up what the residual
    block before it left as two terms; a nearest doubling and its 3x3 convolution become one. Weights are shared.
    channels_last: of a decoder's activations; None: on CUDA only; a UNet's are left as they are.
    Raises SynthkdError for another class, for a module without a known part, and for one that is fused already.
    """
    return Fused(module, channels_last)


def unfuse(module: nn.Module) -> nn.Module:
    """Take every stand-in out of a module, whoever put it in; a copy of a fused module has no handle of its own."""
    for parent in list(module.modules()):
        for key, child in parent._modules.items():
            if isinstance(child, StandIn):
                child.give_back()
                parent._modules[key] = child.original
    return module


def is_fused(module: nn.Module) -> bool:
    """Whether stand-ins are in a module."""
    return any(isinstance(m, StandIn) for m in module.modules())


class Fuser:
    """Fuses a prior's networks while a group is drawn, each time with the same stand-ins."""

    def __init__(self, choice: FuseChoice, decoders: Iterable[nn.Module], others: Iterable[nn.Module]) -> None:
        """choice: see `Synthesizer`; others: networks among which the denoiser is. Raises SynthkdError, see there."""
        if choice not in FUSE_CHOICES:
            raise SynthkdError(f"fuse {choice!r}: expected one of {', '.join(FUSE_CHOICES)}")
        self._choice = choice
        unets = [m for m in others if type(m).__name__ == _UNET]
        self._parts = {"decoder": _distinct(decoders), "denoiser": unets}
        self._handles: dict[int, Fused] = {}
        if choice == "all" and not unets:
            raise SynthkdError(f"fuse 'all': this prior has no {_UNET}; use 'decoder'")
        if choice in ("decoder", "all"):
            self._refuse_unknown()

    def _refuse_unknown(self) -> None:
        for m in self._chosen():
            scan = _Scan(m)
            if not scan.found and not is_fused(m):
                raise SynthkdError(_nothing(m, scan.left))

    def _chosen(self) -> list[nn.Module]:
        names = {"off": (), "all": ("decoder", "denoiser")}.get(self._choice, ("decoder",))
        return [m for name in names for m in self._parts[name]]

    def _todo(self, device: torch.device) -> list[nn.Module]:
        """What is to be fused on this device and is not by its owner."""
        if self._choice == "auto" and backend(device) != "triton":
            return []
        return [m for m in self._chosen() if not is_fused(m) and _Scan(m).found]

    def applies(self, device: torch.device) -> str:
        """What is fused on this device, by whomever: "", `decoder`, `denoiser`, or `decoder and denoiser`."""
        todo = self._todo(device)
        fused = [name for name, part in self._parts.items() if any(is_fused(m) or m in todo for m in part)]
        return " and ".join(fused)

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Fused inside, as before outside; what its owner has fused already stays as it is."""
        with ExitStack() as stack:
            for m in self._todo(device):
                stack.enter_context(self._handle(m))
            yield

    def _handle(self, module: nn.Module) -> Fused:
        if id(module) not in self._handles:
            self._handles[id(module)] = Fused(module)
        return self._handles[id(module)]


def _distinct(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list({id(m): m for m in modules}.values())


def _nothing(module: nn.Module, left: Mapping[str, str]) -> str:
    name = type(module).__name__
    if name not in _MODELS:
        return f"fuse: found a {name}; expected one of {', '.join(_MODELS)}"
    reason = next((f": {n} {why}" for n, why in left.items()), "")
    return f"fuse: no part of this {name} is of a known form{reason}"


class _Scan:
    """What can be replaced in a module, inner parts first: (name, original, stand-in's class); and what cannot."""

    def __init__(self, module: nn.Module) -> None:
        self.found: list[tuple[str, nn.Module, type[StandIn]]] = []
        self.left: dict[str, str] = {}
        name = type(module).__name__
        if name == "AutoencoderKL":
            self._blocks(module, "decoder.")
            self._take("decoder", module.decoder, DecoderStandIn, _decoder(module.decoder))
        elif name == "AutoencoderTiny":
            self._tiny(module.decoder)
        elif name == _UNET:
            self._blocks(module, "")
            self._last(module)

    def _take(self, name: str, module: Any, kind: type[StandIn], why_not: str) -> bool:
        if why_not:
            self.left[name] = why_not
        else:
            self.found.append((name, module, kind))
        return not why_not

    def _blocks(self, module: nn.Module, prefix: str) -> None:
        """Children come after their parents in `named_modules`, so reversed."""
        inside = [(name, m) for name, m in module.named_modules() if name.startswith(prefix)]
        for name, part in reversed(inside):
            if type(part).__name__ in _PARTS:
                kind, why_not = _PARTS[type(part).__name__]
                self._take(name, part, kind, why_not(part))

    def _last(self, unet: Any) -> None:
        norm, act = unet.conv_norm_out, unet.conv_act
        if norm is None:
            return
        why_not = _norm(norm) or _silu(act) or _touched(norm, act)
        if self._take("conv_norm_out", norm, NormSiluStandIn, why_not):
            self._take("conv_act", act, IdentityStandIn, "")

    def _tiny(self, decoder: Any) -> None:
        layers = list(decoder.layers.named_children())
        for (up, doubling), (key, conv) in pairwise(layers):
            if type(doubling) is not nn.Upsample:
                continue
            why_not = _doubling(doubling) or _conv3x3(conv) or _touched(doubling, conv)
            if self._take(f"decoder.layers.{key}", conv, DoubledConvStandIn, why_not):
                self._take(f"decoder.layers.{up}", doubling, IdentityStandIn, "")
        if self.found:
            self._take("decoder", decoder, TinyDecoderStandIn, _touched(decoder))


def _touched(*modules: Any) -> str:
    """Why a module's call cannot be bypassed or copied."""
    for m in modules:
        if any(getattr(m, hooks) for hooks in _HOOKS):
            return "has hooks"
        if "forward" in vars(m) or hasattr(m, "_hf_hook"):
            return "has a forward of its own"
        if m._compiled_call_impl is not None:
            return "is compiled"
    return ""


def _norm(norm: Any) -> str:
    if type(norm) is not nn.GroupNorm:
        return f"has a norm of class {type(norm).__name__}"
    return "" if norm.affine and norm.bias is not None else "has a norm without weight or bias"


def _silu(activation: Any) -> str:
    return "" if type(activation) is nn.SiLU else f"has the activation {type(activation).__name__}"


def _conv3x3(conv: Any) -> str:
    if type(conv) is not nn.Conv2d or type(conv.weight) is not nn.Parameter:
        return f"has a convolution of class {type(conv).__name__}"
    form = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    plain = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    return "" if form == plain else "has a convolution that is not a plain 3x3 one"


def _doubling(up: Any) -> str:
    factor = up.scale_factor
    twice = factor == 2 or factor == (2, 2)
    return "" if up.mode == "nearest" and twice and up.size is None else "does not double by nearest neighbour"


def _resnet(m: Any) -> str:
    if m.time_embedding_norm not in ("default", "group"):  # group: an UpDecoderBlock2D's, which takes no embedding
        return f"has time_embedding_norm {m.time_embedding_norm!r}"
    if not m.pre_norm:
        return "has its norms behind its convolutions"
    if m.upsample is not None or m.downsample is not None:
        return "changes the size inside"
    if m.dropout.p > 0 and m.training:
        return "has dropout in training mode"
    return _norm(m.norm1) or _norm(m.norm2) or _silu(m.nonlinearity) or _touched(m, m.norm1, m.norm2, m.nonlinearity)


def _upsample(m: Any) -> str:
    if m.use_conv_transpose or not m.use_conv or not m.interpolate or m.norm is not None:
        return "is not a nearest doubling and a convolution"
    conv = m.conv if m.name == "conv" else m.Conv2d_0
    return _conv3x3(conv) or _touched(m, conv)


def _decoder(m: Any) -> str:
    if type(m).__name__ != "Decoder":
        return f"is of class {type(m).__name__}"
    return _norm(m.conv_norm_out) or _silu(m.conv_act) or _touched(m, m.conv_norm_out, m.conv_act)


def _other(m: Any) -> str:
    return f"is of class {type(m).__name__}"


_PARTS: Mapping[str, tuple[type[StandIn], Any]] = {
    "ResnetBlock2D": (ResnetStandIn, _resnet),
    "ResnetBlockCondNorm2D": (StandIn, _other),
    "Upsample2D": (UpsampleStandIn, _upsample),
    "UpDecoderBlock2D": (UpBlockStandIn, _touched),
    "AttnUpDecoderBlock2D": (StandIn, _other),
    "UNetMidBlock2D": (MidBlockStandIn, _touched),
}
