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
        return WorkUnit(group, group // self.recipe.groups_per_shard, ids, self._classes(group), kept)

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

        Where classes_per_group does not divide the classes, a window over the seam of two lists may hold a class twice.
        """
        per_group, num_classes = self.recipe.classes_per_group, len(self.recipe.classes)
        window = []
        for position in range(group * per_group, (group + 1) * per_group):
            epoch, offset = divmod(position, num_classes)
            window.append(_class_order(self.request.seed, epoch, num_classes)[offset])
        return tuple(window) * self.recipe.samples_per_class


@lru_cache(maxsize=64)
def _class_order(seed: int, epoch: int, num_classes: int) -> tuple[int, ...]:
    return tuple(int(c) for c in rng.permutation(seed, epoch, "class order", num_classes))


def sample_key(sample_id: int) -> str:
    """The name of a sample in its shard: nine digits at least."""
    return f"{sample_id:09d}"
