"""A request as an iterable of batches."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from synthkd.engine.batch import Batch
from synthkd.engine.environment import environment
from synthkd.engine.plan import Plan, WorkUnit

if TYPE_CHECKING:
    from synthkd.engine.synthesizer import Synthesizer


@dataclass(frozen=True)
class Stream:
    """An iterable over the batches of a request."""

    synthesizer: "Synthesizer"
    plan: Plan

    def __iter__(self) -> Iterator[Batch]:
        """All units of the plan."""
        return self.draw(self.plan.units())

    def draw(self, units: Iterable[WorkUnit]) -> Iterator[Batch]:
        """One Batch per unit, in the given order."""
        for unit in units:
            yield self.synthesizer.run(unit, self.plan.request.seed)

    @property
    def identity(self) -> dict[str, Any]:
        """See `SampleStream.identity`."""
        return self.synthesizer.identity(self.plan.request.seed)

    @property
    def environment(self) -> dict[str, Any]:
        """See `SampleStream.environment`."""
        return environment(self.synthesizer.model.device, **self.synthesizer.how)
