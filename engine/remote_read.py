"""A set in a store read back: copied into a folder, or checked shard by shard."""

from collections.abc import Callable
from pathlib import Path

from synthkd.engine.checking import MOST_PROBLEMS, Verdict, check_finished, verdict
from synthkd.engine.index import read_manifest
from synthkd.engine.locks import folder_lock
from synthkd.engine.remote import RemoteSet
from synthkd.engine.stores import Store, checked_url
from synthkd.engine.verify import SetState, VerifyReport, open_state, settled


def fetched(
    url: str,
    folder: Path,
    on_known: Callable[[int], None] = lambda _: None,
    on_shard: Callable[[int], None] = lambda _: None,
) -> Path:
    """Copy a set at a URL into a folder; goes on where an earlier call ended, every shard checked by its digest.

    on_known: told how many images there are, on_shard: those of each shard that is here. Returns the folder. Raises
    SynthkdError where there is no set, or a shard is damaged.
    """
    remote = RemoteSet(Store(checked_url(url)), folder)
    folder.mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        remote.gather()
        read_manifest(folder)
        on_known(sum(row.samples for row in remote.rows()))
        for row in remote.rows():
            remote.bring(row)
            on_shard(row.samples)
    return folder


def verify_url(url: str, folder: Path, on_shard: Callable[[int], None] = lambda _: None) -> VerifyReport:
    """Check a set at a URL like one on disk, shard by shard, with the disk of one: each is fetched into `folder`.

    Raises SynthkdError where there is no readable set, or the store does not answer.
    """
    remote = RemoteSet(Store(checked_url(url)), folder)
    folder.mkdir(parents=True, exist_ok=True)
    remote.gather()
    state, problems, found, samples = open_state(folder), [], 0, 0
    problems += settled(state)
    found = len(problems)
    for shard in sorted({*range(state.plan.num_shards), *(row.shard for row in remote.rows())}):
        one = _verdict(remote, state, shard)
        problems += one.problems[: max(0, MOST_PROBLEMS - len(problems))]
        found += one.found
        samples += one.samples
        on_shard(one.samples)
    lines = tuple(line.replace(str(folder), url) for line in problems)
    return VerifyReport(samples, len(remote.rows()), lines, found)


def _verdict(remote: RemoteSet, state: SetState, shard: int) -> Verdict:
    row = next((row for row in remote.rows_of(shard)), None)
    if row is None:
        count = state.plan.shard_samples(shard)
        text = f"shard {shard}: not finished, or its files are not those of its row ({count} samples)"
        return verdict(shard, 0, [f"{text}; run the command that began the set again"])
    if shard >= state.plan.num_shards:
        return verdict(shard, 0, [f"{row.file}: lies outside the set, whose manifest counts fewer shards"])
    remote.store.fetch(row.file, remote.folder / row.file)
    try:
        return check_finished(remote.folder, state.plan, row)
    finally:
        remote.drop(row)
