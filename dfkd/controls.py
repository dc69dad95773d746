"""The methods that a run compares with: same student, steps, seed and number of images, a folder each.

Each runs in a process of its own, as in `synthkd compare`. A folder is its control's alone: where the run was given
another teacher, student or budget since, the control is done anew.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from synthkd.dfkd.choices import check_controls
from synthkd.dfkd.compare import in_own_process
from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.method_run import RESULT, MethodRun
from synthkd.dfkd.presets import Preset
from synthkd.dfkd.progress import Progress, Silent
from synthkd.dfkd.teachers import Teacher
from synthkd.engine.errors import SynthkdError
from synthkd.engine.rows import write_atomically

FOLDER, MARK = "controls", "control.json"
_SHOWN = (
    "student_accuracy", "agreement", "num_images", "steps", "batch_size", "seconds", "stage_seconds", "cpu_seconds",
    "peak_mb", "pool",
)  # fmt: skip


def arm_spec(preset: Preset) -> DistillSpec:
    """How guided and unguided students are trained: where there are controls as those, with the teacher beside them.

    Stored labels of a few views of each image are of a finished set only; no control's arm has them.
    """
    spec = preset.distill
    return replace(spec, soft_labels="teacher", views=0) if preset.controls else spec


@dataclass
class Controls:
    """The controls of a preset in a run's folder, OUT/controls/NAME; `check` comes before `execute`."""

    preset: Preset
    out: Path
    seed: int = 0
    num_images: int | None = None
    progress: Progress = field(default_factory=Silent)
    should_stop: Callable[[], bool] = lambda: False
    _identities: dict[str, dict[str, Any]] = field(default_factory=dict)

    def check(self, teacher: Teacher) -> None:
        """Raise SynthkdError where a control cannot be done, and write nothing; teacher: the preset's, loaded.

        Options and counts are among what a control may not take.
        """
        check_controls(self.preset)
        self._identities = {name: self._run(name).identity(teacher) for name in self.preset.controls}
        for name in self.preset.controls:
            self._marked(self._run(name).out)

    def execute(self) -> dict[str, dict[str, Any]]:
        """Do what is left to do; by control what its result says. Raises Stopped where that is asked for."""
        return {name: self._done(name) for name in self.preset.controls}

    def _run(self, name: str) -> MethodRun:
        return MethodRun(
            preset=self.preset, method=name, out=self.out / FOLDER / name, seed=self.seed, num_images=self.num_images,
            workers=1,
        )  # fmt: skip

    def _done(self, name: str) -> dict[str, Any]:
        job, identity = self._run(name), self._identities[name]
        if self._marked(job.out) not in (None, identity):
            _cleared(job.out)
        job.out.mkdir(parents=True, exist_ok=True)
        write_atomically(job.out / MARK, json.dumps(identity) + "\n")
        in_own_process(job, self.progress, self.should_stop)
        found = json.loads((job.out / RESULT).read_text())
        return {key: found[key] for key in _SHOWN if key in found}

    def _marked(self, folder: Path) -> Any:
        """The identity of the control that a folder holds, None for an empty one; raises SynthkdError for any other."""
        there = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if there <= {MARK + ".tmp"}:  # which a call leaves that was killed just then
            return None
        try:
            found = json.loads((folder / MARK).read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise SynthkdError(f"{folder}: holds no control of a run; choose another --out") from error
        return found if isinstance(found, Mapping) else {}


def _cleared(folder: Path) -> None:
    """Take a folder away as a whole: killed meanwhile, the next call finds either all of it or nothing."""
    gone = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)
