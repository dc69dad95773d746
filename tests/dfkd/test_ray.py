"""A set drawn by Ray actors: the same bytes, whatever happens to actors and nodes, and errors as one line."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from synthkd.dfkd.rounds import draw_set
from synthkd.engine import NonFiniteError, Plan, Request, Synthesizer, SynthkdError
from synthkd.engine.distributed import Told, draw_on_cluster
from synthkd.engine.ray_runner import ClusterSpec, connected
from synthkd.engine.verify import verify_set

ray = pytest.importorskip("ray", reason="of the ray extra")

COUNT = 50  # nine groups of 6, the last with 2 kept, in shards of 3
REQUEST = Request(num_samples=COUNT, seed=5)


@dataclass(frozen=True)
class Trouble:
    """A job whose group N meets what a file `N-die`, `N-stop` or `N-nan` says, once."""

    job: Any
    folder: Path

    def __call__(self) -> Synthesizer:
        """The job's Synthesizer, its `run` wrapped."""
        synth: Synthesizer = self.job.build()
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

        synth.run = run  # type: ignore[method-assign, assignment]
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


def _files(folder: Path) -> dict[str, bytes]:
    """Shards, and what the rows say but for times."""
    return {p.name: p.read_bytes() for p in sorted(folder.glob("shard-*"))}


def _spec(cluster: Any, **more: Any) -> ClusterSpec:
    return ClusterSpec(address=cluster.address, device="cpu", **more)


def test_a_killed_actor_a_hung_one_and_a_lost_node(
    cluster: Any, tiny_job: Any, whole: Path, tmp_path: Path
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
            taken, handler = signal.getsignal(signal.SIGTERM), handler
            assert "lambda" in repr(taken)
            summary = draw_on_cluster(
                session, Trouble(tiny_job, tmp_path), plan, folder, source=tiny_job.source(),
                told=Told(on_batch=on_batch),
            )  # fmt: skip
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert not list(tmp_path.glob("*-*"))
    assert cluster.second is None
    assert summary.drawn == summary.present == sum(counts) == COUNT
    assert _files(folder) == _files(whole)
    assert [p.name for p in (folder / "environments").iterdir()] == [
        p.name for p in (whole / "environments").iterdir()
    ]
    assert verify_set(folder).problems == ()


def test_an_error_of_an_actor_is_the_same_one_line(
    cluster: Any, tiny_job: Any, whole: Path, tmp_path: Path
) -> None:
    """A NaN in a group ends the run with exit code 3; a stop keeps what is drawn; the next run goes on."""
    (tmp_path / "4-nan").touch()
    folder, plan, counts = tmp_path / "set", Plan(tiny_job.recipe, REQUEST), []
    with connected(_spec(cluster, actors=1)) as session:
        make = Trouble(tiny_job, tmp_path)
        with pytest.raises(NonFiniteError) as caught:
            draw_on_cluster(session, make, plan, folder)
        assert (str(caught.value), caught.value.exit_code) == ("group 4 was not finite", 3)
        told = Told(on_batch=counts.append, should_stop=lambda: len(counts) > 1)
        summary = draw_on_cluster(session, make, plan, folder, told=told)
        assert summary.stopped
        assert summary.drawn == sum(counts) < COUNT - 24
        assert list(folder.glob("*.journal"))
        other = replace(tiny_job, teacher=str(tmp_path / "none.toml"))
        with pytest.raises(SynthkdError, match=r"none\.toml") as missing:
            draw_on_cluster(session, other.build, plan, tmp_path / "other")
        assert "\n" not in str(missing.value)
        assert "Traceback" not in str(missing.value)
    summary = draw_set(tiny_job, REQUEST, folder, workers=1)
    assert summary.present == COUNT
    assert _files(folder) == _files(whole)


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
    began = time.monotonic()
    with pytest.raises(SynthkdError, match=r"--ray 127\.0\.0\.1:9: nothing answers there"), connected(
        ClusterSpec(address="127.0.0.1:9")
    ):
        pass
    assert time.monotonic() - began < 60
