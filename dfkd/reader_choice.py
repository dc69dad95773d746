"""Which reader reads a set here: the one asked for, or the one measured to be faster; and whether images are kept."""

import contextlib
import importlib.metadata
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from synthkd.dfkd.cached import CACHES, CachedReader, Store, cache_place
from synthkd.dfkd.data_dali import DaliReader, dali_available
from synthkd.dfkd.feed import ReadOptions, Request
from synthkd.dfkd.readers import AheadReader, Encoded, TorchReader, common_size, thread_count
from synthkd.dfkd.views import Views, ViewSpec, draw_views
from synthkd.engine.errors import SynthkdError, suggest
from synthkd.export.artifacts import key_of, own_cache, processor

READERS = ("auto", "dali", "torch")
_MAKERS: dict[str, Callable[..., AheadReader]] = {"torch": TorchReader, "dali": DaliReader}
_SMALL_SET = 20_000  # images below which a set that is decoded once is not worth a measurement
_SECONDS, _BATCH, _IMAGES = 0.4, 64, 512  # of a measurement
_PACKAGES = ("torch", "pillow", "simplejpeg", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


def open_reader(source: Encoded, size: tuple[int, int], options: ReadOptions) -> AheadReader:
    """A reader of a set at height x width.

    Raises SynthkdError for a reader or cache that does not exist, or is not installed.
    """
    for what, value, known in (("reader", options.reader, READERS), ("cache", options.cache, CACHES)):
        if value not in known:
            raise SynthkdError(f"{what} {value!r}: {suggest(value, known)}")
    kept = common_size(source) if options.crops else size
    place = cache_place(options, len(source), kept)
    name = options.reader
    if name == "auto":
        name = "torch" if place and len(source) < _SMALL_SET else fastest(source, size, options)
    make = _MAKERS[name]
    if not place:
        return make(source, size, options)
    inner = make(source, kept, replace(options, device=place))
    slot = (kept, str(torch.device(place)), inner.decoder)
    if slot not in source.stores:
        source.stores[slot] = Store.empty(len(source), kept, place)
    uncached = (lambda: TorchReader(source, size, options)) if options.crops else None
    return CachedReader(source, inner, source.stores[slot], size, options, uncached)


def fastest(source: Encoded, size: tuple[int, int], options: ReadOptions) -> str:
    """dali or torch, as measured on this machine for such a set; the answer is kept in the user's cache folder."""
    if not dali_available():
        return "torch"
    key, known = _key(source, size, options), _answers()
    found = known.get(key)
    if isinstance(found, dict) and found.get("reader") in _MAKERS:
        return str(found["reader"])
    rates = {name: _rate(name, source, size, options) for name in sorted(_MAKERS)}
    best = max(rates, key=lambda name: rates[name])
    _keep({**_answers(), key: {"reader": best, "images_per_second": {n: round(r) for n, r in rates.items()}}})
    return best


def _rate(name: str, source: Encoded, size: tuple[int, int], options: ReadOptions) -> float:
    """Images per second after a first batch; 0 for a reader that does not run here."""
    try:
        reader = _MAKERS[name](source, size, replace(options, strict=False, cache="off"))
    except (SynthkdError, RuntimeError, OSError):
        return 0.0
    reader.quiet = True
    try:
        pixels = reader.read(_requests(len(source), options.crops))
        next(pixels)
        begin, images = time.perf_counter(), 0
        while (seconds := time.perf_counter() - begin) < _SECONDS:
            images += len(next(pixels).used)
        pixels.close()  # type: ignore[attr-defined]
        return images / seconds
    except (SynthkdError, RuntimeError):
        return 0.0
    finally:
        reader.close()


def _requests(count: int, crops: bool) -> Iterator[Request]:
    """The set's first images again and again."""
    used, step = min(count, _IMAGES), 0
    while True:
        rows = np.arange(step, step + min(_BATCH, used)) % used
        spec = ViewSpec(crop=0.5, flip=True) if crops else None
        yield Request(rows, draw_views(spec, 0, 0, rows, used) if spec else Views.plain(rows))
        step += len(rows)


def _key(source: Encoded, size: tuple[int, int], options: ReadOptions) -> str:
    """What the answer hangs on; sides are rounded to half powers of two."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    sides = [round(2 * math.log2(side)) for side in (*common_size(source), *size)]
    here = [processor(torch.device(options.device)), thread_count(options), versions]
    return key_of({"machine": here, "format": source.image_format, "sides": sides, "crops": options.crops})


def _path() -> Path:
    return own_cache() / "readers.json"


def _answers() -> dict[str, Any]:
    """What was measured before; nothing where the file is missing or damaged."""
    try:
        known = json.loads(_path().read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _keep(known: dict[str, Any]) -> None:
    """Replace the file as a whole; a folder that cannot be written costs a measurement next time."""
    with contextlib.suppress(OSError):
        _path().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=_path().parent, suffix=".tmp", delete=False) as file:
            file.write(json.dumps(known, indent=2, sort_keys=True) + "\n")
        Path(file.name).replace(_path())
