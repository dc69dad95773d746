"""Who draws which shard when workers are lost, stopped or kept out; workers of this process stand in for actors."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from synthkd.engine import NonFiniteError, Plan, Request, SynthkdError, distributed, write_shards
from synthkd.engine.distributed import Told, draw_on_cluster
from synthkd.engine.errors import WorkerLostError
from synthkd.engine.locks import shard_lock
from synthkd.engine.ray_runner import Lost, Member, Session
from synthkd.engine.rows import Part, read_index
from synthkd.engine.shard_worker import Hello, ShardWorker
from synthkd.engine.verify import verify_set

COUNT = 32  # six groups of 6, the last with 2 kept, in three shards
SESSION = Session(None, 2, 1, "cpu")


class Here:
    """A crew whose workers run in this process, one call at a time; `fate(asked, member)` may lose one or raise."""

    fate: Callable[[str, Member], Lost | None]

    def __init__(self, session: Session, worker: ShardWorker, count: int) -> None:
        self._make, self._waiting, self.members = worker, deque[tuple[Member, str, Any]](), []
        for _ in range(count):
            self.hire()

    def hire(self) -> None:
        made = ShardWorker(*(getattr(self._make, name) for name in ("factory", "plan", "folder", "publish")))
        self.members.append(Member(made))
        self.ask(self.members[-1], "start")

    def ask(self, member: Member, name: str, *values: Any) -> None:
        member.asked = name
        self._waiting.append((member, name, values))

    @property
    def idle(self) -> list[Member]:
        return [m for m in self.members if not m.asked]

    @property
    def ready(self) -> int:
        return sum(m.hello is not None for m in self.members)

    def answers(self) -> Iterator[tuple[Member, str, Any]]:
        if not self._waiting:
            return
        member, name, values = self._waiting.popleft()
        member.asked, lost = "", type(self).fate(name, member)
        if lost is not None:
            self.members.remove(member)
            member.handle._close()  # what the system does for a process that ends
            yield member, name, lost
            return
        answer = getattr(member.handle, name)(*values)
        member.hello = answer if isinstance(answer, Hello) else member.hello
        yield member, name, answer

    def end(self) -> None:
        for member in self.members:
            if hasattr(member.handle, "_file"):
                member.handle._close()


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> type[Here]:
    """The crew of every drawing; nothing is lost unless its `fate` is changed."""
    log = logging.getLogger("synthkd")
    monkeypatch.setattr(log, "level", log.level)  # a worker sets it

    class Mine(Here):
        fate = staticmethod(lambda asked, member: None)

    monkeypatch.setattr(distributed, "Crew", Mine)
    return Mine


@pytest.fixture
def stream(canned: Callable[..., Any]) -> Any:
    """Thirty-two images in three shards."""
    return canned(COUNT, groups_per_shard=2)


@pytest.fixture
def whole(stream: Any, tmp_path: Path) -> dict[str, bytes]:
    """The shards of one process."""
    write_shards(stream, tmp_path / "whole")
    return _tars(tmp_path / "whole")


def _tars(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("shard-*"))}


def _draw(stream: Any, folder: Path, **options: Any) -> Any:
    synth = stream._synth
    made = SimpleNamespace(model=synth.model, routes=synth.routes, memory=synth.memory, identity=synth.identity)
    made.run = lambda unit, seed: next(stream.draw([unit]))
    return draw_on_cluster(SESSION, lambda: made, stream.plan, folder, **options)


def _agrees(stream: Any, folder: Path, whole: dict[str, bytes]) -> None:
    assert _draw(stream, folder).present == COUNT
    assert _tars(folder) == whole
    assert verify_set(folder).problems == ()


def _nth(what: str, numbers: set[int]) -> Callable[[str, Member], Lost | None]:
    """Lose the worker that is asked something for the n-th time, counted from 0, before it does it."""
    calls = iter(range(10**6))
    return staticmethod(  # type: ignore[return-value]
        lambda asked, member: Lost("killed") if asked == what and next(calls) in numbers else None
    )


def test_the_same_bytes_as_one_process(crew: type[Here], stream: Any, whole: dict[str, bytes], tmp_path: Path) -> None:
    counts: list[int] = []
    actors: list[int] = []
    told = Told(on_batch=counts.append, on_actors=actors.append)
    summary = _draw(stream, tmp_path / "set", told=told)
    assert (summary.drawn, summary.present, summary.stopped, sum(counts)) == (COUNT, COUNT, False, COUNT)
    assert max(actors) == 2
    _agrees(stream, tmp_path / "set", whole)
    assert _draw(stream, tmp_path / "set").drawn == 0


@pytest.mark.parametrize("numbers", [{0}, {1}, {2, 4}, {3}, {0, 1}, {1, 3, 6}])
def test_a_lost_worker_costs_nothing(
    crew: type[Here], stream: Any, whole: dict[str, bytes], tmp_path: Path, numbers: set[int]
) -> None:
    """Its shard goes to another one, which goes on after the groups that are safe; each image is counted once."""
    crew.fate = _nth("step", numbers)
    counts: list[int] = []
    summary = _draw(stream, tmp_path / "set", told=Told(on_batch=counts.append))
    assert summary.drawn == summary.present == sum(counts) == COUNT
    _agrees(stream, tmp_path / "set", whole)


def test_a_shard_that_loses_every_worker_is_named(crew: type[Here], stream: Any, tmp_path: Path) -> None:
    crew.fate = staticmethod(lambda asked, member: Lost("out of memory") if member.shard == 1 else None)
    with pytest.raises(WorkerLostError, match=r"shard 1: 3 actors in a row were lost \(the last: out of memory\)"):
        _draw(stream, tmp_path / "set")
    assert 0 in read_index(tmp_path / "set")


def test_a_worker_that_never_starts_ends_the_run(crew: type[Here], stream: Any, tmp_path: Path) -> None:
    crew.fate = staticmethod(lambda asked, member: Lost("no module") if asked == "start" else None)
    with pytest.raises(WorkerLostError, match="no actor can start: 3 actors in a row"):
        _draw(stream, tmp_path / "set")


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_stop_keeps_every_drawn_group(
    crew: type[Here], stream: Any, whole: dict[str, bytes], tmp_path: Path, after: int
) -> None:
    counts: list[int] = []
    told = Told(on_batch=counts.append, should_stop=lambda: len(counts) >= after)
    summary = _draw(stream, tmp_path / "set", told=told)
    assert summary.stopped
    assert summary.present == sum(counts) < COUNT
    assert not list((tmp_path / "set").glob("*.tar.lock"))
    _agrees(stream, tmp_path / "set", whole)


def test_workers_that_die_of_the_stop_itself_are_a_stop(crew: type[Here], stream: Any, tmp_path: Path) -> None:
    """A signal to the whole process group."""
    counts: list[int] = []
    crew.fate = staticmethod(lambda asked, member: Lost("SIGTERM") if counts else None)
    summary = _draw(stream, tmp_path / "set", told=Told(on_batch=counts.append, should_stop=lambda: bool(counts)))
    assert summary.stopped


def test_an_error_ends_the_run_with_what_is_safe(
    crew: type[Here], stream: Any, whole: dict[str, bytes], tmp_path: Path
) -> None:
    def fate(asked: str, member: Member) -> None:
        if asked == "step" and (tmp_path / "set/shard-000000.tar").exists():
            raise NonFiniteError("group 3 was not finite")

    crew.fate = staticmethod(fate)
    with pytest.raises(NonFiniteError, match="group 3"):
        _draw(stream, tmp_path / "set")
    crew.fate = staticmethod(lambda asked, member: None)
    _agrees(stream, tmp_path / "set", whole)


def test_a_shard_that_another_process_holds_is_waited_for(
    crew: type[Here], stream: Any, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are drawn meanwhile; when it is let go of, it is drawn too; else the run ends with a line."""
    folder = tmp_path / "set"
    write_shards(stream, folder, should_stop=lambda: True)
    monkeypatch.setattr(distributed, "_BACK_OFF", (0.01, 0.01))
    with shard_lock(folder, 0):
        told = Told(should_stop=lambda: len(read_index(folder)) == 2)
        assert _draw(stream, folder, told=told).present == COUNT - 6
        monkeypatch.setattr(distributed, "LOCK_WAIT", 0.0)
        with pytest.raises(SynthkdError, match=r"shard 0 has been held for 0 s: .*another run is writing there"):
            _draw(stream, folder)
    _agrees(stream, folder, whole)


def test_parts_and_growth(crew: type[Here], canned: Callable[..., Any], tmp_path: Path) -> None:
    """Two runs that share a folder, each with workers of its own; then the set grows."""
    folder, (little, large) = tmp_path / "set", (canned(n, groups_per_shard=2) for n in (20, COUNT))
    for index in range(2):
        _draw(little, folder, part=Part(index, 2))
    write_shards(little, tmp_path / "little")
    assert _tars(folder) == _tars(tmp_path / "little")
    assert _draw(large, folder).drawn == COUNT - 20
    write_shards(large, tmp_path / "large")
    assert _tars(folder) == _tars(tmp_path / "large")


def test_another_set_is_refused_before_anything_is_drawn(
    crew: type[Here], stream: Any, canned: Callable[..., Any], tmp_path: Path
) -> None:
    _draw(stream, tmp_path / "set")
    with pytest.raises(SynthkdError, match="holds another recipe's set"):
        _draw(canned(COUNT, groups_per_shard=1), tmp_path / "set")


def test_a_finished_shard_is_published_before_it_counts(crew: type[Here], stream: Any, tmp_path: Path) -> None:
    published: list[int] = []

    def publish(row: Any) -> None:
        assert row.shard not in read_index(tmp_path / "set")
        published.append(row.shard)

    _draw(stream, tmp_path / "set", publish=publish)
    assert sorted(published) == [0, 1, 2]
    assert Plan(stream.plan.recipe, Request(num_samples=COUNT)).num_shards == 3
