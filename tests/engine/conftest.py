"""Shared by the engine's tests: teacher guidance, ready synthesizers, and what a set holds on disk."""

import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synthkd.dfkd.methods.diffdfkd import TeacherGuidance
from synthkd.dfkd.teachers import load_teacher
from synthkd.engine import Batch, Plan, Recipe, Request, Synthesizer, WorkUnit


@pytest.fixture
def guide(teacher_card: Path) -> Callable[..., TeacherGuidance]:
    """A guidance by the tiny teacher: `guide(alpha=1.0, beta=0.0)`, `double=True` for float64."""

    def make(alpha: float = 0.1, beta: float = 1.0, double: bool = False, **more: Any) -> TeacherGuidance:
        teacher = load_teacher(str(teacher_card))
        return TeacherGuidance(teacher.double() if double else teacher, alpha=alpha, beta=beta, **more)

    return make


@pytest.fixture
def synthesizer(
    pipeline: Any, recipe: Callable[..., Any], guide: Callable[..., TeacherGuidance]
) -> Callable[..., Synthesizer]:
    """A Synthesizer over the tiny pipeline, recipe fields overridable, guided where the recipe asks for it."""

    def make(**changes: Any) -> Synthesizer:
        wanted = recipe(**changes)
        return Synthesizer.from_pipeline(pipeline, wanted, guidance=guide() if wanted.guidance.scale > 0 else None)

    return make


@pytest.fixture
def stored() -> Callable[[Path], dict[str, bytes]]:
    """Every member of every shard of a folder, name -> bytes; no name twice."""

    def read(folder: Path) -> dict[str, bytes]:
        out: dict[str, bytes] = {}
        for path in sorted(folder.glob("shard-*.tar")):
            with tarfile.open(path) as tar:
                for info in tar:
                    assert info.name not in out
                    f = tar.extractfile(info)
                    assert f is not None
                    out[info.name] = f.read()
        return out

    return read


class Canned:
    """A stream whose groups are drawn once per test run and handed out again: a set costs its writing alone."""

    def __init__(self, synth: Synthesizer, request: Request, drawn: dict[tuple[Recipe, int], Batch]) -> None:
        self.plan, self.identity = Plan(synth.recipe, request), synth.identity(request.seed)
        self.environment = synth.stream(request).environment
        self._synth, self._drawn = synth, drawn

    def draw(self, units: Iterable[WorkUnit]) -> Iterator[Batch]:
        """The batch of each unit."""
        for unit in units:
            key = (self.plan.recipe, unit.group)
            if key not in self._drawn:
                self._drawn[key] = self._synth.run(replace(unit, kept=len(unit.ids)), self.plan.request.seed)
            yield self._drawn[key].first(unit.kept)


@pytest.fixture(scope="session")
def drawn() -> dict[tuple[Recipe, int], Batch]:
    """Groups by recipe and number."""
    return {}


@pytest.fixture
def canned(synthesizer: Callable[..., Synthesizer], drawn: dict[tuple[Recipe, int], Batch]) -> Callable[..., Canned]:
    """`canned(num_samples, **recipe_changes)`: a stream of seed 0 that repeats groups drawn once."""

    def make(num_samples: int, **changes: Any) -> Canned:
        return Canned(synthesizer(**{"steps": 2, **changes}), Request(num_samples=num_samples), drawn)

    return make
