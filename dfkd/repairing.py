"""Draws the groups that a repair needs: from the manifest alone, as they were drawn."""

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from synthkd.dfkd.replay import Again
from synthkd.engine.card import card_problems, describe_set, write_card
from synthkd.engine.diagnosis import Diagnosis, Need, diagnose, left_by_a_run
from synthkd.engine.encoders import encoder_of
from synthkd.engine.encoding import EncodedGroup, encode_group
from synthkd.engine.index import read_environments, read_manifest
from synthkd.engine.locks import folder_lock
from synthkd.engine.repair import mend_set
from synthkd.engine.rows import drop_rows, shard_name
from synthkd.engine.shards import disk_errors
from synthkd.engine.table import write_table
from synthkd.engine.verify import SetState, drop_notes, open_state, table_problems


@dataclass(frozen=True)
class Repaired:
    """What a repair did, or would do: how many shards it mended, what it left alone, whether it was stopped."""

    mended: int
    left: tuple[str, ...]
    stopped: bool = False


def repair_set(
    again: Again,
    *,
    dry_run: bool = False,
    checkers: int | None = 1,
    tell: Callable[[str], None] = lambda _: None,
    on_shard: Callable[[int], None] = lambda _: None,
    on_needs: Callable[[int], None] = lambda _: None,
    on_group: Callable[[], None] = lambda: None,
    on_mended: Callable[[int], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Repaired:
    """Mend a set where it is damaged or unfinished, and nowhere else; the result does not hang on how it was damaged.

    again: the set, and how its groups are drawn; checkers: processes that check it, None for as many as it is worth;
    tell: given lines on what is wrong and what was done; on_shard: samples of each shard that was checked;
    on_needs: how many groups will be drawn; on_group: called after each; on_mended: samples of each mended shard, when
    it is checked once more.
    Raises SynthkdError where manifest, model, teacher or a round's student are lost. Of a set that no diffusion model
    drew, damaged shards are removed for the command that made it.
    """
    folder = again.set_dir
    if dry_run:
        state = open_state(folder)
        found = diagnose(state, checkers, on_shard)
        if not _is_drawn_by_diffusion(state.manifest):
            return _released(state, found, tell, dry_run=True)
        _tell(found, tell)
        return Repaired(found.shards, found.left)
    with disk_errors(folder), folder_lock(folder):
        read_manifest(folder)
        if dropped := drop_rows(folder):
            tell(f"{folder}: {dropped} lines of its index are no rows of a set; they are taken out")
        state = open_state(folder)
        drop_notes(folder)
        found = diagnose(state, checkers, on_shard)
        if not _is_drawn_by_diffusion(state.manifest):
            return _released(state, found, tell)
        _tell(found, tell)
        on_needs(found.groups)
        left = mend_set(
            state, found, _Drawing(again, state), tell=tell, on_group=on_group, on_shard=on_mended,
            should_stop=should_stop,
        )  # fmt: skip
        if left is None:
            return Repaired(0, (), stopped=True)
        if not left:
            _describe(folder, bool(found.shards), tell)
    return Repaired(found.shards, (*found.left, *left))


def _is_drawn_by_diffusion(manifest: Mapping[str, Any]) -> bool:
    return bool(manifest["model_sha256"])


def _released(state: SetState, found: Diagnosis, tell: Callable[[str], None], dry_run: bool = False) -> Repaired:
    """Mend a set of a method that no diffusion model draws: shards that cannot be mended without it are removed.

    So the command that made the set finds them missing, and not only those whose size has changed.
    """
    folder, kind = state.folder, state.manifest["guidance"].get("kind", "")
    again = f"drawn by the method {str(kind)!r:.40}: run the command that made the set again, which draws it, or says "
    again += "that its run has to begin anew"
    small, gone = [m for m in found.mends if not m.count], [m for m in found.mends if m.count and m.discard]
    told = replace(found, mends=tuple(small), absent=())
    _tell(told, tell)
    left = list(found.left)
    for mend in gone:
        done = "would be removed" if dry_run else "removed"
        left.append(f"{mend.why} -> {shard_name(mend.shard)}: {done}, to be {again}")
    left += [f"{m.why} -> to be {again}" for m in found.mends if m.count and not m.discard]
    left += [f"shards {run[0]} to {run[-1]}: not begun, to be {again}" for run in found.absent]
    if not dry_run:
        left += mend_set(state, told, _nothing, tell=tell) or ()
        drop_rows(folder, {mend.shard for mend in gone})
        for mend in gone:
            for path in (*left_by_a_run(folder, mend.shard), folder / shard_name(mend.shard)):
                path.unlink(missing_ok=True)
        if not left:
            _describe(folder, bool(small), tell)
    return Repaired(len(small), tuple(left))


def _nothing(needs: Iterable[Need]) -> Generator[EncodedGroup, None, None]:
    """Draws nothing."""
    yield from ()


def _describe(folder: Path, mended: bool, tell: Callable[[str], None]) -> None:
    """Table and card of a set that was mended, and those that were damaged or stale themselves."""
    written = [write_table(folder)] if table_problems(folder) else []
    written += describe_set(folder) if mended else []
    if card_problems(folder):
        written += [path for path in [write_card(folder)] if path]
    for name in sorted({path.name for path in written}):
        tell(f"{name}: written again")


def _tell(found: Diagnosis, tell: Callable[[str], None]) -> None:
    for line in found.said():
        tell(line)


@dataclass(frozen=True)
class _Drawing:
    """Groups as they were drawn; runs of one round and one environment share a stream."""

    again: Again
    state: SetState

    def __call__(self, needs: Iterable[Need]) -> Generator[EncodedGroup, None, None]:
        environments = read_environments(self.again.set_dir)
        for (round_, key), run in groupby(needs, lambda need: (need.unit.round, need.environment)):
            yield from self._drawn(round_, environments.get(key, {}), run)

    def _drawn(
        self, round_: int, said: Mapping[str, Any], needs: Iterable[Need]
    ) -> Generator[EncodedGroup, None, None]:
        stream = self.again.stream(self.state.plan, round_, said)
        identity, here = stream.identity, stream.environment
        encoder = encoder_of(said, self.state.plan.recipe.image_format, self.again.device)
        batches = stream.draw(need.unit for need in needs)
        try:
            for batch in batches:
                yield encode_group(batch, identity, here, encoder)
        finally:
            if isinstance(batches, Generator):
                batches.close()

