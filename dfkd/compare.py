"""Methods of one preset at equal budget: the same student, steps and images for each, every run in its own process.

A process of its own makes peak memory that of one method, and leaves a crash in one run to that run.
"""

import json
import multiprocessing as mp
import queue
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from synthkd.dfkd.choices import teacher_name
from synthkd.dfkd.method_run import RESULT, MethodRun, Stopped
from synthkd.dfkd.methods.base import load_method
from synthkd.dfkd.progress import Progress, Silent
from synthkd.engine.errors import SynthkdError, WorkerLostError
from synthkd.engine.pool import follow_parent
from synthkd.engine.rows import write_atomically

COMPARISON = "compare.json"
Row = dict[str, Any]
_SHOWN = (
    "preset", "method", "seed", "teacher", "student", "teacher_accuracy", "student_accuracy", "teacher_miou",
    "student_miou", "agreement",
    "num_images", "steps", "batch_size", "seconds", "stage_seconds", "cpu_seconds", "peak_mb", "device",
)  # fmt: skip


@dataclass(kw_only=True)
class Comparison:
    """What is compared: methods of a preset, each with each seed; `run` carries preset, budget and execution.

    A run's folder is OUT/METHOD/seed-N; what is finished is not done again.
    """

    run: MethodRun
    methods: Sequence[str]
    seeds: Sequence[int]
    progress: Progress = field(default_factory=Silent)
    should_stop: Callable[[], bool] = lambda: False
    on_row: Callable[[Row], None] = lambda _: None

    def execute(self) -> list[Row]:
        """All rows, one a run, in the order of methods and seeds; they and a report are written to the folder.

        Rows of other methods and seeds that are there stay, where their budget is the same. Raises SynthkdError for a
        method that is not known or named twice, before anything is done, and Stopped.
        """
        from synthkd.dfkd.report_compare import write_comparison

        for name in self.methods:
            load_method(name)
            replace(self.run, method=name).check_apart()
        if len(set(self.methods)) < len(self.methods):
            raise SynthkdError(f"methods {', '.join(self.methods)}: expected distinct names")
        rows: list[Row] = []
        out = self.run.out
        out.mkdir(parents=True, exist_ok=True)
        others = self._others()
        for name in self.methods:
            for seed in self.seeds:
                rows.append(self._row(name, seed))
                self.on_row(rows[-1])
                write_atomically(out / COMPARISON, json.dumps({"rows": [*others, *rows]}, indent=2) + "\n")
        write_comparison(out)
        return rows

    def _others(self) -> list[Row]:
        """Rows of an earlier comparison in this folder that are not made now, of the same preset and budget."""
        if not (self.run.out / COMPARISON).is_file():
            return []
        spec = self.run.preset.distill
        mine = {"preset": self.run.preset.name, "steps": spec.steps, "batch_size": spec.batch_size}
        chosen = {"teacher": teacher_name(self.run.preset), "student": spec.arch}  # which older rows do not say
        return [
            row
            for row in read_rows(self.run.out)
            if all(row.get(name) == value for name, value in mine.items())
            and all(row.get(name, value) == value for name, value in chosen.items())
            and (row["method"] not in self.methods or row["seed"] not in self.seeds)
        ]

    def _row(self, name: str, seed: int) -> Row:
        job = replace(self.run, method=name, seed=seed, out=self.run.out / name / f"seed-{seed}")
        self.progress.begin(f"{name} {seed}", 1, "runs")
        in_own_process(job, self.progress, self.should_stop)
        self.progress.advance(f"{name} {seed}", 1)
        self.progress.end(f"{name} {seed}")
        found = json.loads((job.out / RESULT).read_text())
        return {key: found[key] for key in _SHOWN if key in found}


class _Told:
    """A Progress that hands everything to another process."""

    def __init__(self, to: Any) -> None:
        self._to = to

    def begin(self, stage: str, total: int, unit: str) -> None:
        self._to.put(("begin", (stage, total, unit)))

    def advance(self, stage: str, count: int) -> None:
        self._to.put(("advance", (stage, count)))

    def note(self, stage: str, text: str) -> None:
        self._to.put(("note", (stage, text)))

    def end(self, stage: str) -> None:
        self._to.put(("end", (stage,)))


def _child(job: MethodRun, to: Any, stop: Any) -> None:
    """A run in a process of its own: what happens is told, an error by its words and exit code."""
    follow_parent()
    for number in (signal.SIGTERM, signal.SIGINT):  # the parent is told too, and asks for a stop at a safe point
        signal.signal(number, signal.SIG_IGN)
    try:
        replace(job, progress=_Told(to), should_stop=stop.is_set).execute()
        to.put(("done", ()))
    except Stopped:
        to.put(("stopped", ()))
    except (SynthkdError, OSError, SafetensorError) as error:
        to.put(("failed", (str(error), getattr(error, "exit_code", 2))))
    except Exception as error:
        traceback.print_exc()
        to.put(("failed", (f"{type(error).__name__}: {error}", 1)))


def in_own_process(job: MethodRun, progress: Progress, should_stop: Callable[[], bool]) -> None:
    """Run a method; raises what it raises, WorkerLostError where its process ends without a word."""
    context = mp.get_context("spawn")
    told, stop = context.Queue(), context.Event()
    plain = replace(job, progress=Silent(), should_stop=_never)
    process = context.Process(target=_child, args=(plain, told, stop))
    process.start()
    try:
        end = _listened(job, progress, should_stop, process, told, stop)
        process.join()
    finally:
        if process.is_alive():  # something went wrong here: no run without its comparison
            process.kill()
            process.join()
    if end[0] == "stopped" or (not end[0] and should_stop()):
        raise Stopped
    if end[0] == "failed":
        raise _failure(f"{job.method}, seed {job.seed}: {end[1][0]}", end[1][1])
    if end[0] != "done":
        raise WorkerLostError(
            f"{job.method}, seed {job.seed}: its process ended unasked (out of memory?); the same command goes on"
        )


def _listened(
    job: MethodRun, progress: Progress, should_stop: Callable[[], bool], process: Any, told: Any, stop: Any
) -> tuple[str, Any]:
    """Hear the run out, and ask it to stop where that is due; how it ended, ("", ()) for without a word."""
    stages: dict[str, str] = {}
    end: tuple[str, Any] = ("", ())
    while not end[0]:
        if should_stop():
            stop.set()
        alive = process.is_alive()
        try:
            kind, said = told.get(timeout=0.2)
        except queue.Empty:
            if not alive:
                break
            continue
        end = _heard(job, progress, stages, kind, said)
    return end


def _heard(job: MethodRun, progress: Progress, stages: dict[str, str], kind: str, said: Any) -> tuple[str, Any]:
    """Pass progress on under the method's name; what ends the run is returned."""
    if kind not in ("begin", "advance", "note", "end"):
        return kind, said
    stage, *rest = said
    name = f"{job.method} {job.seed}: {stage}"
    if kind == "begin" and stage not in stages:
        stages[stage] = name
        progress.begin(name, *rest)
    elif kind == "advance":
        progress.advance(stages[stage], *rest)
    elif kind == "note":
        progress.note(stages[stage], *rest)
    elif kind == "end":
        progress.end(stages[stage])
    return "", ()


def _failure(text: str, code: int) -> SynthkdError:
    error = SynthkdError(text)
    error.exit_code = code
    return error


def _never() -> bool:
    return False


def read_rows(folder: Path) -> list[Row]:
    """Rows of a comparison; raises SynthkdError where the folder holds none."""
    path = folder / COMPARISON
    try:
        rows = json.loads(path.read_text())["rows"]
        if not all(isinstance(row, Mapping) and "method" in row and "seed" in row for row in rows):
            raise TypeError("a row has no method and seed")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SynthkdError(f"{path}: not a comparison ({' '.join(str(error).split())[:100]})") from error
    return [dict(row) for row in rows]


def summarised(rows: Sequence[Row], column: str) -> dict[str, tuple[float, float, float]]:
    """(mean, lowest, highest) of a column by method, in the order of the rows; methods without a value are left out."""
    found: dict[str, list[float]] = {}
    for row in rows:
        value = row.get(column)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            found.setdefault(str(row["method"]), []).append(float(value))
    return {name: (sum(v) / len(v), min(v), max(v)) for name, v in found.items()}


def score_column(rows: Sequence[Row]) -> str:
    """Where the students' scores are: mIoU of dense tasks, else accuracy, else agreement with the teacher."""
    return next((c for c in ("student_miou", "student_accuracy") if any(c in row for row in rows)), "agreement")
