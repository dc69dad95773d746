"""Loads priors and decoders, and digests their weights. The only `import diffusers` and `import transformers`."""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from synthkd.engine.declared import check_weights
from synthkd.engine.decoders import Decoder, VaeDecoder, latent_layout
from synthkd.engine.errors import SynthkdError
from synthkd.engine.families import PARTS, XL, check_index
from synthkd.engine.latent_model import LatentModel
from synthkd.engine.precision import decode_dtype
from synthkd.engine.priors import wrap_pipeline

__all__ = ["EMBEDDED", "libraries", "load_model", "load_tiny_decoder", "random_pipeline",
    "random_tiny_decoder", "random_vae", "resolve", "weights_digest", "wrap_pipeline", "xformers_processor"]

EMBEDDED = "embedded:"
_LORA_FILE = "pytorch_lora_weights.safetensors"
_NETWORKS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2")
_log = logging.getLogger("synthkd")


def resolve(reference: str) -> str:
    """A model reference as a path or hub id: `embedded:digits` is the pipeline that comes with the package."""
    if not reference.startswith(EMBEDDED):
        return reference
    from synthkd.engine.assets import embedded_path

    return str(embedded_path(reference.removeprefix(EMBEDDED)) / "pipeline")


def load_model(
    reference: str, *, device: str | torch.device, dtype: torch.dtype, loras: Sequence[str] = ()
) -> LatentModel:
    """Load a local folder, a hub id or `embedded:NAME`; safetensors only, never a pickle, never a folder's own code.

    loras: `PATH[@WEIGHT]` each, a folder or .safetensors file or hub id, fused into the weights in this order.
    Raises SynthkdError with one line for a missing folder, an unsupported pipeline class, missing or unreadable
    weights, weights that are not those that were declared, half precision on a CPU, or a missing diffusers or peft.
    """
    if torch.device(device).type == "cpu" and dtype == torch.float16:
        raise SynthkdError("recipe: dtype is 'float16' on a CPU; expected 'float32' or 'bfloat16', or a GPU")
    where, adapters = resolve(reference), [_lora(entry) for entry in loras]
    index = _local_index(where)
    if index is not None:
        _check_files(where, check_index(f"model {where!r}", index))
        check_weights(Path(where))
    diffusers = _import_diffusers()
    pipe = _load_pipeline(diffusers, reference, where, index, dtype)
    for path, weight in adapters:
        _fuse_lora(pipe, path, weight)
    for name in PARTS[type(pipe).__name__]:
        part = getattr(pipe, name)
        if isinstance(part, nn.Module):
            _settle(part, device, decode_dtype(pipe, dtype) if name == "vae" else dtype)
    if type(pipe).__name__ == XL:
        _log.info("model %r is an SDXL base; a refiner is never used", reference)
    return wrap_pipeline(pipe)


def _load_pipeline(
    diffusers: Any, reference: str, where: str, index: Mapping[str, Any] | None, dtype: torch.dtype
) -> Any:
    """The pipeline by the class that its index names; the VAE in float32 at least, for `_settle` to lower."""
    dtypes = {"default": dtype, "vae": torch.promote_types(dtype, torch.float32)}
    try:
        if index is None:
            index = diffusers.DiffusionPipeline.load_config(where)
        name = check_index(f"model {where!r}", index)
        extra = {part: _load_text_encoder(where, part, index, dtype) for part in PARTS[name] if _is_text(part)}
        if "safety_checker" in index:
            extra |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = getattr(diffusers, name).from_pretrained(where, dtype=dtypes, use_safetensors=True, **extra)
        for part in PARTS[name]:
            _check_whole(part, getattr(pipe, part))
    except SynthkdError:
        raise
    except Exception as error:  # a hub that is not reached has errors of its own
        raise SynthkdError(f"model {reference!r}: cannot be loaded: {_one_line(error)}") from error
    if index.get("id2label"):
        pipe.register_to_config(id2label=index["id2label"])
    return pipe


def _is_text(part: str) -> bool:
    return part.startswith("text_encoder")


def _load_text_encoder(where: str, part: str, index: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """A text encoder; raises ValueError for a tensor that its file lacks, which transformers would draw at random."""
    import transformers

    kind = getattr(transformers, index[part][1])
    config = kind.config_class.from_pretrained(where, subfolder=part)
    config._attn_implementation = None  # a config.json may name a kernel on a hub, which would be fetched and run
    encoder, found = kind.from_pretrained(
        where, subfolder=part, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    if found["missing_keys"]:
        raise ValueError(f"{part} lacks the tensor {min(found['missing_keys'])}")
    return encoder


def _check_whole(part: str, module: Any) -> None:
    """Raise ValueError for a tensor that its file lacks: diffusers leaves it on the meta device."""
    tensors = module.named_parameters() if isinstance(module, nn.Module) else ()
    for name, tensor in tensors:
        if tensor.is_meta:
            raise ValueError(f"{part} lacks the tensor {name}")


def _check_files(where: str, name: str) -> None:
    """Every part of a local folder has its config, and its weights as safetensors."""
    for part in PARTS[name]:
        folder = Path(where) / part
        config = {"scheduler": "scheduler_config.json"}.get(part, "config.json")
        missing = None if part.startswith("tokenizer") or (folder / config).is_file() else config
        if part in _NETWORKS and not any(folder.glob("*.safetensors")):
            missing = missing or "*.safetensors (pickled weights are never read)"
        if missing or not folder.is_dir():
            raise SynthkdError(f"model {where!r}: cannot be loaded: no {part}/{missing or ''}")


def _lora(entry: str) -> tuple[str, float]:
    """Path or hub id, and weight, of `PATH[@WEIGHT]`; raises SynthkdError before any weight is read."""
    if find_spec("peft") is None:
        raise SynthkdError(f"lora {entry!r}: peft is not installed: pip install 'synthkd[lora]'")
    path, weight = entry, 1.0
    if "@" in entry and not Path(entry).exists():
        path, _, tail = entry.rpartition("@")
        try:
            weight = float(tail)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise SynthkdError(f"lora {entry!r}: weight is {tail!r}; expected PATH or PATH@NUMBER")
    return _lora_file(path), weight


def _lora_file(path: str) -> str:
    where = Path(path)
    if where.is_dir():
        found = sorted(where.glob("*.safetensors"))
        named = [f for f in found if f.name == _LORA_FILE] or found
        if len(named) != 1:
            raise SynthkdError(
                f"lora {path!r}: {len(found)} .safetensors files there; expected {_LORA_FILE} or just one"
            )
        return str(named[0])
    if where.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise SynthkdError(f"lora {path!r}: a pickle is never read; expected a .safetensors file")
    if not where.is_file() and (_looks_local(path) or where.suffix == ".safetensors"):
        raise SynthkdError(f"lora {path!r}: no such file; expected a .safetensors file or a folder with one")
    return path


def _fuse_lora(pipe: Any, path: str, weight: float) -> None:
    """W <- W + weight * scale * B A (arXiv 2106.09685, section 4.1) in every layer that the file names."""
    if not hasattr(pipe, "load_lora_weights"):
        raise SynthkdError(f"lora {path!r}: a {type(pipe).__name__} takes no LoRA")
    try:
        pipe.load_lora_weights(path, adapter_name="synthkd", use_safetensors=True)
        parts = [part for part, names in pipe.get_list_adapters().items() if "synthkd" in names]
        if not parts:
            raise ValueError("it names no layer of this model")
        pipe.fuse_lora(components=parts, lora_scale=weight, safe_fusing=True, adapter_names=["synthkd"])
        pipe.unload_lora_weights()
    except SynthkdError:
        raise
    except Exception as error:  # a hub that is not reached has errors of its own
        raise SynthkdError(f"lora {path!r}: cannot be fused: {_one_line(error)}") from error


def load_tiny_decoder(
    path: str, *, device: str | torch.device, dtype: torch.dtype, like: Decoder | None = None
) -> VaeDecoder:
    """An AutoencoderTiny folder (TAESD layout) as a guidance decoder.

    like: the prior's own decoder; raises SynthkdError if the tiny one has other latents than it, or is none.
    """
    diffusers = _import_diffusers()
    try:
        vae = diffusers.AutoencoderTiny.from_pretrained(path, dtype=dtype, use_safetensors=True)
    except SynthkdError:
        raise
    except Exception as error:  # a hub that is not reached has errors of its own
        raise SynthkdError(f"guidance.decoder 'tiny:{path}': cannot be loaded: {_one_line(error)}") from error
    if like is not None:
        pairs = zip(
            ("latent channels", "pixels per latent"), latent_layout(vae), latent_layout(like.module), strict=True
        )
        for what, found, wanted in pairs:
            if found != wanted:
                raise SynthkdError(f"guidance.decoder 'tiny:{path}': {found} {what}; this model's vae has {wanted}")
    return VaeDecoder(_settle(vae, device, dtype), vae.config.scaling_factor, vae.config.shift_factor)


def random_vae(seed: int = 0, **config: Any) -> nn.Module:
    """An AutoencoderKL of random weights, frozen, in float32 on the CPU: for benchmarks, where weights do not matter.

    config: over that of Stable Diffusion 1.5. Raises SynthkdError without diffusers.
    """
    stages = len(config.get("block_out_channels", (0,) * 4))
    fields = {
        "down_block_types": ("DownEncoderBlock2D",) * stages,
        "up_block_types": ("UpDecoderBlock2D",) * stages,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": 512,
        **config,
    }
    diffusers = _import_diffusers()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae: nn.Module = diffusers.AutoencoderKL(**fields)
    return vae.eval().requires_grad_(False)


def random_pipeline(name: str, *, device: str | torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A live pipeline of a published architecture (`engine.random_models.ARCHITECTURES`) with random weights.

    For benchmarks, where weights do not matter; it has no text encoder and no tokenizer, so it is of use as
    `random_models.random_prior` alone. Weights are drawn where they stay, in dtype: nothing passes through the host;
    on the meta device they are not drawn. Raises SynthkdError for an unknown name or a missing diffusers.
    """
    from synthkd.engine.random_models import architecture, draw_weights

    made, diffusers = architecture(name), _import_diffusers()
    parts: dict[str, Any] = {"scheduler": diffusers.DDIMScheduler(**made.scheduler)}
    for part, (kind, config) in made.networks.items():
        with torch.device("meta"):
            network = getattr(diffusers, kind)(**config)
        parts[part] = draw_weights(network.to(dtype), torch.device(device), seed)
    nothing = {part: nn.Identity() for part in PARTS[made.pipeline] if part not in parts}
    flags = made.flags | ({"requires_safety_checker": False} if made.pipeline != XL else {"add_watermarker": False})
    return getattr(diffusers, made.pipeline)(**parts, **nothing, **flags)


def random_tiny_decoder(*, device: str | torch.device, dtype: torch.dtype, seed: int = 0) -> VaeDecoder:
    """An AutoencoderTiny in TAESD's layout with random weights as a guidance decoder: for benchmarks."""
    from synthkd.engine.random_models import draw_weights

    diffusers = _import_diffusers()
    with torch.device("meta"):
        vae = diffusers.AutoencoderTiny()
    network = draw_weights(vae.to(dtype), torch.device(device), seed)
    return VaeDecoder(network, vae.config.scaling_factor, vae.config.shift_factor)


def xformers_processor() -> Any:
    """diffusers' attention by xformers, to be a layer's `processor`. Raises SynthkdError without diffusers."""
    _import_diffusers()
    from diffusers.models.attention_processor import XFormersAttnProcessor

    return XFormersAttnProcessor()


def _settle(module: nn.Module, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """Freeze and move a network; channels_last on a CPU, where it is 1.5x faster (on a GPU GroupNorm undoes it)."""
    memory = torch.channels_last if torch.device(device).type == "cpu" else torch.preserve_format
    module.eval().requires_grad_(False).to(device=device, dtype=dtype)
    return module.to(memory_format=memory)  # type: ignore[call-overload]


def weights_digest(modules: Iterable[nn.Module]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors of the modules, and over unfused adapters' scales."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name} {flat.dtype} {tuple(tensor.shape)}".encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        for name, layer in module.named_modules():
            if isinstance(scales := getattr(layer, "scaling", None), dict):  # a LoRA layer of peft
                state = [getattr(layer, a, None) for a in ("active_adapters", "merged_adapters", "disable_adapters")]
                digest.update(f"{name} {sorted(scales.items())} {state}".encode())
    return digest.hexdigest()


def _looks_local(where: str) -> bool:
    path = Path(where)
    return path.is_absolute() or where.startswith(".") or where.count("/") > 1 or path.exists()


def _local_index(where: str) -> dict[str, Any] | None:
    """model_index.json of a local folder, None for a hub id; SynthkdError for a folder without a readable one."""
    path = Path(where) / "model_index.json"
    if not path.is_file():
        if _looks_local(where):
            raise SynthkdError(f"model {where!r}: no model_index.json there; expected a diffusers pipeline folder")
        return None
    try:
        index = json.loads(path.read_text())
    except ValueError:
        index = None
    if not isinstance(index, dict):
        raise SynthkdError(f"model {where!r}: model_index.json is not readable JSON")
    return index


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def libraries() -> tuple[Any, Any]:
    """diffusers and transformers, their warnings and bars off. Raises SynthkdError where they are not installed."""
    diffusers = _import_diffusers()
    import transformers

    return diffusers, transformers


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
