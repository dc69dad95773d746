"""A request as an iterable of batches."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from synthkd.engine.batch import Batch
from synthkd.engine.environment import environment
from synthkd.engine.plan import Plan, WorkUnit
from synthkd.engine.watch import limited

if TYPE_CHECKING:
    from synthkd.engine.synthesizer import Synthesizer


@dataclass(frozen=True)
class Stream:
    """An iterable over the batches of a request. deadline: seconds that a group may take (see `engine.watch`)."""

    synthesizer: "Synthesizer"
    plan: Plan
    deadline: float | None = None

    def __iter__(self) -> Iterator[Batch]:
        """All units of the plan."""
        return self.draw(self.plan.units())

    def draw(self, units: Iterable[WorkUnit]) -> Iterator[Batch]:
        """One Batch per unit, in the given order."""
        if self.deadline is not None and self.synthesizer.routes.key and not self.synthesizer.routes.ready:
            self.synthesizer.prepare()  # what is built once is no part of a group's time
        for unit in units:
            with limited(self.deadline, f"group {unit.group}"):
                batch = self.synthesizer.run(unit, self.plan.request.seed)
            yield batch

    @property
    def identity(self) -> dict[str, Any]:
        """See `SampleStream.identity`."""
        return self.synthesizer.identity(self.plan.request.seed)

    @property
    def environment(self) -> dict[str, Any]:
        """See `SampleStream.environment`."""
        return environment(self.synthesizer.model.device, **self.synthesizer.how)
