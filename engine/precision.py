"""What an autoencoder decodes in: as it is, or a copy in a wider dtype where float16 would overflow inside."""

import logging
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from synthkd.engine.decoders import VaeDecoder, latent_layout
from synthkd.engine.families import XL
from synthkd.export.numerics import half_overflow, probe_latents, wide_dtype

_HALF = (torch.float16, torch.bfloat16)
_log = logging.getLogger("synthkd")


def decode_dtype(pipe: Any, dtype: torch.dtype) -> torch.dtype:
    """What a pipeline of this dtype decodes in: SDXL's autoencoder overflows in half precision (`force_upcast`)."""
    upcast = type(pipe).__name__ == XL and getattr(pipe.vae.config, "force_upcast", False)
    return torch.float32 if upcast and dtype in _HALF else dtype


def copied(vae: Any, dtype: torch.dtype) -> Any:
    """A frozen copy in another dtype; the live autoencoder is not touched."""
    copy = nn.Module.to(deepcopy(vae), dtype)  # diffusers' own `to` warns about that, without a cause here
    return copy.eval().requires_grad_(False)


def finite_decoder(vae: Any, over: Callable[[Any], VaeDecoder]) -> VaeDecoder:
    """A decoder over the live autoencoder, or over a wider copy where float16 would not hold it, which the log says.

    over: makes the decoder of an autoencoder. A float32 copy decodes four small latents; only float16 is probed.
    """
    live = over(vae)
    if vae.dtype != torch.float16 or vae.device.type == "meta":
        return live
    single = over(copied(vae, torch.float32))
    overflow = half_overflow(single.module, single, (probe_latents(latent_layout(vae)[0], device=vae.device),))
    if overflow is None:
        return live
    wide = wide_dtype(vae.device)
    _log.warning(f"model: vae in float16: {overflow}; it decodes in {str(wide).removeprefix('torch.')} instead")
    return single if wide == torch.float32 else over(copied(vae, wide))
