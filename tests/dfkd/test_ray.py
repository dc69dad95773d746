"""A set drawn by Ray actors: the same bytes, whatever happens to actors and nodes, and errors as one line."""

import os
import signal
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from synthkd.dfkd.rounds import draw_set
from synthkd.engine import NonFiniteError, Plan, Request, SynthkdError
from synthkd.engine.distributed import Told, draw_on_cluster
from synthkd.engine.ray_runner import ClusterSpec, Crew, connected
from synthkd.engine.ray_wheel import shipped
from synthkd.engine.rows import read_index, read_journal
from synthkd.engine.shard_worker import Hello, ShardWorker
from synthkd.engine.shards import journal_path
from synthkd.engine.verify import verify_set

ray = pytest.importorskip("ray", reason="of the ray extra")

ROOT = Path(__file__).resolve().parents[2]
COUNT = 50  # nine groups of 6, the last with 2 kept, in shards of 3
REQUEST = Request(num_samples=COUNT, seed=5)


@dataclass(frozen=True)
class Replay:
    """Groups that are drawn already, handed out by an actor that need not load a pipeline for it."""

    identity_: dict[str, Any]
    memory: Any
    groups: dict[int, Any]

    def __call__(self) -> Any:
        """What stands in for a Synthesizer."""
        model, routes = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(key="")
        return SimpleNamespace(
            model=model, routes=routes, memory=self.memory, identity=lambda seed: self.identity_,
            run=lambda unit, seed: self.groups[unit.group].first(unit.kept),
        )  # fmt: skip


@dataclass(frozen=True)
class Trouble:
    """Whatever `make` makes, but its group N meets what a file `N-die`, `N-stop` or `N-nan` says, once."""

    make: Any
    folder: Path

    def __call__(self) -> Any:
        """With `run` wrapped."""
        synth = self.make()
        inner = synth.run

        def run(unit: Any, seed: int) -> Any:
            for what in ("die", "stop", "nan"):
                note = self.folder / f"{unit.group}-{what}"
                if note.exists():
                    note.unlink()
                    if what == "nan":
                        raise NonFiniteError(f"group {unit.group} was not finite")
                    os.kill(os.getpid(), signal.SIGKILL if what == "die" else signal.SIGSTOP)
            return inner(unit, seed)

        synth.run = run
        return synth


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with one CPU slot each; actors read this module by value."""
    from ray.cluster_utils import Cluster

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    made.second = made.add_node(**node)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def whole(tiny_job: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set that one process draws."""
    folder = tmp_path_factory.mktemp("ray") / "whole"
    draw_set(tiny_job, REQUEST, folder, workers=1)
    return folder


@pytest.fixture(scope="module")
def replay(tiny_job: Any) -> Replay:
    """The groups of that set."""
    synth, plan = tiny_job.build(), Plan(tiny_job.recipe, REQUEST)
    groups = {unit.group: synth.run(replace(unit, kept=6), REQUEST.seed) for unit in plan.units()}
    return Replay(synth.identity(REQUEST.seed), synth.memory, groups)


def _files(folder: Path) -> dict[str, bytes]:
    """Shards, and what the rows say but for times."""
    return {p.name: p.read_bytes() for p in sorted(folder.glob("shard-*"))}


def _spec(cluster: Any, **more: Any) -> ClusterSpec:
    return ClusterSpec(address=cluster.address, device="cpu", **more)


def test_a_killed_actor_a_hung_one_and_a_lost_node(
    cluster: Any, tiny_job: Any, replay: Replay, whole: Path, tmp_path: Path
) -> None:
    """Same bytes and environment key as one process, every image once, a stop handler left as it was."""
    for note in ("1-die", "4-stop"):
        (tmp_path / note).touch()
    folder, counts, plan = tmp_path / "set", [], Plan(tiny_job.recipe, REQUEST)

    def on_batch(new: int) -> None:
        counts.append(new)
        if sum(counts) >= 30 and cluster.second is not None:
            cluster.remove_node(cluster.second, allow_graceful=False)
            cluster.second = None

    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with connected(_spec(cluster, deadline=5.0)) as session:
            assert (session.actors, session.device, session.each) == (2, "cpu", 2)
            assert "lambda" in repr(signal.getsignal(signal.SIGTERM))
            summary = draw_on_cluster(
                session, Trouble(replay, tmp_path), plan, folder, source=tiny_job.source(),
                told=Told(on_batch=on_batch),
            )  # fmt: skip
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert not list(tmp_path.glob("*-*"))
    assert cluster.second is None
    assert summary.drawn == summary.present == sum(counts) == COUNT
    assert _files(folder) == _files(whole)
    assert [p.name for p in (folder / "environments").iterdir()] == [p.name for p in (whole / "environments").iterdir()]
    assert verify_set(folder).problems == ()


def test_a_nan_in_an_actor_is_the_same_one_line(cluster: Any, tiny_job: Any, whole: Path, tmp_path: Path) -> None:
    """No traceback of Ray's, the exit code of a NaN; what the actor drew before is safe and as in one process."""
    (tmp_path / "4-nan").touch()
    folder, plan = tmp_path / "set", Plan(tiny_job.recipe, REQUEST)
    with connected(_spec(cluster, actors=1)) as session, pytest.raises(NonFiniteError) as caught:
        draw_on_cluster(session, Trouble(tiny_job.build, tmp_path), plan, folder)
    assert (str(caught.value), caught.value.exit_code) == ("group 4 was not finite", 3)
    assert set(read_index(folder)) == {0}
    assert (folder / "shard-000000.tar").read_bytes() == (whole / "shard-000000.tar").read_bytes()
    assert set(read_journal(journal_path(folder, 1))) == {3}


def test_a_wheel_goes_with_the_actors(cluster: Any, tiny_job: Any, tmp_path: Path) -> None:
    """Their synthkd is the wheel's, whatever is installed; its version is the wheel's too."""
    wheel = tmp_path / "synthkd-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in (p for top in ("engine", "kernels", "export") for p in (ROOT / top).rglob("*.py")):
            archive.write(path, f"synthkd/{path.relative_to(ROOT)}")
        archive.writestr("synthkd-0.1.0.dist-info/METADATA", "Name: synthkd\nVersion: 0.1.0\n")
    worker = ShardWorker(_no_synthesizer, Plan(tiny_job.recipe, REQUEST), tmp_path)
    with connected(_spec(cluster, wheel=wheel)) as session:
        crew = Crew(session, worker, 1)
        answers: list[Any] = []
        while not answers:
            answers = [answer for _, _, answer in crew.answers()]
        crew.end()
    assert isinstance(answers[0], Hello)
    assert "_ray_pkg_" in answers[0].package


def _no_synthesizer() -> Any:
    return SimpleNamespace(model=SimpleNamespace(device=SimpleNamespace(type="cpu")))


@pytest.mark.parametrize("members", [["other/a.py"], ["synthkd/a.py"], ["../synthkd/a.py"], []])
def test_another_wheel_is_refused(members: list[str], tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in members:
            archive.writestr(name, "")
    with pytest.raises(SynthkdError, match="expected a wheel of synthkd"), shipped(wheel):
        pass


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"address": "somewhere"}, "expected auto, local, HOST:PORT or ray://HOST:PORT"),
        ({"actors": 0}, "--ray-actors is 0"),
        ({"deadline": 0.0}, "--deadline is 0.0; expected seconds > 0"),
        ({"wheel": Path("none.whl")}, "--ray-wheel none.whl: expected a .whl file"),
    ],
)
def test_a_wrong_option_is_one_line(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(SynthkdError, match=match):
        ClusterSpec(**changes)


def test_a_cluster_that_is_not_there() -> None:
    gone = connected(ClusterSpec(address="127.0.0.1:9"))
    with pytest.raises(SynthkdError, match=r"--ray 127\.0\.0\.1:9: nothing answers there"), gone:
        pass
