"""`synthkd` with URLs: synth, verify and merge; sets in rounds; and what kinds of files a set is made of."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

from synthkd.dfkd.rounds import DrawOptions, draw_set
from synthkd.dfkd.student import DistillSpec
from synthkd.engine import GuidanceSpec, Request, SynthkdError
from synthkd.engine.remote import RemoteSet
from synthkd.engine.remote_read import fetched
from synthkd.engine.stores import Store
from synthkd.engine.tar import members
from synthkd.engine.verify import verify_set

RUNS = (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK\x03\x04", b"\x93NUMPY")  # pickles, torch.save, numpy
COUNT = 14  # three groups of 6 in shards of one group: rounds 0, 1, 1; the last group keeps 2


@pytest.fixture(scope="module")
def job(tiny_job: Any) -> Any:
    """Two rounds with a student between them, previews, and a decoder that a calibration tries."""
    guidance = GuidanceSpec(scale=0.2, decoder="pooled:2", min_cosine=0.01)
    recipe = replace(
        tiny_job.recipe, rounds=2, groups_per_shard=1, steps=3, cutmix=replace(tiny_job.recipe.cutmix, every=0),
        previews=(0.4,), guidance=guidance,
    )  # fmt: skip
    student = DistillSpec(
        arch="resnet", arch_args={"widths": [4], "blocks": [1]}, steps=4, batch_size=4, warmup_steps=1
    )
    return replace(tiny_job, recipe=recipe, gamma=1.0, round_student=student)


@pytest.fixture(scope="module")
def whole(job: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set in a folder."""
    folder = tmp_path_factory.mktemp("whole") / "set"
    draw_set(job, Request(num_samples=COUNT, seed=5), folder, workers=1)
    return folder


def _draw(job: Any, url: str, spool: Path, **how: Any) -> Any:
    remote = RemoteSet(Store(url, wait=0.0), spool)
    options = DrawOptions(remote=remote, **how)
    return draw_set(job, Request(num_samples=COUNT, seed=5), spool, workers=1, how=options)


def test_rounds_in_a_store(job: Any, whole: Path, tmp_path: Path) -> None:
    """The student is trained on shards that come back, kept in the store, and found there by a new machine."""
    url, groups = f"file://{tmp_path}/store", []
    assert not _draw(job, url, tmp_path / "one", shards=[0, 1]).stopped
    assert (tmp_path / "store/rounds/round-1/student.safetensors").is_file()
    assert not list((tmp_path / "one").glob("*.tar"))
    shutil.rmtree(tmp_path / "one")
    groups.append(_draw(job, url, tmp_path / "two").drawn)
    assert groups == [2]
    copy = fetched(url, tmp_path / "copy")
    assert verify_set(copy).problems == ()
    for name in ("shard-000000.tar", "shard-000001.tar", "shard-000002.tar", "rounds/round-1/student.safetensors"):
        assert (copy / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_run_from_python_has_the_store_to_itself(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the command's has: nothing is drawn, or made in the spool, while another run writes there."""

    def taken(remote: RemoteSet, part: Any) -> Any:
        raise SynthkdError("another run is writing there")

    monkeypatch.setattr(RemoteSet, "held", taken)
    with pytest.raises(SynthkdError, match="another run is writing there"):
        _draw(job, f"file://{tmp_path}/store", tmp_path / "spool")
    assert list(tmp_path.iterdir()) == []


def _kind(path: Path) -> str:
    """What a file is, by its content; raises whatever its reader does for another."""
    if path.suffix in (".json", ".jsonl"):
        for line in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
            json.loads(line)
        return "json"
    if path.suffix == ".tar":
        for name, data in members(path):
            if name.endswith(".json"):
                json.loads(data)
            else:
                assert data.startswith(b"\x89PNG\r\n\x1a\n")
        return "tar"
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as f:
            assert f.keys()
        return "tensors"
    if path.suffix in (".toml", ".md"):
        return "text" if path.read_text() else "empty"
    if path.suffix in (".png", ".webp"):
        with Image.open(path) as image:
            return str(image.format)
    if path.suffix == ".parquet":
        return "parquet" if path.read_bytes()[:4] == b"PAR1" else "?"
    return "lock" if path.name.startswith(".lock") else "?"


def test_no_file_of_a_set_runs_code(whole: Path) -> None:
    """Every file of a finished set with rounds, previews and a settled decoder is of a kind that only holds data."""
    kinds = {p.relative_to(whole).as_posix(): _kind(p) for p in whole.rglob("*") if p.is_file()}
    assert "?" not in kinds.values(), kinds
    assert {"json", "tar", "tensors", "text"} <= set(kinds.values())
    for path in whole.rglob("*"):
        if path.is_file():
            assert not path.read_bytes().startswith(RUNS)


def test_the_command_writes_checks_and_fetches_urls(
    call: Any, pipeline_folder: Path, teacher_card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "recipe.toml").write_text(
        "height = 16\nwidth = 16\nsteps = 2\nclasses_per_group = 3\nsamples_per_class = 2\ngroups_per_shard = 1\n"
        "[guidance]\nscale = 0.2\n"
    )
    words = (
        "synth", "--model", pipeline_folder, "--teacher", teacher_card, "--recipe", tmp_path / "recipe.toml",
        "--num-samples", 8, "--workers", 1, "--device", "cpu", "--out",
    )  # fmt: skip
    url = f"file://{tmp_path}/store/set"
    assert call(*words, tmp_path / "local").returncode == 0
    done = call(*words, url)
    assert done.returncode == 0, done.stderr
    assert f"{url}: 8 images, 8 drawn now" in done.stdout
    assert list((tmp_path / "cache/synthkd/spool").iterdir())
    for name in ("shard-000000.tar", "shard-000001.tar"):
        assert (tmp_path / "store/set" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert f"{url}: 8 images in 2 shards, all as written" in call("verify", url).stdout
    assert "none is missing" in call("merge", url, "--out", tmp_path / "copy").stdout
    (tmp_path / "store/set/shard-000001.tar").write_bytes(b"x")
    done = call("verify", url)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 2)
    assert "shard 1: not finished, or its files are not those of its row" in done.stderr
    done = call("verify", "http://example.org/set")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "scheme 'http' is not allowed" in done.stderr
    done = call(*words, "s3:/bucket/set")
    assert (done.returncode, done.stderr.strip().count("\n")) == (2, 0)
    assert "looks like a URL; expected s3://" in done.stderr


def test_a_refused_url_touches_nothing(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for url in ("http://a/b", "s3://KEY:SECRET@b/c", "zip::file:///x"):
        done = call("synth", "--preset", "digits", "--num-samples", 1, "--out", url)
        assert done.returncode == 2
        assert "SECRET" not in done.stderr
    assert list(tmp_path.iterdir()) == []
