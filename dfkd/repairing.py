"""Draws the groups that a repair needs: from the manifest alone, as they were drawn."""

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from synthkd.dfkd.replay import Again
from synthkd.engine.card import card_problems, describe_set, write_card
from synthkd.engine.diagnosis import Diagnosis, Need, diagnose
from synthkd.engine.encoders import encoder_of
from synthkd.engine.encoding import EncodedGroup, encode_group
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import read_environments, read_manifest
from synthkd.engine.locks import folder_lock
from synthkd.engine.repair import mend_set
from synthkd.engine.rows import drop_bad_rows
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
    should_stop: Callable[[], bool] = lambda: False,
) -> Repaired:
    """Mend a set where it is damaged or unfinished, and nowhere else; the result does not hang on how it was damaged.

    again: the set, and how its groups are drawn; checkers: processes that check it, None for as many as it is worth;
    tell: given lines on what is wrong and what was done; on_shard: samples of each shard that was checked;
    on_needs: how many groups will be drawn; on_group: called after each.
    Raises SynthkdError where manifest, model, teacher or a round's student are lost, or where something must be drawn
    that no diffusion model drew.
    """
    folder = again.set_dir
    if dry_run:
        found = diagnose(open_state(folder), checkers, on_shard)
        _tell(found, tell)
        return Repaired(len(found.mends), found.left)
    with disk_errors(folder), folder_lock(folder):
        read_manifest(folder)
        if dropped := drop_bad_rows(folder):
            tell(f"{folder}: {dropped} lines of its index are no rows of a set; they are taken out")
        state = open_state(folder)
        drop_notes(folder)
        found = diagnose(state, checkers, on_shard)
        _tell(found, tell)
        on_needs(sum(len(m.needs) for m in found.mends))
        left = mend_set(state, found, _Drawing(again, state), tell=tell, on_group=on_group, should_stop=should_stop)
        if left is None:
            return Repaired(0, (), stopped=True)
        if not left:
            _describe(folder, bool(found.mends), tell)
    return Repaired(len(found.mends), (*found.left, *left))


def _describe(folder: Path, mended: bool, tell: Callable[[str], None]) -> None:
    """Table and card of a set that was mended, and those that were damaged or stale themselves."""
    written = [write_table(folder)] if table_problems(folder) else []
    written += describe_set(folder) if mended else []
    if card_problems(folder):
        written += [path for path in [write_card(folder)] if path]
    for name in sorted({path.name for path in written}):
        tell(f"{name}: written again")


def _tell(found: Diagnosis, tell: Callable[[str], None]) -> None:
    for mend in found.mends:
        tell(f"{mend.why} -> {mend.said()}")


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
        refuse_other_methods(self.again.set_dir, self.state.manifest)
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


def refuse_other_methods(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise SynthkdError for a set that no diffusion model drew."""
    if not manifest["model_sha256"]:
        kind = manifest["guidance"].get("kind", "") if isinstance(manifest["guidance"], dict) else ""
        raise SynthkdError(
            f"{folder}: its images are those of the method {str(kind)!r:.40}, which no diffusion model draws; run the "
            "command that made the set again"
        )
