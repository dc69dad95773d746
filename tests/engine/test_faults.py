"""What goes wrong in the middle: memory, workers, stops, deadlines, disks, clocks. The set ends the same."""

import ctypes
import errno
import importlib
import itertools
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.dfkd.cli_options import Asked, check_seconds
from synthkd.dfkd.cli_progress import StopFlag
from synthkd.engine import Execution, GuidanceSpec, Plan, Request, Synthesizer, SynthkdError, pool, write_shards
from synthkd.engine.errors import NonFiniteError, WorkerLostError
from synthkd.engine.halving import halved
from synthkd.engine.index import read_environments
from synthkd.engine.memory import MemoryPlan
from synthkd.engine.priors import StableDiffusion
from synthkd.engine.rows import all_group_rows, read_journal
from synthkd.engine.runner import PoolStream, open_stream
from synthkd.engine.verify import verify_set
from synthkd.engine.watch import limited

COUNT = 20  # four groups of 6, the last with 2 kept, in shards of 2 groups


def _tars(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("shard-*"))}


# Memory


class Crowded(StableDiffusion):
    """A prior whose memory holds `most` samples in its denoiser."""

    most = 100
    held: "list[weakref.ref[Tensor]]"
    alive: list[bool]

    def denoise(self, z: Tensor, *args: Any) -> Any:
        """Notes whether what the attempt before held is gone."""
        if len(z) > self.most:
            self.held.append(weakref.ref(z))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        self.alive += [ref() is not None for ref in self.held]
        return super().denoise(z, *args)


def _crowded(pipe: Any, recipe: Any, loss: Any, most: int, **how: Any) -> tuple[Synthesizer, Crowded]:
    model = Crowded(pipe)
    model.most, model.held, model.alive = most, [], []
    return Synthesizer(model, recipe, loss, **how), model


@pytest.mark.parametrize("gradient", ["x0", "unet"])
def test_a_group_that_does_not_fit_is_drawn_in_halves(
    pipeline64: Any,
    recipe: Callable[..., Any],
    guide: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    gradient: str,
) -> None:
    """The same noise and the same group, as of one part (float64: exactly); the plan stays; the batch says so."""
    wanted = recipe(dtype="float64", guidance=GuidanceSpec(scale=0.3, gradient=gradient), steps=2)
    request = Request(num_samples=12)
    roomy, _ = _crowded(pipeline64, wanted, guide(double=True), 100)
    tight, model = _crowded(pipeline64, wanted, guide(double=True), 2)
    caplog.set_level(logging.WARNING, "synthkd")
    whole, parts = list(roomy.stream(request)), list(tight.stream(request))
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a.images, b.images)
        assert (b.attempt, b.environment["micro_batch"]) == (0, "2/2/2")
    assert whole[0].environment["micro_batch"] == 6
    assert [r.getMessage() for r in caplog.records] == [
        "group 0: out of memory in parts of 6; parts of 3/3/3 from here on",
        "group 0: out of memory in parts of 3/3/3; parts of 2/2/2 from here on",
    ]
    assert len(model.held) == 2
    assert not any(model.alive)  # nothing of the failed attempts was in memory


def test_in_float32_halves_are_within_a_grey_level_and_rows_say_so(
    pipeline: Any, recipe: Callable[..., Any], guide: Callable[..., Any], tmp_path: Path
) -> None:
    wanted, request = recipe(guidance=GuidanceSpec(scale=0.05), steps=2), Request(num_samples=12)
    roomy, _ = _crowded(pipeline, wanted, guide(), 100)
    tight, model = _crowded(pipeline, wanted, guide(), 100)
    whole, stream, halves = list(roomy.stream(request)), tight.stream(request), []

    class Later:
        """Memory runs out after the first group, when the writer has asked where it is drawn."""

        plan, identity, environment = stream.plan, stream.identity, stream.environment

        def draw(self, units: Any) -> Iterator[Any]:
            for batch in stream.draw(units):
                halves.append(batch)
                yield batch
                model.most = 3

    write_shards(Later(), tmp_path)
    assert torch.equal(halves[0].images, whole[0].images)
    assert (halves[1].images.int() - whole[1].images.int()).abs().max() <= 1
    told = read_environments(tmp_path)
    assert [told[row.environment]["micro_batch"] for row in all_group_rows(tmp_path)] == [6, "3/3/3"]
    assert verify_set(tmp_path).problems == ()


def test_strict_bits_stops_with_one_line(pipeline: Any, recipe: Callable[..., Any]) -> None:
    synth, _ = _crowded(pipeline, recipe(steps=2), None, 3, execution=Execution(strict_bits=True))
    with pytest.raises(SynthkdError, match=r"^group 0: out of memory in parts of 6 .*--strict-bits") as caught:
        next(iter(synth.stream(Request(num_samples=6))))
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (2, False)
    assert synth.memory.whole


def test_what_cannot_be_split_is_not() -> None:
    plan = MemoryPlan(6, 6, 6, 6, False, 0, 0)
    kept = halved(plan, splits=False)
    assert kept is not None
    assert kept.key == "3/6/3"
    assert halved(replace(plan, denoise=1, decode=1), splits=False) is None
    assert halved(replace(plan, denoise=1, guide=1, decode=1)) is None


def test_backends_are_built_anew_for_the_smaller_parts(pipeline: Any, recipe: Callable[..., Any]) -> None:
    """What was built for a whole group (a gradient above all) does not know the parts."""
    synth, model = _crowded(pipeline, recipe(steps=2), None, 100)
    first = next(iter(synth.stream(Request(num_samples=6))))
    synth.routes.compiled["vae"] = lambda z: torch.zeros(len(z), 3, 16, 16)  # type: ignore[assignment]
    synth.routes.ready, model.most = True, 3
    again = next(iter(synth.stream(Request(num_samples=6))))
    assert not synth.routes.ready
    assert (again.images.int() - first.images.int()).abs().max() <= 1


# Workers


@pytest.fixture
def faulty(recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`faulty({group: (what, times)}, workers, deadline)`: a pool's stream of forty-two images, as of Faulty."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # spawned workers are told sys.path
    made = importlib.import_module("faulty")
    wanted = recipe(height=8, width=8, groups_per_shard=4)
    (tmp_path / "marks").mkdir()

    def make(faults: dict[int, tuple[str, int]], workers: int = 2, deadline: float | None = None) -> Any:
        factory = made.Faulty(wanted, str(tmp_path / "marks"), faults)
        return PoolStream(factory, Plan(wanted, Request(num_samples=42)), workers, deadline=deadline)

    return make


class Plainly:
    """The stream of a pool without its processes."""

    def __init__(self, stream: PoolStream) -> None:
        self.plan, self.identity, self.environment = stream.plan, stream.identity, stream.environment
        self._drawer = stream.factory()

    def draw(self, units: Any) -> Iterator[Any]:
        return (self._drawer.run(unit, 0) for unit in units)


def test_workers_that_die_or_hang_are_replaced(
    faulty: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One dies, one hangs, one stops in mid-answer; each gets a SIGTERM while it starts, one in mid-group.

    One runs short of memory.

    The last group is not finite: exit code 3, and what was written before stays good.
    """
    write_shards(Plainly(faulty({})), tmp_path / "plain")
    inner = pool._Worker.__init__

    def stopped(worker: Any, start: Any) -> None:
        inner(worker, start)
        os.kill(worker.process.pid, signal.SIGTERM)

    monkeypatch.setattr(pool._Worker, "__init__", stopped)
    caplog.set_level(logging.WARNING, "synthkd")
    faults = {1: ("kill", 1), 2: ("term", 1), 3: ("hang", 1), 4: ("stop", 1), 5: ("shrink", 1), 6: ("nan", 1)}
    with pytest.raises(NonFiniteError, match="group 6 was not finite") as caught:
        write_shards(faulty(faults, deadline=1.5), tmp_path / "pool")
    assert (caught.value.exit_code, "in a worker process" in caught.value.__notes__[0]) == (3, True)
    assert sorted(read_journal(tmp_path / "pool/shard-000001.tar.journal")) == [4, 5]
    assert write_shards(Plainly(faulty({})), tmp_path / "pool").drawn == 6
    assert _tars(tmp_path / "pool") == _tars(tmp_path / "plain")
    assert [row.group for row in all_group_rows(tmp_path / "pool")] == list(range(7))
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert "ended by signal 9; another one draws the group again" in said
    for group in (3, 4):
        late = rf"group {group}: worker process \d+ took longer than the deadline of 1.5 s; another one draws the group"
        assert re.search(late, said)
    assert "group 5: memory ran out in a worker, which draws in parts of 3/3/3 now" in said
    assert "signal 15" not in said


def test_a_group_that_takes_three_workers_with_it_ends_the_run(
    faulty: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others' groups in front of it are written; a stop that reached the workers is a stop."""
    started: list[Any] = []

    class Doomed:
        """A worker in this process."""

        def __init__(self, start: Any) -> None:
            self.process = self
            self.pid, self._drawer = len(started), start.factory()
            started.append(self)

        def draw(self, unit: Any, deadline: float | None) -> Any:
            if unit.group == 2:
                raise pool._Lost("ended by signal 9")
            return self._drawer.run(unit, 0)

        def kill(self) -> None:
            pass

    monkeypatch.setattr(pool, "_Worker", Doomed)
    with pytest.raises(WorkerLostError, match=r"^group 2: .* 3 in a row were lost over this group") as caught:
        write_shards(faulty({}, workers=2), tmp_path / "set")
    assert caught.value.exit_code == 2
    assert sorted(read_journal(tmp_path / "set/shard-000000.tar.journal")) == [0, 1]
    assert len(started) <= 2 + 3
    asked = itertools.count()
    assert write_shards(faulty({}), tmp_path / "set", should_stop=lambda: next(asked) >= 0).stopped


# Stops and deadlines


def _hang() -> None:
    """In C, where no signal handler of Python's runs: a mutex locked twice."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


@pytest.fixture
def child(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """`child(work, signals)`: run `work(ready)` in a forked process, send signals once it is ready; code and words."""

    def run(work: Callable[[Callable[[], None]], object], *signals: int) -> tuple[int, str]:
        reads, writes = os.pipe()
        said = tmp_path / "said"
        process = os.fork()
        if process == 0:
            try:
                os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
                sys.stderr = os.fdopen(2, "w", buffering=1)
                for number in (signal.SIGTERM, signal.SIGINT):
                    signal.signal(number, signal.SIG_DFL)
                work(lambda: os.write(writes, b"x") and None)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(writes)
        os.read(reads, 1)
        for number in signals:
            time.sleep(0.1)
            os.kill(process, number)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        os.close(reads)
        return code, said.read_text()

    return run


def _busy(ready: Callable[[], None]) -> None:
    with StopFlag():
        ready()
        while True:
            time.sleep(0.01)


def test_past_the_grace_a_stopped_process_ends_with_75(child: Callable[..., tuple[int, str]]) -> None:
    def work(ready: Callable[[], None], grace: float | None) -> None:
        with StopFlag(grace) as stop:
            ready()
            if grace != 60:
                _hang()
            while not stop.is_set():
                time.sleep(0.01)

    code, said = child(lambda ready: work(ready, 0.1), signal.SIGTERM)
    assert (code, "not at a safe point 0.1 s after SIGTERM (--grace)" in said) == (75, True)
    code, said = child(lambda ready: work(ready, None), signal.SIGTERM, signal.SIGTERM)
    assert (code, "stopped at once" in said) == (75, True)
    assert child(lambda ready: work(ready, None), signal.SIGINT, signal.SIGINT)[0] == 130
    for number, wanted in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):  # where Python's own handlers run as well
        assert child(_busy, number, number)[0] == wanted
    code, said = child(lambda ready: work(ready, 60), signal.SIGTERM)  # a safe point in time
    assert (code, "once more to stop at once" in said) == (0, True)


def test_in_one_process_the_deadline_ends_it_with_75(child: Callable[..., tuple[int, str]]) -> None:
    def work(ready: Callable[[], None]) -> None:
        with limited(60, "group 2"):
            pass
        with limited(0.1, "group 3"):
            ready()
            _hang()

    code, said = child(work)
    assert (code, "group 3 took longer than the deadline of 0.1 s" in said) == (75, True)


def test_a_time_that_is_none_is_refused() -> None:
    assert check_seconds("--deadline", None) is None
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(SynthkdError, match=r"^--grace is .*; expected seconds above 0"):
            check_seconds("--grace", wrong)


def test_the_options_reach_what_draws(faulty: Callable[..., Any], synthesizer: Callable[..., Synthesizer]) -> None:
    pooled = faulty({})
    many = open_stream(pooled.factory, pooled.plan, workers=2, deadline=7.0)
    one = open_stream(lambda: synthesizer(steps=2), pooled.plan, workers=1, deadline=7.0)
    assert (type(many), many.deadline, one.deadline) == (PoolStream, 7.0, 7.0)
    assert Asked(strict_bits=True).execution.strict_bits
    assert not Asked().execution.strict_bits


# Disks


@pytest.fixture
def stream(canned: Callable[..., Any]) -> Any:
    """Twenty images in two shards."""
    return canned(COUNT, groups_per_shard=2)


def _mends(stream: Any, folder: Path, tmp_path: Path) -> None:
    """The same call again, and every shard as of a run that nothing disturbed; nothing half written is left."""
    write_shards(stream, tmp_path / "whole")
    assert write_shards(stream, folder).present == COUNT
    assert _tars(folder) == _tars(tmp_path / "whole")
    assert verify_set(folder).problems == ()
    assert not list(folder.rglob("*.tmp"))


def _refused(words: str, stream: Any, folder: Path, **how: Any) -> None:
    with pytest.raises(SynthkdError, match=words) as caught:
        write_shards(stream, folder, **how)
    assert (caught.value.exit_code, "\n" in str(caught.value)) == (2, False)
    assert "every finished group is safe" in str(caught.value)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`disk(options)`: a folder on a small file system of its own, mounted with them, or mounted anew."""
    where = tmp_path / "disk"

    def mount(options: str) -> Path:
        where.mkdir(exist_ok=True)
        kind = ["-t", "tmpfs", "tmpfs"] if not where.is_mount() else []
        done = subprocess.run(["mount", "-o", options, *kind, str(where)], capture_output=True, timeout=30)
        if done.returncode:
            pytest.skip("no file system can be mounted here")
        return where

    yield mount
    if where.is_mount():
        subprocess.run(["umount", str(where)], check=True, timeout=30)


@pytest.mark.parametrize("size", [8, 36, 60, 76])
def test_a_disk_that_is_really_full(stream: Any, disk: Callable[[str], Path], tmp_path: Path, size: int) -> None:
    """At the manifest, in a group, at its rows; then it has room."""
    folder = disk(f"size={size}k") / "set"
    _refused("no space left", stream, folder)
    disk("remount,size=8m")
    _mends(stream, folder, tmp_path)


def test_a_disk_that_is_read_only(stream: Any, disk: Callable[[str], Path], tmp_path: Path) -> None:
    folder = disk("size=8m") / "set"
    write_shards(stream, folder, should_stop=lambda: True)
    disk("remount,ro")
    _refused("read-only file system", stream, folder)
    disk("remount,rw")
    _mends(stream, folder, tmp_path)


@pytest.mark.parametrize("code", ["EROFS", "EDQUOT", "EIO"])
def test_a_disk_that_fails_in_mid_run(stream: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """At each of its first writes; whatever the system says, in its words."""
    reasons = {"EROFS": "read-only file system", "EDQUOT": "disk quota exceeded", "EIO": "Input/output error"}
    number, inner = getattr(errno, code), os.fsync
    for point in (1, 2, 6):  # an environment, a journal, the rows of a shard
        calls = itertools.count()

        def fsync(descriptor: int, calls: Any = calls, point: int = point) -> None:
            if next(calls) >= point:
                raise OSError(number, os.strerror(number))
            inner(descriptor)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fsync)
            _refused(reasons[code], stream, tmp_path / f"set-{point}")
        _mends(stream, tmp_path / f"set-{point}", tmp_path)


@pytest.mark.parametrize("limit", [1000, 9000, 30000])
def test_a_limit_on_the_size_of_files(
    stream: Any, child: Callable[..., tuple[int, str]], tmp_path: Path, limit: int
) -> None:
    """As quotas are: the write itself fails, in the middle."""

    def work(ready: Callable[[], None]) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        _refused("file size limit reached", stream, tmp_path / "set")

    list(stream.draw(stream.plan.units()))
    assert child(work) == (0, "")
    _mends(stream, tmp_path / "set", tmp_path)


@pytest.mark.parametrize("inside", ["", "rows", "environments"])
def test_permission_lost_in_mid_run(
    stream: Any, child: Callable[..., tuple[int, str]], tmp_path: Path, inside: str
) -> None:
    """Of the set's folder, or of one in it; by a user whom permissions bind."""
    folder = tmp_path / "set"
    (folder / inside).mkdir(parents=True)
    list(stream.draw(stream.plan.units()))

    def work(ready: Callable[[], None]) -> None:
        os.chdir(folder)
        if os.geteuid() == 0:
            for path in (Path(), Path(inside)):
                os.chown(path, 65534, 65534)
            os.seteuid(65534)
        lose = (lambda _: Path().chmod(0o555)) if not inside else (lambda _: None)
        Path(inside).chmod(0o755 if not inside else 0o555)
        _refused("no permission to write", stream, Path(), on_batch=lose)

    assert child(work) == (0, "")
    for path in (folder, folder / inside):
        path.chmod(0o755)
    _mends(stream, folder, tmp_path)


def test_what_a_killed_run_left_half_written_goes(stream: Any, tmp_path: Path) -> None:
    """Names of ours alone, and only once the folder is this run's."""
    write_shards(stream, tmp_path / "set", should_stop=lambda: True)
    ours = [
        "manifest.json.tmp", "index.jsonl.tmp", "index-00001-of-00004.jsonl.tmp", "shard-000001.tar.journal.tmp",
        "shard-000007.tar.fresh", "rows/shard-000000.jsonl.tmp", "environments/0123456789abcdef.json.00ff00ff.tmp",
    ]  # fmt: skip
    others = ["mine.tmp", "shard-000007.tar.fresh.bak", "rows/notes.tmp", "environments/a.json.tmp"]
    (tmp_path / "set/rows").mkdir(exist_ok=True)
    for name in (*ours, *others):
        (tmp_path / "set" / name).touch()
    write_shards(stream, tmp_path / "set")
    assert not any((tmp_path / "set" / name).exists() for name in ours)
    assert all((tmp_path / "set" / name).exists() for name in others)


# Clocks


def test_a_clock_that_jumps_changes_nothing(
    synthesizer: Callable[..., Synthesizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By days, back and forth, at every question; what is measured stays a time."""
    stream = synthesizer(steps=2, groups_per_shard=2).stream(Request(num_samples=COUNT))
    write_shards(stream, tmp_path / "still")
    jumps, now = itertools.cycle([0.0, -3e5, 9e5, -2e9]), time.time()
    monkeypatch.setattr(time, "time", lambda: now + next(jumps))
    write_shards(stream, tmp_path / "jumping", should_stop=lambda: True)
    write_shards(stream, tmp_path / "jumping")
    assert _tars(tmp_path / "jumping") == _tars(tmp_path / "still")
    for row in all_group_rows(tmp_path / "jumping"):
        assert all(0 <= t < 600 for t in row.seconds.values())
    assert (tmp_path / "jumping/.lock").read_bytes() == b""
