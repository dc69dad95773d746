"""Steps -> what to read, and what was read -> batches: rows, views and labels kept together."""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from synthkd.dfkd.dense import DensePixels, turned_labels
from synthkd.dfkd.feed import Batch, Order, Pixels, Request, Rows, Source
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
    """What was read as a Batch; where a substitute stands for a damaged image, its row, label and view are its own."""
    b, used = asked.size, pixels.used
    rows, views = asked.request.rows[used], asked.request.views.take(used)
    broken = used != np.arange(len(used))
    main, mixed = views.take(slice(0, b)), asked.request.views.take(slice(0, b)).blended
    alone = broken[:b].copy()
    alone[np.flatnonzero(mixed)] |= broken[b:]
    main = replace(main, share=np.where(alone | ~mixed, np.float32(1), main.share))
    partners = None
    if mixed.any():
        partners = pixels.images[:b].clone()
        partners[torch.from_numpy(np.flatnonzero(mixed)).to(partners.device)] = pixels.images[b:]
    return Batch(
        step=asked.step,
        images=pixels.images[:b],
        labels=torch.from_numpy(source.labels[rows[:b]]),
        rows=rows[:b],
        partner_labels=torch.from_numpy(source.labels[main.partner]),
        keys=source.keys(rows[:b]),
        views=main,
        partners=partners,
        logits=stored.of(rows[:b], asked.epochs[used[:b]]) if stored else None,
        masks=turned_labels(pixels.masks[:b], main) if isinstance(pixels, DensePixels) else None,
    )
