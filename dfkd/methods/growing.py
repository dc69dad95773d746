"""Sets that are no diffusion model's: the same shards, journal, index and verification as any other set."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthkd.dfkd.apart import TEACHER, card_declares, pool_declares
from synthkd.dfkd.methods.base import MethodJob
from synthkd.dfkd.sets import SetSource, open_set
from synthkd.dfkd.teachers import teacher_digest
from synthkd.dfkd.training import Stopped
from synthkd.engine.batch import Batch
from synthkd.engine.config import GuidanceSpec, Recipe, Request, fingerprint
from synthkd.engine.declared import in_words
from synthkd.engine.environment import environment, versions
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import claim_folder
from synthkd.engine.locks import folder_lock
from synthkd.engine.plan import Plan, WorkUnit
from synthkd.engine.reading import read_shard
from synthkd.engine.rows import read_index
from synthkd.engine.shards import write_shards

_CLASSES = 100  # of one group, so that a group of a thousand classes is drawn in parts


def frame(job: MethodJob, samples_per_class: int, groups_per_shard: int = 1) -> Recipe:
    """The recipe of a set that no diffusion model draws: classes, image size and how ids fall into groups."""
    height, width = job.teacher.input_size
    return Recipe(
        classes=job.teacher.classes, prompts=("{class}",), height=height, width=width,
        guidance=GuidanceSpec(scale=0.0), guidance_scale=1.0, classes_per_group=min(len(job.teacher.classes), _CLASSES),
        samples_per_class=samples_per_class, groups_per_shard=groups_per_shard,
    )  # fmt: skip


@dataclass(frozen=True)
class DrawnSet:
    """A SampleStream of a method: `draw_group` makes one group, a function of (settings, seed, unit) alone.

    settings: plain values that decide the images, beside recipe, seed and teacher.
    """

    job: MethodJob
    plan: Plan
    settings: Mapping[str, Any]
    draw_group: Callable[[WorkUnit], Batch]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """See `SampleStream.identity`."""
        declared = {"kind": self.job.name, **self.settings, "teacher_sha256": teacher_digest(self.job.teacher)}
        declared = json.loads(json.dumps(declared))
        return {
            "fingerprint": fingerprint(self.plan.recipe, self.job.seed, declared),
            "recipe": self.plan.recipe.to_dict(),
            "seed": self.job.seed,
            "guidance": declared,
            "model_sha256": "",
            "versions": versions(),
        }

    @property
    def environment(self) -> dict[str, Any]:
        """See `SampleStream.environment`."""
        return environment(self.job.teacher.get_buffer("mean").device, self.plan.recipe.group_size)

    def claim(self) -> None:
        """Make the folder this set's; raises SynthkdError where it holds another one."""
        folder = self.job.shards
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder):
            claim_folder(folder, self.identity, self.plan.request.num_samples, {"declared": self._declared()})

    def _declared(self) -> dict[str, str]:
        """What took part declares, in words: the teacher, the prior where one draws, the pool where one was opened."""
        synth, pool = self.job.preset.job, self.job.notes.get("pool")
        told = synth.trained_on() if "prior" in self.settings else {TEACHER: in_words(card_declares(synth.teacher))}
        return told | ({"pool": in_words(pool_declares(pool))} if pool is not None else {})

    def draw(self, units: Iterable[WorkUnit]) -> Iterator[Batch]:
        """One Batch per unit, in the given order."""
        for unit in units:
            yield self.draw_group(unit)

    def written(self, stage: str = "synthesize") -> SetSource:
        """The whole set on disk, of which only what is missing is drawn; raises Stopped where that is asked for."""
        told = self.job.progress
        told.begin(stage, self.plan.request.num_samples, "images")
        try:
            summary = write_shards(
                self, self.job.shards, should_stop=self.job.should_stop,
                on_batch=lambda n: told.advance(stage, n), on_present=lambda n: told.advance(stage, n),
            )  # fmt: skip
        finally:
            told.end(stage)
        if summary.stopped:
            raise Stopped
        return open_set(self.job.shards, self.plan.request.num_samples)


def group_batch(
    unit: WorkUnit,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    notes: Mapping[str, Tensor] | None = None,
    curves: Mapping[str, list[Any]] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Batch:
    """A unit's kept samples as a Batch: images uint8 [B,3,H,W] of all its ids, labels int64 [B]."""
    batch = Batch(
        group=unit.group, round=unit.round, attempt=0, ids=tuple(unit.ids), prompts=("",) * len(unit.ids),
        images=images, labels=labels, targets=torch.nn.functional.one_hot(labels, num_classes).float(),
        notes=dict(notes or {}), curves=dict(curves or {}), seconds=dict(seconds or {}),
    )  # fmt: skip
    return batch.first(unit.kept)


def growing_plan(job: MethodJob, samples_per_class: int) -> Plan:
    """Groups of a `GrowingSet`, one a shard."""
    return Plan(frame(job, samples_per_class), Request(num_samples=job.num_images, seed=job.seed))


class GrowingSet:
    """A set that grows group by group while the student learns: on disk, and all of it on the student's device.

    What is on disk is never made twice: a run that goes on from a checkpoint finds the groups that were made after it.
    Such a set cannot grow beyond its run: what it holds hangs on how many images were asked for.
    """

    def __init__(self, job: MethodJob, settings: Mapping[str, Any], samples_per_class: int) -> None:
        """settings: as for `DrawnSet`; a group has samples_per_class images of each class, one group a shard.

        Raises SynthkdError where the folder holds another set.
        """
        plan = growing_plan(job, samples_per_class)
        self._stream = DrawnSet(job, plan, {**settings, "num_images": job.num_images}, self._given)
        self._stream.claim()
        self._next: Batch | None = None
        self.plan, self.device = plan, job.teacher.get_buffer("mean").device
        size, count = (plan.recipe.height, plan.recipe.width), plan.request.num_samples
        self.images = torch.empty(count, 3, *size, dtype=torch.uint8, device=self.device)
        self.labels = torch.zeros(count, dtype=torch.long, device=self.device)
        self.groups = self.size = 0  # that are in memory

    @property
    def fingerprint(self) -> str:
        """Of what decides the images: recipe, seed, settings, teacher."""
        return str(self._stream.identity["fingerprint"])

    @property
    def full(self) -> bool:
        """Whether all groups are there."""
        return self.groups == self.plan.num_groups

    def on_disk(self) -> int:
        """Groups that are safe, from the first on; a shard of another size than its row's is not."""
        folder = self._stream.job.shards
        rows = read_index(folder).items() if folder.exists() else ()
        done = {n for n, row in rows if (folder / row.file).stat().st_size == row.bytes}  # one group a shard
        return next(i for i in range(self.plan.num_groups + 1) if i not in done)

    def add(self, batch: Batch) -> None:
        """Take the next group in; what is on disk already is read from there."""
        assert batch.group == self.groups
        if self.on_disk() <= batch.group:
            self._next = batch
            write_shards(self._stream, self._stream.job.shards, shards=[batch.group])
        self.read(batch.group + 1)

    def read(self, groups: int) -> None:
        """Have exactly the first `groups` groups in memory, from disk; raises SynthkdError where one is not there."""
        folder = self._stream.job.shards
        if (there := self.on_disk()) < groups:
            raise SynthkdError(
                f"{folder}: group {there} is missing, and the checkpoint beside it was written after it; delete the "
                "run's folder and begin again"
            )
        wanted = sum(self.plan.unit(g).kept for g in range(groups))
        for group in range(self.groups, groups):
            samples = list(read_shard(folder, group))
            if len(samples) != (count := self.plan.unit(group).kept):
                raise SynthkdError(f"{folder}: group {group} has {len(samples)} images; expected {count}")
            here = slice(self.size, self.size + len(samples))
            pixels = torch.from_numpy(np.stack([s.pixels for s in samples])).permute(0, 3, 1, 2)
            self.images[here] = pixels.to(self.device)
            self.labels[here] = torch.tensor([int(s.meta["label"]) for s in samples], device=self.device)
            self.size += len(samples)
        self.groups, self.size = groups, wanted

    def _given(self, unit: WorkUnit) -> Batch:
        assert self._next is not None
        return self._next
