"""Draws a set on the actors of a Ray cluster: each fills whole shards in its folder, this process keeps the index.

Pixels never pass through Ray: an actor answers every group with a few numbers, and a finished shard with its row.
"""

import contextlib
import logging
import os
import platform
import shlex
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synthkd.engine.errors import SynthkdError, WorkerLostError
from synthkd.engine.locks import is_owner
from synthkd.engine.memory import MemoryPlan
from synthkd.engine.ray_wheel import editable, shipped
from synthkd.engine.shard_worker import Declared, Hello, ShardWorker
from synthkd.engine.workers import cores

POLL = 0.2  # seconds between looks at the deadline and at a stop
LOSSES = 3  # actors in a row
PATIENCE = 60.0  # seconds until a cluster that starts no actor is spoken of
_SAFE = "every finished group is safe: mend that and run the same command again"
_CONNECT = 5.0  # seconds
_STORE = 128 * 2**20  # bytes: no image ever lies there
_log = logging.getLogger("synthkd")


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """Where and how a set is drawn by actors.

    address: `auto` (a running cluster, else one started here), `local` (one started here), `HOST:PORT`, or
    `ray://HOST:PORT`; actors: how many, by default one per GPU of the cluster, else one per CPU slot; device: `cpu`,
    `cuda`, or None for the cluster's GPUs where it has some; deadline: seconds that an actor has for a group before it
    is replaced, None for ever; wheel: a synthkd wheel that is sent to the cluster.
    """

    address: str = "auto"
    actors: int | None = None
    device: str | None = None
    deadline: float | None = None
    wheel: Path | None = None

    def __post_init__(self) -> None:
        """Raise SynthkdError for a value outside its range."""
        if self.actors is not None and self.actors < 1:
            raise SynthkdError(f"--ray-actors is {self.actors}; expected a whole number >= 1")
        if self.deadline is not None and not self.deadline > 0:
            raise SynthkdError(f"--deadline is {self.deadline}; expected seconds > 0")
        if self.wheel is not None and not (self.wheel.is_file() and self.wheel.suffix == ".whl"):
            raise SynthkdError(f"--ray-wheel {self.wheel}: expected a .whl file")
        _parsed(self.address)


@dataclass(frozen=True)
class Session:
    """A connection to a cluster: `actors` of them draw, `each` on one machine, on the `device` that they have.

    variables: of their environment, beside the cluster's own.
    """

    ray: Any
    actors: int
    each: int
    device: str
    deadline: float | None = None
    variables: dict[str, str] = field(default_factory=dict)


def _parsed(address: str) -> tuple[str, int] | None:
    """Host and port of an address; None for `auto` and `local`. Raises SynthkdError for what is none of them."""
    if address in ("auto", "local"):
        return None
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16 or "/" in host:
        raise SynthkdError(f"--ray {address!r}: expected auto, local, HOST:PORT or ray://HOST:PORT")
    return host.strip("[]"), int(port)


@contextlib.contextmanager
def connected(spec: ClusterSpec) -> Iterator[Session]:
    """Join a cluster, or start one on this machine, for as long as the block lasts.

    A connection that the process has already is used and kept. Raises SynthkdError where Ray is missing or nothing
    answers.
    """
    ray = _imported()
    if ray.is_initialized():
        yield _session(ray, spec)
        return
    with _signals_kept(), shipped(spec.wheel) as modules:
        _join(ray, spec, modules)
        try:
            if not modules and _elsewhere(ray) and (source := editable()) is not None:
                raise SynthkdError(
                    f"--ray {spec.address}: the cluster has other machines, and synthkd is an editable install of "
                    f"{source} here; make a wheel (pip wheel --no-deps {source}) and pass it with --ray-wheel"
                )
        except BaseException:
            ray.shutdown()
            raise
    try:
        yield _session(ray, spec)
    finally:
        ray.shutdown()


def _imported() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        with _signals_kept():
            import ray
    except ImportError as error:
        raise SynthkdError("Ray is not installed: pip install 'synthkd[ray]'") from error
    return ray


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself; give it back to whoever asked to be told of it."""
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _join(ray: Any, spec: ClusterSpec, modules: list[str]) -> None:
    """Connect to the cluster that is meant, or start one with a CPU slot for each actor."""
    address = os.environ.get("RAY_ADDRESS", "auto") if spec.address == "auto" else spec.address
    if (place := _parsed(address) if address not in ("auto", "local") else None) is not None:
        _reach(address, place)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if modules:
        options["runtime_env"] = {"py_modules": modules}
    here = {"include_dashboard": False, "object_store_memory": _STORE, "num_cpus": max(cores(), spec.actors or 1)}
    try:
        if address == "auto":
            try:
                ray.init(address="auto", **options)
                return
            except ConnectionError:
                address = "local"
        ray.init(address=address, **options, **(here if address == "local" else {}))
    except SystemExit as stop:  # SIGTERM, which Ray answers while it starts; nothing was drawn yet
        raise SystemExit(75) from stop
    except Exception as error:  # whatever a cluster of another version or state answers
        told = " ".join(str(error).split())[:300] or type(error).__name__
        raise SynthkdError(f"--ray {spec.address}: cannot join the cluster ({told})") from error


def _reach(address: str, place: tuple[str, int]) -> None:
    """Raise SynthkdError at once where nothing listens, for which Ray itself takes minutes."""
    try:
        socket.create_connection(place, timeout=_CONNECT).close()
    except OSError as error:
        raise SynthkdError(f"--ray {address}: nothing answers there ({error.strerror or error})") from error


def _alive(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _elsewhere(ray: Any) -> bool:
    """Whether the cluster has a machine other than this one."""
    return any(node["NodeManagerHostname"] != platform.node() for node in _alive(ray))


def _session(ray: Any, spec: ClusterSpec) -> Session:
    has = ray.cluster_resources()
    gpus, slots = int(has.get("GPU", 0)), int(has.get("CPU", 0))
    if spec.device == "cuda" and not gpus:
        raise SynthkdError(f"--ray {spec.address}: --device cuda, but the cluster has no GPU; use --device cpu")
    device = "cuda" if gpus and spec.device != "cpu" else "cpu"
    count = spec.actors or max(1, gpus if device == "cuda" else slots)
    machines = len({node["NodeManagerHostname"] for node in _alive(ray)}) or 1
    passed = {name: value for name, value in os.environ.items() if name.startswith("SYNTHKD_")}
    if not _elsewhere(ray) and spec.wheel is None and "PYTHONPATH" in os.environ:
        passed["PYTHONPATH"] = os.environ["PYTHONPATH"]
    if device == "cpu":
        passed["OMP_NUM_THREADS"] = "1"
    return Session(ray, count, -(-count // machines), device, spec.deadline, passed)


@dataclass(frozen=True)
class Lost:
    """What became of an actor that no longer answers."""

    why: str


class Actor:
    """What Ray runs: a ShardWorker whose errors come back as values, since Ray wraps what is raised in a traceback."""

    def __init__(self, worker: ShardWorker) -> None:
        """worker: not started yet."""
        self._worker = worker

    def ask(self, name: str, *values: Any) -> Any:
        """What a method of the worker returns, or the error that it raises: a SynthkdError, one line."""
        try:
            return getattr(self._worker, name)(*values)
        except SynthkdError as error:
            return error
        except Exception as error:  # memory that ran out, a driver, a bug: its own type may not cross
            told = WorkerLostError(f"an actor on {platform.node()} failed: {_line(error)}; {_SAFE}")
            told.add_note("in an actor:\n" + traceback.format_exc())
            return told


@dataclass(eq=False)
class Member:
    """An actor as the driver knows it: what it was asked last and since when, and which shard it is at."""

    handle: Any
    asked: str = ""
    since: float = 0.0
    shard: int | None = None
    hello: Hello | None = None
    pinned: bool = False


class Crew:
    """The actors: started, asked one thing at a time, heard, replaced."""

    def __init__(self, session: Session, worker: ShardWorker, count: int) -> None:
        """Start `count` actors; each builds its Synthesizer."""
        self._session, self._worker = session, worker
        self._calls: dict[Any, Member] = {}
        self.members: list[Member] = []
        self._began, self._patient = time.monotonic(), True
        for _ in range(count):
            self.hire()

    def hire(self) -> None:
        """Start one more actor."""
        session = self._session
        options: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0}
        options |= {"num_gpus": 1} if session.device == "cuda" else {"scheduling_strategy": "SPREAD"}
        place: dict[str, Any] = {"env_vars": session.variables}
        if shlex.quote(sys.executable) != sys.executable:  # Ray hands it to a shell as it stands
            place["py_executable"] = shlex.quote(sys.executable)
        made = session.ray.remote(Actor).options(runtime_env=place, **options)
        member = Member(made.remote(self._worker))
        self.members.append(member)
        self.ask(member, "start")

    def ask(self, member: Member, name: str, *values: Any) -> None:
        """Ask an idle actor for something; `answers` tells what it says."""
        member.asked, member.since = name, time.monotonic()
        self._calls[member.handle.ask.remote(name, *values)] = member

    @property
    def idle(self) -> list[Member]:
        """Those that are asked nothing."""
        return [member for member in self.members if not member.asked]

    @property
    def ready(self) -> int:
        """How many have started."""
        return sum(member.hello is not None for member in self.members)

    def answers(self) -> Iterator[tuple[Member, str, Any]]:
        """(actor, what it was asked, its answer) of the next that answer; Lost for those that are gone or too late."""
        ray, calls = self._session.ray, list(self._calls)
        done: list[Any] = []
        if calls:
            done, _ = ray.wait(calls, timeout=POLL)
        else:
            time.sleep(POLL)
        for reference in done:
            member = self._calls.pop(reference)
            asked, member.asked = member.asked, ""
            yield member, asked, self._heard(member, reference)
        for member in self._late():
            yield member, "step", self.dismiss(member, f"no group in {self._session.deadline:g} s")
        self._complain()

    def _heard(self, member: Member, reference: Any) -> Any:
        errors = self._session.ray.exceptions
        try:
            answer = self._session.ray.get(reference)
        except errors.RuntimeEnvSetupError as error:
            raise SynthkdError(f"the cluster cannot set up the actors' environment: {_line(error)}") from error
        except errors.RayTaskError as error:  # of an answer that cannot be sent
            raise WorkerLostError(f"an actor failed: {_line(error)}; {_SAFE}") from error
        except errors.RayError as error:
            return self.dismiss(member, _line(error))
        if isinstance(answer, SynthkdError):
            raise answer
        if isinstance(answer, Hello):
            member.hello = answer
        return answer

    def _late(self) -> list[Member]:
        limit = self._session.deadline
        if limit is None:
            return []
        now = time.monotonic()
        return [m for m in self._calls.values() if m.asked in ("step", "rest") and now - m.since > limit]

    def dismiss(self, member: Member, why: str = "") -> Lost:
        """End an actor at once, whatever it does; it is none of the crew then."""
        self._calls = {reference: m for reference, m in self._calls.items() if m is not member}
        self.members = [m for m in self.members if m is not member]
        with contextlib.suppress(Exception):
            self._session.ray.kill(member.handle)
        hello = member.hello
        here = hello is not None and hello.host == platform.node()
        if hello is not None and here and member.asked and is_owner(hello.pid, hello.boot, hello.started):
            with contextlib.suppress(ProcessLookupError, PermissionError):  # one that is stopped does not hear Ray
                os.kill(hello.pid, signal.SIGKILL)
        return Lost(why)

    def end(self) -> None:
        """End all of them."""
        for member in list(self.members):
            self.dismiss(member)

    def _complain(self) -> None:
        if self._patient and not self.ready and time.monotonic() - self._began > PATIENCE:
            self._patient = False
            free = self._session.ray.available_resources()
            has = {kind: f"{free.get(kind, 0):g} free" for kind in ("CPU", "GPU")}
            _log.warning("no actor has started in %.0f s (cluster: CPU %s, GPU %s)", PATIENCE, *has.values())


def _line(error: BaseException) -> str:
    """The last line of an error, which may be a page, and its type."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    hint = "; install this synthkd on every machine, or pass --ray-wheel" if "No module named" in str(error) else ""
    return f"{type(error).__name__}: {lines[-1][:200]}{hint}" if lines else type(error).__name__


def declared(crew: Crew, each: int, should_stop: Callable[[], bool]) -> Declared | None:
    """Ask the first actor that has started what all of them must agree on; None if stopped before that.

    Raises WorkerLostError where actors are lost again and again before they can say it.
    """
    lost = 0
    while not should_stop():
        for member, asked, answer in crew.answers():
            if isinstance(answer, Declared):
                return answer
            if isinstance(answer, Lost):
                lost += 1
                refuse(lost, "no actor can start", answer)
                crew.hire()
            elif asked == "start" and not any(m.asked == "declare" for m in crew.members):
                crew.ask(member, "declare", each)
    return None


def refuse(lost: int, what: str, how: Lost) -> None:
    """Raise WorkerLostError where so many actors in a row were lost that another one would be too."""
    if lost >= LOSSES:
        raise WorkerLostError(
            f"{what}: {LOSSES} actors in a row were lost (the last: {how.why}); {_SAFE}"
        )


def say(answer: Hello, memory: MemoryPlan) -> None:
    """Log here what an actor logged, and how much of a group is computed at once."""
    for level, line in answer.said:
        _log.log(level, line)
    if memory.reason.startswith("not measured") or not memory.whole:
        _log.info(memory.describe())
