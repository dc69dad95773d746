"""Priors: the Protocol the engine needs of one, and its Stable-Diffusion-1.x form. The only `import diffusers`."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from synthkd.engine.decoders import Decoder, VaeDecoder
from synthkd.engine.errors import SynthkdError

SUPPORTED = ("StableDiffusionPipeline",)
EMBEDDED = "embedded:"
_PROMPT_CACHE = 4096


Conditioning = dict[str, Tensor]


class LatentModel(Protocol):
    """A frozen latent denoiser with its conditioning and its decoder."""

    @property
    def decoder(self) -> Decoder:
        """Latents to images."""
        ...

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The noise schedule, in diffusers' vocabulary."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, height and width of the latent of an image in pixels."""
        ...

    def conditions(
        self, prompts: Sequence[str], negative_prompt: str, guidance_scale: float, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None]:
        """What the denoiser is told of B prompts, tensors [B,...] by name, and the same for the negative prompt.

        The second is None where classifier-free guidance is off (guidance_scale <= 1) or embedded in the denoiser.
        size: height and width of the image in pixels.
        """
        ...

    def denoise(
        self, z: Tensor, t: Tensor, cond: Conditioning, uncond: Conditioning | None
    ) -> tuple[Tensor, Tensor | None]:
        """The denoiser's conditional and unconditional outputs [B,C,h,w] at z [B,C,h,w] and timestep t (0-d)."""
        ...

    def modules(self) -> Iterable[nn.Module]:
        """All networks."""
        ...


class StableDiffusion:
    """A diffusers StableDiffusionPipeline (SD 1.x layout) as a LatentModel; the pipeline is left as it was."""

    def __init__(self, pipe: Any) -> None:
        """pipe: a live pipeline; refused with SynthkdError if its class is not supported."""
        name = type(pipe).__name__
        if name not in SUPPORTED:
            raise SynthkdError(f"model: {name} is not supported yet; expected {' or '.join(SUPPORTED)}")
        self._pipe = pipe
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        config = pipe.vae.config
        self._decoder = VaeDecoder(pipe.vae, config.scaling_factor, getattr(config, "shift_factor", None) or 0.0)

    @property
    def decoder(self) -> Decoder:
        """The pipeline's VAE."""
        return self._decoder

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """The pipeline's scheduler config."""
        return dict(self._pipe.scheduler.config)

    @property
    def device(self) -> torch.device:
        """The denoiser's device."""
        return next(self._pipe.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's dtype."""
        return next(self._pipe.unet.parameters()).dtype

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Raises SynthkdError where the size is not a multiple of the VAE's factor."""
        factor = 2 ** (len(self._pipe.vae.config.block_out_channels) - 1)
        for name, value in (("height", height), ("width", width)):
            if value % factor:
                raise SynthkdError(f"recipe: {name} is {value}; this model needs a multiple of {factor}")
        return int(self._pipe.unet.config.in_channels), height // factor, width // factor

    def conditions(
        self, prompts: Sequence[str], negative_prompt: str, guidance_scale: float, size: tuple[int, int]
    ) -> tuple[Conditioning, Conditioning | None]:
        """Text encoder states [B,L,D]; each prompt is encoded alone, once, so the batch cannot change a bit."""
        cond = torch.cat([self._encode_one(p) for p in prompts])
        if guidance_scale <= 1.0:
            return {"encoder_hidden_states": cond}, None
        uncond = self._encode_one(negative_prompt).expand_as(cond)
        return {"encoder_hidden_states": cond}, {"encoder_hidden_states": uncond}

    def _encode_one(self, prompt: str) -> Tensor:
        if prompt not in self._cache:
            tokenizer, encoder = self._pipe.tokenizer, self._pipe.text_encoder
            tokens = tokenizer(
                prompt,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            mask = tokens.attention_mask.to(self.device) if getattr(encoder.config, "use_attention_mask", 0) else None
            with torch.no_grad():
                states = encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]
            self._cache[prompt] = states.to(self.dtype)
            if len(self._cache) > _PROMPT_CACHE:
                self._cache.popitem(last=False)
        return self._cache[prompt]

    def denoise(
        self, z: Tensor, t: Tensor, cond: Conditioning, uncond: Conditioning | None
    ) -> tuple[Tensor, Tensor | None]:
        """One UNet call; with classifier-free guidance on a doubled batch, unconditional half first."""
        unet = self._pipe.unet
        if uncond is None:
            return unet(z, t, **cond, return_dict=False)[0], None
        told = {name: torch.cat([uncond[name], value]) for name, value in cond.items()}
        both = unet(torch.cat([z, z]), t, **told, return_dict=False)[0]
        out_uncond, out_cond = both.chunk(2)
        return out_cond, out_uncond

    def modules(self) -> Iterable[nn.Module]:
        """UNet, VAE and text encoder."""
        return (self._pipe.unet, self._pipe.vae, self._pipe.text_encoder)


def resolve(reference: str) -> str:
    """A model reference as a path or hub id: `embedded:digits` is the pipeline that comes with the package."""
    if not reference.startswith(EMBEDDED):
        return reference
    from synthkd.engine.assets import embedded_path

    return str(embedded_path(reference.removeprefix(EMBEDDED)) / "pipeline")


def load_model(reference: str, *, device: str | torch.device, dtype: torch.dtype) -> StableDiffusion:
    """Load a local folder, a hub id or `embedded:NAME`; safetensors only, never a pickle.

    Raises SynthkdError with one line for a missing folder, an unsupported pipeline class, missing or
    unreadable weights, half precision on a CPU, or a missing diffusers.
    """
    if torch.device(device).type == "cpu" and dtype == torch.float16:
        raise SynthkdError("recipe: dtype is 'float16' on a CPU; expected 'float32' or 'bfloat16', or a GPU")
    where = resolve(reference)
    _check_folder(where)
    diffusers = _import_diffusers()
    try:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            where, dtype=dtype, use_safetensors=True, safety_checker=None, requires_safety_checker=False
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SynthkdError(f"model {reference!r}: cannot be loaded: {reason}") from error
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        _settle(module, device, dtype)
    return StableDiffusion(pipe)


def load_tiny_decoder(path: str, *, device: str | torch.device, dtype: torch.dtype) -> VaeDecoder:
    """An AutoencoderTiny folder (TAESD layout) as a guidance decoder; raises SynthkdError if it is none."""
    diffusers = _import_diffusers()
    try:
        vae = diffusers.AutoencoderTiny.from_pretrained(path, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SynthkdError(f"guidance.decoder 'tiny:{path}': cannot be loaded: {reason}") from error
    return VaeDecoder(_settle(vae, device, dtype), vae.config.scaling_factor)


def _settle(module: nn.Module, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """Freeze and move a network; channels_last on a CPU, where it is 1.5x faster (on a GPU GroupNorm undoes it)."""
    memory = torch.channels_last if torch.device(device).type == "cpu" else torch.preserve_format
    module.eval().requires_grad_(False).to(device=device, dtype=dtype)
    return module.to(memory_format=memory)  # type: ignore[call-overload]


def weights_digest(modules: Iterable[nn.Module]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors of the modules."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name} {flat.dtype} {tuple(tensor.shape)}".encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_folder(where: str) -> None:
    """Refuse a local folder by its model_index.json before any weight is read."""
    index = Path(where) / "model_index.json"
    looks_local = Path(where).is_absolute() or where.startswith(".") or where.count("/") > 1 or Path(where).exists()
    if not index.is_file():
        if looks_local:
            raise SynthkdError(f"model {where!r}: no model_index.json there; expected a diffusers pipeline folder")
        return
    try:
        name = str(json.loads(index.read_text()).get("_class_name"))
    except (ValueError, AttributeError) as error:
        raise SynthkdError(f"model {where!r}: model_index.json is not readable JSON") from error
    if name not in SUPPORTED:
        raise SynthkdError(f"model {where!r}: {name} is not supported yet; expected {' or '.join(SUPPORTED)}")


def _import_diffusers() -> Any:
    try:
        import diffusers
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise SynthkdError("diffusers is not installed: pip install 'synthkd[diffusers]'") from error
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return diffusers
