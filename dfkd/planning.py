"""What a set of any size will take, by arithmetic: time, storage, files and money, before anything is drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from synthkd.dfkd.rates import Rates
from synthkd.engine.errors import SynthkdError
from synthkd.engine.plan import Plan

HOUR = 3600.0
TABLE_BYTES = 45.0  # of an image in index.parquet; see bench/results/table.jsonl
_SHARD = (64e6, 2e9)  # bytes: smaller ones are many files, larger ones are long to draw again
_ROUNDS_OF_WORK = 8  # shards a process, below which the last ones leave many idle


@dataclass(frozen=True)
class StageCost:
    """One stage: seconds an image in one process, hours of all processes together, share of the drawing, and cost."""

    stage: str
    seconds: float
    hours: float
    cost: float | None


@dataclass(frozen=True)
class Planned:
    """All figures of a plan; hours are of one process each, a GPU's or a CPU core's.

    wall_hours: until the last of `processes` ends, when shards are shared out evenly; advice: what to change, in words.
    """

    samples: int
    groups: int
    shards: int
    shards_per_process: int
    processes: int
    stages: tuple[StageCost, ...]
    wall_hours: float
    bytes: dict[str, float]
    files: int
    advice: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for --json."""
        stages = [vars(stage) for stage in self.stages]
        return {**vars(self), "stages": stages, "advice": list(self.advice)}


def plan_cost(
    plan: Plan, rates: Rates, processes: int, price: float | None = None, student_images: int = 0, views: int = 0
) -> Planned:
    """The cost of a plan on so many processes; O(1) in the number of images.

    price: of one process for an hour; student_images: that a student is shown in its training; views: stored labels of
    each image, 0 for the teacher in the loop. Raises SynthkdError for counts or prices below their range.
    """
    _check(processes, price, rates)
    group, count = plan.recipe.group_size, plan.request.num_samples
    drawn = plan.num_groups * group  # the last group is drawn whole
    stages = [_stage(name, s, drawn, price) for name, s in rates.seconds.items()]
    if views and rates.labels:
        stages.append(_stage("labels", views / rates.labels, count, price))
    if student_images and rates.student:
        stages.append(_stage("student", student_images / rates.student / count, count, price))
    most = -(-plan.num_shards // processes)
    per_group = group * sum(rates.seconds.values())
    longest = min(most * plan.recipe.groups_per_shard, plan.num_groups) * per_group / HOUR
    size = {kind: each * count for kind, each in rates.bytes.items()} | {"parquet": TABLE_BYTES * count}
    return Planned(
        count, plan.num_groups, plan.num_shards, most, processes, tuple(stages), longest, size,
        files=2 * plan.num_shards + 6, advice=tuple(_advice(plan, rates, processes)),
    )  # fmt: skip


def _check(processes: int, price: float | None, rates: Rates) -> None:
    if not 1 <= processes <= 10**7:
        raise SynthkdError(f"--gpus is {processes}; expected 1 to 10000000")
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise SynthkdError(f"--price is {price}; expected a number >= 0, the price of one GPU for an hour")
    if not rates.images_per_second:
        raise SynthkdError(f"rates of {rates.case!r} hold no seconds; pass --images-per-second")


def _stage(name: str, seconds: float, images: int, price: float | None) -> StageCost:
    hours = seconds * images / HOUR
    return StageCost(name, seconds, hours, None if price is None else hours * price)


def _advice(plan: Plan, rates: Rates, processes: int) -> Sequence[str]:
    """What of the plan's cut into shards will cost time or trouble."""
    out, recipe = [], plan.recipe
    group_bytes = recipe.group_size * rates.bytes.get("shards", 0.0)
    if plan.num_shards < processes:
        out.append(f"{plan.num_shards} shards for {processes} processes: {processes - plan.num_shards} of them idle")
    if plan.num_shards < _ROUNDS_OF_WORK * processes and recipe.groups_per_shard > 1:
        fewer = max(1, plan.num_groups // (_ROUNDS_OF_WORK * processes))
        out.append(f"groups_per_shard {min(fewer, recipe.groups_per_shard)} would share the work out more evenly")
    elif group_bytes and group_bytes * recipe.groups_per_shard < _SHARD[0] and plan.num_shards > 10_000:
        best = min(math.ceil(_SHARD[0] / group_bytes), max(1, plan.num_groups // (_ROUNDS_OF_WORK * processes)))
        if best > recipe.groups_per_shard:
            out.append(
                f"groups_per_shard {best} would make {-(-plan.num_groups // best):,} shards instead of "
                f"{plan.num_shards:,} (it is part of the recipe: decide before the first image)"
            )
    if group_bytes * recipe.groups_per_shard > _SHARD[1]:
        size = group_bytes * recipe.groups_per_shard / 1e9
        out.append(f"shards of {size:.1f} GB are long to draw again; lower groups_per_shard")
    return out
