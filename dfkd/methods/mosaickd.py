"""MosaicKD (arXiv 2110.15094): images that are locally like an out-of-domain pool's and globally like the teacher's.

A generator and a patch discriminator play while the student learns: every `student_steps` of its steps they take one
each (`dfkd/methods/players.py`). Half of each of its batches is made, half is of the pool.
"""

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthkd.dfkd.crops import viewed
from synthkd.dfkd.feed import Batch
from synthkd.dfkd.fields import ABOVE_ZERO, AMOUNT, YES_NO, Kind, is_number, is_whole, whole
from synthkd.dfkd.generators import PATCHES
from synthkd.dfkd.methods.base import MethodFeed, MethodJob
from synthkd.dfkd.methods.growing import DrawnSet, GrowingSet, frame, group_batch
from synthkd.dfkd.methods.players import GameSpec, Players
from synthkd.dfkd.pools import logits_word
from synthkd.dfkd.sight import Sight
from synthkd.dfkd.views import Views, ViewSpec
from synthkd.engine import rng
from synthkd.engine.batch import Batch as Group
from synthkd.engine.config import Request
from synthkd.engine.errors import SynthkdError
from synthkd.engine.plan import Plan, WorkUnit

_GROUP, _GROUPS = 128, 40  # images of a group that the last generator makes; groups of a set that grows


@dataclass(frozen=True, kw_only=True)
class MosaicSpec(GameSpec):
    """The players, and how the student is fed.

    student_steps: of the student to one of each player; select: pool images of the highest teacher entropy that are
    used, 0: all; keep: False makes new images for every batch, as published, and leaves a set of the last generator's;
    True shows the run's number of images at most, a set that grows evenly over the first `fill` of the steps.
    """

    student_steps: int = 5
    select: int = 0
    keep: bool = False
    fill: float = 1.0


def _list_of(count: int, fits: Any, expected: str) -> Kind:
    return Kind(lambda v: isinstance(v, (list, tuple)) and len(v) == count and all(map(fits, v)), expected)


_KINDS: Mapping[str, Kind] = {
    "patch": Kind(lambda v: is_whole(v) and v in PATCHES, " or ".join(map(str, PATCHES))),
    "noise": whole(1),
    "widths": _list_of(3, lambda v: is_whole(v, 1), "three whole numbers >= 1"),
    "patch_width": whole(1),
    **dict.fromkeys(("local", "align", "adv", "balance"), AMOUNT),
    "lr": ABOVE_ZERO,
    "betas": _list_of(2, lambda v: is_number(v) and 0 <= v < 1, "two numbers, 0 up to below 1"),
    "batch": Kind(lambda v: is_whole(v) and v != 1, "0, or a whole number >= 2"),
    "student_steps": whole(1),
    "select": whole(0),
    "keep": YES_NO,
    "fill": Kind(lambda v: is_number(v) and 0 < v <= 1, "0 < share <= 1"),
}


def mosaickd(job: MethodJob) -> MethodFeed:
    """Made images beside the pool's, by players that learn while the student does; raises SynthkdError without a pool.

    And as `check_mosaickd` does.
    """
    return MosaicFeed(job, check_mosaickd(job))


def check_mosaickd(job: MethodJob) -> MosaicSpec:
    """The method's settings; raises SynthkdError for a wrong one.

    And for a batch_size below 4 (halves of two), and for `mix`: a made image has no second one to be blended with.
    """
    spec = job.settings(MosaicSpec, _KINDS)
    if job.spec.batch_size < 4 or job.spec.mix:
        found = f"batch_size is {job.spec.batch_size} and mix {job.spec.mix}"
        raise SynthkdError(f"method {job.name}: {found}; expected at least 4, half of it of the pool, and mix 0")
    return spec


class MosaicFeed:
    """See the first lines of this file."""

    def __init__(self, job: MethodJob, spec: MosaicSpec) -> None:
        """Opens the pool; its last images, as the student's spec says how many, are held out."""
        self.job, self.spec, self.half = job, spec, job.spec.batch_size // 2
        images = job.opened_pool().selected(spec.select or None).source
        rest = job.spec.batch_size - self.half
        self._pool = job.set_feed(images, replace(job.spec, batch_size=rest, accumulate=1))
        self.held, self.waited = self._pool.held, 0.0
        self._settings = {**asdict(spec), "student": asdict(job.spec), "pool": images.digest}
        self.players = Players(
            spec, job.teacher, job.student, batch=spec.batch or self.half, how=job.how, seed=job.seed,
            rounds=-(-job.spec.steps // spec.student_steps),
        )  # fmt: skip
        # Views of their own: those of the pool's rows have the same counters.
        self._sight = Sight(ViewSpec.of(job.spec), int(rng.raw(job.seed, 0, "made", 1)[0] >> 1), 0, self.half)
        self._kept: GrowingSet | None = None
        if spec.keep:
            per_group = max(2, job.num_images // _GROUPS)
            self._kept = GrowingSet(job, self._settings, max(1, round(per_group / len(job.teacher.classes))))
        else:
            self._last_set().claim()  # another set there is said now, not after the training

    @property
    def reading(self) -> Mapping[str, str]:
        """Of the pool."""
        return self._pool.reading

    @property
    def made(self) -> int:
        """Images of the generator that the student has seen, or can see."""
        return self._kept.size if self._kept is not None else self.half * self.job.spec.steps

    @property
    def damaged(self) -> dict[str, str]:
        """Of the pool."""
        return self._pool.damaged

    def batches(self, start: int, stop: int) -> Generator[Batch]:
        """See `Feed`; after the training's last batch a set is left in the run's folder."""
        with closing(self._pool.batches(start, stop)) as pool:
            for step, real in enumerate(pool, start):
                if step % self.spec.student_steps == 0:
                    self.players.learn(real.images, step // self.spec.student_steps)
                self.waited = self._pool.waited
                yield self._joined(real, self._made(step))
        if stop == self.job.spec.steps and self._kept is None:
            self._last_set().written("synthesize")

    def _made(self, step: int) -> tuple[Tensor, Tensor]:
        """Images uint8 [half,3,h,w] and labels int64 [half] of a step, before their views."""
        if self._kept is None:
            images = self.players.images(self.players.noise("student", step, self.half))
            return images, self._labels(images)
        self._grow(self._kept, step)
        drawn = torch.from_numpy(rng.uniform(self.job.seed, step, "kept", self.half))
        u = drawn.to(self._kept.device, non_blocking=True)
        at = (u * self._kept.size).long().clamp_max(self._kept.size - 1)
        return self._kept.images[at], self._kept.labels[at]

    def _grow(self, kept: GrowingSet, step: int) -> None:
        """Have as many groups as are due."""
        count = kept.plan.num_groups
        due = max(1, round(count * min(1.0, (step + 1) / (self.spec.fill * self.job.spec.steps))))
        while kept.groups < due:
            kept.add(self._group(kept.plan.unit(kept.groups)))

    def _labels(self, images: Tensor) -> Tensor:
        """Classes that the teacher names, int64 [B]; zeros where no loss asks for labels: the teacher is dear."""
        if not self.job.spec.hard:
            return torch.zeros(len(images), dtype=torch.long, device=images.device)
        return self._named(images)

    @torch.no_grad()
    def _named(self, images: Tensor) -> Tensor:
        return logits_word(self.job.teacher(images.float() / 255))[0]

    def _joined(self, real: Batch, made: tuple[Tensor, Tensor]) -> Batch:
        """Images of the pool and made ones in turn, so that every part of a batch has both."""
        images, labels = made
        views = self._sight.of(np.arange(self.half), np.full(self.half, real.step))
        images = _cropped(images, views, self.job)
        turn = np.concatenate([np.arange(len(real)) / len(real), np.arange(self.half) / self.half])
        order = np.argsort(turn, kind="stable")
        index = torch.from_numpy(order).to(images.device, non_blocking=True)
        named = torch.cat([real.labels.to(images.device), labels])[index]
        return Batch(
            step=real.step,
            images=torch.cat([real.images, images])[index].contiguous(memory_format=torch.channels_last),
            labels=named,
            partner_labels=named,
            rows=np.concatenate([real.rows, np.full(self.half, -1)])[order],
            keys=(),
            views=Views.cat([real.views, views]).take(order),
        )

    def _last_set(self) -> DrawnSet:
        """A set of the run's number of images by the generator as it is."""
        classes = len(self.job.teacher.classes)
        recipe = frame(self.job, max(1, _GROUP // classes), groups_per_shard=8)
        plan = Plan(recipe, Request(num_samples=self.job.num_images, seed=self.job.seed))
        return DrawnSet(self.job, plan, self._settings, self._group)

    def _group(self, unit: WorkUnit) -> Group:
        """A group of a set; raises SynthkdError for images that are not finite."""
        drawn = [self.players.noise("set", i, 1) for i in unit.ids]
        images = self.players.images(torch.cat(drawn), kept=True)
        return group_batch(unit, images, self._named(images), len(self.job.teacher.classes))

    def learned(self, batch: Batch, student_logits: Tensor, teacher_logits: Tensor) -> None:
        """Nothing: the student is looked through when the generator learns."""

    def terms(self) -> dict[str, float]:
        """See `players.TERMS`."""
        return self.players.terms()

    def state(self) -> dict[str, Tensor]:
        """See `Feed`."""
        groups = self._kept.groups if self._kept else 0
        return {**self.players.state(), "groups": torch.tensor(groups)}

    def load(self, state: dict[str, Tensor]) -> None:
        """See `Feed`."""
        self.players.load(state)
        if self._kept is not None:
            self._kept.read(int(state["groups"]))

    def close(self) -> None:
        """Give the pool's reader back."""
        self._pool.close()


def _cropped(images: Tensor, views: Views, job: MethodJob) -> Tensor:
    """Made images uint8 [B,3,h,w] as a reader would have read them: cropped and mirrored."""
    if job.spec.crop == 1 and not job.spec.flip:
        return images
    pixels = images.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return viewed(pixels, views, job.teacher.input_size).permute(0, 3, 1, 2)
