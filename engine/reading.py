"""Shards -> samples, without trusting them: names, sizes and counts are checked, nothing is executed."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import read_manifest
from synthkd.engine.rows import ShardRow, group_rows, read_index
from synthkd.engine.shards import short_digest
from synthkd.engine.tar import MAX_MEMBER, members
from synthkd.engine.untrusted import parse_note

__all__ = ["MAX_MEMBER", "MAX_PIXELS", "Sample", "decode_image", "decode_meta", "members", "read_set", "read_shard"]

MAX_PIXELS = 64 * 2**20
MAX_META = 4 * 2**20  # bytes of a sample's json
MAX_SCANS = 100  # of a progressive JPEG: each costs a pass over all its pixels


@dataclass(frozen=True)
class Sample:
    """A stored sample: its image file, decoded when asked for, and its json."""

    key: str
    image: bytes
    meta: dict[str, Any]
    where: str

    @property
    def preview(self) -> float | None:
        """The share of the run at which a preview was taken; None for a finished image."""
        share = self.meta.get("preview")
        return float(share) if isinstance(share, float) else None

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """uint8 [H,W,3]; raises SynthkdError for what is no image."""
        return decode_image(self.image, self.where)


def decode_image(data: bytes, where: str) -> NDArray[np.uint8]:
    """File bytes -> uint8 [H,W,3], the first frame; raises SynthkdError for what is no image, or a giant one."""
    check_scans(data, where)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height <= MAX_PIXELS:
                return np.asarray(image.convert("RGB"))
            size = f"{image.width}x{image.height}"
    except Exception as error:  # a decoder raises whatever it stumbles over
        raise SynthkdError(f"{where}: not a readable image ({' '.join(str(error).split())[:200]})") from error
    raise SynthkdError(f"{where}: {size} pixels; expected a training image")


def check_scans(data: bytes, where: str) -> None:
    """Raise SynthkdError for a JPEG of so many scans that decoding it would take minutes."""
    if data.startswith(b"\xff\xd8") and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise SynthkdError(f"{where}: a JPEG of {scans} scans; expected a training image")


def decode_meta(data: bytes, where: str) -> dict[str, Any]:
    """A sample's json; raises SynthkdError for what is no table."""
    if len(data) > MAX_META:
        raise SynthkdError(f"{where}: {len(data)} bytes; expected a sample's json of at most {MAX_META}")
    try:
        meta = parse_note(data, finite=False)
    except (ValueError, RecursionError) as error:
        raise SynthkdError(f"{where}: not readable JSON ({error})") from error
    if not isinstance(meta, dict):
        raise SynthkdError(f"{where}: not a table of fields")
    return meta


def read_set(folder: Path) -> Iterator[Sample]:
    """All samples of a set in id order, each member checked against the index; previews follow their sample.

    Raises SynthkdError naming the shard and member that is damaged or missing.
    """
    manifest, index = read_manifest(folder), read_index(folder)
    if not index:
        raise SynthkdError(f"{folder}: holds no finished shard; finish the set with the command that began it")
    suffix = manifest["recipe"]["image_format"]
    for shard in sorted(index):
        yield from _read_shard(folder, index[shard], suffix)


def read_shard(folder: Path, shard: int) -> Iterator[Sample]:
    """The samples of one finished shard, like those of `read_set`; raises SynthkdError where it is not there."""
    manifest, index = read_manifest(folder), read_index(folder)
    if shard not in index:
        raise SynthkdError(f"{folder}: shard {shard} is missing or not finished; run the command that began the set")
    yield from _read_shard(folder, index[shard], manifest["recipe"]["image_format"])


def _read_shard(folder: Path, row: ShardRow, suffix: str) -> Iterator[Sample]:
    path, wanted = folder / row.file, {n: d for g in group_rows(folder, row) for n, d in g.members.items()}
    held: dict[str, bytes] = {}
    for name, data in members(path):
        if wanted.pop(name, None) != short_digest(data):
            raise SynthkdError(f"{path}: {name} does not match its digest; run `synthkd verify {folder}`")
        held[name] = data
        key = name.partition(".")[0]
        if f"{key}.{suffix}" in held and f"{key}.json" in held:
            meta = decode_meta(held.pop(f"{key}.json"), f"{path}: {key}.json")
            yield Sample(key, held.pop(f"{key}.{suffix}"), meta, f"{path}: {key}.{suffix}")
    if wanted:
        raise SynthkdError(f"{path}: {min(wanted)} is missing; run `synthkd verify {folder}`")
