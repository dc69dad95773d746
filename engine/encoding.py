"""A drawn group -> the members of its tar, and what its row says of it; in no order with other groups."""

import json
import math
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from synthkd.engine.batch import Batch, Preview
from synthkd.engine.encoders import PILLOW, Encoder
from synthkd.engine.plan import preview_key

BLOCK = tarfile.BLOCKSIZE


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


def tar_member(name: str, data: bytes) -> bytes:
    """One tar member with a fixed header (mode 644, time 0, no owner), padded to whole blocks."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + b"\0" * (-len(data) % BLOCK)


@dataclass(frozen=True)
class Draft:
    """A group whose images are not files yet: any of its samples can be encoded on its own, on any thread.

    pixels: uint8 [B,H,W,3] of the finished images, then of each preview; metas: the json of every sample of each.
    """

    batch: Batch
    pixels: list[Tensor]
    metas: list[list[dict[str, Any]]]
    image_format: str
    quality: int
    environment: Mapping[str, Any]

    def encode(self, samples: range, encoder: Encoder) -> list[tuple[str, bytes]]:
        """(name, bytes) of the image and json of each of the samples, followed by those of its previews."""
        views = []
        for pixels, metas in zip(self.pixels, self.metas, strict=True):
            images = encoder(pixels[samples.start : samples.stop], self.image_format, self.quality)
            views.append(list(zip(metas[samples.start : samples.stop], images, strict=True)))
        return [file for sample in zip(*views, strict=True) for view in sample for file in self._files(*view)]

    def _files(self, meta: Mapping[str, Any], image: bytes) -> Iterator[tuple[str, bytes]]:
        yield f"{meta['key']}.{self.image_format}", image
        yield f"{meta['key']}.json", json.dumps(meta, sort_keys=True).encode()

    def finish(self, members: list[tuple[str, bytes]]) -> EncodedGroup:
        """The group from the members of all its samples, in order."""
        batch = self.batch
        return EncodedGroup(
            group=batch.group,
            attempt=batch.attempt,
            kept=len(batch.ids),
            per_sample=2 * len(self.metas),
            members=members,
            table=table_of(self.metas[0]),
            environment=self.environment,
            seconds={k: round(v, 6) for k, v in batch.seconds.items()},
            curves={name: [_mean(v) for v in curve] for name, curve in batch.curves.items()},
        )


def draft_group(
    batch: Batch, identity: Mapping[str, Any], environment: Mapping[str, Any], encoder: Encoder = PILLOW
) -> Draft:
    """What a group's files are made of; a row says where it was drawn, and which encoder it had where not Pillow's.

    batch: in host memory, but for images that are encoded on the device.
    """
    recipe, views = identity["recipe"], (None, *batch.previews)
    return Draft(
        batch=batch,
        pixels=[(batch if view is None else view).images.permute(0, 2, 3, 1).contiguous() for view in views],
        metas=[list(_metas(batch, view, identity)) for view in views],
        image_format=recipe["image_format"],
        quality=recipe["image_quality"],
        environment={**(batch.environment or environment), **({"encoder": encoder.name} if encoder.name else {})},
    )


def encode_group(
    batch: Batch, identity: Mapping[str, Any], environment: Mapping[str, Any], encoder: Encoder = PILLOW
) -> EncodedGroup:
    """All members of a group, and its figures."""
    draft = draft_group(batch if encoder.on_device else batch.cpu(), identity, environment, encoder)
    return draft.finish(draft.encode(range(len(batch.ids)), encoder))


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


def _metas(batch: Batch, preview: Preview | None, identity: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The json of each finished image, or of each sample's preview; that one says so, and of which sample."""
    recipe, shown = identity["recipe"], batch if preview is None else preview
    notes = {name: note.float().cpu().tolist() for name, note in shown.notes.items()}
    labels, targets = shown.labels.tolist(), shown.targets.cpu().tolist()
    last = {name: curve[-1] for name, curve in batch.curves.items()}
    for i, sample in enumerate(batch.keys):
        meta: dict[str, Any] = {
            "key": sample if preview is None else preview_key(sample, preview.share),
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
        yield meta
