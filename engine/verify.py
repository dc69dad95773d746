"""Is a set complete and undamaged? Every problem is named by shard and member."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synthkd.engine.config import Recipe, Request
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import (
    checkpoint_digest,
    decoder_note,
    found_checkpoint,
    found_decoder,
    read_manifest,
    round_folder,
)
from synthkd.engine.plan import Plan
from synthkd.engine.reading import members
from synthkd.engine.rows import GroupRow, ShardRow, group_rows, read_index
from synthkd.engine.shards import file_digest, short_digest


@dataclass(frozen=True)
class VerifyReport:
    """samples and shards looked at, and one line per problem."""

    samples: int
    shards: int
    problems: tuple[str, ...]


def verify_set(folder: Path, on_shard: Callable[[int], None] = lambda _: None) -> VerifyReport:
    """Compare a set with its manifest and index; on_shard is called with each shard's sample count.

    Raises SynthkdError only where there is no readable manifest or index.
    """
    manifest, index = read_manifest(folder), read_index(folder)
    recipe = Recipe.from_dict(manifest["recipe"])
    plan = Plan(recipe, Request(num_samples=manifest["num_samples"], seed=manifest["seed"]))
    problems = [p for round_ in range(1, plan.num_rounds) for p in _checkpoint(folder, manifest, round_)]
    problems += _decoder(folder, manifest)
    for shard in range(plan.num_shards):
        if shard not in index:
            count = sum(u.kept for u in plan.shard_units(shard))
            problems.append(f"shard {shard}: not finished ({count} samples); run the command that began the set again")
            continue
        problems += _shard(folder, plan, index[shard])
        on_shard(index[shard].samples)
    return VerifyReport(sum(r.samples for r in index.values()), len(index), tuple(problems))


def _checkpoint(folder: Path, manifest: Mapping[str, Any], round_: int) -> list[str]:
    """Problems of the checkpoint that a round was drawn with."""
    wanted, found = checkpoint_digest(manifest, round_), found_checkpoint(folder, round_)
    if wanted is None:
        return [f"round {round_}: not begun; run the command that began the set again"]
    if found is None:
        name = round_folder(folder, round_).relative_to(folder)
        return [f"{name}: a file of its student is missing; run the command that drew the set again"]
    return [] if found == wanted else [f"rounds/round-{round_}: its student does not match the digest in the manifest"]


def _decoder(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Problems of the guidance decoder that was fitted for the set."""
    note = decoder_note(manifest)
    wanted, found = note.get("sha256"), found_decoder(folder)
    if wanted is None or found == wanted or note.get("chosen") == "vae":
        return []
    if found is None:
        return ["decoder: a file of the set's own decoder is missing; run the command that drew the set again"]
    return ["decoder: the set's own decoder does not match the digest in the manifest"]


def _shard(folder: Path, plan: Plan, row: ShardRow) -> list[str]:
    try:
        groups = group_rows(folder, row)
    except SynthkdError as error:
        return [str(error).partition("; run `synthkd repair")[0]]
    return _coverage(plan, row, groups) + check_shard(folder, row, groups)


def _coverage(plan: Plan, row: ShardRow, groups: list[GroupRow]) -> list[str]:
    kept = {g.group: g.kept for g in groups}
    return [
        f"{row.file}: group {u.group} has {kept.get(u.group, 0)} of {u.kept} samples"
        for u in plan.shard_units(row.shard)
        if kept.get(u.group, 0) < u.kept
    ]


def check_shard(folder: Path, row: ShardRow, groups: list[GroupRow]) -> list[str]:
    """Problems of one shard: damaged, missing and foreign members, truncation, a digest that does not fit."""
    path = folder / row.file
    wanted = {n: d for g in groups for n, d in g.members.items()}
    problems, seen = [], set()
    size = path.stat().st_size
    if size < row.bytes:
        problems.append(f"{row.file}: truncated to {size} of {row.bytes} bytes")
    try:
        for name, data in members(path):
            if name in seen or name not in wanted:
                problems.append(f"{row.file}: unexpected member {name}")
            elif wanted[name] != short_digest(data):
                problems.append(f"{row.file}: {name} does not match its digest (flipped bits)")
            seen.add(name)
    except SynthkdError as error:
        problems.append(str(error).partition("; run `synthkd verify")[0])
    problems += [f"{row.file}: {name} is missing" for name in sorted(wanted.keys() - seen)]
    if not problems and file_digest(path) != row.sha256:
        problems.append(f"{row.file}: SHA-256 differs from the index, though every member is right")
    return problems
