"""A set drawn by a crew of actors: which shard goes to whom, what happens when one is lost, and the index.

This process alone holds the folder's lock and writes the index; each actor holds the lock of the shard that it writes.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from synthkd.engine.encoders import check_encoder
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import claim_folder
from synthkd.engine.locks import claim_lock, folder_lock
from synthkd.engine.plan import Plan
from synthkd.engine.ray_runner import Crew, Lost, Member, Session, declared, refuse, say
from synthkd.engine.remote import RemoteSet
from synthkd.engine.rows import Part, gather_index
from synthkd.engine.runner import Factory
from synthkd.engine.shard_worker import Declared, Hello, ShardWorker, Step
from synthkd.engine.shards import ShardFolder, disk_errors
from synthkd.engine.writer import WriteSummary, Writing

LOCK_WAIT = 120.0  # seconds until a shard that a lost actor still holds ends the run
_BACK_OFF = 0.5, 8.0  # seconds between looks at such a lock: the first, the longest


@dataclass(frozen=True, kw_only=True)
class Told:
    """Who is told what: new samples that are safe; those that were there; how many actors draw; whether to stop."""

    on_batch: Callable[[int], None] = lambda _: None
    on_present: Callable[[int], None] = lambda _: None
    on_actors: Callable[[int], None] = lambda _: None
    should_stop: Callable[[], bool] = lambda: False


def draw_on_cluster(
    session: Session,
    factory: Factory,
    plan: Plan,
    out: str | Path,
    *,
    shards: Sequence[int] | None = None,
    part: Part | None = None,
    source: Mapping[str, Any] | None = None,
    told: Told | None = None,
    writing: Writing | None = None,
    remote: RemoteSet | None = None,
) -> WriteSummary:
    """Draw a plan into a folder that every machine of the cluster sees, as `write_shards` does in this process.

    factory: picklable, makes a Synthesizer on the session's device; writing: encoder, its threads, groups under way of
    each actor; remote: where actors put finished shards; the folder is a spool of every machine's own then.
    Raises SynthkdError as `write_shards` does, NonFiniteError as an actor does, WorkerLostError where one shard loses
    several actors in a row.
    """
    folder, told, writing = Path(out).resolve(), told or Told(), writing or Writing()
    check_encoder(writing.encoder, plan.recipe.image_format, session.device)
    depot = remote.publisher if remote else None
    worker = ShardWorker(factory, plan, folder, depot, str(Path.cwd()), writing, part is not None)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder, part):
            if remote is not None:
                remote.attach()
            state = ShardFolder(folder, plan, shards, part, remote)
            left = sum(not state.settled(shard) for shard in state.order)
            crew = Crew(session, worker, max(1, min(session.actors, left)))
            try:
                agreed = declared(crew, session.each, told.should_stop)
                if agreed is None:
                    return WriteSummary(0, state.present(), True)
                _claim(folder, agreed, plan, source or {}, part)
                if remote is not None:
                    remote.note()
                state = ShardFolder(folder, plan, shards, part, remote)
                told.on_present(state.present())
                return Drawing(crew, state, agreed, told).run()
            finally:
                crew.end()


def _claim(folder: Path, agreed: Declared, plan: Plan, source: Mapping[str, Any], part: Part | None) -> None:
    with claim_lock(folder):
        claim_folder(folder, agreed.identity, plan.request.num_samples, source)
    if part is None:
        gather_index(folder)


class Drawing:
    """Shards on their way through a crew."""

    def __init__(self, crew: Crew, state: ShardFolder, agreed: Declared, told: Told) -> None:
        """Nothing is asked of the actors yet."""
        self._crew, self._state, self._agreed, self._told = crew, state, agreed, told
        self._todo = iter(shard for shard in state.order if not state.settled(shard))
        self._again: deque[int] = deque()
        self._later: dict[int, tuple[float, float]] = {}  # a held shard: when it is looked at again, and held since
        self._safe: dict[int, int] = {}
        self._losses: dict[int, int] = {}
        self._unborn, self._drawn, self._stopped, self._said = 0, 0, False, False
        self._tally, self._began, self._most = WriteSummary(0, 0, False), time.monotonic(), 1

    def run(self) -> WriteSummary:
        """Until all shards are finished, or a stop: then every actor ends its group and lets go of its shard."""
        while True:
            self._stopped = self._stopped or self._told.should_stop()
            for member in self._crew.idle:
                self._occupy(member)
            if not self._busy():
                break
            for member, asked, answer in self._crew.answers():
                self._hear(member, asked, answer)
            self._told.on_actors(self._crew.ready)
            self._most = max(self._most, self._crew.ready)
        return self._summary()

    def _summary(self) -> WriteSummary:
        """Counts, and seconds: `drawing` and `stalled` of an actor on average, `encoding` and `writing` of all."""
        tally, seconds, most = self._tally, time.monotonic() - self._began, self._most
        return replace(
            tally, drawn=self._drawn, present=self._state.present(), stopped=self._stopped, seconds=seconds,
            drawing=tally.drawing / most, stalled=tally.stalled / most,
        )  # fmt: skip

    def _busy(self) -> bool:
        """Whether there is something to wait for; an actor that has not started yet is not, once nothing is left."""
        at_work = any(m.shard is not None for m in self._crew.members)
        return at_work or (not self._stopped and bool(self._again or self._later or self._has_next()))

    def _has_next(self) -> bool:
        following = next(self._todo, None)
        if following is not None:
            self._again.appendleft(following)
        return following is not None

    def _occupy(self, member: Member) -> None:
        """Give an idle actor what is next for it."""
        if member.hello is None:
            return
        if not member.pinned:
            member.pinned = True
            self._crew.ask(member, "pin", self._agreed)
            return
        if self._stopped:
            if member.shard is not None:
                self._crew.ask(member, "rest")
            return
        if member.shard is None:
            member.shard = self._next()
        if member.shard is not None:
            shard = member.shard
            self._safe.setdefault(shard, self._state.samples(shard))
            self._crew.ask(member, "step", shard, *self._state.standing(shard))

    def _next(self) -> int | None:
        """A shard that was given back, one whose lock is worth another look, or the next of the plan."""
        if self._again:
            return self._again.popleft()
        now = time.monotonic()
        due = [shard for shard, (when, _) in self._later.items() if when <= now]
        return due[0] if due else next(self._todo, None)

    def _hear(self, member: Member, asked: str, answer: Any) -> None:
        if isinstance(answer, Lost):
            self._lose(member, answer)
        elif isinstance(answer, Hello):
            self._unborn = 0
        elif isinstance(answer, Step):
            if not self._said and member.hello is not None:
                self._said = True
                say(member.hello, self._agreed.memory)
            self._count(member, answer)
        if asked == "rest":
            member.shard = None

    def _count(self, member: Member, step: Step) -> None:
        """Note where a shard stands; a finished one gets its row in the index."""
        if step.held:
            self._put_off(member, step)
            return
        self._later.pop(step.shard, None)
        self._tally = self._tally.then(step.tally) if step.tally else self._tally
        new = step.kept - self._safe[step.shard]
        self._safe[step.shard] = step.kept
        if step.row is not None:
            self._state.took(step.row)
            del self._safe[step.shard]
            member.shard = None
        if new > 0:
            self._losses.pop(step.shard, None)
            self._drawn += new
            self._told.on_batch(new)

    def _put_off(self, member: Member, step: Step) -> None:
        """A lost actor, out of reach, still has the shard: look again later, and not for ever."""
        now = time.monotonic()
        since = self._later.get(step.shard, (now, now))[1]
        if now - since > LOCK_WAIT:
            raise SynthkdError(f"shard {step.shard} has been held for {LOCK_WAIT:.0f} s: {step.held}")
        pause = min(max(_BACK_OFF[0], now - since), _BACK_OFF[1])
        self._later[step.shard], member.shard = (now + pause, since), None

    def _lose(self, member: Member, how: Lost) -> None:
        """Give the shard of a lost actor to the next one, and replace the actor."""
        self._stopped = self._stopped or self._told.should_stop()  # a stop that reached the actors too
        if self._stopped:
            return
        shard = member.shard
        if shard is None:
            self._unborn += 1
            refuse(self._unborn, "no actor can start", how)
        else:
            self._losses[shard] = self._losses.get(shard, 0) + 1
            refuse(self._losses[shard], f"shard {shard}", how)
            if shard not in self._later:
                self._again.append(shard)
        self._crew.hire()
