"""A drawn group -> the members of its tar, and what its row says of it; in no order with other groups."""

import io
import json
import math
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from PIL import Image

from synthkd.engine.batch import Batch, Preview
from synthkd.engine.plan import preview_key

BLOCK = tarfile.BLOCKSIZE
_PIL_FORMAT = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


@dataclass(frozen=True)
class EncodedGroup:
    """A group as files: what a shard needs to append it.

    members: (name, bytes), `per_sample` of them for each of `kept` samples; table: columns of `GroupRow.table`, but for
    offsets; environment: where it was drawn.
    """

    group: int
    attempt: int
    kept: int
    per_sample: int
    members: list[tuple[str, bytes]]
    table: dict[str, list[Any]]
    environment: Mapping[str, Any]
    seconds: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)


def encode_image(pixels: Any, image_format: str, quality: int) -> bytes:
    """uint8 [H,W,3] array -> file bytes; the same bytes for the same pixels and Pillow version."""
    buffer = io.BytesIO()
    options = {} if image_format == "png" else {"quality": quality}
    Image.fromarray(pixels).save(buffer, _PIL_FORMAT[image_format], **options)
    return buffer.getvalue()


def tar_member(name: str, data: bytes) -> bytes:
    """One tar member with a fixed header (mode 644, time 0, no owner), padded to whole blocks."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (-len(data) % BLOCK)


def encode_group(batch: Batch, identity: Mapping[str, Any], environment: Mapping[str, Any]) -> EncodedGroup:
    """All members of a group, and its figures."""
    metas: list[dict[str, Any]] = []
    return EncodedGroup(
        group=batch.group,
        attempt=batch.attempt,
        kept=len(batch.ids),
        per_sample=2 * (1 + len(batch.previews)),
        members=list(sample_members(batch, identity, metas)),
        table=table_of(metas),
        environment=batch.environment or environment,
        seconds={k: round(v, 6) for k, v in batch.seconds.items()},
        curves={name: [_mean(v) for v in curve] for name, curve in batch.curves.items()},
    )


def _mean(value: Any) -> float:
    return sum(value) / len(value) if isinstance(value, list) else float(value)


def table_of(metas: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Columns of the samples' json, previews left out."""
    whole = [meta for meta in metas if "preview" not in meta]
    table: dict[str, list[Any]] = {name: [meta[name] for meta in whole] for name in ("key", "label")}
    table["confidence"] = [_confidence(meta) for meta in whole]
    for name in whole[0]["losses"] if whole else ():
        table[f"losses.{name}"] = [round(float(meta["losses"][name]), 6) for meta in whole]
    return table


def _confidence(meta: Mapping[str, Any]) -> float | None:
    """The teacher's softmax probability of the label; None without its logits."""
    logits = meta.get("logits")
    if not isinstance(logits, list):
        return None
    top = max(logits)
    total = math.fsum(math.exp(x - top) for x in logits)
    return round(math.exp(logits[meta["label"]] - top) / total, 6)


def sample_members(
    batch: Batch, identity: Mapping[str, Any], metas: list[dict[str, Any]] | None = None
) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the image and json of each sample of a batch, followed by those of its previews.

    metas: given the content of every json.
    """
    views = [_view_members(batch, preview, identity, metas) for preview in (None, *batch.previews)]
    for sample in zip(*views, strict=True):
        yield from chain.from_iterable(sample)


def _view_members(
    batch: Batch, preview: Preview | None, identity: Mapping[str, Any], metas: list[dict[str, Any]] | None
) -> Iterator[tuple[tuple[str, bytes], tuple[str, bytes]]]:
    """Image and json of each finished image, or of each sample's preview; that one says so, and of which sample."""
    recipe, shown = identity["recipe"], batch if preview is None else preview
    pixels = shown.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    notes = {name: note.float().cpu().tolist() for name, note in shown.notes.items()}
    labels, targets, suffix = shown.labels.tolist(), shown.targets.cpu().tolist(), recipe["image_format"]
    last = {name: curve[-1] for name, curve in batch.curves.items()}
    for i, sample in enumerate(batch.keys):
        key = sample if preview is None else preview_key(sample, preview.share)
        meta: dict[str, Any] = {
            "key": key,
            "label": labels[i],
            "class": recipe["classes"][labels[i]],
            "prompt": batch.prompts[i],
            "seed": identity["seed"],
            "group": batch.group,
            "attempt": batch.attempt,
        }
        if preview is None:
            meta["losses"] = {name: value[i] if isinstance(value, list) else value for name, value in last.items()}
        meta |= {name: note[i] for name, note in notes.items()}
        if batch.sources:
            meta["source"] = batch.sources[i]
        if preview is not None:
            meta |= {"preview": preview.share, "of": sample}
        if recipe["rounds"] > 1:
            meta["round"] = batch.round
        if recipe["cutmix"]["scope"] == "any" and recipe["cutmix"]["every"]:
            meta["targets"] = targets[i]
        if metas is not None:
            metas.append(meta)
        image = encode_image(pixels[i], suffix, recipe["image_quality"])
        yield (f"{key}.{suffix}", image), (f"{key}.json", json.dumps(meta, sort_keys=True).encode())
