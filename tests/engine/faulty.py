"""What workers of the tests draw: groups of one colour each, some of which go wrong a number of times."""

import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from synthkd.engine import Batch, NonFiniteError, Recipe, WorkUnit
from synthkd.engine.memory import MemoryPlan


@dataclass(frozen=True)
class Faulty:
    """A picklable factory. faults: group -> (what, how often): kill, hang, stop in a send, term, nan, shrink."""

    recipe: Recipe
    folder: str
    faults: dict[int, tuple[str, int]]

    def __call__(self) -> "Drawer":
        """In a worker, or in the parent."""
        return Drawer(self)


def _stopping(pipe: Any, data: bytes) -> None:
    """Half a message, and then nothing more."""
    os.write(pipe.fileno(), data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGSTOP)


class Drawer:
    """As much of a Synthesizer as a pool and a writer need."""

    def __init__(self, made_of: Faulty) -> None:
        self.made_of, self.processes = made_of, 1
        size = made_of.recipe.group_size
        self.memory = MemoryPlan(size, size, size, size, False, 0, 0)
        self.model, self.routes = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(key="")

    @property
    def how(self) -> dict[str, Any]:
        """For the environment."""
        return {"micro_batch": self.memory.key}

    def identity(self, seed: int) -> dict[str, Any]:
        """A manifest's content."""
        recipe = self.made_of.recipe.to_dict()
        return {"fingerprint": "f", "recipe": recipe, "seed": seed, "guidance": {}, "model_sha256": "m"}

    def run(self, unit: WorkUnit, seed: int) -> Batch:
        """A group, unless it has faults left."""
        what, times = self.made_of.faults.get(unit.group, ("", 0))
        for i in range(times):
            try:
                (Path(self.made_of.folder) / f"{what}-{unit.group}-{i}").touch(exist_ok=False)
            except FileExistsError:
                continue
            self._fail(what, unit.group)
            break
        return self._batch(unit)

    def _fail(self, what: str, group: int) -> None:
        if what in ("kill", "term"):
            os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGTERM)
        if what == "hang":
            time.sleep(600)
        if what == "stop":
            Connection._send = _stopping  # type: ignore[attr-defined]
        if what == "nan":
            raise NonFiniteError(f"group {group} was not finite")
        if what == "shrink":
            self.memory = MemoryPlan(self.memory.group, 3, 3, 3, False, 0, 0)

    def _batch(self, unit: WorkUnit) -> Batch:
        count = unit.kept
        labels = torch.tensor(unit.classes[:count])
        return Batch(
            group=unit.group, round=0, attempt=0, ids=tuple(unit.ids)[:count], prompts=("a",) * count,
            images=torch.full((count, 3, 8, 8), 10 * unit.group, dtype=torch.uint8), labels=labels,
            targets=torch.nn.functional.one_hot(labels, 3).float(),
            environment={"micro_batch": self.memory.key},
        )  # fmt: skip
