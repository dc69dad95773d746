"""Drawing with writing over drawing alone: the digits prior in one process, guided and as cheap as it gets, by format.

Each round draws the same groups once for nothing and once into a set, so that drift meets both alike.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from synthkd.bench.record import stamped
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.presets import Preset
from synthkd.engine import GuidanceSpec, Plan, Request, SynthkdError, write_shards
from synthkd.engine.config import CutMixSpec
from synthkd.engine.encoders import encoder_for
from synthkd.engine.errors import suggest
from synthkd.engine.runner import open_stream
from synthkd.engine.writer import WriteSummary, Writing

CASES, FORMATS = ("guided", "cheap"), ("png", "jpg", "webp")
CHEAP_STEPS = 4


@dataclass(frozen=True)
class WritingSpec:
    """What is measured: cases by formats, `groups` a time, `rounds` of both contenders, on the disk of `folder`."""

    cases: Sequence[str] = CASES
    formats: Sequence[str] = FORMATS
    writing: Writing = field(default_factory=Writing)
    groups: int = 4
    rounds: int = 5
    folder: Path | None = None

    def __post_init__(self) -> None:
        """Raise SynthkdError for an unknown case or format, or less than one round or group."""
        for option, given, known in (("case", self.cases, CASES), ("format", self.formats, FORMATS)):
            for name in given:
                if name not in known:
                    raise SynthkdError(f"--{option} {name!r}: {suggest(name, known)}")
        if self.groups < 1 or self.rounds < 1:
            raise SynthkdError(f"--groups {self.groups} --rounds {self.rounds}: expected one or more of each")


def job_of(case: str, image_format: str, preset: Preset) -> SynthJob:
    """The preset's job in a format; `cheap`: no teacher, no classifier-free guidance, few steps, so little to draw."""
    recipe = replace(preset.job.recipe, image_format=image_format)
    if case == "cheap":
        recipe = replace(
            recipe, steps=CHEAP_STEPS, guidance_scale=1.0, guidance=GuidanceSpec(scale=0.0), cutmix=CutMixSpec(every=0)
        )
    return replace(preset.job, recipe=recipe)


def measure_writing(spec: WritingSpec, preset: Preset) -> Iterator[dict[str, Any]]:
    """One row for each case and format."""
    for case in spec.cases:
        for image_format in spec.formats:
            if spec.writing.encoder in ("simplejpeg", "nvjpeg") and image_format != "jpg":
                continue
            yield _row(spec, case, job_of(case, image_format, preset))


def _row(spec: WritingSpec, case: str, job: SynthJob) -> dict[str, Any]:
    encoder = encoder_for(spec.writing.encoder, job.recipe.image_format, job.device)
    groups = spec.groups * (10 if case == "cheap" else 1)
    plan = Plan(job.recipe, Request(num_samples=groups * job.recipe.group_size))
    stream = open_stream(job.build, plan, workers=1)
    for _ in stream.draw([plan.unit(0)]):  # what only the first group costs
        pass
    alone, written, sums = [], [], WriteSummary(0, 0, False)
    for _ in range(spec.rounds):
        started = time.monotonic()
        for _ in stream.draw(plan.units()):
            pass
        alone.append(time.monotonic() - started)
        with tempfile.TemporaryDirectory(dir=spec.folder) as folder:
            started = time.monotonic()
            summary = write_shards(stream, Path(folder) / "set", writing=spec.writing)
            written.append(time.monotonic() - started)
        sums = sums.then(summary)
    ratios, images = [a / w for a, w in zip(alone, written, strict=True)], plan.request.num_samples
    return stamped({
        "kind": "writing",
        "case": case,
        "image_format": job.recipe.image_format,
        "encoder": encoder.name or "pillow",
        "encoders": spec.writing.threads_for(job.device),
        "ring": spec.writing.ring,
        "device": job.device,
        "images": images,
        "rounds": spec.rounds,
        "ratio": round(statistics.median(ratios), 4),
        "lowest_ratio": round(min(ratios), 4),
        "highest_ratio": round(max(ratios), 4),
        "images_per_second": round(images / statistics.median(written), 2),
        "images_per_second_alone": round(images / statistics.median(alone), 2),
        "stall_percent": round(sums.stall_percent, 3),
        "encoding_ms": round(1e3 * sums.encoding / sums.drawn, 3),
        "appending_ms": round(1e3 * sums.writing / sums.drawn, 3),
    })  # fmt: skip
