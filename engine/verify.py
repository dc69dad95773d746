"""Is a set complete and undamaged? Every problem is named by shard and member.

Shards are checked one after another, in this process or in several; what is kept does not grow with the images. A check
that is to be gone on with notes each shard that was found right in `.verify.jsonl`, and drops that file at its end.
"""

import contextlib
import hashlib
import json
import multiprocessing as mp
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from synthkd.engine.card import card_problems
from synthkd.engine.checking import MOST_PROBLEMS, Stamp, Verdict, check_finished, stamp_of, verdict
from synthkd.engine.config import Recipe, Request
from synthkd.engine.environment import environment_key
from synthkd.engine.errors import SynthkdError, WorkerLostError
from synthkd.engine.index import (
    ENVIRONMENTS,
    MANIFEST,
    checkpoint_digest,
    decoder_note,
    found_checkpoint,
    found_decoder,
    read_environments,
    read_manifest,
    round_folder,
)
from synthkd.engine.plan import Plan
from synthkd.engine.pool import follow_parent
from synthkd.engine.rows import ShardRow, read_index, shard_name
from synthkd.engine.shards import journal_path
from synthkd.engine.table import check_table
from synthkd.engine.untrusted import append_plain, open_plain, read_plain
from synthkd.engine.workers import cores

NOTES = ".verify.jsonl"
_MAX_STAMP = 2**20  # bytes of a line of it
MOST_SHARDS, MOST_OF_A_SHARD = 10**7, 10**6  # above them a check would not end, or not fit
_MUCH = 2 * 2**30, 200_000  # bytes or samples from which processes are worth their start
_CONTEXT = "fork" if sys.platform == "linux" else "spawn"  # a fork starts at once, and its networks' code is shared
_SHARD_FILE = re.compile(r"shard-(\d{6,})\.tar(\.part|\.journal|\.fresh|\.lock[\w.-]*)?")


@dataclass(frozen=True)
class VerifyReport:
    """samples and shards looked at, and one line per problem.

    problems: the first of them; found: how many there are; resumed: shards that an earlier check had found right;
    stopped: whether it ended before its end.
    """

    samples: int
    shards: int
    problems: tuple[str, ...]
    found: int = 0
    resumed: int = 0
    stopped: bool = False


@dataclass(frozen=True)
class SetState:
    """What a check starts from: a set's manifest, plan and index, with the rows of shards whose file is lost."""

    folder: Path
    manifest: dict[str, Any]
    plan: Plan
    index: dict[int, ShardRow]


def open_state(folder: Path) -> SetState:
    """Raises SynthkdError where there is no readable manifest or index."""
    manifest = read_manifest(folder)
    recipe = Recipe.from_dict(manifest["recipe"])
    plan = Plan(recipe, Request(num_samples=manifest["num_samples"], seed=manifest["seed"]))
    if plan.num_shards > MOST_SHARDS or plan.shard_samples(0) > MOST_OF_A_SHARD or recipe.group_size > MOST_OF_A_SHARD:
        raise SynthkdError(
            f"{folder}: its manifest plans {plan.num_shards} shards of {plan.shard_samples(0)} images in groups of "
            f"{recipe.group_size}; expected at most {MOST_SHARDS} shards and {MOST_OF_A_SHARD} images in each"
        )
    return SetState(folder, manifest, plan, read_index(folder, missing=True))


def verify_set(
    folder: Path,
    on_shard: Callable[[int], None] = lambda _: None,
    *,
    workers: int | None = 1,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> VerifyReport:
    """Compare a set with its manifest and index; on_shard is called with each finished shard's sample count.

    workers: processes, None for as many as the set is worth; resume: go on from the notes of a check that was ended,
    and keep such notes; should_stop: asked after each shard.
    Raises SynthkdError only where there is no readable manifest or index.
    """
    state = open_state(folder)
    problems, found, keys, resumed = settled(state), 0, set[str](), 0
    found = len(problems)
    notes = _Notes(state) if resume else None
    known = notes.right() if notes else {}
    with contextlib.closing(checked(state, workers, known)) as verdicts:
        for one in verdicts:
            problems += one.problems[: max(0, MOST_PROBLEMS - len(problems))]
            found += one.found
            keys |= one.environments
            if one.shard in state.index:
                on_shard(one.samples)
            if one.shard in known:
                resumed += 1
            elif notes and not one.found:
                notes.add(one)
            if should_stop():
                return _report(state, problems, found, resumed, stopped=True)
    rest = [*_environments(state, keys), *leftovers(state)]
    rest += told_problems(folder) if not found else []  # they are made of the rows, and mended after them
    if notes:
        notes.drop()
    return _report(state, problems + rest, found + len(rest), resumed)


def _report(state: SetState, problems: list[str], found: int, resumed: int, stopped: bool = False) -> VerifyReport:
    rows = [row for row in state.index.values() if (state.folder / row.file).exists()]
    lines = tuple(problems[:MOST_PROBLEMS])
    return VerifyReport(sum(r.samples for r in rows), len(rows), lines, found, resumed, stopped)


def checked(
    state: SetState, workers: int | None = 1, known: Mapping[int, Stamp] | None = None
) -> Generator[Verdict, None, None]:
    """A verdict on each shard of the plan, then on those of the index that lie outside, in order.

    known: stamps of shards that need no second look.
    """
    known, outside = known or {}, sorted(n for n in state.index if n >= state.plan.num_shards)
    work = [row for n, row in state.index.items() if n not in known and n < state.plan.num_shards]
    look: Callable[[ShardRow], Verdict] = partial(check_finished, state.folder, state.plan)
    with _looking(look, _processes(workers, work)) as submit:
        waiting: deque[Verdict | Future[Verdict]] = deque()
        for shard in range(state.plan.num_shards):
            waiting.append(_begun(state, shard, known, submit))
            if len(waiting) > 4 * submit.width:
                yield _done(waiting.popleft())
        while waiting:
            yield _done(waiting.popleft())
    for shard in outside:
        lines = [f"{shard_name(shard)}: lies outside the set, whose manifest counts {state.plan.num_shards} shards"]
        yield verdict(shard, state.index[shard].samples, lines)


def _begun(state: SetState, shard: int, known: Mapping[int, Stamp], submit: "_Looking") -> "Verdict | Future[Verdict]":
    """The check of one shard, under way; a verdict at once where there is nothing to read."""
    row = state.index.get(shard)
    if row is None:
        return _absent(state, shard)
    if shard in known:
        return verdict(shard, row.samples, [], known[shard].get("environments", ()))
    return submit(row)


def _absent(state: SetState, shard: int) -> Verdict:
    """Of a shard without a row in the index."""
    count = state.plan.shard_samples(shard)
    if (state.folder / shard_name(shard)).exists() and not journal_path(state.folder, shard).exists():
        return verdict(shard, 0, [f"{shard_name(shard)}: has no row in the index ({count} samples)"])
    text = f"shard {shard}: not finished ({count} samples); run the command that began the set again"
    return verdict(shard, 0, [text])


class _Looking:
    """Looks at shards: in this process, or in those of a pool."""

    def __init__(self, look: Callable[[ShardRow], Verdict], pool: ProcessPoolExecutor | None, width: int) -> None:
        self._look, self._pool, self.width = look, pool, width

    def __call__(self, row: ShardRow) -> "Verdict | Future[Verdict]":
        return self._pool.submit(self._look, row) if self._pool else self._look(row)


@contextlib.contextmanager
def _looking(look: Callable[[ShardRow], Verdict], workers: int) -> Iterator[_Looking]:
    if workers < 2:
        yield _Looking(look, None, 0)
        return
    pool = ProcessPoolExecutor(workers, mp.get_context(_CONTEXT), initializer=_start)
    try:
        yield _Looking(look, pool, workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the caller's way to stop
    follow_parent()


def _done(one: "Verdict | Future[Verdict]") -> Verdict:
    if isinstance(one, Verdict):
        return one
    try:
        return one.result()
    except BrokenProcessPool as error:
        raise WorkerLostError(
            "a process of verify ended unasked (out of memory?); use fewer --workers and run the same command again"
        ) from error


def _processes(workers: int | None, work: list[ShardRow]) -> int:
    """As many as were asked for, or as the work is worth; never more than shards."""
    if workers is None:
        much = sum(r.bytes for r in work) > _MUCH[0] or sum(r.samples for r in work) > _MUCH[1]
        workers = cores() if much else 1
    return min(workers, len(work))


class _Notes:
    """Shards that were found right, in the set's folder; where that is no plain file of it, nothing is noted."""

    def __init__(self, state: SetState) -> None:
        self._state, self._path = state, state.folder / NOTES
        self._manifest = hashlib.sha256(read_plain(state.folder / MANIFEST, state.folder)).hexdigest()

    def right(self) -> dict[int, Stamp]:
        """Stamps of shards that are as they were when they were found right, under the same manifest."""
        out: dict[int, Stamp] = {}
        with contextlib.suppress(OSError, SynthkdError), _opened(self._path, self._state.folder) as f:
            while line := f.readline(_MAX_STAMP):
                said = _stamp(line)
                row = self._state.index.get(said.get("shard", -1))
                if row is None or said.get("manifest") != self._manifest:
                    continue
                now = stamp_of(self._state.folder, row)
                if now["tar"] and all(said.get(name) == value for name, value in now.items()):
                    out[row.shard] = said
        return out

    def add(self, one: Verdict) -> None:
        """Note a shard; a line is whole or it does not count."""
        line = {**one.stamp, "manifest": self._manifest, "environments": sorted(one.environments)}
        with contextlib.suppress(OSError, SynthkdError), os.fdopen(append_plain(self._path), "a") as f:
            f.write("\n" + json.dumps(line) + "\n")

    def drop(self) -> None:
        """The check came to its end."""
        drop_notes(self._state.folder)


def _opened(path: Path, home: Path) -> IO[bytes]:
    return open(open_plain(path, home), "rb")  # noqa: PTH123


def _stamp(line: bytes) -> Stamp:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    sound = isinstance(said, dict) and type(said.get("shard")) is int and isinstance(said.get("environments"), list)
    return said if sound and all(isinstance(key, str) for key in said["environments"]) else {}


def drop_notes(folder: Path) -> None:
    """Forget what an earlier check had found."""
    with contextlib.suppress(OSError):
        (folder / NOTES).unlink(missing_ok=True)


def settled(state: SetState) -> list[str]:
    """Problems of what a set settled before its images."""
    rounds = range(1, state.plan.num_rounds)
    problems = [p for round_ in rounds for p in _checkpoint(state.folder, state.manifest, round_)]
    return problems + _decoder(state.folder, state.manifest)


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


def _environments(state: SetState, keys: set[str]) -> list[str]:
    """Keys that nothing explains; an empty one is of groups whose environment was lost, and says so itself."""
    known = read_environments(state.folder)
    problems = [f"{ENVIRONMENTS}/{key:.80}.json: is missing or damaged" for key in sorted(keys - known.keys() - {""})]
    wrong = [key for key in sorted(known.keys() & keys) if environment_key(known[key]) != key]
    return problems + [f"{ENVIRONMENTS}/{key}.json: is not what its name is the digest of" for key in wrong]


def leftovers(state: SetState) -> list[str]:
    """Files of shards that no run will pick up again, and names that no shard has."""
    problems = []
    with os.scandir(state.folder) as entries:
        for name in sorted(e.name for e in entries if e.name.startswith("shard-")):
            found = _SHARD_FILE.fullmatch(name)
            if found is None or shard_name(int(found[1])) != name.removesuffix(found[2] or ""):
                problems.append(f"{name:.120}: no file of a set has this name")
                continue
            if (said := _leftover(state, int(found[1]), found[2] or "")) is not None:
                problems.append(f"{name}: {said}")
    return problems


def _leftover(state: SetState, shard: int, kind: str) -> str | None:
    row, journal = state.index.get(shard), journal_path(state.folder, shard).exists()
    if shard >= state.plan.num_shards:
        return None if kind.startswith(".lock") or row else f"lies outside the set of {state.plan.num_shards} shards"
    if kind == ".journal" and row is not None and row.samples >= state.plan.shard_samples(shard):
        return "left by a run that was killed; the shard is in the index"
    if kind in (".part", ".fresh") and not journal:
        return "left by a run that was killed, without a journal that vouches for it"
    return None


def told_problems(folder: Path) -> list[str]:
    """Problems of the set's Parquet table and of its card, where it has them."""
    return table_problems(folder) + _said(card_problems, folder)


def table_problems(folder: Path) -> list[str]:
    """Problems of the set's Parquet table, where it has one."""
    return _said(check_table, folder)


def _said(look: Callable[[Path], list[str]], folder: Path) -> list[str]:
    try:
        return look(folder)
    except SynthkdError as error:
        return [str(error)]
