"""A synthesis job on the actors of a cluster."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.progress import Progress
from synthkd.engine import Plan
from synthkd.engine.distributed import Told, draw_on_cluster
from synthkd.engine.ray_runner import Session
from synthkd.engine.remote import RemoteSet
from synthkd.engine.rows import Part
from synthkd.engine.writer import WriteSummary, Writing


def draw_by_actors(
    session: Session,
    job: SynthJob,
    plan: Plan,
    folder: Path,
    stage: str,
    progress: Progress,
    should_stop: Callable[[], bool],
    shards: Sequence[int] | None = None,
    part: Part | None = None,
    writing: Writing | None = None,
    remote: RemoteSet | None = None,
) -> WriteSummary:
    """Draw a round of a job on the device that the cluster has; progress: told images, their rate and the actors."""
    began, drawn = time.monotonic(), 0

    def on_present(have: int) -> None:
        nonlocal began
        began = time.monotonic()  # actors are up
        progress.advance(stage, have)

    def on_batch(new: int) -> None:
        nonlocal drawn
        drawn += new
        progress.advance(stage, new)

    def on_actors(count: int) -> None:
        rate = drawn / max(time.monotonic() - began, 1e-9)
        progress.note(stage, f"{rate:.1f}/s by {count} actors")

    told = Told(on_batch=on_batch, on_present=on_present, on_actors=on_actors, should_stop=should_stop)
    there = replace(job, device=session.device)
    return draw_on_cluster(
        session, there.build, plan, folder, shards=shards, part=part, source=job.origin(), told=told, writing=writing,
        remote=remote,
    )  # fmt: skip
