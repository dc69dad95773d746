"""The soak in small: a Ray cluster whose command, actor, node and disk fail, against one process."""

import shutil
from pathlib import Path

import pytest

from synthkd.bench.soak import DISK, KILL, SoakSpec, compared, same, soak
from synthkd.engine.rows import rows_path


@pytest.mark.slow
def test_a_disturbed_cluster_ends_in_the_set_of_one_process(tmp_path: Path) -> None:
    """Two SIGKILLs of the command, one of an actor, a node that goes, a full disk (where one can be mounted)."""
    pytest.importorskip("ray", reason="synthkd[ray]")
    spec = SoakSpec(images=240, kills=2, groups_per_shard=1, seed=1)
    lines: list[str] = []
    row = soak(spec, tmp_path, lines.append)
    assert same(row), lines
    assert (row["images"], row["lost"], row["doubled"], row["problems"]) == (240, 0, 0, 0)
    assert (row["kills"], row["actor_kills"], row["node_removals"]) == (2, 1, 1)
    assert row["exit_codes"]["-9"] == 2
    filled = 0 if "not run" in row["disk_full"] else 1
    assert row["exit_codes"].get("2", 0) == filled
    _finds_what_differs(tmp_path, spec)


def _finds_what_differs(place: Path, spec: SoakSpec) -> None:
    """The comparison itself: a changed byte, a lost shard, a row of another environment."""
    whole, other = place / "undisturbed", place / "other"
    shutil.copytree(whole, other)
    assert compared(whole, other, spec)["identical"]
    shard = other / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    found = compared(whole, other, spec)
    assert not found["identical"]
    assert found["problems"] > 0
    shard.unlink()
    rows_path(other, 1).unlink()
    found = compared(whole, other, spec)
    assert (found["lost"], found["identical"]) == (40, False)


def test_events_are_all_there_in_an_order_of_the_seed() -> None:
    spec = SoakSpec(kills=20, disks=2)
    assert spec.events().count(KILL) == 20
    assert spec.events().count(DISK) == 2
    assert spec.events() == SoakSpec(kills=20, disks=2).events() != SoakSpec(kills=20, disks=2, seed=1).events()
