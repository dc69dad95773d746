"""Seconds of a job's stages over all calls of it, in a file of its folder."""

import hashlib
import json
import resource
import time
from pathlib import Path

from synthkd.dfkd.training import Stopped
from synthkd.engine.rows import write_atomically

SPENT = "spent.json"


class Spent:
    """Seconds of each stage, by the clock and of the processor, over all calls of a run; a killed one's are lost.

    Those of another run in the same folder are forgotten.
    """

    def __init__(self, path: Path, run: str, *before: str) -> None:
        """run: what the job is, in words or as JSON; its digest stands in the file; before: how it was told earlier."""
        self._path, self._runs = path, [hashlib.sha256(r.encode()).hexdigest() for r in (run, *before)]
        self._name, self._began = "", (0.0, 0.0)
        self.seconds, self.cpu = self._known("seconds"), self._known("cpu")

    def _known(self, what: str) -> dict[str, float]:
        try:
            found = json.loads(self._path.read_text())
            return {str(n): float(v) for n, v in found[what].items()} if found["run"] in self._runs else {}
        except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError):
            return {}

    def __call__(self, name: str) -> "Spent":
        """The stage that the next `with` block is."""
        self._name = name
        return self

    def __enter__(self) -> None:
        """The clocks' readings."""
        self._began = time.perf_counter(), cpu_seconds()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Written down at the end, and where the job was asked to stop; not after an error."""
        if kind is None or issubclass(kind, Stopped):
            began = self._began
            self.add(self._name, time.perf_counter() - began[0], cpu_seconds() - began[1])

    def add(self, name: str, seconds: float, cpu: float) -> None:
        """So much more of a stage."""
        for known, more in ((self.seconds, seconds), (self.cpu, cpu)):
            known[name] = known.get(name, 0.0) + more
        self._path.parent.mkdir(parents=True, exist_ok=True)
        told = {"run": self._runs[0], "seconds": self.seconds, "cpu": self.cpu}
        write_atomically(self._path, json.dumps(told) + "\n")


def cpu_seconds() -> float:
    """Of the processor, by this process and those of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)
