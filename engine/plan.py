"""Request -> work units, by arithmetic alone: id -> class, group, shard. No torch, O(1) memory at any size."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from synthkd.engine import rng
from synthkd.engine.config import Recipe, Request


@dataclass(frozen=True)
class WorkUnit:
    """One group: the ids of all its members (padding included), their classes, and how many are kept."""

    group: int
    shard: int
    round: int
    ids: range
    classes: tuple[int, ...]
    kept: int


@dataclass(frozen=True)
class Plan:
    """The work of a request; a group's content depends on (recipe, seed, group) and on nothing else."""

    recipe: Recipe
    request: Request

    @property
    def num_groups(self) -> int:
        """Groups that hold at least one wanted sample."""
        return -(-self.request.num_samples // self.recipe.group_size)

    @property
    def num_shards(self) -> int:
        """Shards that hold at least one wanted sample."""
        return -(-self.num_groups // self.recipe.groups_per_shard)

    def unit(self, group: int) -> WorkUnit:
        """The work unit of one group; raises IndexError outside the plan."""
        if not 0 <= group < self.num_groups:
            raise IndexError(f"group {group} is outside 0..{self.num_groups - 1}")
        size = self.recipe.group_size
        ids = range(group * size, (group + 1) * size)
        kept = min(size, self.request.num_samples - ids.start)
        shard, round_ = group // self.recipe.groups_per_shard, self.recipe.round_of(group)
        return WorkUnit(group, shard, round_, ids, self._classes(group), kept)

    def shard_samples(self, shard: int) -> int:
        """How many samples of a shard are kept."""
        per_shard = self.recipe.groups_per_shard * self.recipe.group_size
        return max(0, min(per_shard, self.request.num_samples - shard * per_shard))

    def shard_units(self, shard: int) -> Iterator[WorkUnit]:
        """The units of one shard, in order."""
        per_shard = self.recipe.groups_per_shard
        for group in range(shard * per_shard, min((shard + 1) * per_shard, self.num_groups)):
            yield self.unit(group)

    def units(self, shards: Iterable[int] | None = None) -> Iterator[WorkUnit]:
        """All units, shard by shard, in the given order of shards."""
        for shard in range(self.num_shards) if shards is None else shards:
            yield from self.shard_units(shard)

    def _classes(self, group: int) -> tuple[int, ...]:
        """Class of each member: a window over an endless run of permuted class lists, interleaved.

        A class of weight w is w times in each list. Where classes_per_group does not divide the list, or a weight is
        above 1, a window may hold a class more than once.
        """
        per_group, drawn = self.recipe.classes_per_group, self.recipe.drawn_classes
        window = []
        for position in range(group * per_group, (group + 1) * per_group):
            epoch, offset = divmod(position, len(drawn))
            window.append(drawn[_class_order(self.request.seed, epoch, len(drawn))[offset]])
        return tuple(window) * self.recipe.samples_per_class

    @property
    def num_rounds(self) -> int:
        """Rounds that hold at least one wanted sample."""
        return self.recipe.round_of(self.num_groups - 1) + 1

    def round_shards(self, round_: int) -> range:
        """The shards of one round; rounds are whole shards."""
        recipe = self.recipe
        per_round = max(1, recipe.groups_per_round // recipe.groups_per_shard)
        end = self.num_shards if round_ == recipe.rounds - 1 else min((round_ + 1) * per_round, self.num_shards)
        return range(min(round_ * per_round, self.num_shards), end)


@lru_cache(maxsize=64)
def _class_order(seed: int, epoch: int, num_classes: int) -> tuple[int, ...]:
    return tuple(int(c) for c in rng.permutation(seed, epoch, "class order", num_classes))


def sample_key(sample_id: int) -> str:
    """The name of a sample in its shard: nine digits at least."""
    return f"{sample_id:09d}"


def preview_key(sample: str, share: float) -> str:
    """The name of a sample's preview at a share of the run: the sample's, and the percent."""
    return f"{sample}-p{round(100 * share):02d}"
