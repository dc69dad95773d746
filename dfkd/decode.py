"""Image files -> uint8 pixels: JPEG by simplejpeg where it is installed, else Pillow; nothing giant is decoded."""

import importlib.metadata
import io
import struct
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from synthkd.engine.errors import SynthkdError
from synthkd.engine.reading import MAX_PIXELS, check_scans, decode_image

_PNG, _JPEG, _RIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF"


@lru_cache(maxsize=1)
def _simplejpeg() -> Any:
    """The module, or None where the extra `jpeg` is not installed."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def decoder_name(image_format: str) -> str:
    """Package and version that decodes png, jpg or webp here."""
    if image_format == "jpg" and _simplejpeg() is not None:
        return f"simplejpeg {importlib.metadata.version('simplejpeg')}"
    return f"Pillow {importlib.metadata.version('pillow')}"


def stored_size(data: bytes, where: str) -> tuple[int, int]:
    """Height and width as an image's header has them; raises SynthkdError for no PNG, JPEG or WebP, or a giant one."""
    try:
        height, width = _header(data)
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise SynthkdError(f"{where}: not a readable image ({error})") from error
    if height * width > MAX_PIXELS:
        raise SynthkdError(f"{where}: {width}x{height} pixels; expected a training image")
    if height * width == 0:
        raise SynthkdError(f"{where}: not a readable image ({width}x{height} pixels)")
    return height, width


def _header(data: bytes) -> tuple[int, int]:
    fast = _simplejpeg()
    if data.startswith(_PNG) and data[12:16] == b"IHDR":
        width, height = struct.unpack(">II", data[16:24])
        return height, width
    if data.startswith(_JPEG) and fast is not None:
        height, width = fast.decode_jpeg_header(data)[:2]
        return height, width
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
        return image.height, image.width


def is_cut_off(data: bytes) -> bool:
    """Whether an image lacks its format's end: some decoders fill up what is missing without a word."""
    if data.startswith(_JPEG):
        return not data.endswith(b"\xff\xd9")
    if data.startswith(_PNG):
        return not data.endswith(b"IEND\xaeB`\x82")
    return data.startswith(_RIFF) and int.from_bytes(data[4:8], "little") + 8 > len(data)


def decode(data: bytes, where: str, into: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """File bytes -> uint8 [H,W,3]; raises SynthkdError for what is no PNG, JPEG or WebP, is cut off, or giant.

    into: uint8 [h,w,3], contiguous; where the image has that size it may be decoded there, and `into` comes back.
    """
    fast = _simplejpeg()
    if fast is None or not data.startswith(_JPEG):
        return decode_image(data, where)
    check_scans(data, where)
    size = stored_size(data, where)
    try:
        if into is not None and into.shape[:2] == size:
            fast.decode_jpeg(data, colorspace="RGB", buffer=into)
            return into
        pixels: NDArray[np.uint8] = fast.decode_jpeg(data, colorspace="RGB")
    except ValueError:  # CMYK, or something to be warned of: Pillow has the last word
        return decode_image(data, where)
    return pixels
