"""A set that is never written: drawn groups go into a bounded pool, and the student draws its batches from there.

Which images stay and which come up is decided by how far the student is from the teacher on them: prioritised replay
(arXiv 1511.05952, sec. 3.3), as SSD-KD uses it for synthetic images.
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import IterableDataset

from synthkd.dfkd.feed import Batch
from synthkd.dfkd.sight import Sight
from synthkd.engine import Request, Synthesizer, rng
from synthkd.engine.batch import Batch as Drawn
from synthkd.engine.errors import SynthkdError
from synthkd.engine.synthesizer import fitted_images

_FLOOR = 1e-3  # of a priority, in nats, so that no image is lost for good


@dataclass(frozen=True, kw_only=True)
class PoolSpec:
    """capacity: images held; reuse: how often an image is seen on average; exponent: 0 draws them alike, 1 by priority.

    The exponent is alpha of arXiv 1511.05952, eq. 1.
    """

    capacity: int = 4096
    reuse: int = 16
    exponent: float = 0.6

    def __post_init__(self) -> None:
        """Raise SynthkdError for a value outside its range."""
        if self.capacity < 2 or self.reuse < 1 or not 0 <= self.exponent <= 8:
            raise SynthkdError(
                f"pool: capacity {self.capacity}, reuse {self.reuse}, exponent {self.exponent}; expected at least 2, at "
                "least 1, and 0 to 8"
            )


class ReplayPool:
    """Images on one device with a priority each; full, it gives up those of the least priority, the oldest first."""

    def __init__(self, spec: PoolSpec, seed: int) -> None:
        """seed: of the draws."""
        self.spec, self.seed = spec, seed
        self.images: Tensor | None = None
        self.labels = self.priority = self.rows = torch.empty(0)
        self.size = 0

    def add(self, images: Tensor, labels: Tensor, rows: Tensor) -> None:
        """Take in uint8 images [N,3,h,w] with labels and sample ids [N], at the highest priority there is (sec. 3.3)."""
        if self.images is None:
            self._begin(images)
        count = min(len(images), self.spec.capacity)
        images, labels, rows = images[-count:], labels[-count:], rows[-count:]
        highest = self.priority[: self.size].max() if self.size else torch.ones((), device=images.device)
        free = self.spec.capacity - self.size
        at = torch.arange(self.size, self.size + min(count, free), device=images.device)
        if count > free:  # a stable sort by priority; within equals the lower row is the older image
            order = torch.argsort(self.rows[: self.size], stable=True)
            order = order[torch.argsort(self.priority[: self.size][order], stable=True)]
            at = torch.cat([at, order[: count - free]])
        assert self.images is not None
        self.images[at], self.labels[at], self.rows[at] = images, labels, rows
        self.priority[at] = highest
        self.size = min(self.size + count, self.spec.capacity)

    def _begin(self, images: Tensor) -> None:
        n, device = self.spec.capacity, images.device
        self.images = torch.empty((n, *images.shape[1:]), dtype=torch.uint8, device=device)
        self.labels, self.rows = (torch.zeros(n, dtype=torch.long, device=device) for _ in range(2))
        self.priority = torch.zeros(n, device=device)

    def draw(self, count: int, step: int) -> Tensor:
        """Places int64 [count] of images, each with probability ~ priority ** exponent; with repetition."""
        weight = self.priority[: self.size].clamp_min(_FLOOR) ** self.spec.exponent
        u = torch.from_numpy(rng.uniform(self.seed, step, "replay", count)).to(weight.device, torch.float32)
        edges = torch.cumsum(weight.double(), 0)
        return torch.searchsorted(edges, u.double() * edges[-1]).clamp_max(self.size - 1)

    def learned(self, at: Tensor, student_logits: Tensor, teacher_logits: Tensor) -> None:
        """The new priority of drawn images: KL(teacher || student) in nats."""
        t, s = F.log_softmax(teacher_logits.float(), 1), F.log_softmax(student_logits.float(), 1)
        self.priority[at] = (t.exp() * (t - s)).sum(1).clamp(0, 1e4)


class OnlineImages(IterableDataset[Batch]):
    """Batches of images as they are drawn; a Feed of the training loop, and an IterableDataset for any other.

    Every group the Synthesizer draws enters the pool, then `reuse` x group / batch_size batches are drawn from it.
    The first groups, `held_out` of the images, are for the agreement and are never trained on: `held()` draws them.
    """

    def __init__(
        self,
        synthesizer: Synthesizer,
        request: Request,
        *,
        size: tuple[int, int],
        batch_size: int,
        sight: Sight,
        held_out: float = 0.1,
        pool: PoolSpec | None = None,
    ) -> None:
        """size: of the images handed out; sight: their views, whose crops and partners are refused here."""
        if sight.spec.crop < 1 or sight.spec.mix:
            raise SynthkdError("distill: crop and mix need a set on disk; set crop to 1 and mix to 0 for online training")
        self.plan = synthesizer.stream(request).plan
        self.synthesizer, self.size, self.batch_size, self.sight = synthesizer, size, batch_size, sight
        units = list(self.plan.units()) if self.plan.num_groups < 2 else None
        if units is not None:
            raise SynthkdError(f"online: {request.num_samples} images are one group; draw at least two groups")
        self._held_groups = min(max(1, round(self.plan.num_groups * held_out)), self.plan.num_groups - 1)
        self.pool = ReplayPool(pool or PoolSpec(), sight.seed)
        self.waited = 0.0
        self._at = torch.empty(0)
