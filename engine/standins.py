"""Modules that stand in for diffusers' own and call this project's ops; `engine.fusion` puts them in and out."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from synthkd import kernels


class StandIn(nn.Module):
    """A replacement: its attributes are the original's, but for the few of its own."""

    own: tuple[str, ...] = ("original", "seen", "_buffers", "_non_persistent_buffers_set")

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
        self._copy(self.original, self)

    def give_back(self) -> None:
        """Let attributes that were set in the meantime, such as the training flag, stay."""
        self._copy(self, self.original)

    def _copy(self, source: nn.Module, target: nn.Module) -> None:
        for k in set(vars(target)) - set(vars(source)) - set(self.own):
            del target.__dict__[k]
        target.__dict__.update({k: v for k, v in vars(source).items() if k not in self.own})

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
        self.__dict__["seen"] = self._weight_now()

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
        new, old, self.__dict__["seen"] = self._fold(), self.folded, self._weight_now()
        if (old.shape, old.dtype, old.device, old.stride()) == (new.shape, new.dtype, new.device, new.stride()):
            old.copy_(new)
        else:
            self.folded = new

    def _weight_now(self) -> tuple[int, int]:
        """Changes with every change of the weight in place, and with every other weight."""
        weight = self._convolution().weight
        return id(weight), -1 if weight.is_inference() else weight._version

    def _upsampled(self, x: Tensor) -> Tensor:
        conv = self._convolution()
        if not torch.compiler.is_compiling() and self.__dict__["seen"] != self._weight_now():
            self.refold()
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
