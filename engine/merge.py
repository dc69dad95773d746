"""Several folders of one set -> one: each shard copied whole and checked on its way, or refused by name.

A shard is in the new set when the index says so; a merge that was killed goes on when it is run again.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from synthkd.engine.card import describe_set
from synthkd.engine.environment import environment_key
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import (
    CHECKPOINT_FILES,
    CHECKPOINTS,
    DECODER,
    DECODER_FILES,
    MANIFEST,
    checkpoint_digest,
    claim_folder,
    decoder_folder,
    decoder_note,
    flatten,
    found_checkpoint,
    found_decoder,
    note_checkpoint,
    note_decoder,
    note_environment,
    read_environments,
    read_manifest,
    round_folder,
)
from synthkd.engine.locks import folder_lock
from synthkd.engine.rows import (
    INDEX,
    MAX_ROWS,
    ShardRow,
    append_line,
    gather_index,
    group_rows,
    mend_tail,
    read_index,
    rows_path,
    write_atomically,
)
from synthkd.engine.shards import disk_errors, journal_path, journalled, part_path
from synthkd.engine.untrusted import read_plain
from synthkd.engine.verify import SetState, open_state
from synthkd.export.artifacts import sync_folder

_BLOCK = 2**20
_NOT_DECLARED = ("format", "num_samples", "source", CHECKPOINTS, DECODER)


@dataclass(frozen=True)
class Merged:
    """A set after a merge: samples and shards it has, shards that came now, and the numbers of those it lacks."""

    samples: int
    shards: int
    new: int
    missing: tuple[int, ...]
    stopped: bool = False


@dataclass(frozen=True)
class _Place:
    """A finished shard in one of the folders."""

    folder: Path
    row: ShardRow

    def said(self) -> str:
        """Folder and environments, for people."""
        keys = sorted({key for group in group_rows(self.folder, self.row) for _, key, _ in group.runs})
        return f"{self.folder} ({self.row.sha256[:12]}, environments {', '.join(keys)})"


def merge_sets(
    sources: Sequence[Path],
    out: Path,
    *,
    link: bool = False,
    on_shard: Callable[[int], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Merged:
    """Put the finished shards of several folders into one, which may hold some of them already.

    link: hard links in place of copies; on_shard: called with the samples of each shard that is there;
    should_stop: asked after each shard.
    Raises SynthkdError, before a shard is copied, where the folders are not of one set, or where a shard of two has
    other bytes; and where a shard is damaged.
    """
    states = [open_state(folder) for folder in sources]
    if any(folder.resolve() == out.resolve() for folder in sources):
        raise SynthkdError(f"--out {out}: is one of the sets to merge; choose another folder")
    _refuse_others(states)
    chosen = _chosen(states)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with folder_lock(out):
            _claim(states, out)
            mend_tail(out / INDEX)
            have = read_index(out)
            _refuse_conflicts(out, have, chosen)
            new = 0
            for shard in sorted(chosen):
                new += _brought(chosen[shard], out, have.get(shard), link)
                on_shard(chosen[shard].row.samples)
                if should_stop():
                    return replace(_summary(out, new), stopped=True)
            return _described(out, new)


def gather_parts(folder: Path, on_shard: Callable[[int], None] = lambda _: None) -> Merged:
    """Put the rows of runs that shared a folder into the set's own index; raises SynthkdError while one still runs.

    on_shard: given the images of each shard of a whole set, whose table is written.
    """
    read_manifest(folder)
    with disk_errors(folder), folder_lock(folder):
        gather_index(folder)
        return _described(folder, 0, on_shard)


def _described(folder: Path, new: int, on_shard: Callable[[int], None] = lambda _: None) -> Merged:
    """A whole set gets its table and card."""
    done = _summary(folder, new)
    if not done.missing:
        describe_set(folder, on_shard)
    return done


def _summary(folder: Path, new: int) -> Merged:
    state, index = open_state(folder), read_index(folder)
    plan = state.plan
    missing = [n for n in range(plan.num_shards) if n not in index or index[n].samples < plan.shard_samples(n)]
    return Merged(sum(r.samples for r in index.values()), len(index), new, tuple(missing))


def _refuse_others(states: Sequence[SetState]) -> None:
    """Raise SynthkdError, which names the first difference, where two folders are not of one set."""
    first = states[0]
    for other in states[1:]:
        for name in ("fingerprint", "model_sha256"):
            if first.manifest[name] != other.manifest[name]:
                raise SynthkdError(_difference(first, other))
        _same_note(first, other)


def _difference(first: SetState, other: SetState) -> str:
    parts = ("recipe", "seed", "guidance", "model_sha256")
    ours, theirs = (flatten({p: s.manifest[p] for p in parts}) for s in (first, other))
    names = sorted(ours.keys() | theirs.keys(), key=lambda n: (parts.index(n.partition(".")[0]), n))
    name = next((n for n in names if ours.get(n) != theirs.get(n)), "fingerprint")
    here, there = (str(side.get(name, "nothing"))[:60] for side in (ours, theirs))
    return (
        f"{other.folder}: another set than {first.folder} ({name} is {there} there, {here} here); only folders of one "
        "recipe, seed, model and teacher can be merged"
    )


def _same_note(first: SetState, other: SetState) -> None:
    """What both settled before their images must be the same."""
    rounds = range(1, min(first.plan.num_rounds, other.plan.num_rounds))
    pairs = [
        (f"the student of round {r}", checkpoint_digest(first.manifest, r), checkpoint_digest(other.manifest, r))
        for r in rounds
    ]
    ours, theirs = decoder_note(first.manifest), decoder_note(other.manifest)
    pairs += [(f"the decoder's {name}", ours.get(name), theirs.get(name)) for name in ("chosen", "sha256")]
    for what, here, there in pairs:
        if None not in (here, there) and here != there:
            raise SynthkdError(
                f"{other.folder}: {what} is not that of {first.folder} ({str(there)[:12]} there, {str(here)[:12]} "
                "here), so their images are of two sets; draw one of them again in the other's folder"
            )


def _chosen(states: Sequence[SetState]) -> dict[int, _Place]:
    """Where each shard is taken from; raises SynthkdError where two folders have other bytes for it."""
    chosen: dict[int, _Place] = {}
    for state in states:
        for shard, row in state.index.items():
            if not (state.folder / row.file).is_file():
                continue
            place = _Place(state.folder, row)
            chosen[shard] = _larger(chosen[shard], place) if shard in chosen else place
    return chosen


def _refuse_conflicts(out: Path, have: dict[int, ShardRow], chosen: dict[int, _Place]) -> None:
    """Keep what is in the new folder already where it is as large; raise SynthkdError where its bytes are others."""
    for shard in chosen.keys() & have.keys():
        if not _begun(chosen[shard].row, have[shard], out):
            chosen[shard] = _larger(_Place(out, have[shard]), chosen[shard])


def _begun(row: ShardRow, have: ShardRow, out: Path) -> bool:
    """Whether a merge that was killed had begun to put a larger state of a shard into `out`: its groups came first."""
    if row.samples <= have.samples or have.rows == row.rows:
        return False
    with contextlib.suppress(OSError, SynthkdError):
        return hashlib.sha256(read_plain(rows_path(out, row.shard), out, MAX_ROWS)).hexdigest() == row.rows
    return False


def _larger(a: _Place, b: _Place) -> _Place:
    """The one of two places that has all of a shard; the first where they are the same."""
    if a.row.sha256 == b.row.sha256:
        return a
    small, large = sorted((a, b), key=lambda place: place.row.samples)
    if small.row.samples < large.row.samples:  # it has grown since
        mine, whole = (
            {n: d for g in group_rows(p.folder, p.row) for n, d in g.members.items()} for p in (small, large)
        )
        if mine.items() <= whole.items():
            return large
    raise SynthkdError(
        f"{a.row.file}: its bytes are not the same in {a.said()} and {b.said()}; images of two environments differ, so "
        "delete the shard in one of the folders and merge again"
    )


def _claim(states: Sequence[SetState], out: Path) -> None:
    """Make the new folder this set's: manifest, students, decoder, environments."""
    first, most = states[0], max(state.plan.request.num_samples for state in states)
    identity = {name: value for name, value in first.manifest.items() if name not in _NOT_DECLARED}
    if (out / MANIFEST).exists():
        _same_note(first, open_state(out))
    claim_folder(out, identity, most, _table(first.manifest.get("source")))
    for state in states:
        for key, detail in read_environments(state.folder).items():
            if environment_key(detail) == key:
                note_environment(out, detail)
        for round_ in range(1, state.plan.num_rounds):
            _student(state, out, round_)
        _decoder(state, out)


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _student(state: SetState, out: Path, round_: int) -> None:
    """Bring the student that a round was drawn with."""
    wanted = checkpoint_digest(state.manifest, round_)
    if wanted is None or checkpoint_digest(read_manifest(out), round_) == wanted == found_checkpoint(out, round_):
        return
    where, name = round_folder(state.folder, round_), f"the student of round {round_}"
    _refuse_damaged(where, name, found_checkpoint(state.folder, round_), wanted)
    _copy_files(where, round_folder(out, round_), CHECKPOINT_FILES)
    note_checkpoint(out, round_, wanted)


def _decoder(state: SetState, out: Path) -> None:
    """Bring what the set's guidance looked through."""
    note = decoder_note(state.manifest)
    if not note or decoder_note(read_manifest(out)) == note:
        return
    if "sha256" in note and note.get("chosen") != "vae":
        _refuse_damaged(decoder_folder(state.folder), "the decoder", found_decoder(state.folder), note["sha256"])
        _copy_files(decoder_folder(state.folder), decoder_folder(out), DECODER_FILES)
    note_decoder(out, note)


def _refuse_damaged(where: Path, name: str, found: str | None, wanted: str) -> None:
    if found != wanted:
        raise SynthkdError(f"{where}: {name} is missing or damaged; run the command that drew that set again")


def _copy_files(source: Path, target: Path, names: Sequence[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / f"{name}.tmp")
        (target / f"{name}.tmp").replace(target / name)


def _brought(place: _Place, out: Path, have: ShardRow | None, link: bool) -> int:
    """Bring a shard with its groups; 1 where it was not there."""
    row, tar = place.row, out / place.row.file
    there = have is not None and have.sha256 == row.sha256 and tar.stat().st_size == row.bytes
    if place.folder == out or (there and rows_path(out, row.shard).is_file()):
        return 0
    if _under_way(out, row.shard) > row.samples:
        return 0  # a run has drawn more of it here, and goes on
    group_rows(place.folder, row)  # whose digest is that of the index
    for path in (journal_path(out, row.shard), part_path(out, row.shard)):  # of a shard that was not finished here
        path.unlink(missing_ok=True)
    fresh = out / f".{row.file}.merge"
    fresh.unlink(missing_ok=True)
    _tar(place, fresh, link)
    listed = rows_path(out, row.shard)
    listed.parent.mkdir(exist_ok=True)
    write_atomically(listed, rows_path(place.folder, row.shard).read_text(encoding="utf-8"))
    fresh.replace(tar)
    sync_folder(out)
    revision = row.revision if have is None else max(row.revision, have.revision + 1)
    append_line(out / INDEX, asdict(replace(row, revision=revision)))
    return 1


def _under_way(out: Path, shard: int) -> int:
    """Samples of a shard that grows in `out`, and that no index row counts yet."""
    with contextlib.suppress(SynthkdError, OSError):
        return sum(group.kept for group in journalled(out, shard).values())
    return 0


def _tar(place: _Place, target: Path, link: bool) -> None:
    """A shard's tar at its new place, its digest checked on the way; raises SynthkdError where that is not right."""
    source = place.folder / place.row.file
    if link:
        _link(source, target)
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        copy = None if link else stack.enter_context(target.open("wb"))
        for block in _blocks(source):
            digest.update(block)
            if copy:
                copy.write(block)
        if copy:
            copy.flush()
            os.fsync(copy.fileno())
    if digest.hexdigest() != place.row.sha256:
        target.unlink()
        raise SynthkdError(f"{source}: does not match its digest in the index; run `synthkd repair {place.folder}`")


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as f:
        while block := f.read(_BLOCK):
            yield block


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        raise SynthkdError(
            f"--link: {source} cannot be linked into {target.parent} ({error.strerror}); merge without --link, or on "
            "one file system that has hard links"
        ) from error
