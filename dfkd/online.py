"""A set that is never written: drawn groups go into a bounded pool, and the student draws its batches from there.

Which images stay and which come up is decided by how far the student is from the teacher on them: prioritised replay
(arXiv 1511.05952, sec. 3.3), as SSD-KD uses it for synthetic images.
"""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.evaluate import predict
from synthkd.dfkd.feed import Batch, Unmoved
from synthkd.dfkd.parallel import Ranks
from synthkd.dfkd.sight import Sight, in_memory
from synthkd.dfkd.student import Hooks, Student, TrainOptions, fresh_student
from synthkd.dfkd.teachers import Teacher
from synthkd.dfkd.training import Training
from synthkd.dfkd.views import ViewSpec
from synthkd.engine import Request, Synthesizer, rng
from synthkd.engine.errors import SynthkdError

_FLOOR = 1e-3  # of a priority, in nats, so that no image is lost for good


@dataclass(frozen=True, kw_only=True)
class PoolSpec:
    """How the pool works.

    capacity: images held; exponent: alpha of arXiv 1511.05952, eq. 1: 0 draws all alike, 1 by their priority;
    fill: the share of the training by whose end all images are drawn.
    """

    capacity: int = 4096
    exponent: float = 0.6
    fill: float = 0.8

    def __post_init__(self) -> None:
        """Raise SynthkdError for a value outside its range."""
        if self.capacity < 2 or not 0 <= self.exponent <= 8 or not 0 < self.fill <= 1:
            found = f"capacity {self.capacity}, exponent {self.exponent}, fill {self.fill}"
            raise SynthkdError(f"pool: {found}; expected at least 2, 0 to 8, and above 0 to 1")


class ReplayPool:
    """Images on one device with a priority each; full, it gives up those of the least priority, the oldest first."""

    def __init__(self, spec: PoolSpec, seed: int) -> None:
        """seed: of the draws."""
        self.spec, self.seed, self.size, self._added = spec, seed, 0, 0
        self.images = self.labels = self.priority = self._age = torch.empty(0)

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Take in uint8 images [N,3,h,w] with labels [N], at the highest priority there is (arXiv 1511.05952, 3.3)."""
        if not self.size:
            self._begin(images)
        count = min(len(images), self.spec.capacity)
        images, labels = images[-count:], labels[-count:].to(images.device)
        highest = self.priority[: self.size].max() if self.size else torch.ones((), device=images.device)
        at = self._places(count)
        self.images[at], self.labels[at], self.priority[at] = images, labels, highest
        self._age[at] = torch.arange(self._added, self._added + count, device=images.device)
        self._added += count
        self.size = min(self.size + count, self.spec.capacity)

    def _places(self, count: int) -> Tensor:
        """Free places first, then those of the least priority; of equals the oldest."""
        free, device = min(count, self.spec.capacity - self.size), self.images.device
        at = torch.arange(self.size, self.size + free, device=device)
        if count == free:
            return at
        oldest = torch.argsort(self._age[: self.size])
        order = oldest[torch.argsort(self.priority[: self.size][oldest], stable=True)]
        return torch.cat([at, order[: count - free]])

    def _begin(self, images: Tensor) -> None:
        n, device = self.spec.capacity, images.device
        self.images = torch.empty((n, *images.shape[1:]), dtype=torch.uint8, device=device)
        self.labels, self._age = (torch.zeros(n, dtype=torch.long, device=device) for _ in range(2))
        self.priority = torch.zeros(n, device=device)

    def draw(self, count: int, step: int) -> Tensor:
        """Places int64 [count] of images, drawn with probability ~ priority ** exponent, with repetition (eq. 1)."""
        weight = self.priority[: self.size].double().clamp_min(_FLOOR) ** self.spec.exponent
        edges = torch.cumsum(weight, 0)
        u = torch.from_numpy(rng.uniform(self.seed, step, "replay", count)).to(edges.device)
        return torch.searchsorted(edges, u * edges[-1]).clamp_max(self.size - 1)

    def learned(self, at: Tensor, student_logits: Tensor, teacher_logits: Tensor) -> None:
        """The new priority of drawn images: KL(teacher || student) in nats."""
        t, s = F.log_softmax(teacher_logits.float(), 1), F.log_softmax(student_logits.float(), 1)
        self.priority[at] = (t.exp() * (t - s)).sum(1).clamp(0, 1e4)


class OnlineImages(Unmoved, IterableDataset[Batch]):
    """Batches of images as they are drawn: a Feed of the training loop, and an IterableDataset for any other loop.

    Groups of the request are drawn evenly over the first `fill` of the steps. The first ones, `held_out` of all, are
    for the agreement and never trained on. A batch's keys are empty: which images it has the device alone knows.
    """

    def __init__(
        self,
        synthesizer: Synthesizer,
        request: Request,
        spec: DistillSpec,
        size: tuple[int, int],
        pool: PoolSpec | None = None,
    ) -> None:
        """size: of the images handed out, (height, width). Raises SynthkdError for a request of a single group.

        And for views that need a second image or the file: crop and mix.
        """
        view = ViewSpec.of(spec)
        if view.crop < 1 or view.mix or spec.soft_labels == "stored":
            raise SynthkdError("online: crop, mix and stored soft labels need a set on disk; use synth and distill")
        self.stream = synthesizer.stream(request)
        groups = self.stream.plan.num_groups
        if groups < 2:
            raise SynthkdError(f"online: {request.num_samples} images are one group; draw two or more: one is held out")
        self.spec, self.size = spec, size
        self.held_groups = min(max(1, round(groups * spec.held_out)), groups - 1)
        self.pool, self.waited = ReplayPool(pool or PoolSpec(), spec.seed), 0.0
        self._sight = Sight(view, spec.seed, spec.views, spec.batch_size)
        self._drawn, self._at = self.held_groups, torch.empty(0)

    def held(self) -> Tensor:
        """The held-out images, uint8 [M,3,h,w] on the CPU; drawn when asked for."""
        return torch.cat([self._group(g)[0].cpu() for g in range(self.held_groups)])

    def __iter__(self) -> Iterator[Batch]:
        """The batches of a training, in order; raises SynthkdError in a DataLoader's worker: none teaches its pool."""
        if get_worker_info() is not None:
            raise SynthkdError("online: images are drawn where the student is; give the DataLoader num_workers=0")
        return self.batches(0, self.spec.steps)

    def batches(self, start: int, stop: int) -> Generator[Batch]:
        """See `Feed`; a training begins at step 0, since the pool is nowhere kept."""
        if start:
            raise SynthkdError("online: a training that was stopped cannot go on: its images are gone; begin again")
        for step in range(stop):
            self._fill(step)
            yield self._batch(step)

    def learned(self, batch: Batch, student_logits: Tensor, teacher_logits: Tensor) -> None:
        """See `Feed`: the batch's images have new priorities."""
        self.pool.learned(self._at, student_logits, teacher_logits)

    def _fill(self, step: int) -> None:
        """Draw groups until as many are there as the step is due."""
        began, groups = time.perf_counter(), self.stream.plan.num_groups
        share = min(1.0, (step + 1) / max(1.0, self.spec.steps * self.pool.spec.fill))
        due = self.held_groups + max(1, round((groups - self.held_groups) * share))
        while self._drawn < min(due, groups):
            self.pool.add(*self._group(self._drawn))
            self._drawn += 1
        self.waited += time.perf_counter() - began

    def _group(self, group: int) -> tuple[Tensor, Tensor]:
        """Images and labels of one group, at the size that is handed out."""
        (drawn,) = self.stream.draw([self.stream.plan.unit(group)])
        images = drawn.images
        if tuple(images.shape[2:]) != self.size:
            x = F.interpolate(images.float(), size=list(self.size), mode="bilinear", antialias=True)
            images = x.clamp(0, 255).round().to(torch.uint8)
        return images, drawn.labels

    def _batch(self, step: int) -> Batch:
        self._at = self.pool.draw(self.spec.batch_size, step)
        return in_memory(self._sight, step, self.pool.images[self._at], self.pool.labels[self._at])


def distill_online(
    synthesizer: Synthesizer,
    request: Request,
    teacher: Teacher,
    spec: DistillSpec,
    *,
    pool: PoolSpec | None = None,
    options: TrainOptions | None = None,
    hooks: Hooks | None = None,
) -> Student:
    """Train a student on images as they are drawn; nothing is written, and nothing of it can be continued.

    Deterministic on a CPU: groups, pool and batches are functions of (recipe, seed, spec). Raises what `distill` does.
    """
    device = str(teacher.get_buffer("mean").device)
    options, hooks = options or TrainOptions(device=device), hooks or Hooks()
    student = fresh_student(teacher, spec)
    feed = OnlineImages(synthesizer, request, spec, teacher.input_size, pool)
    held = feed.held()
    training = Training(
        student=student, teacher=teacher, feed=feed, held=held, wanted=predict(teacher, held).argmax(dim=1), spec=spec,
        options=options, ranks=Ranks(device=device), on_step=hooks.on_step, on_row=hooks.on_row,
        should_stop=hooks.should_stop,
    )  # fmt: skip
    agreement = training.run()
    return Student(student, training.log, agreement, {})
