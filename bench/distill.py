"""`synthkd bench distill`: reading, the training step, and whole short trainings, each against the plain thing.

All variants of a stage, size and pair of networks are timed in one interleaved run on the same images, with the
quality of what they give in the same row. What is compared with what stands in `bench/distill_stages.py`.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from synthkd.bench.backends import digits
from synthkd.bench.distill_cases import STUDENTS
from synthkd.bench.distill_stages import Setting, settings
from synthkd.bench.distill_variants import SIZES, STAGES, DistillBench, Entry, attempted, variants_of
from synthkd.bench.record import stamped
from synthkd.bench.timing import quartiles
from synthkd.engine import SynthkdError
from synthkd.engine.errors import suggest

Row = dict[str, Any]
Tell = Callable[[str], None]


def measure_distill(spec: DistillBench, tell: Tell = lambda _: None) -> Iterator[Row]:
    """One row per stage, size, pair of networks and variant. Raises SynthkdError for words that do not exist."""
    check(spec)
    for setting in settings(spec):
        with setting.opened(tell) as entries:
            interleave(entries, spec.rounds or setting.rounds, f"{setting.stage}, {setting.case}", tell)
            yield from (stamped(row) for row in rows_of(spec, setting, entries))


def check(spec: DistillBench) -> None:
    """Raise SynthkdError for an unknown stage, size, variant or format, and where nothing is left to measure."""
    stages = [stage for stage in STAGES if stage in (spec.stages or STAGES)]
    known: Mapping[str, tuple[Sequence[Any], Sequence[Any]]] = {
        "stage": (spec.stages, STAGES),
        "size": (spec.sizes, tuple(SIZES)),
        "variant": (spec.variants, [name for stage in stages for name in variants_of(stage)]),
        "student": (spec.students, sorted({name for found in STUDENTS.values() for name, _ in found})),
        "format": ((spec.image_format,), ("jpg", "png", "webp")),
    }
    for option, (given, choices) in known.items():
        for value in given:
            if value not in choices:
                raise SynthkdError(f"--{option} {value!r}: {suggest(str(value), map(str, choices))}")
    if not settings(spec):
        asked = {"stage": spec.stages, "size": spec.sizes, "student": spec.students}
        words = " ".join(f"--{option} {value}" for option, given in asked.items() for value in given)
        raise SynthkdError(f"{words}: nothing to measure on {spec.device.type}; choose --size 32, or another --student")


def interleave(entries: Mapping[str, Entry], rounds: int, name: str, tell: Tell) -> None:
    """A round runs each variant once; one that fails now drops out."""
    for number in range(rounds):
        for entry in entries.values():
            if entry.run is not None and entry.runs:
                with attempted(entry):
                    entry.rates.append(entry.run())
        tell(f"{name}: round {number + 1} of {rounds}")


def rows_of(spec: DistillBench, setting: Setting, entries: Mapping[str, Entry]) -> Iterator[Row]:
    """Rows of one interleaved run; times_reference: median images per second by that of the reference."""
    reference = next(iter(entries))
    base, best = _median(entries[reference]), _best(setting, entries)
    for name, entry in entries.items():
        found, median = quartiles(entry.rates) if entry.rates else None, _median(entry)
        times = median / base if median and base else None
        bar = setting.bar if name == best else None
        yield {
            "kind": "distill", "stage": setting.stage, "case": setting.case, "variant": name, "size": setting.size,
            "device": spec.device.type, "rounds": len(entry.rates), "reference": reference,
            "images_per_second": digits(median),
            "q1": digits(found.q1 if found else None), "q3": digits(found.q3 if found else None),
            "times_reference": digits(times), "bar": bar,
            "bar_reached": None if bar is None or times is None else times >= bar,
            "skipped": entry.skipped, "failed": entry.failed, **setting.facts, **entry.facts,
            **_beside(entry, entries[reference]),
        }  # fmt: skip


def _beside(entry: Entry, reference: Entry) -> Row:
    """How far a loss is from the reference's."""
    ours, theirs = entry.facts.get("loss"), reference.facts.get("loss")
    if theirs is None:
        return {}
    return {"loss_relative": None if ours is None else digits(abs(ours - theirs) / max(abs(theirs), 1e-12))}


def _best(setting: Setting, entries: Mapping[str, Entry]) -> str | None:
    """The variant that the bar is for: the fastest of the stage's, in float32 on a CPU, in bfloat16 on a GPU."""
    rates = {name: _median(entries[name]) for name in setting.defaults if name in entries}
    return max(rates, key=lambda name: rates[name] or 0.0) if any(rates.values()) else None


def _median(entry: Entry) -> float | None:
    return statistics.median(entry.rates) if entry.rates and entry.runs else None
