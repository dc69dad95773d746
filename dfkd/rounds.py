"""A set round by round: between rounds a student is trained on what is there, and the next round disagrees with it.

The rounds of a set are fixed by its recipe, so a set can grow; each round's student is a function of the rounds before,
is kept in the set's folder, and its digest is in the manifest.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from synthkd.dfkd.cluster import draw_by_actors
from synthkd.dfkd.decoding import settle_decoder
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.progress import Progress, Silent
from synthkd.dfkd.sets import open_set
from synthkd.dfkd.student import Hooks, Stopped, TrainOptions, distill, save_student
from synthkd.dfkd.teachers import load_teacher
from synthkd.dfkd.training import CHECKPOINT
from synthkd.engine import Plan, Request, SynthkdError
from synthkd.engine.card import describe_set
from synthkd.engine.config import AUTO_PIXELS
from synthkd.engine.encoders import check_encoder
from synthkd.engine.errors import NotYetError
from synthkd.engine.index import (
    MANIFEST,
    checkpoint_digest,
    claim_folder,
    found_checkpoint,
    note_checkpoint,
    read_manifest,
    round_folder,
)
from synthkd.engine.locks import settle_lock
from synthkd.engine.ray_runner import ClusterSpec, Session, connected
from synthkd.engine.remote import RemoteSet
from synthkd.engine.rows import Part, read_index
from synthkd.engine.runner import open_stream
from synthkd.engine.shards import write_shards
from synthkd.engine.workers import default_workers, one_thread
from synthkd.engine.writer import WriteSummary, Writing, note_run

_log = logging.getLogger("synthkd")
_LASTING = ("step", "loss", "lr", "agreement")


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """How a set is drawn; no image hangs on any of it.

    shards: their order, all by default, or all of the part; part: which of several runs that share the folder this is;
    deadline: seconds that a group may take (see `open_stream`); writing: encoder, its threads, groups under way;
    cluster: draw on the actors of a Ray cluster instead of processes of this machine; remote: where finished shards go,
    for which the folder is a spool then (see `engine.remote.open_output`).
    """

    shards: Sequence[int] | None = None
    part: Part | None = None
    deadline: float | None = None
    writing: Writing | None = None
    cluster: ClusterSpec | None = None
    remote: RemoteSet | None = None

    def order(self, plan: Plan) -> Sequence[int]:
        """The shards of a plan that are wanted, as they come."""
        whole = range(plan.num_shards) if self.part is None else self.part.shards(plan.num_shards)
        return whole if self.shards is None else self.shards


def draw_set(
    job: SynthJob,
    request: Request,
    folder: Path,
    stage: str = "synthesize",
    workers: int | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    how: DrawOptions = DrawOptions(),
) -> WriteSummary:
    """Draw a job's set into a folder, round by round, on several processes where the device is a CPU.

    What is there already is kept; a complete set gets its table and card. Raises SynthkdError where a round is asked
    for before the rounds that teach its student are there.
    """
    job.check()
    if how.cluster is None:
        encoder, count = (how.writing or Writing()).encoder, workers or default_workers(job.device)
        check_encoder(encoder, job.recipe.image_format, torch.device(job.device).type, count)
    if how.remote is None:
        return _draw_set(job, request, folder, stage, workers, progress or Silent(), should_stop, how)
    _check_nodes(job, how)
    with how.remote.held(how.part):
        how.remote.prepare()
        return _draw_set(job, request, folder, stage, workers, progress or Silent(), should_stop, how)


def _draw_set(
    job: SynthJob,
    request: Request,
    folder: Path,
    stage: str,
    workers: int | None,
    told: Progress,
    should_stop: Callable[[], bool],
    how: DrawOptions,
) -> WriteSummary:
    """See `draw_set`; where finished shards go elsewhere, no other run writes there."""
    plan = Plan(job.recipe, request)
    settled = settle_decoder(job, folder, request, told, should_stop, how.part)
    if settled is None:
        return WriteSummary(0, 0, True)
    job, order, summary = settled, how.order(plan), WriteSummary(0, 0, False)
    _say_what_gamma_does(job, plan)
    if not any(s in plan.round_shards(0) for s in order):
        _claim(job, request, folder, how.part)
    told.begin(stage, sum(plan.shard_samples(s) for s in order), "images")
    with ExitStack() as stack:
        stack.callback(told.end, stage)
        session = stack.enter_context(connected(how.cluster)) if how.cluster else None
        drawing = _Drawing(plan, folder, stage, workers or default_workers(job.device), told, should_stop, how, session)
        try:
            for round_ in range(plan.num_rounds):
                mine = order if plan.num_rounds == 1 else [s for s in order if s in plan.round_shards(round_)]
                if not mine:
                    continue
                student = None
                with _rounds_before(how.remote, folder, plan, round_):
                    if round_:
                        student = ensure_student(job, folder, round_, request, told, should_stop, how.part)
                if round_ and student is None:
                    summary = replace(summary, stopped=True)
                else:
                    summary = summary.then(drawing.draw(job.at_round(round_, student), mine))
                if summary.stopped:
                    break
        finally:
            note_run(folder, summary, how.writing)
    if not summary.stopped and how.remote is not None:
        how.remote.finish(plan.num_shards)
    elif not summary.stopped:
        describe_set(folder)
    return summary


def _check_nodes(job: SynthJob, how: DrawOptions) -> None:
    """Raise SynthkdError where the nodes of a cluster would need files of the set's folder, which they do not see."""
    own = job.recipe.rounds > 1 or (
        job.recipe.guidance.decoder == "auto" and max(job.recipe.height, job.recipe.width) > AUTO_PIXELS
    )
    if how.cluster is not None and own:
        raise SynthkdError(
            "--ray with a URL: rounds and a decoder of the set's own need files that every node sees; write to a "
            "shared folder, or use --shard-index and --num-shards"
        )


@contextlib.contextmanager
def _rounds_before(remote: RemoteSet | None, folder: Path, plan: Plan, round_: int) -> Iterator[None]:
    """Within it the shards of the rounds before are in the spool, where a round's student has to be trained on them."""
    if remote is None or round_ == 0:
        yield
        return
    remote.prepare()  # other parts may have finished shards, or have trained the student
    try:
        student_card(folder, round_)
        needed = range(0)
    except SynthkdError:
        needed = range(plan.round_shards(round_).start)
    with remote.brought(needed):
        yield


@dataclass(frozen=True)
class _Drawing:
    """A set on its way, for the rounds of it."""

    plan: Plan
    folder: Path
    stage: str
    workers: int
    told: Progress
    should_stop: Callable[[], bool]
    how: DrawOptions
    session: Session | None

    def draw(self, job: SynthJob, shards: Sequence[int]) -> WriteSummary:
        """Draw some shards, all of one round, with the job of that round."""
        told, stage, how = self.told, self.stage, self.how
        if self.session is not None:
            return draw_by_actors(
                self.session, job, self.plan, self.folder, stage, told, self.should_stop, shards, how.part, how.writing,
                how.remote,
            )  # fmt: skip
        return write_shards(
            open_stream(job.build, self.plan, self.workers, how.deadline),
            self.folder,
            shards=shards,
            part=how.part,
            source=job.origin(),
            writing=how.writing,
            on_batch=lambda n: told.advance(stage, n),
            on_present=lambda n: told.advance(stage, n),
            should_stop=self.should_stop,
            remote=how.remote,
        )


def _claim(job: SynthJob, request: Request, folder: Path, part: Part | None) -> None:
    """Compare a folder with the job where no first round will do so before a student is trained on what it holds."""
    if (folder / MANIFEST).exists():
        identity = job.build().identity(request.seed)
        with settle_lock(folder, part):
            claim_folder(folder, identity, request.num_samples, job.origin())


def _say_what_gamma_does(job: SynthJob, plan: Plan) -> None:
    if job.gamma > 0 and plan.num_rounds == 1:
        _log.warning(
            "gamma is %s, but %s images end within the first round, which no student has part in; draw more, or lower "
            "groups_per_round and groups_per_shard",
            job.gamma,
            plan.request.num_samples,
        )


def student_card(folder: Path, round_: int) -> Path | None:
    """Card of the student that a round was drawn with; None for the first round.

    Raises SynthkdError where card or weights are missing, or are not those that the manifest names.
    """
    if round_ == 0:
        return None
    where, wanted = round_folder(folder, round_), checkpoint_digest(read_manifest(folder), round_)
    if wanted is None or found_checkpoint(folder, round_) != wanted:
        raise SynthkdError(
            f"{where}: the student that round {round_} was drawn with is missing or damaged; run the command that drew "
            "the set again, which trains it anew"
        )
    return where / "student.toml"


def ensure_student(
    job: SynthJob,
    folder: Path,
    round_: int,
    request: Request,
    progress: Progress,
    should_stop: Callable[[], bool] = lambda: False,
    part: Part | None = None,
) -> Path | None:
    """The card of a round's student: the kept one, or trained now on all images of the rounds before; None if stopped.

    Raises SynthkdError where those are not finished, or where training anew gives another student than the one that
    the manifest names (another processor or library).
    """
    if not folder.exists():
        _before(job, folder, round_, request, part)
    with settle_lock(folder, part):
        try:
            return student_card(folder, round_)
        except SynthkdError:
            known = checkpoint_digest(read_manifest(folder), round_)
        count = _before(job, folder, round_, request, part)
        try:
            card = _train(job, folder, round_, count, request.seed, progress, should_stop)
        except Stopped:
            return None
        found = found_checkpoint(folder, round_)
        if found is None or known not in (None, found):
            raise SynthkdError(
                f"{folder}: the student of round {round_} was lost, and training it anew gave another one (another "
                "processor or library?); draw the set again in a new folder"
            )
        note_checkpoint(folder, round_, found)
        return card


def _as_ever(device: str) -> TrainOptions:
    """How a round's student is trained wherever the set is: nothing that is chosen by measurement."""
    return TrainOptions(device=device, reader="torch", threads=1, compile="off" if device == "cpu" else "auto")


def _before(job: SynthJob, folder: Path, round_: int, request: Request, part: Part | None) -> int:
    """Number of images in the rounds before; raises SynthkdError where a shard of them is missing."""
    plan = Plan(job.recipe, request)
    last = plan.round_shards(round_).start
    have = read_index(folder) if folder.exists() else {}
    missing = [s for s in range(last) if s not in have]
    if missing and part is not None:
        raise NotYetError(
            f"{folder}: round {round_} needs the rounds before it, and shard {missing[0]} is another part's, or not "
            "finished; the same command goes on when it is there"
        )
    if missing:
        raise SynthkdError(
            f"{folder}: round {round_} needs the rounds before it; shard {missing[0]} is not finished: draw shards 0 "
            f"to {last - 1} first"
        )
    return sum(u.kept for s in range(last) for u in plan.shard_units(s))


def _train(
    job: SynthJob,
    folder: Path,
    round_: int,
    count: int,
    seed: int,
    progress: Progress,
    should_stop: Callable[[], bool],
) -> Path:
    """Train and save a round's student, on a CPU with one thread; a function of (set so far, spec, seed, round).

    Raises Stopped where that is asked for; its checkpoint is gone on from.
    """
    spec = replace(job.round_student, seed=(seed + round_) % 2**63)
    teacher = load_teacher(job.teacher, job.device, allow_code=job.allow_code)
    source, stage, where, done = open_set(folder, count), f"student of round {round_}", round_folder(folder, round_), 0

    def on_step(step: int) -> None:
        nonlocal done
        progress.advance(stage, step - done)
        done = step

    where.mkdir(parents=True, exist_ok=True)
    progress.begin(stage, spec.steps, "steps")
    try:
        with one_thread(job.device):
            hooks = Hooks(on_step=on_step, should_stop=should_stop)
            student = distill(
                source, teacher, spec, options=_as_ever(job.device), folder=where, labels_root=folder, hooks=hooks
            )
    finally:
        progress.end(stage)
    lasting = [{name: row[name] for name in _LASTING} for row in student.log]  # how long it took is no part of a set
    card = save_student(replace(student, log=lasting), spec, where, {"round": round_, "images": count})
    (where / CHECKPOINT).unlink(missing_ok=True)
    return card
