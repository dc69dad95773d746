"""What a set of any size will take, by arithmetic: time, storage, files and money, before anything is drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from synthkd.dfkd.rates import Rates
from synthkd.engine.errors import SynthkdError
from synthkd.engine.plan import Plan

HOUR = 3600.0
TABLE_BYTES = 35.0  # of an image in index.parquet; see bench/results/table.jsonl
_LABEL_BYTES = 2, 45  # of one view of an image in soft_labels: a class, the rest; see docs/distill.md
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

    wall_hours: until the last of `processes` ends, when the shards of each round are shared out evenly and a round's
    student is trained by one of them before it; advice: what to change and what is not counted, in words.
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
    plan: Plan, rates: Rates, processes: int, price: float | None = None, student_images: int = 0, views: int = 0,
    round_images: int = 0,
) -> Planned:  # fmt: skip
    """The cost of a plan on so many processes; O(1) in the number of images.

    price: of one process for an hour; student_images: that a student is shown in its training; views: stored labels of
    each image, 0 for the teacher in the loop; round_images: that a round's student is shown before the round. Raises
    SynthkdError for counts or prices below their range.
    """
    _check(processes, price, rates)
    count, trained = plan.request.num_samples, round_images * (plan.num_rounds - 1)
    drawn = plan.num_groups * plan.recipe.group_size  # the last group is drawn whole
    stages = [_stage(name, s, drawn, price) for name, s in rates.seconds.items()]
    for name, images, rate in (
        ("round students", trained, rates.student), ("labels", views * count, rates.labels),
        ("student", student_images, rates.student),
    ):  # fmt: skip
        stages += [_stage(name, images / rate / count, count, price)] if images and rate else []
    most, longest = _longest(plan, processes)
    wall = longest * plan.recipe.group_size * sum(rates.seconds.values())
    wall += trained / rates.student if rates.student else 0.0
    size = {kind: each * count for kind, each in rates.bytes.items()} | {"parquet": TABLE_BYTES * count}
    if views:
        size["labels"] = float(count * views * (_LABEL_BYTES[0] * len(plan.recipe.classes) + _LABEL_BYTES[1]))
    told = [*_advice(plan, rates, processes), *_left_out(plan, rates, round_images, student_images, views)]
    return Planned(
        count, plan.num_groups, plan.num_shards, most, processes, tuple(stages), wall / HOUR, size,
        files=2 * plan.num_shards + 6, advice=tuple(told),
    )  # fmt: skip


def _longest(plan: Plan, processes: int) -> tuple[int, int]:
    """Shards and groups of the busiest process: a round begins when all shards of the one before are there.

    All rounds but the last have as many shards, so that none is listed.
    """
    last, each = plan.round_shards(plan.num_rounds - 1), len(plan.round_shards(0))
    full, size = -(-each // processes), plan.recipe.groups_per_shard
    most = -(-len(last) // processes)
    groups = min(most * size, plan.num_groups - last.start * size)
    before = plan.num_rounds - 1
    return before * full + most, before * full * size + groups


def _left_out(plan: Plan, rates: Rates, round_images: int, student_images: int, views: int) -> list[str]:
    """What was asked for and cannot be reckoned."""
    out = []
    if plan.num_rounds > 1 and not (round_images and rates.student):
        out.append(f"not counted: the training of {plan.num_rounds - 1:,} students between rounds (no rate of it)")
    if views and not rates.labels:
        out.append("not counted: the time of the stored labels (no rate of it)")
    if student_images and not rates.student:
        out.append("not counted: the student's training (no rate of it)")
    return out


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
    if processes > 1 and plan.num_shards < _ROUNDS_OF_WORK * processes and recipe.groups_per_shard > 1:
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
