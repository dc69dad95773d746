"""Pixels -> image files: by Pillow, by simplejpeg, or by nvJPEG on the GPU that drew them."""

import importlib.metadata
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from PIL import Image
from torch import Tensor

from synthkd.engine.errors import SynthkdError, suggest

EncoderName = Literal["auto", "pillow", "simplejpeg", "nvjpeg"]
_PIL_FORMAT = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


@dataclass(frozen=True)
class Encoder:
    """One way to make files.

    files: uint8 [n,H,W,3], format, quality -> n files; name: as in a row's environment, package version included, ""
    for Pillow, whose version stands there anyway; on_device: whether it takes pixels that are still on the GPU.
    """

    files: Callable[[Tensor, str, int], list[bytes]]
    name: str = ""
    on_device: bool = False

    def __call__(self, pixels: Tensor, image_format: str, quality: int) -> list[bytes]:
        """uint8 [n,H,W,3] -> n files: the same bytes for the same pixels and version of the encoder."""
        return self.files(pixels, image_format, quality)


def encode_image(pixels: Any, image_format: str, quality: int) -> bytes:
    """uint8 [H,W,3] array -> file bytes; the same bytes for the same pixels and Pillow version."""
    buffer = io.BytesIO()
    options = {} if image_format == "png" else {"quality": quality}
    Image.fromarray(pixels).save(buffer, _PIL_FORMAT[image_format], **options)
    return buffer.getvalue()


def _pillow(pixels: Tensor, image_format: str, quality: int) -> list[bytes]:
    return [encode_image(image, image_format, quality) for image in pixels.cpu().numpy()]


PILLOW = Encoder(_pillow)


def encoder_for(name: str, image_format: str, device: str) -> Encoder:
    """The encoder of a name for a set's format and the type of the device that draws it; `auto` is Pillow.

    Raises SynthkdError for an unknown one, and where format, device or a missing package rule it out.
    """
    check_encoder(name, image_format, device)
    if name in ("auto", "pillow"):
        return PILLOW
    return _simplejpeg() if name == "simplejpeg" else _nvjpeg()


def check_encoder(name: str, image_format: str, device: str | None = None, workers: int = 1) -> None:
    """Raise SynthkdError where there is no such encoder, or format, device or number of processes rule it out.

    device: None where it is not known yet; workers: processes of a machine whose groups one of them encodes.
    """
    if name not in get_args(EncoderName):
        raise SynthkdError(f"--encoder {name!r}: {suggest(name, get_args(EncoderName))}")
    if name in ("auto", "pillow"):
        return
    if image_format != "jpg":
        raise SynthkdError(f"--encoder {name}: writes JPEG, image_format is {image_format!r}; use auto, or 'jpg'")
    if name == "nvjpeg" and device not in (None, "cuda"):
        raise SynthkdError(f"--encoder nvjpeg: encodes on a GPU, device is {device!r}; use auto or simplejpeg")
    if name == "nvjpeg" and workers > 1:
        raise SynthkdError(
            f"--encoder nvjpeg: groups of {workers} workers come through host memory; use --workers 1, or simplejpeg"
        )


def encoder_of(environment: Mapping[str, Any], image_format: str, device: str) -> Encoder:
    """The encoder that a row's environment names; Pillow where that one needs a GPU and there is none."""
    name = str(environment.get("encoder", "")).partition(" ")[0] or "auto"
    return PILLOW if name == "nvjpeg" and device != "cuda" else encoder_for(name, image_format, device)


def _simplejpeg() -> Encoder:
    """libjpeg-turbo without the interpreter's lock, which Pillow's JPEG holds while it encodes."""
    try:
        import simplejpeg
    except ImportError as error:
        raise SynthkdError("simplejpeg is not installed: pip install 'synthkd[jpeg]'") from error

    def files(pixels: Tensor, image_format: str, quality: int) -> list[bytes]:
        arrays = pixels.cpu().numpy()
        return [simplejpeg.encode_jpeg(a, quality=quality, colorspace="RGB", colorsubsampling="420") for a in arrays]

    return Encoder(files, f"simplejpeg {importlib.metadata.version('simplejpeg')}")


def _nvjpeg() -> Encoder:
    """NVIDIA's encoder by way of torchvision (0.20 or later); pixels never reach the host."""
    try:
        from torchvision.io import encode_jpeg
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise SynthkdError("torchvision is not installed: pip install 'synthkd[torchvision]'") from error

    def files(pixels: Tensor, image_format: str, quality: int) -> list[bytes]:
        if pixels.device.type != "cuda":  # torchvision would take libjpeg, and rows would still say nvjpeg
            raise SynthkdError(
                f"--encoder nvjpeg: pixels are on {pixels.device}, not on a GPU; use --workers 1, or another encoder"
            )
        planes = [image.permute(2, 0, 1).contiguous() for image in pixels]
        return [data.cpu().numpy().tobytes() for data in encode_jpeg(planes, quality=quality)]

    return Encoder(files, f"nvjpeg {importlib.metadata.version('torchvision')}", on_device=True)
