"""`synthkd repair` draws again from the manifest alone, and says what it cannot mend."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def folder(tiny_set: Path, tmp_path: Path) -> Path:
    """Thirty images in two shards, the first with a bit turned in its second group, the second without its tar."""
    shutil.copytree(tiny_set, tmp_path / "set")
    shard = tmp_path / "set/shard-000000.tar"
    with tarfile.open(shard) as tar:
        info = tar.getmember("000000007.png")
    data = bytearray(shard.read_bytes())
    data[info.offset_data + 60] ^= 4
    shard.write_bytes(data)
    (tmp_path / "set/shard-000001.tar").unlink()
    return tmp_path / "set"


def _tars(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("shard-*"))}


def _manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_verify_names_repair_and_repair_mends(call: Callable[..., Any], tiny_set: Path, folder: Path) -> None:
    done = call("verify", folder, "--json")
    assert done.returncode == 2
    assert done.stderr.strip().endswith(f"2 problems in 1 shards; run `synthkd repair {folder}`")
    assert json.loads(done.stdout)["found"] == 2
    damaged = _tars(folder)
    done = call("repair", folder, "--dry-run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "2 groups are kept, 1 drawn: 1" in done.stdout
    assert "0 groups are kept, 2 drawn: 3, 4" in done.stdout
    assert _tars(folder) == damaged
    done = call("repair", folder, "--device", "cpu", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("drawn again, every byte as recorded") == 3
    assert _tars(folder) == _tars(tiny_set)
    done = call("verify", folder)
    assert done.returncode == 0, done.stderr
    assert "30 images in 2 shards, all as written" in done.stdout
    assert "nothing to mend" in call("repair", folder, "--device", "cpu").stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fingerprint": "0" * 16}, "model or teacher changed since the set was drawn (fingerprint differs)"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    call: Callable[..., Any], folder: Path, change: dict[str, Any], said: str
) -> None:
    _manifest(folder, **change)
    before = _tars(folder)
    done = call("repair", folder, "--device", "cpu")
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert _tars(folder).items() >= before.items()


def test_damaged_shards_of_a_method_are_removed_for_it(call: Callable[..., Any], tiny_set: Path, folder: Path) -> None:
    """A flipped bit, which the command that made the set would not see: the shard and its row go, nothing else."""
    shutil.copyfile(tiny_set / "shard-000001.tar", folder / "shard-000001.tar")
    _manifest(folder, model_sha256="", guidance={"kind": "mosaickd"})
    before = _tars(folder)
    done = call("repair", folder, "--dry-run", "--device", "cpu")
    assert "shard-000000.tar: would be removed, to be drawn by the method 'mosaickd'" in done.stderr
    assert _tars(folder) == before
    done = call("repair", folder, "--device", "cpu")
    assert done.returncode == 2
    assert "shard-000000.tar: removed, to be drawn by the method 'mosaickd': run the command" in done.stderr
    assert _tars(folder) == {"shard-000001.tar": before["shard-000001.tar"]}
    assert [json.loads(line)["shard"] for line in (folder / "index.jsonl").read_text().splitlines()] == [1]
    assert "shard 0: not finished (18 samples)" in call("verify", folder).stderr


def test_a_lost_manifest_is_not_guessed(call: Callable[..., Any], folder: Path) -> None:
    (folder / "manifest.json").unlink()
    done = call("repair", folder, "--device", "cpu")
    assert done.returncode == 2
    assert "no manifest.json there" in done.stderr


def test_what_repair_leaves_is_told(call: Callable[..., Any], tiny_set: Path, tmp_path: Path) -> None:
    """An index line that is none is taken out; an environment that nothing knows stays a problem."""
    folder = tmp_path / "set"
    shutil.copytree(tiny_set, folder)
    with (folder / "index.jsonl").open("a") as f:
        f.write('{"shard": "none"}\n')
    for path in (folder / "environments").iterdir():
        path.unlink()
    assert "run `synthkd repair" in call("verify", folder).stderr
    done = call("repair", folder, "--device", "cpu")
    assert done.returncode == 2
    assert "1 lines of its index are no rows of a set" in done.stdout
    assert "only a drawing there tells it" in done.stderr
    assert "environments/" in call("verify", folder).stderr


def test_a_damaged_table_is_written_again(call: Callable[..., Any], tiny_set: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    folder = tmp_path / "set"
    shutil.copytree(tiny_set, folder)
    table = folder / "index.parquet"
    table.write_bytes(table.read_bytes()[:-100])
    assert "index.parquet" in call("verify", folder).stderr
    done = call("repair", folder, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "index.parquet: written again" in done.stdout
    assert call("verify", folder).returncode == 0


def test_a_stale_card_is_written_again(call: Callable[..., Any], tiny_set: Path, tmp_path: Path) -> None:
    """As after a kill between the last shard and the card; the table is right."""
    folder = Path(shutil.copytree(tiny_set, tmp_path / "set"))
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace(", counts ", ", counts 0")[:-1])
    assert "README.md: stale" in call("verify", folder).stderr
    done = call("repair", folder, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "README.md: written again" in done.stdout
    assert (folder / "README.md").read_text() == card
    assert call("verify", folder).returncode == 0
