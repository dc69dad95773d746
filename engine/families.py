"""Which pipeline families the engine takes: refusals in one line, from class names and plain dicts alone."""

from collections.abc import Mapping
from typing import Any

from synthkd.engine.errors import SynthkdError

_TEXT = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
XL = "StableDiffusionXLPipeline"
PARTS: Mapping[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": _TEXT,
    "LatentConsistencyModelPipeline": _TEXT,
    XL: (*_TEXT, "text_encoder_2", "tokenizer_2"),
    "DiTPipeline": ("transformer", "vae", "scheduler"),
}
LIBRARIES = ("diffusers", "transformers")

_WHY = {
    "StableDiffusionXLImg2Img": "a refiner or an image-to-image pipeline",
    "StableDiffusion3": "flow matching",
    "Flux": "flow matching",
    "Sana": "flow matching",
    "AuraFlow": "flow matching",
    "Lumina": "flow matching",
    "QwenImage": "flow matching",
    "HiDream": "flow matching",
    "HunyuanImage": "flow matching",
    "Chroma": "flow matching",
    "CogView4": "flow matching",
    "ZImage": "flow matching",
    "PixArt": "a text-to-image transformer",
    "HunyuanDiT": "a text-to-image transformer",
    "Kandinsky": "its own latent space",
    "StableCascade": "its own latent space",
    "IF": "pixels, not latents",
}


def expected() -> str:
    """The supported classes, for the tail of a message."""
    return " or ".join(PARTS)


def check_class(where: str, name: str) -> None:
    """Raise SynthkdError, which begins with `where`, for a pipeline class that is not supported."""
    if name in PARTS:
        return
    why = next((f" ({reason})" for prefix, reason in _WHY.items() if name.startswith(prefix)), "")
    raise SynthkdError(f"{where}: {name} is not supported yet{why}; expected {expected()}")


def check_scheduler(where: str, name: str, config: Mapping[str, Any] | None = None) -> None:
    """Raise SynthkdError for a noise schedule of another kind than alpha x0 + sigma eps with alpha^2 + sigma^2 = 1."""
    config = config or {}
    flow = "FlowMatch" in name or bool(config.get("use_flow_sigmas"))
    if flow or config.get("prediction_type") == "flow_prediction":
        raise SynthkdError(f"{where}: scheduler {name} (flow matching) is not supported yet; expected a DDIM kind")
    if name.startswith("EDM"):
        raise SynthkdError(f"{where}: scheduler {name} (EDM noise levels) is not supported yet; expected a DDIM kind")


def check_parts(where: str, name: str, present: Mapping[str, bool]) -> None:
    """Raise SynthkdError for a pipeline of class `name` that lacks a part; present: part -> whether it is there."""
    missing = [part for part in PARTS[name] if not present.get(part)]
    if not missing:
        return
    if name == XL and present.get("text_encoder_2") and not present.get("text_encoder"):
        raise SynthkdError(f"{where}: this is the refiner alone, without the first text encoder; expected an SDXL base")
    if name == XL and not present.get("text_encoder_2"):
        raise SynthkdError(f"{where}: no second text encoder (text_encoder_2); expected an SDXL base, which has two")
    raise SynthkdError(f"{where}: no {missing[0]}; a {name} has {', '.join(PARTS[name])}")


def check_index(where: str, index: Mapping[str, Any]) -> str:
    """The pipeline class of a model_index.json; raises SynthkdError for what cannot be loaded from it.

    Parts must come from diffusers or transformers: a part in the folder's own code is refused.
    """
    name = str(index.get("_class_name"))
    refiner = name.startswith("StableDiffusionXLImg2Img") and not _named(index.get("text_encoder"))
    name = XL if refiner else name
    check_class(where, name)
    present = {part: _named(index.get(part)) for part in PARTS[name]}
    check_parts(where, name, present)
    for part in PARTS[name]:
        entry = index[part]
        if entry[0] not in LIBRARIES:
            raise SynthkdError(
                f"{where}: model_index.json has {part} from {entry[0]!r}; expected {' or '.join(LIBRARIES)}, "
                "code from a model folder is never run"
            )
    check_scheduler(where, index["scheduler"][1])
    return name


def _named(entry: object) -> bool:
    """Whether an entry of model_index.json is [library, class]."""
    return isinstance(entry, (list, tuple)) and len(entry) == 2 and all(isinstance(e, str) for e in entry)


def label_numbers(pipe: Any) -> dict[str, frozenset[int]]:
    """Labels, as written and in lower case -> class numbers (ImageNet has two cranes, so a set)."""
    named = pipe.config.get("id2label")
    if named:
        pairs = [(label, int(n)) for n, text in named.items() for label in {text, *text.split(",")}]
    else:
        pairs = list(pipe.labels.items())
    out: dict[str, frozenset[int]] = {}
    for label, number in pairs:
        for key in {label.strip(), label.strip().lower()}:
            out[key] = out.get(key, frozenset()) | {number}
    return out
