"""Puts the ops of `synthkd.kernels` into diffusers' modules, and takes them out again.

A module that is recognised, by the names of its class and parts, is replaced in its parent by a stand-in that borrows
the original's attributes, children and parameters themselves: moves of dtype and device, training flags and hooks reach
both, and `state_dict` has the same names and tensors. What is not exactly of the known form stays.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from synthkd import kernels
from synthkd.engine.errors import SynthkdError
from synthkd.kernels.dispatch import backend

FuseChoice = Literal["auto", "off", "decoder", "all"]
FUSE_CHOICES = ("auto", "off", "decoder", "all")

_UNET = "UNet2DConditionModel"
_MODELS = ("AutoencoderKL", "AutoencoderTiny", _UNET)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class StandIn(nn.Module):
    """A replacement: its attributes are the original's, but for the few of its own."""

    own: tuple[str, ...] = ("original", "_buffers", "_non_persistent_buffers_set")

    if TYPE_CHECKING:  # borrowed attributes have no types

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, original: nn.Module) -> None:
        """original: what it stands in for."""
        super().__init__()
        self.__dict__["original"] = original  # not a child
        self._non_persistent_buffers_set = set()
        self.borrow()

    def borrow(self) -> None:
        """Take over what the original's attributes are now."""
        self.__dict__.update({k: v for k, v in vars(self.original).items() if k not in self.own})

    def give_back(self) -> None:
        """Let attributes that were set in the meantime, such as the training flag, stay."""
        vars(self.original).update({k: v for k, v in vars(self).items() if k not in self.own})

    def refold(self) -> None:
        """Compute anew what was computed from weights."""

    @property
    def _stock(self) -> Any:
        """The original's forward, as a function of self."""
        return type(self.__dict__["original"]).forward


class ResnetStandIn(StandIn):
    """ResnetBlock2D: x + conv2(silu(norm2(conv1(silu(norm1(x))) + temb))) over output_scale_factor."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """As the original's; further arguments are ignored there as well."""
        return _total(*self.carry(input_tensor, None, temb))

    def carry(self, x: Tensor, residual: Tensor | None, temb: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The block at x + residual; what it returns are terms as well, for the next norm to add up."""
        h, x = _norm_silu(self.norm1, x, residual)
        h = self.conv1(h)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        h = h + temb if temb is not None and self.time_embedding_norm == "default" else h
        h = self.conv2(self.dropout(_norm_silu(self.norm2, h, None)[0]))
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        if self.output_scale_factor == 1:
            return x, h
        return (x + h) / self.output_scale_factor, None


class _Upsampling(StandIn):
    """What stand-ins with a folded convolution share: `folded` [4Co,Ci,2,2], a buffer outside the state."""

    folded: Tensor

    def __init__(self, original: nn.Module) -> None:
        """original: an Upsample2D, or the convolution behind an nn.Upsample."""
        super().__init__(original)
        self.register_buffer("folded", self._fold(), persistent=False)

    def _convolution(self) -> Any:
        raise NotImplementedError

    @torch.no_grad()
    def _fold(self) -> Tensor:
        weight = self._convolution().weight
        folded = kernels.fold_upsample_weight(weight.detach())
        nhwc = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        return folded.contiguous(memory_format=torch.channels_last) if nhwc else folded

    @torch.no_grad()
    def refold(self) -> None:
        """In place where it can be, so that a captured graph sees it."""
        new, old = self._fold(), self.folded
        if (old.shape, old.dtype, old.device, old.stride()) == (new.shape, new.dtype, new.device, new.stride()):
            old.copy_(new)
        else:
            self.folded = new

    def _upsampled(self, x: Tensor) -> Tensor:
        conv = self._convolution()
        # a weight that is trained is folded where its gradient sees it
        trained = torch.is_grad_enabled() and conv.weight.requires_grad
        folded = kernels.fold_upsample_weight(conv.weight) if trained else self.folded
        return kernels.upsample2x_conv3x3(x, folded, conv.bias)


class UpsampleStandIn(_Upsampling):
    """Upsample2D with a 3x3 convolution; another size than twice as large goes the stock way."""

    def _convolution(self) -> Any:
        return self.conv if self.name == "conv" else self.Conv2d_0

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """As the original's."""
        if output_size is not None:
            return self._stock(self, hidden_states, output_size)
        return self._upsampled(hidden_states)


class DoubledConvStandIn(_Upsampling):
    """A 3x3 convolution that does the work of the nn.Upsample before it, for which an Identity stands in."""

    def _convolution(self) -> Any:
        return self

    def forward(self, x: Tensor) -> Tensor:
        """As of the two originals."""
        return self._upsampled(x)


class NormSiluStandIn(StandIn):
    """A GroupNorm that does the work of the SiLU behind it, for which an Identity stands in."""

    def forward(self, x: Tensor) -> Tensor:
        """As of the two originals."""
        return _norm_silu(self, x, None)[0]


class IdentityStandIn(StandIn):
    """Stands in for a module whose work its neighbour does."""

    def forward(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


class UpBlockStandIn(StandIn):
    """UpDecoderBlock2D."""

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        """As the original's."""
        return _total(*self.carry(hidden_states, None, temb))

    def carry(self, x: Tensor, residual: Tensor | None, temb: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See ResnetStandIn."""
        for resnet in self.resnets:
            x, residual = _through(resnet, x, residual, temb)
        for upsampler in self.upsamplers or ():
            x, residual = upsampler(_total(x, residual)), None
        return x, residual


class MidBlockStandIn(StandIn):
    """UNetMidBlock2D: a resnet, then attention and a resnet in turns."""

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        """As the original's."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._stock(self, hidden_states, temb)
        return _total(*self.carry(hidden_states, None, temb))

    def carry(self, x: Tensor, residual: Tensor | None, temb: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See ResnetStandIn."""
        x, residual = _through(self.resnets[0], x, residual, temb)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            if attention is not None:
                x, residual = attention(_total(x, residual), temb=temb), None
            x, residual = _through(resnet, x, residual, temb)
        return x, residual


class DecoderStandIn(StandIn):
    """Decoder of an AutoencoderKL; checkpoints by block, as the original does where it is told to."""

    own = (*StandIn.own, "channels_last")
    channels_last: bool | None = None

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """As the original's."""
        x, residual = self.conv_in(_laid_out(sample, self.channels_last)), None
        kept = torch.is_grad_enabled() and self.gradient_checkpointing
        for block in (self.mid_block, *self.up_blocks):
            if kept:
                x = self._gradient_checkpointing_func(block, x, latent_embeds)
            else:
                x, residual = _through(block, x, residual, latent_embeds)
        return self.conv_out(_norm_silu(self.conv_norm_out, x, residual)[0])


class TinyDecoderStandIn(StandIn):
    """DecoderTiny, for the memory layout alone."""

    own = (*StandIn.own, "channels_last")
    channels_last: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        """As the original's."""
        return self._stock(self, _laid_out(x, self.channels_last))


def _norm_silu(norm: Any, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """silu(norm(x + residual)), and x + residual."""
    if residual is None:
        return kernels.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps), x
    return kernels.add_group_norm_silu(x, residual, norm.num_groups, norm.weight, norm.bias, norm.eps)


def _through(block: Any, x: Tensor, residual: Tensor | None, temb: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A block that can carry two terms on, or any other at their sum."""
    if isinstance(block, ResnetStandIn | UpBlockStandIn | MidBlockStandIn):
        return block.carry(x, residual, temb)
    return block(_total(x, residual), temb), None


def _total(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else x + residual


def _laid_out(x: Tensor, channels_last: bool | None) -> Tensor:
    wanted = x.is_cuda if channels_last is None else channels_last
    return x.contiguous(memory_format=torch.channels_last) if wanted else x


class Fused:
    """The stand-ins of a module: in place from the start, taken out by `undo` or at the end of a `with` block.

    replaced: names of what was replaced; left: names of what looked like it but was left alone, with the reason.
    Folded weights are copies: after a change of weights in place call `refold`; `put` does so by itself.
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
            raise SynthkdError(f"fuse: this {type(self.module).__name__} is fused already; undo that first")
        scan = _Scan(self.module)
        found, self.left = scan.found, scan.left
        if not found:
            raise SynthkdError(_nothing(self.module, self.left))
        made = {(id(m), kind): self._made.get((id(m), kind)) or kind(m) for _, m, kind in found}
        self._made, self.replaced = made, tuple(name for name, _, _ in found)
        homes = {id(child): (m._modules, key) for m in self.module.modules() for key, child in m._modules.items()}
        for _, original, kind in found:
            self._insert(made[id(original), kind], *homes[id(original)])
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
        self._decoders = [] if choice == "off" else _distinct(decoders)
        self._denoisers = [m for m in others if type(m).__name__ == _UNET] if choice == "all" else []
        self._handles: dict[int, Fused] = {}
        if choice in ("decoder", "all"):
            self._refuse_unknown()

    def _refuse_unknown(self) -> None:
        for m in (*self._decoders, *self._denoisers):
            scan = _Scan(m)
            if not scan.found and not is_fused(m):
                raise SynthkdError(_nothing(m, scan.left))

    def applies(self, device: torch.device) -> str:
        """What is fused on this device: "", `decoder`, or `decoder and denoiser`."""
        if self._choice == "auto" and backend(device) != "triton":
            return ""
        parts = {"decoder": self._decoders, "denoiser": self._denoisers}
        return " and ".join(name for name, modules in parts.items() if any(_fusable(m) for m in modules))

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Fused inside, as before outside; what its owner has fused already stays as it is."""
        with ExitStack() as stack:
            for m in (*self._decoders, *self._denoisers) if self.applies(device) else ():
                if not is_fused(m) and _fusable(m):
                    stack.enter_context(self._handle(m))
            yield

    def _handle(self, module: nn.Module) -> Fused:
        if id(module) not in self._handles:
            self._handles[id(module)] = Fused(module)
        return self._handles[id(module)]


def _distinct(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list({id(m): m for m in modules}.values())


def _fusable(module: nn.Module) -> bool:
    """Whether a module has a part of a known form, or stand-ins already."""
    return is_fused(module) or bool(_Scan(module).found)


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
