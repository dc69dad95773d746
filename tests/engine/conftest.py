"""Shared by the engine's tests: teacher guidance, ready synthesizers, and what a set holds on disk."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synthkd.dfkd.methods.diffdfkd import TeacherGuidance
from synthkd.dfkd.teachers import load_teacher
from synthkd.engine import Synthesizer


@pytest.fixture
def guide(teacher_card: Path) -> Callable[..., TeacherGuidance]:
    """A guidance by the tiny teacher: `guide(alpha=1.0, beta=0.0)`, `double=True` for float64."""

    def make(alpha: float = 0.1, beta: float = 1.0, double: bool = False) -> TeacherGuidance:
        teacher = load_teacher(str(teacher_card))
        return TeacherGuidance(teacher.double() if double else teacher, alpha=alpha, beta=beta)

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
