"""`synthkd bench engine`: how fast groups are drawn, at what arithmetic, and what the images are worth, in one row.

All variants of a case are timed in one interleaved run. One that fails (memory, a compiler) has a row that says so.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from synthkd.bench import quality
from synthkd.bench.as_published import AsPublished
from synthkd.bench.engine_cases import (
    ALL_CFG,
    EMBEDDED,
    Entrant,
    embedded_variants,
    find_case,
    pick,
    random_builders,
    random_drawer,
    random_guidance,
    random_recipe,
)
from synthkd.bench.flops import Drawer, count_run
from synthkd.bench.record import stamped
from synthkd.bench.timing import Quartiles, Stopwatch, compute_ceiling, quartiles
from synthkd.dfkd.presets import Preset
from synthkd.engine import Plan, Request, Synthesizer
from synthkd.engine.random_models import random_prior
from synthkd.engine.workers import one_thread

Tell = Callable[[str], None]
Row = dict[str, Any]
_GPU_DTYPE = torch.bfloat16


@dataclass
class Contender:
    """A variant that is warm, or why it is not.

    compile_seconds: the first group's time above the second's; peak_gb: of the device's memory while both were drawn,
    with whatever the other variants keep.
    """

    drawer: Drawer | None = None
    failed: str | None = None
    warm_up_seconds: float | None = None
    compile_seconds: float | None = None
    peak_gb: float | None = None
    seconds: Quartiles | None = None


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What the timed rounds of a case found. ceiling: TFLOP/s (`timing.compute_ceiling`), None where none was timed."""

    contenders: Mapping[str, Contender] = field(default_factory=dict)
    ceiling: float | None = None


def synth_of(drawer: Drawer) -> Synthesizer:
    """The Synthesizer inside."""
    return drawer.synth if isinstance(drawer, AsPublished) else drawer


def time_variants(
    builders: Mapping[str, Callable[[], Drawer]],
    device: torch.device,
    seed: int,
    repeats: int,
    tell: Tell = lambda _: None,
) -> Timing:
    """Warm up every variant, then let each draw group 0 of the seed once a round; on a CPU with one thread."""
    with one_thread(device):
        found = {name: _warmed(name, build, device, seed, tell) for name, build in builders.items()}
        dtype = next((synth_of(c.drawer).model.dtype for c in found.values() if c.drawer), torch.float32)
        ceiling = compute_ceiling(device, dtype)
        _rounds(found, Stopwatch(device), seed, repeats, tell)
        ceiling = max(ceiling, compute_ceiling(device, dtype))  # the machine may have been busy before
    return Timing(contenders=found, ceiling=ceiling)


def _group(drawer: Drawer, seed: int) -> Callable[[], object]:
    recipe = synth_of(drawer).recipe
    unit = Plan(recipe, Request(num_samples=recipe.group_size, seed=seed)).unit(0)
    return partial(drawer.run, unit, seed)


def _warmed(name: str, build: Callable[[], Drawer], device: torch.device, seed: int, tell: Tell) -> Contender:
    entry, cuda = Contender(), device.type == "cuda"
    try:
        drawer = build()
        call = _group(drawer, seed)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        first, second = (_timed(call, cuda) for _ in range(2))
        entry.drawer, entry.warm_up_seconds = drawer, round(first + second, 3)
        entry.compile_seconds = round(max(0.0, first - second), 3) if cuda else None
        entry.peak_gb = round(torch.cuda.max_memory_allocated() / 1e9, 3) if cuda else None
        tell(f"{name}: warm after {first + second:.1f} s")
    except Exception as error:  # memory or a compiler: the others are still timed
        entry.failed = _why(error)
        tell(f"{name}: FAILED: {entry.failed}")
        if cuda:
            torch.cuda.empty_cache()
    return entry


def _timed(call: Callable[[], object], cuda: bool) -> float:
    started = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _rounds(found: Mapping[str, Contender], watch: Stopwatch, seed: int, repeats: int, tell: Tell) -> None:
    """Interleaved: a round draws one group of each variant; one that fails now drops out."""
    spent: dict[str, list[float]] = {name: [] for name, entry in found.items() if entry.drawer}
    for i in range(repeats):
        for name in spent:
            entry = found[name]
            if entry.drawer and not entry.failed:
                try:
                    spent[name].append(watch.microseconds(_group(entry.drawer, seed)) / 1e6)
                except Exception as error:
                    entry.failed = _why(error)
        tell(f"round {i + 1} of {repeats}")
    for name, values in spent.items():
        if values and not found[name].failed:
            found[name].seconds = quartiles(values)


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def rows_of(
    case: str, seed: int, timing: Timing, counts: Mapping[str, float | None], bars: Mapping[str, float]
) -> list[Row]:
    """One row per variant, quality columns empty. counts: TFLOP per image by variant."""
    per_image = {n: _per_image(c) for n, c in timing.contenders.items()}
    return [
        {
            "kind": "engine", "case": case, "variant": name, "seed": seed, "torch": torch.__version__,
            **_speed(timing, name, per_image, tera), **_bar(bars.get(name), per_image.get(name)), **quality.unknown(),
        }
        for name, tera in counts.items()
    ]  # fmt: skip


def _per_image(entry: Contender) -> float | None:
    if entry.seconds is None or entry.drawer is None:
        return None
    return entry.seconds.median / synth_of(entry.drawer).recipe.group_size


def _speed(timing: Timing, name: str, per_image: Mapping[str, float | None], tera: float | None) -> Row:
    entry, ceiling, mine, plain = timing.contenders.get(name, Contender()), timing.ceiling, *_pair(per_image, name)
    rate = tera / mine if tera and mine else None
    synth = synth_of(entry.drawer) if entry.drawer else None
    return {
        "failed": entry.failed,
        "device": synth.model.device.type if synth else None,
        "dtype": synth.recipe.dtype if synth else None,
        "images_per_group": synth.recipe.group_size if synth else None,
        "images_per_second": _rounded(1 / mine if mine else None),
        "seconds_per_group": asdict(entry.seconds) if entry.seconds else None,
        "times_plain": _rounded(mine / plain if mine and plain else None),
        "tflop_per_image": _rounded(tera),
        "tflop_per_s": _rounded(rate),
        "ceiling_tflop_per_s": _rounded(ceiling),
        "percent_of_ceiling": _rounded(100 * rate / ceiling if rate and ceiling else None),
        "roofline_images_per_second": _rounded(ceiling / tera if tera and ceiling else None),
        "peak_gb": entry.peak_gb,
        "warm_up_seconds": entry.warm_up_seconds,
        "compile_seconds": entry.compile_seconds,
    }


def _pair(per_image: Mapping[str, float | None], name: str) -> tuple[float | None, float | None]:
    """A variant's seconds per image, and those of the plain run at the same CFG interval."""
    alike = f"plain{ALL_CFG}" if name.endswith(ALL_CFG) else "plain"
    return per_image.get(name), per_image.get(alike)


def _bar(bar: float | None, per_image: float | None) -> Row:
    """What is asked of an H200, and whether this device reaches it."""
    return {"bar_images_per_second": bar, "bar_reached": 1 / per_image >= bar if bar and per_image else None}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """What is measured. variants: all of a case where empty; counts: only the arithmetic; num_images: None for no
    quality."""

    case: str
    device: torch.device
    variants: Sequence[str] = ()
    seeds: Sequence[int] = (0,)
    repeats: int = 5
    num_images: int | None = None
    counts: bool = False


def measure_engine(spec: EngineSpec, preset: Preset, tell: Tell = lambda _: None) -> Iterator[Row]:
    """Rows of a case, per seed and variant; preset: what the embedded case draws.

    A case with random weights is counted alone, on meta tensors, where the device is no GPU.
    """
    rows = _embedded(spec, preset, tell) if spec.case == EMBEDDED else _random(spec, tell)
    for row in rows:
        yield stamped(row)


def _embedded(spec: EngineSpec, preset: Preset, tell: Tell) -> Iterator[Row]:
    entrants = embedded_variants(preset.on(spec.device.type))
    names = pick(entrants, list(spec.variants))
    counts = {name: count_embedded(entrants[name]) for name in names}
    tell("counted")
    done: dict[int, list[Row]] = {}
    for seed in spec.seeds:
        timing = Timing()
        if not spec.counts:
            timing = time_variants({n: entrants[n].build for n in names}, spec.device, seed, spec.repeats, tell)
        done[seed] = rows_of(EMBEDDED, seed, timing, counts, {})
    rows = {(row["seed"], row["variant"]): row for found in done.values() for row in found}
    if spec.num_images is None or spec.counts:
        yield from rows.values()
        return
    # a variant at another CFG interval is scored like any other; one that failed is not
    jobs = {
        key: quality.QualityJob(entrants[key[1]], key[0], spec.num_images)
        for key, row in rows.items()
        if not row["failed"]
    }
    yield from (row for key, row in rows.items() if key not in jobs)
    for key, found in quality.score_all(jobs):
        tell(f"seed {key[0]}, {key[1]}: {found}")
        yield {**rows[key], "num_images": spec.num_images, **found}


def count_embedded(entrant: Entrant) -> float:
    """TFLOP per image of a preset's variant."""
    drawer = Entrant(entrant.preset.on("cpu"), entrant.published).build()
    for network in (*synth_of(drawer).model.modules(), synth_of(drawer).look.module):
        network.to("meta")
    return count_run(drawer) / 1e12


def count_random(case_name: str, variant: str) -> float:
    """TFLOP per image of a variant of a published architecture."""
    case = find_case(case_name)
    prior = random_prior(case.architecture, device="meta")
    guidance = random_guidance(random_recipe(case, variant, torch.float32).classes)
    return count_run(random_drawer(case, variant, prior, guidance, group=1)) / 1e12


def _random(spec: EngineSpec, tell: Tell) -> Iterator[Row]:
    """Quality columns stay empty: random weights draw nothing that could be scored."""
    case, cuda = find_case(spec.case), spec.device.type == "cuda" and not spec.counts
    builders = random_builders(
        case, spec.device if cuda else torch.device("meta"), _GPU_DTYPE if cuda else torch.float32
    )
    names = pick(builders, list(spec.variants))
    counts: dict[str, float | None] = {}
    for name in names:
        alike = name.removesuffix(", compiled")
        counts[name] = counts[alike] if alike in counts else count_random(spec.case, alike)
        tell(f"{name}: {counts[name]:.4g} TFLOP per image")
    for seed in spec.seeds:
        timing = Timing()
        if cuda:
            timing = time_variants({n: builders[n] for n in names}, spec.device, seed, spec.repeats, tell)
        yield from rows_of(spec.case, seed, timing, counts, case.bars)


def summary(rows: Sequence[Row]) -> Row | None:
    """What is claimed, on the rows of the embedded case; None where its variants are not all there.

    Times are medians over seeds of ratios within one interleaved run; accuracy is paired by seed.
    """
    mine = [r for r in rows if r.get("case") == EMBEDDED]
    seconds = {v: {r["seed"]: 1 / r["images_per_second"] for r in mine if r["variant"] == v and r["images_per_second"]}
               for v in ("plain", "guided", "as-published")}  # fmt: skip
    times_plain, times_faster = (
        _ratio(seconds["guided"], seconds["plain"]),
        _ratio(seconds["as-published"], seconds["guided"]),
    )
    ours, theirs = (quality.accuracies(mine, v) for v in ("guided", "full-cost"))
    both = sorted(ours.keys() & theirs.keys())
    if times_plain is None and not both:
        return None
    delta = quality.paired([ours[s] for s in both], [theirs[s] for s in both]) if both else None
    return {
        "kind": "summary", "case": EMBEDDED, "seeds": both or sorted(seconds["guided"]),
        "guided_times_plain": times_plain,
        "guided_times_faster_than_as_published": times_faster,
        "guided_minus_full_cost": delta._asdict() if delta else None,
        "reached": {
            "guided at most 1.4x plain": None if times_plain is None else times_plain <= 1.4,
            "at least 3x faster than as-published": None if times_faster is None else times_faster >= 3,
            "lower bound above -1.0 point": delta.lower > -1.0 if delta and delta.lower is not None else None,
        },
    }  # fmt: skip


def _ratio(these: Mapping[int, float], those: Mapping[int, float]) -> float | None:
    both = these.keys() & those.keys()
    return _rounded(statistics.median(these[s] / those[s] for s in both)) if both else None
