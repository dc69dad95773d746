"""The tests and benchmark suites of a GPU machine in parts that fit a time limit; finished parts are not run again.

`python -m synthkd.bench.gpu --minutes 9` goes on where the last call stopped, until it says `all parts done`. Each part
is a process of its own: one that ends in an illegal access, or out of memory, takes no other along.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from synthkd.bench import adversarial
from synthkd.bench.backend_runs import measure_backends
from synthkd.bench.backends import RUN, BackendSpec
from synthkd.bench.decoder import DIRECTIONS, DecoderSpec, measure_decoder
from synthkd.bench.digits import run_seed
from synthkd.bench.distill import measure_distill
from synthkd.bench.distill_variants import END, READ, STEP, WAIT_BAR, DistillBench
from synthkd.bench.engine import EngineSpec, measure_engine
from synthkd.bench.evidence_gpu import evidence_parts, skipped
from synthkd.bench.kernels import measure, workloads
from synthkd.bench.methods import measure_methods
from synthkd.bench.million import measure_million
from synthkd.bench.rates import measured, record
from synthkd.bench.record import append_row, stamped
from synthkd.bench.writing import WritingSpec, measure_writing
from synthkd.dfkd.presets import load_preset
from synthkd.dfkd.progress import Silent
from synthkd.dfkd.training import Stopped
from synthkd.engine.errors import SynthkdError
from synthkd.engine.rows import write_atomically
from synthkd.engine.workers import default_workers
from synthkd.kernels.suites import SUITES

STATE = Path("build/gpu/done.json")
SEEDS = range(5)
TESTS = {"kernels": ["kernels"], "runs": ["engine", "export", "dfkd", "test_gpu.py"]}  # folders and files of tests/
FIRST, LATER = ("bfloat16", "float32"), ("float16",)  # a dtype costs a minute or two over all ops, mostly compiling
# The engine's cases, and variants that are timed together: always with `plain`, and the baseline on the same card.
ENGINE = {
    "sd15-512": (("plain", "guided", "as-published"), ("plain", "tiny", "pooled:2", "vae")),
    "sdxl-1024": (("plain", "guided"), ("plain", "as-published"), ("plain", "tiny", "pooled:2"), ("plain", "vae")),
    "sd15-256": (("plain", "guided", "as-published"), ("plain", "tiny", "pooled:2", "vae")),
    "sdxl-512": (("plain", "guided", "as-published"), ("plain", "tiny", "pooled:2", "vae")),
}
COMPILED = ("plain", "as-published", "as-published, compiled")
# Backends of a case that are timed together, always with eager; a large network takes minutes to build. In float16 what
# onnxruntime and TensorRT build, since CUDA's provider has few kernels of bfloat16.
BACKENDS: dict[str, tuple[tuple[str, ...], ...]] = {
    RUN: (("compile",), ("fp8",)),
    "unet": (("compile",), ("fp8",), ("aoti",), ("onnx",), ("onnx-tensorrt",), ("tensorrt",),
             ("flash", "cudnn", "xformers")),
    "vae": (("compile",), ("aoti",), ("onnx",), ("onnx-tensorrt",), ("tensorrt",)),
}  # fmt: skip
# Stage, size and student (all where empty) of what is timed together, and its rounds.
DISTILL = (
    (READ, 32, "", 5), (READ, 224, "", 5), (STEP, 32, "", 5), (STEP, 224, "", 5), (END, 32, "resnet18", 3),
    (END, 224, "resnet50", 2), (END, 32, "resnet20", 3), (END, 32, "digits", 3),
)  # fmt: skip
# Methods by preset and the seeds of each; the last preset goes on over several calls.
METHODS: tuple[tuple[str, tuple[str, ...], tuple[int, ...]], ...] = (
    ("digits", ("mosaickd", "fastdfkd", "deepinversion", "dda", "diffdfkd", "diffusion", "pool"), (0, 1, 2)),
    ("segments", ("mosaickd", "pool"), (0, 1, 2)),
    ("cifar10-small", ("mosaickd", "fastdfkd", "pool"), (0,)),
    ("cifar10-mosaickd", ("mosaickd", "pool"), (0,)),
)
TRY_AGAIN = 75  # exit code of a part whose time was over before its end
RESUMED = ("methods: ", "evidence: ", "prior-")  # parts that go on where they were ended
MINUTES = 8.0  # of one part that may go on in the next call
HALF = ("onnx", "onnx-tensorrt", "tensorrt")
LONGEST = 570  # seconds of one part, after which it is ended

Parts = dict[str, Callable[[], None]]


def tests_part(name: str) -> None:
    """GPU tests; raises where one fails."""
    import pytest

    tests = Path(__file__).resolve().parents[1] / "tests"
    places = [str(tests / place) for place in TESTS[name]]
    status = pytest.main(["-m", "gpu", "-rf", "--durations=5", f"--rootdir={tests.parent}", *places])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest exits with {int(status)}")


def digits_part(seed: int) -> None:
    """The main job for one seed on the GPU, its row appended."""
    folder = STATE.parent / f"digits-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # a part that was cut short starts anew: its times must be one run's
    row = run_seed(load_preset("digits").on("cuda"), seed, folder, Silent())
    append_row("digits", row)


def adversarial_part(seed: int) -> None:
    """Digits with and without the adversarial term for one seed on the GPU, its row appended."""
    folder = STATE.parent / f"adversarial-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    row = adversarial.run_seed(load_preset("digits").on("cuda"), 1.0, 3, seed, folder, Silent())
    append_row("adversarial", row)


def kernels_part(op: str, dtypes: tuple[str, ...] = FIRST) -> None:
    """One op against plain torch; its rows appended together, so that a part that was cut short leaves none."""
    device, rows = torch.device("cuda"), []
    for row in measure(workloads(device, [op], dtypes), device):
        rows.append(row)
        found = (
            f"{row['percent_of_copy']} % of a copy" if row["check"]["passed"] else f"FAILED: {row['check']['reason']}"
        )
        _tell(f"{op}: {row['case']}, {row['dtype']}, {row['direction']}: {found}")
        for name, reason in row["failed"].items():
            _tell(f"  {name}: FAILED: {reason}")
    for row in rows:
        append_row("kernels", row)


def decoder_part(direction: str) -> None:
    """SD 1.5's decoder at 512, batch 8, bfloat16, in one direction; its row appended."""
    for row in measure_decoder(DecoderSpec(device=torch.device("cuda"), directions=(direction,)), _tell):
        append_row("decoder", row)
        for name, entry in row["contenders"].items():
            _tell(f"decoder, {direction}: {name}: {entry['milliseconds'] or entry['failed']}")


def engine_part(case: str, variants: tuple[str, ...]) -> None:
    """Some variants of a case in one interleaved run, bfloat16; a row that failed is told and kept."""
    spec = EngineSpec(case=case, device=torch.device("cuda"), variants=variants)
    for row in measure_engine(spec, load_preset("digits"), _tell):
        append_row("engine", row)
        bar = row["bar_images_per_second"]
        asked = "" if bar is None else f", bar {bar}: {'reached' if row['bar_reached'] else 'NOT reached'}"
        speed = f"{row['images_per_second']} images/s, {row['percent_of_ceiling']} % of the roof, {row['peak_gb']} GB"
        _tell(f"engine, {case}: {row['variant']}: {row['failed'] or speed + asked}")


def engine_parts() -> Parts:
    """All cases and groups of variants, those with bars first; the compiled baseline last, since it may not end."""
    groups = [(case, variants) for case, found in ENGINE.items() for variants in found]
    groups.append(("sd15-512", COMPILED))
    return {f"engine: {case} {' + '.join(v)}": partial(engine_part, case, v) for case, v in groups}


def backends_part(case: str, role: str, names: tuple[str, ...]) -> None:
    """Some backends of a role, or of whole plain runs; what is not installed has a row that says so.

    What was built is removed at the end: an SDXL UNet is 5 GB in each form.
    """
    dtype, folder = torch.float16 if names[0] in HALF else torch.bfloat16, STATE.parent / "artifacts"
    spec = BackendSpec(
        case=case, device=torch.device("cuda"), roles=(role,), backends=names, dtype=dtype, artifacts=str(folder)
    )
    for row in measure_backends(spec, load_preset("digits"), _tell):
        append_row("backends", row)
        bar = row.get("bar_images_per_second")
        asked = "" if bar is None else f", bar {bar}: {'reached' if row['bar_reached'] else 'NOT reached'}"
        speed = f"{row['images_per_second']} images/s, {row['times_eager']} x eager, PSNR {row['psnr']}"
        _tell(f"backends, {case}: {role}, {row['backend']}: {row['skipped'] or row['failed'] or speed + asked}")
    shutil.rmtree(folder, ignore_errors=True)


def backends_parts() -> Parts:
    """SDXL first, whose whole runs have a bar."""
    cases = ("sdxl-1024", "sd15-512")
    groups = [(case, role, names) for case in cases for role, found in BACKENDS.items() for names in found]
    return {
        f"backends: {case} {role} {' + '.join(names)}": partial(backends_part, case, role, names)
        for case, role, names in groups
        if role != RUN or case == "sdxl-1024"
    }


def distill_part(stage: str, size: int, student: str, rounds: int) -> None:
    """Readers, steps or short trainings at one size; rows appended, the share of time waited told with its bar."""
    spec = DistillBench(
        device=torch.device("cuda"), stages=(stage,), sizes=(size,), students=(student,) if student else (),
        rounds=rounds, workers=default_workers("cpu"),
    )  # fmt: skip
    for row in measure_distill(spec, _tell):
        append_row("distill", row)
        said = f"{row['images_per_second']} images/s, {row['times_reference']} x {row['reference']}"
        if row["bar"] is not None:
            said += f", bar {row['bar']}: {'reached' if row['bar_reached'] else 'NOT reached'}"
        if (wait := row.get("data_wait")) is not None:
            said += f", waits {wait} % of the time, bar {WAIT_BAR}: {'kept' if wait < WAIT_BAR else 'NOT kept'}"
        _tell(f"distill, {stage}, {row['case']}: {row['variant']}: {row['skipped'] or row['failed'] or said}")


def distill_parts() -> Parts:
    """All of DISTILL."""
    return {
        f"distill: {stage} {size} {student}".strip(): partial(distill_part, stage, size, student, rounds)
        for stage, size, student, rounds in DISTILL
    }


def methods_part(preset: str, method: str, seed: int) -> None:
    """One method and seed, its row appended; raises Stopped where the time ends first: the next call goes on."""
    until = time.monotonic() + 60 * MINUTES
    for row in measure_methods(
        load_preset(preset).on("cuda"), [method], [seed], STATE.parent / "methods" / preset, record=True,
        should_stop=lambda: time.monotonic() > until,
    ):  # fmt: skip
        score = row.get("student_miou", row.get("student_accuracy"))
        _tell(f"methods, {preset}: {method}, seed {seed}: {score} % in {row['seconds']} s, {row['peak_mb']} MB")


def methods_parts() -> Parts:
    """All of METHODS whose files are here."""
    return {
        f"methods: {preset} {method} seed {seed}": partial(methods_part, preset, method, seed)
        for preset, methods, seeds in METHODS
        if _is_here(preset)
        for seed in seeds
        for method in methods
    }


def _is_here(preset: str) -> bool:
    """Whether a preset's data is; without it there is nothing to run."""
    try:
        load_preset(preset)
    except SynthkdError:
        return False
    return True


def million_part() -> None:
    """As many images as the time allows, up to a million, its row appended; a set that was begun goes on."""
    row = measure_million("cuda", STATE.parent / "million", MINUTES)
    append_row("million", stamped(row))
    _tell(
        f"million: {row['images']} images, {row['images_per_second']} images/s, waited {row['stall_percent']} % of the "
        f"time, {row['peak_mb']} MB, {row['peak_device_mb']} MB on the GPU, {row['problems']} problems"
    )


def scale_parts() -> Parts:
    """The large set, and what `synthkd plan` reckons with."""
    return {
        "million": million_part,
        "rates": lambda: record(measured(load_preset("digits").on("cuda"), 2000)),
        "writing": writing_part,
    }


def writing_part() -> None:
    """Drawing with writing over drawing alone, every format; rows appended."""
    for row in measure_writing(WritingSpec(), load_preset("digits").on("cuda")):
        append_row("writing", row)
        _tell(f"writing, {row['case']}, {row['image_format']}: {row['ratio']} of drawing alone")


def _tell(line: str) -> None:
    print(line, flush=True)


def parts() -> Parts:
    """All parts by name, in the order in which they run: the short ones first."""
    found: Parts = {f"tests: {name}": partial(tests_part, name) for name in TESTS}
    found |= {f"kernels: {s.name}": partial(kernels_part, s.name) for s in SUITES}
    found |= {f"decoder: {direction}": partial(decoder_part, direction) for direction in DIRECTIONS}
    found |= distill_parts() | engine_parts() | backends_parts()
    found |= {f"kernels, {LATER[0]}: {s.name}": partial(kernels_part, s.name, LATER) for s in SUITES}
    suites = {"digits": digits_part, "adversarial": adversarial_part}
    found |= {f"{name} seed {seed}": partial(part, seed) for name, part in suites.items() for seed in SEEDS}
    return found | scale_parts() | methods_parts() | evidence_parts(_tell)  # the longest training last


def apart(name: str) -> None:
    """Run a part in a process of its own; raises where that fails or lasts too long."""
    subprocess.run([sys.executable, "-m", "synthkd.bench.gpu", "--part", name], check=True, timeout=LONGEST)


class Left(NamedTuple):
    """Names of parts that are not done, and of those among them that failed in this call."""

    todo: list[str]
    failed: list[str]


def run_parts(todo: Parts, state: Path, minutes: float) -> Left:
    """Run parts that are not done yet, and start none after `minutes`; a failing one does not stop the others.

    What was begun before and did not come to its end, failed or killed, goes last: it could do so again.
    """
    begun: dict[str, bool] = json.loads(state.read_text()) if state.exists() else {}  # name: whether it is done
    started, failed = time.monotonic(), []

    def note(name: str, done: bool) -> None:
        begun[name] = done
        state.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(state, json.dumps(begun))

    for name in sorted(todo, key=lambda name: name in begun):
        if begun.get(name):
            continue
        if time.monotonic() - started > minutes * 60:
            break
        note(name, False)
        try:
            todo[name]()
        except Exception as error:
            if _goes_on(name, error):
                _tell(f"{name}: goes on in the next call")
                continue
            failed.append(name)
            _tell(f"{name}: FAILED: {type(error).__name__}: {error}")
            continue
        note(name, True)
        _tell(f"{name}: done after {time.monotonic() - started:.0f} s")
    return Left([name for name in todo if not begun.get(name)], failed)


def _goes_on(name: str, error: Exception) -> bool:
    """Whether a part has not failed: its time was over, and it keeps what is done."""
    if isinstance(error, subprocess.TimeoutExpired):
        return name.startswith(RESUMED)
    return isinstance(error, subprocess.CalledProcessError) and error.returncode == TRY_AGAIN


def main() -> None:
    """Run what is left within the time limit; exits with 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="start no part after so many minutes")
    parser.add_argument("--part", choices=list(parts()), help="run this one alone, here and now")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device")
    if arguments.part:
        try:
            parts()[arguments.part]()
        except Stopped:
            sys.exit(TRY_AGAIN)
        return
    for line in skipped():
        _tell(line)
    left = run_parts({name: partial(apart, name) for name in parts()}, STATE, arguments.minutes)
    _tell(f"left for the next call: {', '.join(left.todo)}" if left.todo else "all parts done")
    if left.failed:
        sys.exit(f"FAILED: {', '.join(left.failed)}")


if __name__ == "__main__":
    main()
