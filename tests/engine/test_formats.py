"""Shards are plain WebDataset: `webdataset` and `datasets` read what `read_set` reads."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthkd.engine import CutMixSpec, GuidanceSpec, write_shards
from synthkd.engine.reading import Sample, read_set

CHANGES: dict[str, Any] = {
    "guidance": GuidanceSpec(scale=0.2),
    "cutmix": CutMixSpec(every=1, last_clean=1, scope="any"),
    "steps": 3,
}


@pytest.fixture
def folder(canned: Callable[..., Any], tmp_path: Path) -> Path:
    """A guided set with class-crossing CutMix: 20 images in two shards."""
    write_shards(canned(20, **CHANGES), tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def samples(folder: Path) -> dict[str, Sample]:
    """What the project's own reader finds."""
    return {s.key: s for s in read_set(folder)}


def test_plain_webdataset_reads_them(folder: Path, samples: dict[str, Sample]) -> None:
    wds = pytest.importorskip("webdataset")
    shards = [str(p) for p in sorted(folder.glob("*.tar"))]
    found = list(wds.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert [x["__key__"] for x in found] == list(samples)
    for x in found:
        assert np.array_equal(np.asarray(x["png"]), samples[x["__key__"]].pixels)
        assert x["json"] == samples[x["__key__"]].meta


def test_huggingface_datasets_read_them(
    folder: Path, samples: dict[str, Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    shards = [str(p) for p in sorted(folder.glob("*.tar"))]
    found = datasets.load_dataset("webdataset", data_files=shards, split="train", cache_dir=str(tmp_path / "cache"))
    assert found.num_rows == 20
    for x in found:
        assert np.array_equal(np.asarray(x["png"].convert("RGB")), samples[x["__key__"]].pixels)
        assert x["json"] == samples[x["__key__"]].meta


def test_a_sample_tells_its_whole_story(samples: dict[str, Sample]) -> None:
    for s in samples.values():
        assert set(s.meta["losses"]) == {"bn", "ce"}
        assert len(s.meta["logits"]) == len(s.meta["targets"]) == 3
        assert sum(s.meta["targets"]) == pytest.approx(1.0)
        assert s.meta["label"] == int(np.argmax(s.meta["targets"]))
        assert s.meta["key"] == s.key


def test_stored_logits_are_the_teachers_on_the_stored_pixels(
    samples: dict[str, Sample], guide: Callable[..., Any]
) -> None:
    import torch

    for s in list(samples.values())[:6]:
        image = torch.from_numpy(s.pixels.copy()).permute(2, 0, 1)[None] / 255
        torch.testing.assert_close(torch.tensor([s.meta["logits"]]), guide().teacher(image), rtol=1e-4, atol=1e-4)


def test_jpg_and_webp_load_too(canned: Callable[..., Any], tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    for suffix in ("jpg", "webp"):
        write_shards(canned(6, image_format=suffix), tmp_path / suffix)
        found = list(wds.WebDataset(str(tmp_path / suffix / "shard-000000.tar"), shardshuffle=False).decode("pil"))
        pixels = [s.pixels for s in read_set(tmp_path / suffix)]
        assert all(np.array_equal(np.asarray(x[suffix]), p) for x, p in zip(found, pixels, strict=True))


def test_the_engine_itself_needs_neither(folder: Path) -> None:
    """`webdataset` and `datasets` are the reader's choice, never imported by a write."""
    for path in (Path(sys.modules["synthkd.engine"].__path__[0])).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {"webdataset", "datasets"} & set(names), path
