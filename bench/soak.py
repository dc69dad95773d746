"""A set drawn by a Ray cluster while processes, nodes and the disk fail, compared with one that nothing disturbed.

`python -m synthkd.bench.soak --images 20000 --kills 20 --record`, or `make soak`. The disturbed run must end byte for
byte as the other: nothing lost, nothing twice. Killed is the command itself (SIGKILL, at random moments, then given
again), an actor, a node of the cluster; the disk is filled until the command ends with its one line.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from synthkd.bench.record import append_row, stamped
from synthkd.engine.errors import SynthkdError
from synthkd.engine.rows import all_group_rows, read_index
from synthkd.engine.shards import file_digest, journalled
from synthkd.engine.verify import verify_set

# Four calls, one of them guided: the same networks, terms and files as the preset's twenty, at a fifth of the time.
RECIPE = "steps = 4\ngroups_per_shard = {groups}\n[guidance]\nstart = 0.7\n[cutmix]\nevery = 2\nlast_clean = 1\n"
KILL, ACTOR, NODE, DISK = "kill", "actor", "node", "disk"
_STUCK = 240  # seconds without a new group after which the run is a failure
_LEFT = 64 * 2**10  # bytes that a full disk has left


@dataclass(frozen=True, kw_only=True)
class SoakSpec:
    """images: of the set; kills: SIGKILLs of the command; actors, nodes, disks: how often each of these fails.

    seed: of the moments and of the order; groups_per_shard: of the recipe (a shard is what an actor takes at a time).
    """

    images: int = 20_000
    kills: int = 20
    actors: int = 1
    nodes: int = 1
    disks: int = 1
    seed: int = 0
    groups_per_shard: int = 10

    def events(self) -> list[str]:
        """What happens, in a random order."""
        found = [KILL] * self.kills + [ACTOR] * self.actors + [NODE] * self.nodes + [DISK] * self.disks
        random.Random(self.seed).shuffle(found)
        return found


def soak(spec: SoakSpec, place: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Both runs, and the row that compares them; place: a folder for the undisturbed set and logs."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "recipe.toml").write_text(RECIPE.format(groups=spec.groups_per_shard))
    with small_disk(spec) as (disk, real):
        started = time.monotonic()
        whole = place / "undisturbed"
        _run_whole(spec, place, whole)
        undisturbed = time.monotonic() - started
        say(f"undisturbed: {spec.images} images in {undisturbed:.0f} s")
        with cluster() as nodes:
            run = Disturbed(spec, place, disk / "set", nodes, say)
            run.execute()
        row = {**compared(whole, disk / "set", spec), **run.row(), "undisturbed_seconds": round(undisturbed, 1)}
    return {"kind": "soak", **row, "disk_full": "tmpfs" if real else "not run: no tmpfs"}


def command(spec: SoakSpec, place: Path, out: Path, *more: str) -> list[str]:
    """The `synthkd synth` of both runs."""
    return [
        *(sys.executable, "-m", "synthkd.dfkd.cli", "synth", "--preset", "digits", "--device", "cpu"),
        *("--recipe", str(place / "recipe.toml"), "--num-samples", str(spec.images), "--out", str(out), *more),
    ]


def _run_whole(spec: SoakSpec, place: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    with (place / "undisturbed.log").open("wb") as log:
        subprocess.run(command(spec, place, out, "--workers", "1"), check=True, stdout=log, stderr=log)


@contextlib.contextmanager
def small_disk(spec: SoakSpec) -> Iterator[tuple[Path, bool]]:
    """A folder whose disk can be filled without harm, and whether it is one: a tmpfs, where this user may mount it."""
    with tempfile.TemporaryDirectory(prefix="synthkd-soak-") as folder:
        size = f"{max(64, spec.images // 50)}m"
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
        try:
            yield Path(folder), mounted.returncode == 0
        finally:
            if mounted.returncode == 0:
                subprocess.run(["umount", "-l", folder], check=False)


class Nodes:
    """A cluster of a head and two nodes with a CPU slot each."""

    def __init__(self) -> None:
        """Start it."""
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self._nodes = [self._cluster.add_node(num_cpus=1) for _ in range(2)]
        self.address = str(self._cluster.address)

    def lose_one(self) -> None:
        """A node is gone, processes and all; another one joins."""
        self._cluster.remove_node(self._nodes.pop(0), allow_graceful=False)
        self._nodes.append(self._cluster.add_node(num_cpus=1))

    def stop(self) -> None:
        """End every process of it."""
        self._cluster.shutdown()


@contextlib.contextmanager
def cluster() -> Iterator[Nodes]:
    """The nodes, stopped at the end."""
    nodes = Nodes()
    try:
        yield nodes
    finally:
        nodes.stop()


def actor_processes() -> list[psutil.Process]:
    """Processes of Ray actors that this process, or one that it has started, has started: those that draw shards."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("ray::Actor"):
                found.append(process)
    return found


def safe_images(folder: Path) -> int:
    """Images of a set that are safe now."""
    try:
        finished = read_index(folder)
        open_ = [int(p.name.split(".")[0].rpartition("-")[2]) for p in folder.glob("shard-*.journal")]
        grown = sum(g.kept for s in open_ if s not in finished for g in journalled(folder, s).values())
        return sum(row.samples for row in finished.values()) + grown
    except (OSError, SynthkdError):  # a file that is being replaced
        return 0


class Disturbed:
    """The run that things happen to."""

    def __init__(
        self, spec: SoakSpec, place: Path, out: Path, nodes: Nodes, say: Callable[[str], None] = print
    ) -> None:
        """out: the set's folder, on a disk that may be filled; place: where the recipe lies."""
        self.spec, self.place, self.out, self.nodes, self.say = spec, place, out, nodes, say
        self.random, self.done, self.starts, self.seconds = random.Random(spec.seed), Counter[str](), 0, 0.0
        self.codes: Counter[int] = Counter()

    def execute(self) -> None:
        """All events, spread over the run, then the run to its end; raises RuntimeError where it stands still."""
        started, process, events = time.monotonic(), None, self.spec.events()
        if not os.path.ismount(self.out.parent):
            events = [event for event in events if event != DISK]
        step = self.spec.images // (len(events) + 1)
        try:
            for number, event in enumerate(events, start=1):
                process = self._wait_for(number * step, process)
                if process is None:  # the set was whole before everything had happened
                    break
                process = getattr(self, f"_{event}")(process)
                self.done[event] += 1
                self.say(f"{time.monotonic() - started:.0f} s: {event}, {safe_images(self.out)} images safe")
            self._wait_for(self.spec.images + 1, process)
        finally:
            self.seconds = time.monotonic() - started

    def row(self) -> dict[str, Any]:
        """What happened."""
        names = {KILL: "kills", ACTOR: "actor_kills", NODE: "node_removals", DISK: "disks_filled"}
        codes = {str(code): n for code, n in sorted(self.codes.items())}
        said = {column: self.done[event] for event, column in names.items()}
        return {**said, "starts": self.starts, "exit_codes": codes, "seconds": round(self.seconds, 1)}

    def _start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        with (self.place / "disturbed.log").open("ab") as log:
            words = command(self.spec, self.place, self.out, "--ray", self.nodes.address, "--ray-actors", "2")
            return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)

    def _wait_for(self, images: int, process: subprocess.Popen[bytes] | None) -> subprocess.Popen[bytes] | None:
        """The running command once so many images are safe (and a moment more); None where it ended whole before."""
        newest, since = -1, time.monotonic()
        process = process or self._start()
        while (have := safe_images(self.out)) < images:
            if have != newest:
                newest, since = have, time.monotonic()
            if time.monotonic() - since > _STUCK:
                raise RuntimeError(f"no new group for {_STUCK} s at {have} images; see {self.place / 'disturbed.log'}")
            if process.poll() is not None:
                self.codes[process.returncode] += 1
                if process.returncode == 0:
                    return None
                process = self._start()
            time.sleep(0.05)
        time.sleep(self.random.random() * 1.5)  # anywhere in a group, a rename, a row
        return process

    def _kill(self, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes] | None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        self.codes[process.wait()] += 1
        return None

    def _actor(self, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        """SIGKILL to an actor that holds a shard."""
        writers = {json.loads(lock.read_text())["pid"] for lock in self.out.glob("shard-*.lock")}
        found = [actor for actor in actor_processes() if actor.pid in writers]
        found[0].kill()
        return process

    def _node(self, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        self.nodes.lose_one()
        return process

    def _disk(self, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes] | None:
        """Fill the disk, wait until the command says so and ends, and make room again."""
        filler = self.out.parent / "filler"
        free = shutil.disk_usage(self.out.parent).free
        with filler.open("wb") as f:
            os.posix_fallocate(f.fileno(), 0, max(1, free - _LEFT))
        try:
            self.codes[process.wait(timeout=_STUCK)] += 1
        finally:
            filler.unlink()
        return None


def compared(whole: Path, disturbed: Path, spec: SoakSpec) -> dict[str, Any]:
    """How the disturbed set differs from the undisturbed one: files, samples, environments, verification."""
    digests = [{p.name: file_digest(p) for p in sorted(folder.glob("shard-*"))} for folder in (whole, disturbed)]
    rows = [list(all_group_rows(folder)) for folder in (whole, disturbed)]
    keys = Counter(key for row in rows[1] for key in row.table["key"])
    environments = [{key for row in side for key in row.environments} for side in rows]
    problems: Sequence[str] = verify_set(disturbed).problems
    return {
        "images": sum(keys.values()),
        "lost": spec.images - len(keys),
        "doubled": sum(n - 1 for n in keys.values()),
        "identical": digests[0] == digests[1] and bool(digests[0]),
        "same_environment": environments[0] == environments[1] and len(environments[0]) == 1,
        "tables_equal": [r.table for r in rows[0]] == [r.table for r in rows[1]],
        "problems": len(problems),
    }


def main() -> None:
    """Run it; exits with 1 where the sets differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("images", 20_000), ("kills", 20), ("actors", 1), ("nodes", 1), ("disks", 1), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("out/soak"))
    parser.add_argument("--record", action="store_true", help="append the row to bench/results/soak.jsonl")
    arguments = vars(parser.parse_args())
    place, record = arguments.pop("out"), arguments.pop("record")
    row = stamped(soak(SoakSpec(**arguments), place, lambda line: print(line, flush=True)))
    print(json.dumps(row))
    if record:
        append_row("soak", row)
    if not same(row):
        sys.exit("the disturbed set is not the undisturbed one")
    asked = {name: arguments[name] for name in ("kills", "actors", "nodes")}
    done = {"kills": row["kills"], "actors": row["actor_kills"], "nodes": row["node_removals"]}
    if asked != done or row["disks_filled"] not in (arguments["disks"], 0):
        sys.exit(f"the set was whole before everything had happened: {done} of {asked}")


def same(row: dict[str, Any]) -> bool:
    """Whether a row says that nothing was lost, doubled or changed."""
    whole = row["identical"] and row["same_environment"] and row["tables_equal"]
    return bool(whole) and not (row["lost"] or row["doubled"] or row["problems"])


if __name__ == "__main__":
    main()
