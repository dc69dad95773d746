"""Previews on the student's side: trained on, not counted, not scored."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from synthkd.dfkd.cached import MemorySource
from synthkd.dfkd.data import LabelledImages, load_synthetic
from synthkd.dfkd.report import write_report
from synthkd.dfkd.report_data import load_set
from synthkd.dfkd.student import DistillSpec, split
from synthkd.dfkd.students import StudentJob, train_student
from synthkd.engine.errors import SynthkdError
from synthkd.engine.reading import read_set


@pytest.fixture(scope="module")
def folder(tiny_job: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight samples, two of them in a last group of six, with two previews each."""
    from synthkd.dfkd.rounds import draw_set
    from synthkd.engine import Request

    out = tmp_path_factory.mktemp("set") / "shards"
    job = replace(tiny_job, recipe=replace(tiny_job.recipe, previews=(0.5, 0.75)))
    draw_set(job, Request(num_samples=8, seed=5), out, workers=1)
    return out


def test_loaded_with_or_without(folder: Path) -> None:
    both, finals = load_synthetic(folder), load_synthetic(folder, previews=False)
    assert (len(both), len(finals)) == (24, 8)
    assert both.previews is not None
    assert both.previews.tolist() == [False, True, True] * 8
    assert torch.equal(both.images[~both.previews], finals.images)
    assert torch.equal(both.labels[0::3], finals.labels)
    assert finals.previews is None
    stored = [torch.from_numpy(s.pixels.copy()).permute(2, 0, 1) for s in read_set(folder)]
    assert torch.equal(both.images, torch.stack(stored))


def test_a_limit_counts_samples(folder: Path, tiny_set: Path) -> None:
    both, some = load_synthetic(folder), load_synthetic(folder, 5, (8, 6))
    assert some.images.shape == (15, 3, 8, 6)
    assert torch.equal(some.labels, both.labels[:15])
    assert len(load_synthetic(folder, 5, previews=False)) == 5
    assert len(load_synthetic(tiny_set)) == len(load_synthetic(tiny_set, previews=False)) == 30


def test_an_unfinished_set_is_counted_with_its_previews(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "set"))
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "num_samples": 9}))
    with pytest.raises(SynthkdError, match="24 of 27 images are in finished shards"):
        load_synthetic(copy)


def test_held_out_are_finished_images_of_samples_that_are_not_trained_on() -> None:
    """Twelve images of four samples; of a large set no more is held out than a share that fits in memory."""
    images, labels = torch.zeros(12, 3, 2, 2, dtype=torch.uint8), torch.zeros(12, dtype=torch.long)
    marks = torch.tensor([False, True, True] * 4)
    rows, held = split(MemorySource(LabelledImages(images, labels, ("a",), marks)), 0.5, (2, 2))
    assert (rows, held.tolist()) == (6, [6, 9])
    plain = MemorySource(LabelledImages(images, labels, ("a",)))
    rows, held = split(plain, 0.1, (2, 2))
    assert (rows, held.tolist()) == (11, [11])
    pixels = images[:1, :, :1, :1].expand(4000, -1, -1, -1)
    many = MemorySource(LabelledImages(pixels, torch.zeros(4000, dtype=torch.long), ("a",)))
    assert len(split(many, 0.5, (512, 512))[1]) == 512


def test_students_are_trained_on_both_unless_told_otherwise(
    folder: Path, tmp_path: Path, teacher_card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from synthkd.dfkd import students

    trained = []
    inner = students.distill
    monkeypatch.setattr(students, "distill", lambda data, *a, **kw: trained.append(len(data)) or inner(data, *a, **kw))
    spec = DistillSpec(arch_args={"widths": [8], "blocks": [1]}, steps=1, batch_size=4)
    job = StudentJob(set_dir=folder, out_dir=tmp_path, teacher=str(teacher_card), spec=spec, device="cpu")
    for this in (job, replace(job, previews=False), replace(job, limit=7)):
        train_student(this)
    assert trained == [24, 8, 21]
    assert "previews" not in json.loads(job.stamp)


def test_the_command_trains_without_previews(folder: Path, tmp_path: Path, call: Any) -> None:
    from synthkd.dfkd import cli_distill

    loaded = []
    inner = cli_distill.open_set
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli_distill, "open_set", lambda *given: loaded.append(given[2]) or inner(*given))
        for words in ((), ("--no-previews",)):
            done = call("distill", folder, "--out", tmp_path / "student", "--steps", 1, "--batch-size", 4, *words)
            assert done.returncode == 0, done.stderr
    assert loaded == [True, False]


def test_a_report_counts_finished_images_and_shows_previews(folder: Path) -> None:
    drawn = load_set(folder)
    assert (drawn.total, len(drawn.intended)) == (8, 8)
    firsts = [row[0] for row in drawn.keys.values()]
    assert sorted(drawn.previews) == sorted(f"{key}-p{percent}" for key in firsts for percent in (50, 75))
    assert not any("-p" in key for row in drawn.keys.values() for key in row)
    page = write_report(folder).read_text()
    assert "the clean latent at 50.0\N{NO-BREAK SPACE}%, 75.0\N{NO-BREAK SPACE}% of the run" in page
