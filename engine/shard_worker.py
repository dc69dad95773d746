"""Draws whole shards in a process of its own, on whatever machine: what an actor does, without a cluster."""

import contextlib
import logging
import os
import platform
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

import synthkd.engine
from synthkd.engine.batch import Batch
from synthkd.engine.encoders import encoder_for
from synthkd.engine.encoding import Draft, EncodedGroup, draft_group
from synthkd.engine.environment import environment_key
from synthkd.engine.errors import HeldError, SynthkdError
from synthkd.engine.index import claim_folder
from synthkd.engine.locks import claim_lock, owner_note, shard_lock
from synthkd.engine.memory import MemoryPlan
from synthkd.engine.plan import Plan, WorkUnit
from synthkd.engine.rows import ShardRow, read_index
from synthkd.engine.runner import Factory
from synthkd.engine.shard_file import ShardFile, disk_errors, is_whole, journal_path, part_path
from synthkd.engine.writer import GroupWriter, WriteSummary, Writing


class Depot(Protocol):
    """A store as a worker uses it (`remote.Publisher`); picklable."""

    def publish(self, row: ShardRow) -> None:
        """Put a sealed shard of the folder there."""

    def finished(self, shard: int, samples: int) -> ShardRow | None:
        """The row of a shard that is there as a whole with so many samples; else None."""
        ...

    def bring(self, row: ShardRow) -> None:
        """Put a finished shard and its rows into the folder, so that it can grow."""

    def drop(self, row: ShardRow) -> None:
        """Let what was published leave the folder."""


_log = logging.getLogger("synthkd")


@dataclass(frozen=True)
class Hello:
    """Who draws: host, process, where its synthkd lies, and what its Synthesizer logged as (level, line).

    boot, started: of the machine and of the process, as `locks.owner_note` says them; a number alone may be another's.
    """

    host: str
    pid: int
    package: str
    said: tuple[tuple[int, str], ...] = ()
    boot: str = ""
    started: str = ""


@dataclass(frozen=True)
class Declared:
    """What the first worker knows for all of them: the set's identity, and how much of a group is computed at once."""

    identity: dict[str, Any]
    memory: MemoryPlan


@dataclass(frozen=True)
class Step:
    """Where a shard stands after a call: samples that are safe in it, and its row once it is finished.

    held: who else writes the shard, where that kept this worker from it; tally: what drawing and writing it took since
    this worker took it up, told when it lets go of it.
    """

    shard: int
    kept: int = 0
    row: ShardRow | None = None
    held: str = ""
    tally: WriteSummary | None = None


@dataclass
class ShardWorker:
    """One process of several that fill a set: draws the missing groups of a shard, writes and seals its files.

    factory: makes its Synthesizer; folder: of the set, a path that every machine sees, or with a depot a spool on each;
    depot: where finished shards go before they are told; home: the caller's working directory, which relative paths
    are meant from; writing: encoder, its threads, groups under way; shared: whether other runs may finish
    its shards meanwhile. Writing the index is not its business.
    """

    factory: Factory
    plan: Plan
    folder: Path
    depot: Depot | None = None
    home: str | None = None
    writing: Writing = field(default_factory=Writing)
    shared: bool = False
    _synthesizer: Any = field(default=None, init=False)
    _identity: dict[str, Any] = field(default_factory=dict, init=False)  # of all workers, see `pin`
    _file: ShardFile | None = field(default=None, init=False)
    _units: list[WorkUnit] = field(default_factory=list, init=False)
    _writer: GroupWriter | None = field(default=None, init=False)
    _tally: WriteSummary = field(default=WriteSummary(0, 0, False), init=False)

    def start(self) -> Hello:
        """Build the Synthesizer; on a CPU with one thread. Raises SynthkdError as the factory does."""
        if self.home is not None and Path(self.home).is_dir():
            os.chdir(self.home)
        heard = _Heard()
        _log.addHandler(heard)
        _log.setLevel(logging.INFO)
        try:
            self._synthesizer = self.factory()
        finally:
            _log.removeHandler(heard)
            _log.setLevel(logging.ERROR)  # the driver says what was heard, once for all workers
        if self._synthesizer.model.device.type == "cpu":
            torch.set_num_threads(1)
        package = str(Path(str(synthkd.engine.__file__)).parent)
        about = owner_note()
        return Hello(about["host"], about["pid"], package, tuple(heard.lines), about["boot"], about["started"])

    def declare(self, processes: int) -> Declared:
        """What all workers need to agree on. processes: how many draw on this machine and share its memory."""
        self._synthesizer.processes = processes
        return Declared(self._synthesizer.identity(self.plan.request.seed), self._synthesizer.memory)

    def pin(self, agreed: Declared) -> None:
        """Take over what all workers agree on, and make the backends ready that draw by it; asked before any `step`."""
        self._identity, self._synthesizer.memory = agreed.identity, agreed.memory
        if self._synthesizer.routes.key:
            self._synthesizer.prepare()

    def step(self, shard: int, finished: ShardRow | None, known: ShardRow | None = None) -> Step:
        """Draw one more group of a shard, or finish it where it has all; an earlier worker's groups are kept.

        finished: its row in the index, where a set grows; known: its newest row, though its tar be lost. Raises
        NonFiniteError, and SynthkdError as the disk does.
        """
        with disk_errors(self.folder):
            try:
                if self._file is None or self._file.shard != shard:
                    self._close()
                    if (row := self._finished(shard)) is not None:
                        return Step(shard, self.plan.shard_samples(shard), row)
                    self._open(shard, finished, known)
                return self._advance(shard)
            except BaseException as error:
                self._close()
                if isinstance(error, HeldError):  # a lost actor that is out of reach still writes
                    return Step(shard, held=str(error))
                raise

    def rest(self) -> Step | None:
        """Wait until what was drawn is safe, and let go of the shard; where it stands, None where none is open."""
        if self._file is None:
            return None
        with disk_errors(self.folder):
            try:
                self._written()
                return replace(self._stands(self._file), tally=self._tally)
            finally:
                self._close()

    def _finished(self, shard: int) -> ShardRow | None:
        """The row of a shard that a lost worker has published and could not tell of; what it left here goes."""
        if self.depot is None:
            return None
        self._claim_spool()
        row = self.depot.finished(shard, self.plan.shard_samples(shard))
        if row is not None:
            with shard_lock(self.folder, shard):
                journal_path(self.folder, shard).unlink(missing_ok=True)
                part_path(self.folder, shard).unlink(missing_ok=True)
                self.depot.drop(row)
        return row

    def _claim_spool(self) -> None:
        """Make the folder the set's: on a machine of its own the driver's claim says nothing of what lies there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with claim_lock(self.folder):
                claim_folder(self.folder, self._identity, self.plan.request.num_samples, {})
        except HeldError:
            raise
        except SynthkdError as error:
            hint = "choose another --spool, or remove that folder there"
            raise SynthkdError(f"the spool on {platform.node()} is another set's ({error}); {hint}") from error

    def _now(self, shard: int) -> tuple[ShardRow | None, ShardRow | None]:
        """What the index says of a shard that is locked: its row where its tar is whole, and its newest row."""
        row = read_index(self.folder, missing=True).get(shard)
        return (row if row and is_whole(self.folder, row) else None), row

    def _open(self, shard: int, finished: ShardRow | None, known: ShardRow | None) -> None:
        device, recipe = self._synthesizer.model.device.type, self.plan.recipe
        encoder = encoder_for(self.writing.encoder, recipe.image_format, device)
        if self.depot is not None and finished is not None and not journal_path(self.folder, shard).exists():
            self.depot.bring(finished)
        now = partial(self._now, shard) if self.shared and self.depot is None else None
        file = self._file = ShardFile(self.folder, shard, finished, known, now)
        self._units = [u for u in self.plan.shard_units(shard) if file.kept(u.group) < u.kept]

        def draft(batch: Batch) -> Draft:
            return draft_group(batch, self._identity, batch.environment, encoder)

        def append(group: EncodedGroup) -> int:
            before = file.kept(group.group)
            file.append(group)
            return group.kept - before

        self._tally, threads = WriteSummary(0, 0, False), self.writing.threads_for(device)
        self._writer = GroupWriter(append, draft, encoder, threads, self.writing.ring).__enter__()

    def _advance(self, shard: int) -> Step:
        assert self._file is not None
        assert self._writer is not None
        if self._units:
            started = time.monotonic()
            batch = self._synthesizer.run(self._units.pop(0), self.plan.request.seed)
            self._tally = replace(self._tally, drawing=self._tally.drawing + time.monotonic() - started)
            self._writer.put(batch)
        if self._units:
            return self._stands(self._file)
        self._written()
        stands, row = self._stands(self._file), self._file.seal()
        if self.depot is not None:
            self.depot.publish(row)
            journal_path(self.folder, shard).unlink(missing_ok=True)
            self.depot.drop(row)
        self._close()
        return replace(stands, row=row, tally=self._tally)

    def _written(self) -> None:
        """Wait until every group is safe; raises what the writing raised."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.__exit__(None, None, None)
            finally:
                key = environment_key(dict(writer.environment)) if writer.environment else ""
                self._tally = replace(writer.tally, drawing=self._tally.drawing, environment=key)

    def _stands(self, file: ShardFile) -> Step:
        return Step(file.shard, sum(min(u.kept, file.kept(u.group)) for u in self.plan.shard_units(file.shard)))

    def _close(self) -> None:
        """Let others write the shard, after what is under way has ended."""
        with contextlib.suppress(Exception):
            self._written()
        if self._file is not None:
            self._file.release()
        self._file, self._units = None, []


class _Heard(logging.Handler):
    """Keeps what is logged as (level, line)."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))
