"""Clean-latent previews: marked samples beside the finished ones, which they leave alone."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from synthkd.engine import CutMixSpec, GuidanceSpec, Plan, Request, Synthesizer, write_shards
from synthkd.engine.reading import Sample, read_set
from synthkd.engine.verify import verify_set
from synthkd.kernels import to_uint8

SHARES = (0.25, 0.75)  # after calls 0 and 2 of 4
CHANGES: dict[str, Any] = {
    "guidance": GuidanceSpec(scale=0.2),
    "cutmix": CutMixSpec(every=1, last_clean=1, scope="any"),
    "steps": 4,
    "groups_per_shard": 2,
    "previews": SHARES,
}
Canned = Callable[..., Any]


def _files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("shard-*"))}


@pytest.fixture
def folder(canned: Canned, tmp_path: Path) -> Path:
    """Twenty samples, two of them in a last group of six, with two previews each."""
    write_shards(canned(20, **CHANGES), tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def samples(folder: Path) -> dict[str, Sample]:
    """All of them by key."""
    return {s.key: s for s in read_set(folder)}


def test_a_preview_is_a_sample_of_its_own_that_says_so(samples: dict[str, Sample], folder: Path) -> None:
    assert list(samples) == [f"{i:09d}{tail}" for i in range(20) for tail in ("", "-p25", "-p75")]
    for key, sample in samples.items():
        of, _, percent = key.partition("-p")
        final = samples[of]
        if not percent:
            assert sample.preview is None
            assert not {"preview", "of"} & set(sample.meta)
            continue
        assert sample.preview == sample.meta["preview"] == int(percent) / 100
        assert (sample.meta["of"], sample.meta["key"]) == (of, key)
        same = ("prompt", "seed", "group", "attempt")
        assert [sample.meta[n] for n in same] == [final.meta[n] for n in same]
        assert sample.pixels.shape == final.pixels.shape
        assert not np.array_equal(sample.pixels, final.pixels)
    report = verify_set(folder)
    assert (report.samples, report.problems) == (20, ())


def test_labels_follow_the_area_at_that_call(samples: dict[str, Sample], canned: Canned) -> None:
    stream = canned(20, **CHANGES)
    steer = stream._synth._steering(stream.plan.unit(0), 0, 0)
    moved = 0
    for call, tail in ((0, "-p25"), (2, "-p75"), (3, "")):
        for i in range(6):
            meta = samples[f"{i:09d}{tail}"].meta
            assert meta["targets"] == pytest.approx(steer.targets[call + 1][i].tolist())
            assert meta["label"] == int(np.argmax(meta["targets"]))
            assert meta["class"] == ("cat", "dog", "bird")[meta["label"]]
            moved += meta["targets"] != samples[f"{i:09d}"].meta["targets"]
    assert moved


def test_logits_are_the_teachers_on_the_preview(samples: dict[str, Sample], guide: Callable[..., Any]) -> None:
    for key in ("000000001-p25", "000000004-p75"):
        image = torch.from_numpy(samples[key].pixels.copy()).permute(2, 0, 1)[None] / 255
        stored = torch.tensor([samples[key].meta["logits"]])
        torch.testing.assert_close(stored, guide().teacher(image), rtol=1e-4, atol=1e-4)


def test_a_preview_is_the_decoded_clean_latent(
    synthesizer: Callable[..., Synthesizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the solver's step made of x0, after exchange and guidance, at the calls of the shares."""
    from synthkd.engine import sampler

    inner, seen = sampler.guided_step, []

    def watched(*args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        out: tuple[Tensor, Tensor | None] = inner(*args, **options)
        seen.append(out[1])
        return out

    monkeypatch.setattr(sampler, "guided_step", watched)
    synth = synthesizer(**CHANGES)
    (batch,) = synth.stream(Request(num_samples=6))
    for preview, call in zip(batch.previews, (0, 2), strict=True):
        assert preview.share == SHARES[call // 2]
        with torch.no_grad():
            assert torch.equal(preview.images, to_uint8(synth.model.decoder(seen[call])))
    sent = pickle.loads(pickle.dumps(batch.cpu()))  # as a worker does
    assert [p.share for p in sent.previews] == list(SHARES)
    assert all(torch.equal(a.images, b.images) for a, b in zip(sent.previews, batch.previews, strict=True))


def test_finished_images_do_not_know_of_previews(
    canned: Canned, folder: Path, stored: Callable[[Path], dict[str, bytes]], tmp_path: Path
) -> None:
    write_shards(canned(20, **{**CHANGES, "previews": ()}), tmp_path / "plain")
    plain, both = stored(tmp_path / "plain"), stored(folder)
    assert len(plain) == 40
    assert {name: data for name, data in both.items() if "-p" not in name} == plain


def test_a_set_grows_to_the_same_bytes(canned: Canned, folder: Path, tmp_path: Path) -> None:
    """Over groups that are kept in part: 1, then 8, then 20 samples."""
    for count in (1, 8, 20):
        summary = write_shards(canned(count, **CHANGES), tmp_path / "grown")
        assert summary.present == count
        assert len(list(read_set(tmp_path / "grown"))) == 3 * count
    assert _files(tmp_path / "grown") == _files(folder)


@pytest.mark.parametrize("point", range(2, 14, 3))
def test_a_kill_changes_nothing(
    canned: Canned, folder: Path, killed: Callable[..., bool], tmp_path: Path, point: int
) -> None:
    def work() -> None:
        calls, fsync = iter(range(10**6)), os.fsync
        os.fsync = lambda f: os.kill(os.getpid(), 9) if next(calls) == point else fsync(f)
        write_shards(canned(20, **CHANGES), tmp_path / "killed")

    assert killed(work)
    assert write_shards(canned(20, **CHANGES), tmp_path / "killed").present == 20
    assert _files(tmp_path / "killed") == _files(folder)


def test_plain_webdataset_reads_previews(folder: Path, samples: dict[str, Sample]) -> None:
    wds = pytest.importorskip("webdataset")
    shards = [str(p) for p in sorted(folder.glob("*.tar"))]
    found = list(wds.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert [x["__key__"] for x in found] == list(samples)
    for x in found:
        assert np.array_equal(np.asarray(x["png"]), samples[x["__key__"]].pixels)
        assert x["json"] == samples[x["__key__"]].meta


def test_a_lost_preview_is_named(folder: Path) -> None:
    path = folder / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    at = data.index(b"000000003-p75.png") + 512
    data[at + 40] ^= 1
    path.write_bytes(data)
    assert "000000003-p75.png" in verify_set(folder).problems[0]


def test_a_preview_that_is_not_finite_redraws_its_group(
    synthesizer: Callable[..., Synthesizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt's last decoded latent, a preview's, comes out as NaN."""
    synth, calls = synthesizer(steps=4, previews=(0.5,)), iter(range(100))
    inner = type(synth.model.decoder).__call__

    def spoiled(self: Any, latents: Tensor) -> Tensor:
        return inner(self, latents) * (float("nan") if next(calls) == 1 else 1.0)

    monkeypatch.setattr(type(synth.model.decoder), "__call__", spoiled)
    (batch,) = synth.stream(Request(num_samples=6))
    assert batch.attempt == 1


def test_a_multistep_solver_and_no_guidance(synthesizer: Callable[..., Synthesizer]) -> None:
    """The history of DPM-Solver++ 2M is its own: previews leave its images alone."""
    changes: dict[str, Any] = {"sampler": "dpmpp_2m", "steps": 4}
    synth = synthesizer(**changes, previews=SHARES)
    plain = synthesizer(**changes).run(Plan(synth.recipe, Request(num_samples=6)).unit(0), 0)
    (batch,) = synth.stream(Request(num_samples=4))
    assert torch.equal(batch.images, plain.images[:4])
    assert [p.images.shape for p in batch.previews] == [batch.images.shape] * 2
    assert json.dumps(batch.previews[0].labels.tolist()) == json.dumps(batch.labels.tolist())
