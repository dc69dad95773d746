"""A million rows: `index.parquet` and the card written, verified and asked, with the memory that it takes.

`python -m synthkd.bench.table --record`; the set has rows and no images. One core: nothing here starts a thread.
"""

import argparse
import hashlib
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from synthkd.bench.record import append_row, stamped
from synthkd.engine.card import write_card
from synthkd.engine.config import Recipe, fingerprint
from synthkd.engine.index import FORMAT, MANIFEST
from synthkd.engine.plan import sample_key
from synthkd.engine.rows import GroupRow, ShardRow, lines_of, rows_path, shard_name
from synthkd.engine.table import Condition, check_table, select, write_table

SHARD_SAMPLES = 2000
# seconds, megabytes: said before the first run
PREDICTED = {"write": 14.0, "verify": 15.0, "query": 1.0, "card": 9.0, "peak_megabytes": 600}


def synthetic_set(folder: Path, count: int, classes: int = 100, shard_samples: int = SHARD_SAMPLES) -> None:
    """A format-2 set of `count` samples, a multiple of shard_samples, with rows as `synth` writes them; its tars are
    empty files."""
    group = 40
    recipe = Recipe(
        classes=tuple(f"class {i}" for i in range(classes)),
        prompts=("a photo of a {class}",),
        classes_per_group=min(classes, 10),
        samples_per_class=group // min(classes, 10),
        groups_per_shard=shard_samples // group,
    )
    (folder / "rows").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for shard in range(count // shard_samples):
        first = shard * shard_samples // group
        text = lines_of(_group(first + i, group, classes, rng) for i in range(shard_samples // group))
        rows_path(folder, shard).write_text(text)
        (folder / shard_name(shard)).touch()
        digest = hashlib.sha256(text.encode()).hexdigest()
        row = ShardRow(shard, shard_name(shard), shard_samples, 0, digest, shard_samples // group, digest)
        with (folder / "index.jsonl").open("a") as f:
            f.write(json.dumps(asdict(row)) + "\n")
    manifest = {
        "format": FORMAT, "fingerprint": fingerprint(recipe, 0, {}), "recipe": recipe.to_dict(), "guidance": {},
        "model_sha256": "", "seed": 0, "num_samples": count, "source": {"model": "embedded:digits"},
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _group(number: int, size: int, classes: int, rng: np.random.Generator) -> GroupRow:
    keys = [sample_key(number * size + i) for i in range(size)]
    digests = [f"{d:016x}" for d in rng.integers(0, 2**63, 2 * size).tolist()]
    names = [f"{key}.{kind}" for key in keys for kind in ("json", "png")]
    sizes, start = rng.integers(1500, 3000, size), number % 50 * size * 4096
    table: dict[str, list[Any]] = {
        "key": keys,
        "label": rng.integers(0, classes, size).tolist(),
        "confidence": rng.random(size).round(6).tolist(),
        "losses.bn": (50 * rng.random(size)).round(6).tolist(),
        "losses.ce": (5 * rng.random(size)).round(6).tolist(),
        "offset": list(range(start + 512, start + 512 + size * 4096, 4096)),
        "size": sizes.tolist(),
    }
    curves = {name: (10 * rng.random(12)).tolist() for name in ("bn", "ce")}
    seconds = dict.fromkeys(("denoise", "guide", "decode"), 0.5)
    members = dict(zip(names, digests, strict=True))
    return GroupRow(number, 0, size, start + size * 4096, "e3386c58fb196b6e", members, table, seconds, curves)


def measure(count: int) -> Mapping[str, Any]:
    """One row: seconds of each step, by the clock and of this process's work, and its peak resident memory."""
    folder = Path(tempfile.mkdtemp(prefix="table-"))
    try:
        synthetic_set(folder / "set", count)
        return _measured(folder / "set", count)
    finally:
        shutil.rmtree(folder)


def _measured(folder: Path, count: int) -> Mapping[str, Any]:
    before = _peak()
    where = [Condition("class", "==", "class 7"), Condition("confidence", ">", 0.99)]
    found: list[int] = []
    steps: dict[str, Callable[[], object]] = {
        "write": lambda: write_table(folder),
        "verify": lambda: found.append(len(check_table(folder))),
        "query": lambda: found.append(sum(1 for _ in select(folder, where))),
        "card": lambda: write_card(folder),
    }
    seconds, busy = {}, {}
    for name, step in steps.items():
        started, used = time.monotonic(), time.process_time()
        step()
        seconds[name] = round(time.monotonic() - started, 2)
        busy[name] = round(time.process_time() - used, 2)
    size = sum(path.stat().st_size for path in (folder / "rows").iterdir())
    return stamped({
        "rows": count, "shard_samples": SHARD_SAMPLES, "seconds": seconds, "cpu_seconds": busy,
        "total": round(sum(seconds.values()), 2),
        "problems": found[0], "selected": found[1], "peak_megabytes": _peak(), "before_megabytes": before,
        "json_megabytes": size // 2**20, "parquet_megabytes": (folder / "index.parquet").stat().st_size // 2**20,
        "predicted": PREDICTED if count == 10**6 else None,
    })  # fmt: skip


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    """Measure, print the row, and append it if that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10**6, help="a multiple of 2,000")
    parser.add_argument("--record", action="store_true", help="append the row to bench/results/table.jsonl")
    asked = parser.parse_args()
    row = measure(asked.rows)
    print(json.dumps(row, sort_keys=True))
    if asked.record:
        append_row("table", row)


if __name__ == "__main__":
    main()
