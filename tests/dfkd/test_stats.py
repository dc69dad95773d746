"""A set's figures: counted as by hand, sampled by seed, near-copies found, a page that cannot call out."""

import hashlib
import json
import shutil
import signal
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from synthkd.bench.table import synthetic_set
from synthkd.dfkd import stats as module
from synthkd.dfkd.near import near_copies
from synthkd.dfkd.report_stats import write_stats
from synthkd.dfkd.stats import measure_set
from synthkd.engine import SynthkdError
from synthkd.engine.card import CARD
from synthkd.engine.plan import sample_key
from synthkd.engine.reading import read_set
from synthkd.engine.rows import rows_path
from synthkd.engine.table import TABLE, check_table


def test_a_drawn_set_has_its_table_and_card(tiny_set: Path) -> None:
    """Whoever draws a whole set by `draw_set` leaves both behind, and they are right."""
    assert check_table(tiny_set) == []
    assert (tiny_set / TABLE).is_file()
    assert "30 synthetic images in 3 classes" in (tiny_set / CARD).read_text()


def test_figures_are_those_counted_by_hand(tiny_set: Path) -> None:
    """Counts, confidence, losses, readings and pixels against a plain pass over the samples."""
    found = measure_set(tiny_set, sample=100).figures()
    samples = [s for s in read_set(tiny_set) if s.preview is None]
    counts = Counter(s.meta["label"] for s in samples)
    assert [c["images"] for c in found["classes"]] == [counts[i] for i in range(3)]
    assert (found["images"], found["sample"]["images"], found["shards"]) == (30, 30, 2)
    odds = [torch.tensor(s.meta["logits"], dtype=torch.float64).softmax(0) for s in samples]
    right = np.mean([int(o.argmax()) == s.meta["label"] for o, s in zip(odds, samples, strict=True)])
    assert found["sample"]["agreement_percent"] == pytest.approx(100 * right, rel=1e-5)
    for i, row in enumerate(found["classes"]):
        mine = [float(o[i]) for o, s in zip(odds, samples, strict=True) if s.meta["label"] == i]
        assert row["confidence"] == pytest.approx(np.mean(mine), abs=1e-5)
    for name, spread in found["losses"].items():
        values = [s.meta["losses"][name] for s in samples]
        assert spread["mean"] == pytest.approx(np.mean(values), rel=1e-4)
        assert spread["median"] == pytest.approx(np.median(values), rel=1e-4)
    pixels = np.stack([s.pixels for s in samples]).astype(np.float64) / 255
    assert found["sample"]["mean"] == pytest.approx(pixels.mean((0, 1, 2)), rel=1e-5)
    assert found["sample"]["std"] == pytest.approx(pixels.std((0, 1, 2)), rel=1e-5)
    assert found["bytes"]["mean"] == pytest.approx(np.mean([len(s.image) for s in samples]), rel=1e-5)
    assert sum(found["confidence_histogram"]) == 30
    assert found["attempts"] == {"1": 5}
    assert sum(found["stage_seconds"].values()) > 0
    assert json.loads(json.dumps(found)) == found


def test_the_sample_is_a_function_of_seed_and_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same images however a set is cut into shards; evenly over it; others with another seed."""
    monkeypatch.setattr(module, "_look", lambda stats, told: None)
    ids = []
    for name, per_shard, seed in (("a", 40, 0), ("b", 400, 0), ("b", 400, 1)):
        folder = tmp_path / name
        if not folder.exists():
            synthetic_set(folder, 4000, classes=5, shard_samples=per_shard)
        ids.append([place.id for place in measure_set(folder, sample=500, seed=seed).sample])
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 500
    assert len(set(ids[0]) & set(ids[2])) < 120
    assert np.histogram(ids[0], 8, (0, 4000))[0].min() > 35


def test_equal_files_are_counted_over_the_whole_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By digest, across shards, with their ids."""
    monkeypatch.setattr(module, "_look", lambda stats, told: None)
    folder = tmp_path / "set"
    synthetic_set(folder, 160, classes=5, shard_samples=80)
    groups = [[json.loads(line) for line in rows_path(folder, i).read_text().splitlines()] for i in (0, 1)]
    digest = groups[0][0]["members"]["000000003.png"]
    groups[1][0]["members"]["000000081.png"] = groups[1][1]["members"]["000000150.png"] = digest
    rows_path(folder, 1).write_text("".join(json.dumps(group) + "\n" for group in groups[1]))
    rows = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    rows[1]["rows"] = hashlib.sha256(rows_path(folder, 1).read_bytes()).hexdigest()
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = measure_set(folder, sample=5)
    assert (found.equal, found.equal_pairs) == (2, [(3, 81), (81, 150)])


def test_cells_of_planes_find_what_all_pairs_find() -> None:
    """With 150 planted near-copies among 2,000, the way for large samples finds all, and nothing that is none."""
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(2000, 769, generator=generator), dim=1)
    for i in range(150):
        noise = F.normalize(torch.randn(769, generator=generator), dim=0)
        vectors[1999 - i] = F.normalize(vectors[i] + 0.13 * noise, dim=0)  # likeness about 0.992
    every, cells = near_copies(vectors), near_copies(vectors, exact=100)
    assert (every.count, every.exact, cells.exact) == (150, True, False)
    assert cells.count == 150
    assert [(p.earlier, p.later) for p in cells.examples] == [(p.earlier, p.later) for p in every.examples]


def test_a_damaged_sample_is_named(tiny_set: Path, tmp_path: Path) -> None:
    """Its image or its json: one line with shard and member."""
    for at in (600, 512 + 1024 * 2):
        copy = tmp_path / str(at)
        shutil.copytree(tiny_set, copy)
        with tarfile.open(copy / "shard-000000.tar") as tar:
            info = next(i for i in tar if i.name == ("000000000.png" if at == 600 else "000000000.json"))
        data = bytearray((copy / "shard-000000.tar").read_bytes())
        data[info.offset_data + 20] ^= 1
        (copy / "shard-000000.tar").write_bytes(data)
        with pytest.raises(SynthkdError, match=r"000000000\.png: it or its json does not match"):
            measure_set(copy, sample=100)


def test_the_page_holds_hostile_names_as_text(tiny_set: Path, tmp_path: Path) -> None:
    """Class names are escaped, nothing is loaded from elsewhere, and every part is there."""
    copy = tmp_path / "set"
    shutil.copytree(tiny_set, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["recipe"]["classes"] = ["<script>alert(1)</script>", '"><img src=http://x>', "\ud800"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    path = write_stats(measure_set(copy, sample=10), tmp_path / "new" / "page.html")
    text = path.read_text()
    assert "<script" not in text
    assert "<img src=http" not in text
    for name in ("summary", "images", "balance", "confidence", "losses", "files", "pixels", "copies", "times"):
        assert f'<section id="{name}"' in text


@pytest.mark.parametrize("command", ["index", "stats"])
def test_a_stop_writes_nothing(
    tiny_set: Path, tmp_path: Path, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """SIGTERM between two shards: exit code 75, and no file that was not there before."""
    from synthkd.dfkd import cli_progress

    folder, inner = tmp_path / "set", cli_progress.Bars.advance
    shutil.copytree(tiny_set, folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}

    def advance(bars: Any, stage: str, count: int) -> None:
        inner(bars, stage, count)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cli_progress.Bars, "advance", advance)
    done = call(command, folder)
    assert done.returncode == 75, done.stderr
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_cli(tiny_set: Path, tmp_path: Path, call: Callable[..., Any]) -> None:
    """stats writes a page or prints JSON; index lists rows; wrong input is one line with exit code 2."""
    done = call("stats", tiny_set, "--json", "--sample", 7)
    assert json.loads(done.stdout)["near_copies"]["of"] == 7
    assert not (tiny_set / "stats.html").exists()
    assert call("stats", tiny_set, "--out", tmp_path / "s.html").returncode == 0
    assert (tmp_path / "s.html").is_file()
    done = call("index", tiny_set, "--where", "class == dog", "--where", "id < 12", "--json")
    keys = [json.loads(line)["key"] for line in done.stdout.splitlines()]
    wanted = [s.key for s in read_set(tiny_set) if s.meta["class"] == "dog" and s.key < sample_key(12)]
    assert keys == wanted
    assert wanted
    for words in (
        ("stats", tiny_set, "--sample", 0),
        ("stats", tmp_path),
        ("index", tmp_path),
        ("index", tiny_set, "--where", "clas == dog"),
        ("index", tiny_set, "--where", "confidence > very"),
        ("index", tiny_set, "--where", "confidence"),
    ):
        done = call(*words)
        assert done.returncode == 2, words
        assert len(done.stderr.strip().splitlines()[-1:]) == 1
        assert "Traceback" not in done.stderr
