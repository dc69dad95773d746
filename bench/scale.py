"""What a large set costs beside its images: memory over time, actors against plain processes, planning.

`python -m synthkd.bench.scale --record` draws with a cheap recipe (four calls), so that everything beside the networks
counts most. Predictions, written before the first run: no process grows by 5 % from 2,000 to 20,000 images; two actors
reach 1.7 times one where each has a core, and no less than two plain processes; 10^9 images are planned in 0.01 s.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from synthkd.bench.record import append_row, stamped
from synthkd.bench.soak import RECIPE, SoakSpec, actor_processes, command, safe_images
from synthkd.dfkd.planning import plan_cost
from synthkd.dfkd.presets import load_preset
from synthkd.dfkd.rates import recorded_rates
from synthkd.engine import Plan, Request

EARLY = 2_000  # images from which on memory is watched
DRIFT_BAR, ACTORS_BAR = 5.0, 1.7
_EVERY = 0.5
_STARTED = 80  # images, after which a process has met everything it does


def planned() -> dict[str, Any]:
    """10^9 images on 1,024 processes: seconds and memory of the arithmetic."""
    rates, recipe = recorded_rates("digits"), load_preset("digits").job.recipe
    tracemalloc.start()
    started = time.perf_counter()
    plan = Plan(recipe, Request(num_samples=10**9))
    found = plan_cost(plan, rates, 1024)
    last = plan.unit(plan.num_groups - 1)
    seconds, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"stage": "plan", "images": found.samples, "shards": found.shards, "last_id": last.ids[last.kept - 1],
            "milliseconds": round(1e3 * seconds, 3), "peak_kb": round(peak / 1e3, 1)}  # fmt: skip


def watched(words: Sequence[str], out: Path, log: Path) -> dict[str, list[tuple[int, float]]]:
    """Run a command; (images safe, resident MB) of it and of its actors over time, by process."""
    seen: dict[str, list[tuple[int, float]]] = defaultdict(list)
    with log.open("wb") as f, subprocess.Popen(words, stdout=f, stderr=f) as process:
        while process.poll() is None:
            have = safe_images(out)
            mine = {"driver": psutil.Process(process.pid)} if "--ray" in words else {}
            actors = actor_processes() if "--ray" in words else [psutil.Process(process.pid)]
            for name, found in {**mine, **{f"worker {p.pid}": p for p in actors}}.items():
                with contextlib.suppress(psutil.Error):
                    seen[name].append((have, found.memory_info().rss / 2**20))
            time.sleep(_EVERY)
        if process.returncode:
            raise RuntimeError(f"the command ended with {process.returncode}; see {log}")
    return seen


def drift(points: Sequence[tuple[int, float]], images: int) -> dict[str, float] | None:
    """Resident MB at EARLY images and at the end, medians of samples near both, and percent between; None if short."""
    early = [mb for have, mb in points if EARLY <= have <= EARLY * 1.25]
    late = [mb for have, mb in points if images * 0.95 <= have]
    if not early or not late:
        return None
    first, last = statistics.median(early), statistics.median(late)
    return {"early_mb": round(first, 1), "late_mb": round(last, 1), "drift_percent": round(100 * (last / first - 1), 2)}


def memory(images: int, place: Path, ray: bool) -> dict[str, Any]:
    """Resident memory of every process of a run."""
    spec, out = _fresh(images, place, "memory")
    more = ("--ray", "local", "--ray-actors", "2") if ray else ("--workers", "1")
    seen = watched(command(spec, place, out, *more), out, place / "memory.log")
    found = {name: d for name, points in seen.items() if (d := drift(points, images)) is not None}
    worst = max((d["drift_percent"] for d in found.values()), default=None)
    return {
        "stage": "memory", "how": "ray, 2 actors" if ray else "one process", "images": images,
        "processes": dict(sorted((name.partition(" ")[0] + f" {i}", d) for i, (name, d) in enumerate(found.items()))),
        "worst_drift_percent": worst, "bar": DRIFT_BAR, "bar_reached": worst is not None and worst < DRIFT_BAR,
    }  # fmt: skip


def rate(commands: Sequence[Sequence[str]], out: Path, images: int, log: Path) -> float:
    """Images a second of commands that share a folder, from the first groups on: starting up is left out."""
    started, have = None, 0
    with log.open("wb") as f:
        running = [subprocess.Popen(words, stdout=f, stderr=f) for words in commands]
        while any(p.poll() is None for p in running):
            have = safe_images(out)
            if started is None and have >= _STARTED:
                started = (time.monotonic(), have)
            if have >= images:
                break
            time.sleep(0.02)
        ended = time.monotonic()
        codes = [p.wait() for p in running]
    if any(codes) or started is None:
        raise RuntimeError(f"a command ended with {codes}; see {log}")
    return (images - started[1]) / (ended - started[0])


def actors(images: int, place: Path, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """One actor, two actors, two plain processes: interleaved rounds, medians."""
    ways: Mapping[str, Sequence[Sequence[str]]] = {
        "one actor": [("--ray", "local", "--ray-actors", "1")],
        "two actors": [("--ray", "local", "--ray-actors", "2")],
        "two processes": [("--workers", "1", "--shard-index", str(i), "--num-shards", "2") for i in range(2)],
        "one process": [("--workers", "1")],
    }
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, extras in ways.items():
            spec, out = _fresh(images, place, "actors")
            found[name].append(rate([command(spec, place, out, *x) for x in extras], out, images, place / "actors.log"))
            say(f"{name}: {found[name][-1]:.1f} images/s")
    middle = {name: round(statistics.median(values), 2) for name, values in found.items()}
    times = round(middle["two actors"] / middle["one actor"], 3)
    beside = round(middle["two actors"] / middle["two processes"], 3)
    return {"stage": "actors", "images": images, "rounds": rounds, "images_per_second": middle,
            "two_actors_times_one": times, "two_actors_times_two_processes": beside, "bar": ACTORS_BAR,
            "bar_reached": times >= ACTORS_BAR}  # fmt: skip


def _fresh(images: int, place: Path, name: str) -> tuple[SoakSpec, Path]:
    """An empty folder for a set, and the recipe."""
    spec, out = SoakSpec(images=images), place / name
    place.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out, ignore_errors=True)
    (place / "recipe.toml").write_text(RECIPE.format(groups=spec.groups_per_shard))
    return spec, out


def main() -> None:
    """Measure what is asked for, and print one JSON row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=("plan", "memory", "actors"), action="append")
    parser.add_argument("--images", type=int, default=20_000, help="of the memory run")
    parser.add_argument("--actor-images", type=int, default=4_000, help="of each run that is timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-ray", action="store_true", help="memory of one plain process")
    parser.add_argument("--out", type=Path, default=Path("out/scale"))
    parser.add_argument("--record", action="store_true", help="append the rows to bench/results/scale.jsonl")
    given = parser.parse_args()

    def say(line: str) -> None:
        print(line, flush=True)

    made: dict[str, Callable[[], dict[str, Any]]] = {
        "plan": planned,
        "memory": lambda: memory(given.images, given.out, not given.no_ray),
        "actors": lambda: actors(given.actor_images, given.out, given.rounds, say),
    }
    for stage in given.stage or made:
        row = stamped({"kind": "scale", **made[stage]()})
        say(json.dumps(row))
        if given.record:
            append_row("scale", row)


if __name__ == "__main__":
    main()
