"""What a set looks through: fitted, tried and frozen once; kept through kills, growth, replay, rounds and loss."""

import json
import os
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from synthkd.dfkd import decoding
from synthkd.dfkd.fit_decoder import FitSpec
from synthkd.dfkd.presets import unguided
from synthkd.dfkd.replay import replay_sample
from synthkd.dfkd.report import write_report
from synthkd.dfkd.rounds import DrawOptions, draw_set
from synthkd.dfkd.student import DistillSpec
from synthkd.engine import Request, SynthkdError, config, write_shards
from synthkd.engine.index import read_manifest
from synthkd.engine.verify import verify_set

COUNT = 9  # two groups of 6 in two shards; the last keeps 3


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` fits from 9 pixels on, and a fit is a matter of a second."""
    monkeypatch.setattr(config, "AUTO_PIXELS", 8)
    monkeypatch.setattr(decoding, "FIT", FitSpec(samples=48, steps=20, batch_size=16, hidden=8, blocks=1))


def looking(job: Any, decoder: str, min_cosine: float = 0.01) -> Any:
    """The job with another decoder."""
    guidance = replace(job.recipe.guidance, decoder=decoder, min_cosine=min_cosine)
    return replace(job, recipe=replace(job.recipe, guidance=guidance, groups_per_shard=1))


@pytest.fixture
def auto(tiny_job: Any) -> Any:
    """A job that leaves it to the set."""
    return looking(tiny_job, "auto")


def draw(job: Any, folder: Path, count: int = COUNT, **options: Any) -> Any:
    """Draw the set in this process."""
    workers, how = options.pop("workers", 1), DrawOptions(shards=options.pop("shards", None))
    return draw_set(job, Request(num_samples=count, seed=5), folder, workers=workers, how=how, **options)


def files(folder: Path) -> dict[str, bytes]:
    """Shards, and the set's own decoder."""
    found = [*folder.glob("shard-*"), *folder.glob("decoder/*")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(found)}


def shards(folder: Path) -> list[bytes]:
    """Shards alone."""
    return [p.read_bytes() for p in sorted(folder.glob("shard-*"))]


@pytest.fixture(scope="module")
def kept() -> dict[str, Path]:
    """Sets drawn once."""
    return {}


@pytest.fixture
def whole(auto: Any, kept: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set that nothing disturbed."""
    if "whole" not in kept:
        kept["whole"] = tmp_path_factory.mktemp("decoding") / "whole"
        draw(auto, kept["whole"])
    return kept["whole"]


@pytest.fixture
def plain(tiny_job: Any, kept: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recipe through the full VAE."""
    if "plain" not in kept:
        kept["plain"] = tmp_path_factory.mktemp("decoding") / "plain"
        draw(looking(tiny_job, "vae"), kept["plain"])
    return kept["plain"]


def test_a_set_fits_its_own_decoder(whole: Path, plain: Path, tmp_path: Path) -> None:
    manifest, other = read_manifest(whole), read_manifest(plain)
    note = manifest["decoder"]
    assert (note["asked"], note["chosen"], note["threshold"]) == ("auto", "fitted", 0.01)
    assert note["cosine"] >= 0.01
    assert len(note["cosines"]) == 4
    assert "decoder" not in other
    assert manifest["model_sha256"] == other["model_sha256"]  # knows nothing of what was fitted
    assert shards(whole) != shards(plain)
    assert verify_set(whole).problems == ()
    assert replay_sample(whole, 7, tmp_path / "7.png", "cpu")[1] == "identical to the stored image"
    shutil.copytree(whole, tmp_path / "set")
    assert "Here guidance looks through a fitted decoder" in write_report(tmp_path / "set").read_text()


def test_where_the_gradients_disagree_the_vae_is_taken(tiny_job: Any, plain: Path, tmp_path: Path) -> None:
    draw(looking(tiny_job, "auto", min_cosine=0.999), tmp_path / "set")
    assert read_manifest(tmp_path / "set")["decoder"]["chosen"] == "vae"
    assert _pictures(tmp_path / "set") == _pictures(plain)
    assert replay_sample(tmp_path / "set", 7, tmp_path / "7.png", "cpu")[1] == "identical to the stored image"


def _pictures(folder: Path) -> dict[str, bytes]:
    out = {}
    for path in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            out |= {m.name: tar.extractfile(m).read() for m in tar if m.name.endswith(".png")}  # type: ignore[union-attr]
    return out


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("not to be called")


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("synthkd.dfkd.fit_decoder", "_losses"),
        ("synthkd.engine.fitted", "write_atomically"),  # weights are there, their card is not
        ("synthkd.dfkd.decoding", "note_decoder"),  # the artifact is there, its digest is not
        ("synthkd.dfkd.decoding", "calibrate"),  # fitted and noted, not decided
        ("synthkd.dfkd.decoding", "obey"),  # decided, nothing drawn
    ],
)
def test_a_kill_at_any_point_changes_nothing(
    auto: Any, whole: Path, tmp_path: Path, killed: Callable[..., bool], where: str, what: str
) -> None:
    folder = tmp_path / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[where], what, die)
        assert killed(lambda: draw(auto, folder))
    draw(auto, folder, shards=[1, 0])
    assert files(folder) == files(whole)
    assert read_manifest(folder)["decoder"] == read_manifest(whole)["decoder"]


def test_a_stop_while_fitting_leaves_nothing_half_done(auto: Any, whole: Path, tmp_path: Path) -> None:
    asked = iter(range(1000))
    assert draw(auto, tmp_path / "set", should_stop=lambda: next(asked) >= 5).stopped
    assert not list((tmp_path / "set").glob("decoder/*"))
    assert "decoder" not in read_manifest(tmp_path / "set")
    draw(auto, tmp_path / "set")
    assert files(tmp_path / "set") == files(whole)


def test_a_grown_set_keeps_its_decision(
    auto: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "set")
    monkeypatch.setattr(decoding, "calibrate", refuse)
    monkeypatch.setattr(decoding, "fit_decoder", refuse)
    draw(auto, tmp_path / "set", 12)
    assert read_manifest(tmp_path / "set")["decoder"] == read_manifest(whole)["decoder"]
    assert read_manifest(tmp_path / "set")["num_samples"] == 12
    assert verify_set(tmp_path / "set").problems == ()


def test_a_lost_or_damaged_decoder_is_fitted_anew(auto: Any, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(whole, folder)
    with (folder / "decoder" / "decoder.safetensors").open("ab") as f:
        f.write(b"x")
    assert any("does not match the digest" in p for p in verify_set(folder).problems)
    with pytest.raises(SynthkdError, match="missing or damaged; run the command that drew the set again"):
        replay_sample(folder, 1, tmp_path / "1.png", "cpu")
    shutil.rmtree(folder / "decoder")
    assert any("is missing" in p for p in verify_set(folder).problems)
    draw(auto, folder)
    assert files(folder) == files(whole)


def test_another_decoder_than_the_noted_one_is_refused(
    auto: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "set")
    shutil.rmtree(tmp_path / "set" / "decoder")
    monkeypatch.setattr(decoding, "FIT", replace(decoding.FIT, steps=19))
    with pytest.raises(SynthkdError, match="fitting it anew gave another one"):
        draw(auto, tmp_path / "set", 12)


@pytest.mark.parametrize("note", [[], {"asked": 1}, {"asked": "auto", "chosen": "vae"}, {"cosine": "high"}, "auto"])
def test_a_manifest_that_says_nonsense_is_one_line(whole: Path, tmp_path: Path, note: Any) -> None:
    shutil.copytree(whole, tmp_path / "set")
    path = tmp_path / "set" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder": note}))
    with pytest.raises(SynthkdError, match=r"manifest\.json: decoder"):
        replay_sample(tmp_path / "set", 1, tmp_path / "1.png", "cpu")


def test_another_set_is_refused_before_anything_is_fitted(
    auto: Any, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "fit_decoder", refuse)
    other = replace(auto, recipe=replace(auto.recipe, steps=3))
    with pytest.raises(SynthkdError, match=r"holds another recipe's set \(recipe.steps"):
        draw(other, whole)


def test_a_named_decoder_is_tried_too(tiny_job: Any, build: Any, plain: Path, tmp_path: Path) -> None:
    build.tiny_autoencoder().save_pretrained(tmp_path / "tiny")
    named = looking(tiny_job, f"tiny:{tmp_path / 'tiny'}", min_cosine=0.99)
    draw(named, tmp_path / "tried")
    draw(looking(tiny_job, named.recipe.guidance.decoder, min_cosine=0.0), tmp_path / "trusted")
    tried, trusted = read_manifest(tmp_path / "tried"), read_manifest(tmp_path / "trusted")
    assert tried["decoder"]["chosen"] == "vae"
    assert "decoder" not in trusted
    assert tried["model_sha256"] == trusted["model_sha256"] != read_manifest(plain)["model_sha256"]
    assert _pictures(tmp_path / "tried") == _pictures(plain) != _pictures(tmp_path / "trusted")


def test_a_set_begun_from_python_goes_on_as_it_began(auto: Any, plain: Path, tmp_path: Path) -> None:
    write_shards(auto.build().stream(Request(num_samples=COUNT, seed=5)), tmp_path / "set", shards=[0])
    assert "decoder" not in read_manifest(tmp_path / "set")
    draw(auto, tmp_path / "set")
    assert read_manifest(tmp_path / "set")["decoder"]["chosen"] == "vae"
    assert _pictures(tmp_path / "set") == _pictures(plain)


def test_an_unguided_control_settles_nothing(auto: Any, tmp_path: Path) -> None:
    draw(unguided(auto), tmp_path / "set", 3)
    assert "decoder" not in read_manifest(tmp_path / "set")
    assert not (tmp_path / "set" / "decoder").exists()


def test_rounds_share_the_decision(auto: Any, tmp_path: Path) -> None:
    student = DistillSpec(
        arch="resnet", arch_args={"widths": [4], "blocks": [1]}, steps=2, batch_size=4, warmup_steps=1
    )
    job = replace(auto, gamma=1.0, round_student=student, recipe=replace(auto.recipe, rounds=2))
    draw(job, tmp_path / "set")
    manifest = read_manifest(tmp_path / "set")
    assert manifest["decoder"]["chosen"] == "fitted"
    assert set(manifest["checkpoints"]) == {"1"}
    assert replay_sample(tmp_path / "set", 7, tmp_path / "7.png", "cpu")[1] == "identical to the stored image"


def test_another_loop_does_not_go_on_through_another_decoder(tiny_job: Any, tmp_path: Path) -> None:
    """A stream of the same recipe from Python has the same fingerprint; what it looks through may be another."""
    job, folder = looking(tiny_job, "pooled:2", min_cosine=0.999), tmp_path / "set"
    draw(job, folder)
    assert read_manifest(folder)["decoder"]["chosen"] == "vae"
    before = shards(folder)
    with pytest.raises(SynthkdError, match=r"looks through 'vae'.*not through 'pooled'"):
        write_shards(job.build().stream(Request(num_samples=COUNT + 6, seed=5)), folder)
    assert shards(folder) == before
    write_shards(replace(job, look="vae").build().stream(Request(num_samples=COUNT + 6, seed=5)), folder)
    draw(job, tmp_path / "at-once", COUNT + 6)
    assert shards(folder) == shards(tmp_path / "at-once")
    assert "look" not in read_manifest(folder)


def test_a_lost_decoder_that_was_not_chosen_is_no_problem(tiny_job: Any, tmp_path: Path) -> None:
    draw(looking(tiny_job, "auto", min_cosine=0.999), tmp_path / "set")
    shutil.rmtree(tmp_path / "set" / "decoder")
    assert verify_set(tmp_path / "set").problems == ()
