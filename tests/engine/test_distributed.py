"""Who draws which shard when workers are lost, stopped or kept out; workers of this process stand in for actors."""

import logging
import pickle
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from synthkd.engine import NonFiniteError, SynthkdError, distributed, write_shards
from synthkd.engine.distributed import Told, draw_on_cluster
from synthkd.engine.errors import WorkerLostError
from synthkd.engine.locks import shard_lock
from synthkd.engine.ray_runner import Actor, Crew, Lost, Member, Session
from synthkd.engine.remote import Publisher, RemoteSet
from synthkd.engine.remote_read import fetched
from synthkd.engine.rows import Part, ShardRow, read_index
from synthkd.engine.shard_worker import Hello, ShardWorker
from synthkd.engine.stores import Store
from synthkd.engine.verify import verify_set
from synthkd.engine.writer import Writing

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
        made = ShardWorker(*(getattr(self._make, name) for name in ("factory", "plan", "folder", "depot")))
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


def _made(stream: Any) -> Any:
    synth = stream._synth
    made = SimpleNamespace(model=synth.model, routes=synth.routes, memory=synth.memory, identity=synth.identity)
    made.run = lambda unit, seed: next(stream.draw([unit]))
    return made


def _draw(stream: Any, folder: Path, **options: Any) -> Any:
    made = _made(stream)
    return draw_on_cluster(SESSION, lambda: made, stream.plan, folder, **options)


def _elsewhere(stream: Any, url: str, spool: Path) -> ShardWorker:
    """A worker with a spool that no driver has claimed, as on another machine; ready to draw."""
    worker = ShardWorker(lambda: _made(stream), stream.plan, spool, Publisher(Store(url), spool))
    worker.start()
    worker.pin(worker.declare(1))
    return worker


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

    class Watched(Publisher):
        def publish(self, row: ShardRow) -> None:
            assert row.shard not in read_index(tmp_path / "set", missing=True)
            published.append(row.shard)
            super().publish(row)

    remote = RemoteSet(Store(f"file://{tmp_path}/store"), tmp_path / "set")
    remote.publisher = Watched(remote.store, remote.folder)
    _draw(stream, tmp_path / "set", remote=remote)
    assert sorted(published) == [0, 1, 2]
    assert read_index(tmp_path / "set", missing=True).keys() == {0, 1, 2}


def test_shards_of_actors_go_to_a_store(
    crew: type[Here], canned: Callable[..., Any], stream: Any, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """A finished shard leaves the spool for the store; killed, grown, or with an empty spool, the run goes on."""
    url = f"file://{tmp_path}/store"
    crew.fate = _nth("step", {2})
    first = RemoteSet(Store(url), tmp_path / "spool")
    counts: list[int] = []
    told = Told(on_batch=counts.append, should_stop=lambda: sum(counts) >= 18)
    assert _draw(canned(20, groups_per_shard=2), tmp_path / "spool", remote=first, told=told).stopped
    assert not list((tmp_path / "spool").glob("shard-*.tar"))
    again = RemoteSet(Store(url), tmp_path / "other")
    assert _draw(stream, tmp_path / "other", remote=again).present == COUNT
    again.finish(stream.plan.num_shards)
    assert not list((tmp_path / "other").glob("shard-*"))
    fetched(url, tmp_path / "back")
    assert _tars(tmp_path / "back") == whole
    assert verify_set(tmp_path / "back").problems == ()


def test_a_spool_of_another_set_is_refused(
    crew: type[Here], stream: Any, canned: Callable[..., Any], tmp_path: Path
) -> None:
    """What another recipe left of a shard on a worker's machine becomes no part of this one's, claimed or not."""
    url, spool = f"file://{tmp_path}/store", tmp_path / "node"
    other = _elsewhere(canned(COUNT, groups_per_shard=2, guidance_scale=2.0), url, spool)
    other.step(0, None)
    assert other.rest().kept == 6  # type: ignore[union-attr]
    for _ in range(2):
        with pytest.raises(SynthkdError, match=r"the spool on .* is another set's .*choose another --spool"):
            _elsewhere(stream, url, spool).step(0, None)
        assert (spool / "shard-000000.tar.journal").exists()
        (spool / "manifest.json").unlink(missing_ok=True)  # as before spools had one


def test_a_shard_is_published_by_a_worker_that_dies_before_it_tells(
    crew: type[Here], stream: Any, canned: Callable[..., Any], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """The next one finds it in the store, new or grown, and draws nothing; damaged there, it is drawn again."""
    url, rows = f"file://{tmp_path}/store", []
    for step, count in enumerate((20, COUNT)):
        grown = canned(count, groups_per_shard=2)
        first = _elsewhere(grown, url, tmp_path / f"one-{step}")
        while (told := first.step(1, rows[0] if rows else None)).row is None:
            pass
        again = _elsewhere(grown, url, tmp_path / f"one-{step}")
        again._synthesizer.run = None
        assert again.step(1, rows[0] if rows else None).row == told.row
        rows.append(told.row)
    assert (tmp_path / "store/shard-000001.tar").read_bytes() == whole["shard-000001.tar"]
    (tmp_path / "store/shard-000001.tar").write_bytes(b"")
    last = _elsewhere(stream, url, tmp_path / "two")
    assert last.step(1, None).row is None
    last.rest()


def test_an_encoder_is_for_the_device_of_the_cluster(crew: type[Here], stream: Any, tmp_path: Path) -> None:
    """Whatever the caller's own; nothing is made before it is known."""
    plan = SimpleNamespace(recipe=SimpleNamespace(image_format="jpg"))
    with pytest.raises(SynthkdError, match="encodes on a GPU, device is 'cpu'"):
        draw_on_cluster(SESSION, dict, plan, tmp_path / "set", writing=Writing("nvjpeg"))  # type: ignore[arg-type]
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("first\nCUDA out of memory\n")])
def test_any_error_of_an_actor_is_one_line(error: Exception) -> None:
    def start() -> None:
        raise error

    told = Actor(SimpleNamespace(start=start)).ask("start")  # type: ignore[arg-type]
    assert isinstance(pickle.loads(pickle.dumps(told)), WorkerLostError)
    assert str(told).count("\n") == 0
    assert f"{type(error).__name__}{': CUDA out of memory' if str(error) else ''}; every finished" in str(told)


@pytest.mark.parametrize(("changes", "killed"), [({}, 1), ({"started": "1"}, 0), ({"boot": "another"}, 0)])
def test_a_process_that_only_has_the_number_is_not_killed(
    stream: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], killed: int
) -> None:
    """Containers may share a host name, and a number is used again."""
    kills: list[int] = []
    monkeypatch.setattr("os.kill", lambda pid, number: kills.append(pid))
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    monkeypatch.setattr("os.chdir", lambda where: None)
    worker = ShardWorker(lambda: _made(stream), stream.plan, Path())
    ray = SimpleNamespace(kill=lambda handle: None)
    crew = Crew(Session(ray, 1, 1, "cpu"), worker, 0)
    member = Member(None, asked="step", hello=replace(worker.start(), **changes))
    crew.dismiss(member)
    assert len(kills) == killed


def test_one_worker_alone_reads_all_weights(crew: type[Here], stream: Any, tmp_path: Path) -> None:
    """The others are sent the identity that it declares."""
    made, asked = _made(stream), []
    identity = made.identity
    made.identity = lambda seed: asked.append(seed) or identity(seed)
    draw_on_cluster(SESSION, lambda: made, stream.plan, tmp_path / "set")
    assert len(asked) == 1
