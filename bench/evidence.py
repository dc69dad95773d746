"""Evidence on natural images: a preset's guided run beside its controls, a row each, over seeds.

`python -m synthkd.bench.evidence PRESET --seeds 0,1,2 --out OUT --record` (`synthkd bench evidence` is the same);
`--table` makes the tables of docs/evidence.md anew (`bench/evidence_page.py`).
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from synthkd.bench import record
from synthkd.dfkd.cards import card_path, read_card
from synthkd.dfkd.controls import arm_spec
from synthkd.dfkd.presets import Preset
from synthkd.dfkd.progress import Progress, Silent
from synthkd.dfkd.run import Run
from synthkd.engine.errors import SynthkdError
from synthkd.engine.rows import mend_tail, write_atomically

NAME = "evidence"
DONE = "evidence.json"
PRIOR_RESULT = "prior.json"
_PRIOR_PREFIX = "prior-"
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is run: a preset with each seed, in OUT/seed-N; what is finished is not done again.

    record: append the rows to bench/results/evidence.jsonl, each of them once, wherever a call was killed.
    """

    preset: Preset
    seeds: Sequence[int]
    out: Path
    num_images: int | None = None
    workers: int | None = None
    record: bool = False
    progress: Progress = field(default_factory=Silent)
    should_stop: Callable[[], bool] = lambda: False

    def execute(self) -> list[Row]:
        """Rows of all seeds, in the order of guided, unguided and the preset's controls.

        Raises SynthkdError, before anything is drawn, for a preset that nothing scores or that has nothing to compare
        with, as `SynthJob.check` does, and for figures of a prior that are of other weights; Interrupted as `Run` does.
        """
        if self.preset.test_set is None:
            raise SynthkdError(f"evidence: preset {self.preset.name} has no test set; choose one that is scored")
        if not self.preset.teachers and not self.preset.controls:  # a run of such a one does not tell its arms apart
            raise SynthkdError(
                f"evidence: preset {self.preset.name} names neither teachers nor controls; name controls"
            )
        self.preset.job.check()
        asked = facts_of(self.preset, self.num_images or self.preset.num_images)
        return [row for seed in self.seeds for row in self._seed(seed, asked)]

    def _seed(self, seed: int, asked: Mapping[str, Any]) -> list[Row]:
        folder = self.out / f"seed-{seed}"
        wanted = {"run": asked["run"], "controls": list(self.preset.controls)}
        rows = _finished(folder, wanted)
        if rows is None:
            result = Run(
                self.preset, folder, seed, self.num_images, self.workers, self.progress, self.should_stop
            ).execute()
            rows = [record.stamped(row) for row in rows_of(result, folder, asked)]
            write_atomically(folder / DONE, json.dumps(wanted | {"rows": rows}, indent=2) + "\n")
        if self.record:
            append_new(rows)
        return rows


def facts_of(preset: Preset, num_images: int) -> dict[str, Any]:
    """What all rows of a run share; `run` is a digest of all that was declared but the seed, whatever the folders.

    Raises SynthkdError as `prior_facts` does, and for a card that cannot be read.
    """
    job, spec = preset.job, arm_spec(preset)
    card = read_card(card_path(job.teacher))
    teacher = hashlib.sha256(card.weights.read_bytes()).hexdigest() if card.weights else None
    prior, device = prior_facts(job.model), job.device.partition(":")[0]
    declared = {
        "preset": preset.name, "teacher": teacher, "prior": prior.get("sha256"), "budget": num_images,
        "distill": asdict(replace(spec, seed=0)), "recipe": asdict(job.recipe), "device": device,
        "weights": [job.alpha, job.beta, job.gamma, job.entropy, job.head, job.bn_momentum],
        "methods": {name: dict(options) for name, options in preset.methods.items()},
    }  # fmt: skip
    guided = job.recipe.guidance
    return {
        "preset": preset.name, "size": prior["size"], "teacher": Path(job.teacher).stem, "teacher_sha256": teacher,
        "student": spec.arch, "budget": num_images, "steps": spec.steps, "batch_size": spec.batch_size, "prior": prior,
        "image_size": [job.recipe.height, job.recipe.width],
        "guidance": {
            "scale": guided.scale, "start": guided.start, "alpha": job.alpha, "beta": job.beta,
            "steps": job.recipe.steps, "guidance_scale": job.recipe.guidance_scale,
        },
        "run": hashlib.sha256(json.dumps(declared, sort_keys=True, default=str).encode()).hexdigest()[:16],
    }  # fmt: skip


def prior_facts(model: str) -> dict[str, Any]:
    """Of a prior that `synthkd fit-prior` wrote to FOLDER/pipeline: size, digest of its denoiser, how it was trained.

    The size is the folder's: `prior-small` is `small`, any other folder `own`. A prior that is no folder has its name
    alone. Raises SynthkdError where FOLDER/prior.json is of other weights than those that lie there.
    """
    pipeline = Path(model)
    if not pipeline.is_dir():
        return {"size": model, "sha256": None}
    home = pipeline.resolve().parent
    size = home.name.removeprefix(_PRIOR_PREFIX) if home.name.startswith(_PRIOR_PREFIX) else "own"
    sums = {f"unet/{p.name}": _digest(p) for p in sorted((pipeline / "unet").glob("*.safetensors"))}
    found = {"size": size, "sha256": next(iter(sums.values()), None)}
    path = home / PRIOR_RESULT
    if pipeline.name != "pipeline" or not path.is_file():
        return found
    try:
        told = json.loads(path.read_text())
        other = next((name for name, digest in sums.items() if told["sha256"].get(name) != digest), None)
        if other is None:
            return found | _training(told)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise SynthkdError(f"{path}: not what `synthkd fit-prior` writes ({reason}); fit the prior again") from error
    raise SynthkdError(f"{path}: its SHA-256 of {other} is not that of the file; fit the prior again")


def _training(told: Mapping[str, Any]) -> dict[str, Any]:
    """How a prior was trained, and what came of it, from its prior.json."""
    vae, unet = told["vae"], told["unet"]
    return {
        "trained_on": list(told["trained_on"]), "images": int(told["images"]), "steps": int(unet["steps"]),
        "batch_size": int(unet["batch_size"]), "vae_steps": int(vae["steps"]),
        "hours": round((float(vae["seconds"]) + float(unet["seconds"])) / 3600, 3),
        "parameters": sum(int(n) for n in told["parameters"].values()),
        "psnr": vae["psnr_held_out"], "held_out_loss": unet["held_out_loss"], "device": str(told["device"]),
    }  # fmt: skip


def rows_of(result: Mapping[str, Any], folder: Path, asked: Mapping[str, Any]) -> list[Row]:
    """Rows of a finished run, not stamped: what it says of each arm, its student's digest, its hours.

    hours are of drawing and training over all calls but those that were killed; gpu_hours the same, 0.0 on a CPU.
    """
    drawn = {
        "guided": (folder, "student_accuracy", "guided_images_per_second"),
        "unguided": (folder / "control", "unguided_student_accuracy", "images_per_second"),
    }
    rows, images = [], int(result["num_images"])
    for name, (home, accuracy, rate) in drawn.items():
        seconds, speed = float(result["arm_seconds"][name]), float(result[rate])
        rows.append(_row(name, home, result, asked, float(result[accuracy]), images, seconds, speed))
    for name, found in result["controls"].items():
        score, home = float(found["student_accuracy"]), folder / "controls" / name
        rows.append(_row(name, home, result, asked, score, int(found["num_images"]), float(found["seconds"]), None))
    return rows


def _row(
    name: str, home: Path, result: Mapping[str, Any], asked: Mapping[str, Any], accuracy: float, images: int,
    seconds: float, rate: float | None,
) -> Row:  # fmt: skip
    """One row; home: folder of the arm's student; rate: of drawing, where a prior drew."""
    device, hours = str(result["device"]), round(seconds / 3600, 4)
    guidance = {"guided": asked["guidance"], "unguided": {**asked["guidance"], "scale": 0.0}}.get(name)
    return {
        **asked, "control": name, "seed": int(result["seed"]), "parameters": result.get("parameters"),
        "teacher_accuracy": float(result["teacher_accuracy"]), "student_accuracy": accuracy,
        "student_sha256": _digest(home / "student.safetensors"), "images": images, "images_per_second": rate,
        "guidance": guidance, "hours": hours, "device": device,
        "gpu_hours": hours if device.startswith("cuda") else 0.0,
    }  # fmt: skip


def append_new(rows: Sequence[Row]) -> list[Row]:
    """Append the rows that are not in bench/results/evidence.jsonl yet, and return them; a torn last line is cut off.

    A row is one student: preset, arm, seed and the digest of its weights.
    """
    path = record.RESULTS / f"{NAME}.jsonl"
    mend_tail(path)
    known = {_key(row) for row in read_rows(path)}
    new = [row for row in rows if _key(row) not in known]
    for row in new:
        record.append_row(NAME, row)
    return new


def read_rows(path: Path) -> list[Row]:
    """All rows of a file of results, in their order; none where it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("preset", "run", "control", "seed", "student_sha256"))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _finished(folder: Path, wanted: Mapping[str, Any]) -> list[Row] | None:
    """The rows that an earlier call left, if they are of this very run and its controls."""
    try:
        found = json.loads((folder / DONE).read_text())
        rows: list[Row] = found["rows"]
        return rows if all(found[name] == value for name, value in wanted.items()) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


if __name__ == "__main__":
    from synthkd.bench.cli_evidence import main

    main(sys.argv[1:])
