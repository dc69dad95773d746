"""Steps -> what to read, and what was read -> batches: rows, views and labels kept together."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from synthkd.dfkd.dense import DensePixels, turned_labels
from synthkd.dfkd.feed import Batch, Order, Pixels, Request, Rows, Source
from synthkd.dfkd.readers import stand_ins
from synthkd.dfkd.views import Views, ViewSpec, draw_views, per_epoch, view_of_epoch


class Labels(Protocol):
    """Logits that are stored."""

    def of(self, rows: Rows, epochs: Rows) -> Tensor:
        """Logits [B,K] of rows in the view of their epoch."""
        ...


@dataclass(frozen=True)
class Sight:
    """Which view of a sample an epoch sees: `views` of them in turn (0: new ones), from `seed`, for `count` rows."""

    spec: ViewSpec
    seed: int
    views: int
    count: int

    def of(self, rows: Rows, epochs: Rows) -> Views:
        """Views of some rows in the epochs they are seen in."""
        parts, places = [], []
        for epoch, here in per_epoch(epochs):
            view = view_of_epoch(epoch, self.views)
            parts.append(draw_views(self.spec, self.seed, view, rows[here], self.count))
            places.append(np.flatnonzero(here))
        return Views.cat(parts).take(np.argsort(np.concatenate(places), kind="stable"))


def in_memory(sight: Sight, step: int, images: Tensor, labels: Tensor) -> Batch:
    """A step's Batch of images that are on a device already, uint8 [B,3,h,w], each step in views of its own.

    sight: of B rows, without crop and blending; keys are empty: which images these are the device alone knows.
    """
    images, rows = images.contiguous(memory_format=torch.channels_last), np.arange(len(images))
    views = sight.of(rows, np.full(len(rows), step))
    flip = torch.from_numpy(views.flip).to(images.device, non_blocking=True).view(-1, 1, 1, 1)
    return Batch(step, torch.where(flip, images.flip(3), images), labels, labels, rows, (), views)


@dataclass(frozen=True)
class Asked:
    """A request of the loader: `size` images of a step, then the partners of the blended ones among them."""

    step: int
    request: Request
    epochs: Rows
    size: int


def ask(order: Order, sight: Sight, step: int) -> Asked:
    """What to read for a step."""
    rows, epochs = order.at(step)
    return request_for(rows, epochs, sight, step)


def request_for(rows: Rows, epochs: Rows, sight: Sight, step: int) -> Asked:
    """What to read for some rows; a partner has its own crop and flip of the same epoch."""
    views = sight.of(rows, epochs)
    mixed = views.blended
    if not mixed.any():
        return Asked(step, Request(rows, views), epochs, len(rows))
    partners = views.partner[mixed]
    theirs = sight.of(partners, epochs[mixed])
    request = Request(np.concatenate([rows, partners]), Views.cat([views, theirs]))
    return Asked(step, request, np.concatenate([epochs, epochs[mixed]]), len(rows))


def batch_of(source: Source, asked: Asked, pixels: Pixels, stored: Labels | None = None) -> Batch:
    """What was read as a Batch; raises SynthkdError where no image of it is whole.

    In the place of a damaged image, or of one whose partner is damaged, stands the next whole one of the batch with its
    own partner, label and view.
    """
    b, used = asked.size, pixels.used
    mixed = asked.request.views.take(slice(0, b)).blended
    partner_at = np.arange(b)  # where in the request each image's partner was read
    partner_at[mixed] = b + np.arange(int(mixed.sum()))
    whole = used[:b] == np.arange(b)
    whole[mixed] &= used[b:] == b + np.arange(int(mixed.sum()))
    source_at = stand_ins(whole)
    rows, views = asked.request.rows[source_at], asked.request.views.take(source_at)
    main, epochs = torch.from_numpy(source_at), asked.epochs[source_at]
    images = pixels.images[:b] if whole.all() else pixels.images[main.to(pixels.images.device)]
    partners = None
    if mixed.any():
        partners = pixels.images[torch.from_numpy(partner_at[source_at]).to(pixels.images.device)]
    return Batch(
        step=asked.step,
        images=images,
        labels=torch.from_numpy(source.labels[rows]),
        rows=rows,
        partner_labels=torch.from_numpy(source.labels[views.partner]),
        keys=source.keys(rows),
        views=views,
        partners=partners,
        logits=stored.of(rows, epochs) if stored else None,
        masks=turned_labels(pixels.masks[main], views) if isinstance(pixels, DensePixels) else None,
    )
