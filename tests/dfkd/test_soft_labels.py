"""Stored labels are what the teacher would say in the loop, of these very views."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthkd.dfkd import soft_labels
from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.feed import Order
from synthkd.dfkd.loader import Loader
from synthkd.dfkd.sets import open_set
from synthkd.dfkd.soft_labels import StoredLabels, store_labels
from synthkd.dfkd.student import TrainOptions, distill
from synthkd.dfkd.teachers import Teacher, load_teacher
from synthkd.dfkd.training import sight_of
from synthkd.dfkd.views import looks
from synthkd.engine.errors import SynthkdError

SPEC = DistillSpec(
    arch_args={"widths": [4], "blocks": [1]}, steps=30, batch_size=8, crop=0.5, flip=True, mix=0.5, views=3,
    soft_labels="stored", select="last",
)  # fmt: skip
ROWS = 27  # of the tiny set's 30


@pytest.fixture
def teacher(teacher_card: Path) -> Teacher:
    """The tiny set's own."""
    return load_teacher(str(teacher_card))


def stored(root: Path, folder: Path, teacher: Teacher, spec: DistillSpec = SPEC, **options: Any) -> Any:
    """Labels of a set, written below `root`."""
    source = open_set(folder)
    reader = source.reader(teacher.input_size, TrainOptions(crops=True))
    return store_labels(root, source, reader, teacher, sight_of(spec, ROWS), **options)


def test_labels_are_the_teachers_word_on_the_batches_to_come(tiny_set: Path, tmp_path: Path, teacher: Teacher) -> None:
    """Through loader, crops, flips, blends and two turns of three views: within float16's rounding."""
    labels, told = stored(tmp_path, tiny_set, teacher)
    assert (told.labelled, told.bytes > 3 * ROWS * 3 * 2) == (3 * ROWS, True)
    source, sight = open_set(tiny_set), sight_of(SPEC, ROWS)
    reader = source.reader(teacher.input_size, TrainOptions(crops=True))
    feed = Loader(source, reader, Order(ROWS, 8, SPEC.seed), sight, torch.device("cpu"), labels)
    blended = 0
    for batch in feed.batches(0, 20):
        with torch.no_grad():
            said = teacher(looks(batch.images, batch.views, sight.spec, batch.partners))
        assert batch.logits is not None
        torch.testing.assert_close(batch.logits, said, rtol=2e-3, atol=2e-3)
        blended += int(batch.views.blended.sum())
    assert 0 < blended < 160


def test_a_student_of_stored_labels_is_one_of_the_teacher_in_the_loop(
    tiny_set: Path, tmp_path: Path, teacher: Teacher
) -> None:
    """The same views, so the same losses, but for the labels' rounding."""
    source = open_set(tiny_set)
    ours = distill(source, teacher, SPEC, labels_root=tmp_path)
    theirs = distill(source, teacher, replace(SPEC, soft_labels="teacher"))
    for a, b in zip(ours.log, theirs.log, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)


def test_no_teacher_runs_in_the_loop(
    tiny_set: Path, tmp_path: Path, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the labels lie there, the teacher sees the held-out images and nothing else."""
    stored(tmp_path, tiny_set, teacher)
    seen: list[int] = []
    forward = Teacher.forward
    monkeypatch.setattr(
        Teacher, "forward", lambda self, x: (seen.append(len(x)) if self is teacher else None, forward(self, x))[1]
    )
    distill(open_set(tiny_set), teacher, SPEC, labels_root=tmp_path)
    assert seen == [3]


def test_killed_between_files_nothing_is_labelled_twice(
    tiny_set: Path,
    tmp_path: Path,
    teacher: Teacher,
    killed: Callable[[Callable[[], object]], bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Files of ten rows; killed in the fourth, the next call labels what is left, and the bytes are the same."""
    monkeypatch.setattr(soft_labels, "CHUNK", 10)
    whole, _ = stored(tmp_path / "whole", tiny_set, teacher)
    count = 0

    def kill(images: int) -> None:
        nonlocal count
        count += images
        if count > 30:
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed(lambda: stored(tmp_path / "killed", tiny_set, teacher, on_images=kill))
    left, told = stored(tmp_path / "killed", tiny_set, teacher)
    assert told.labelled == 3 * ROWS - 27  # three files of one view were whole
    names = sorted(p.name for p in whole.folder.iterdir())
    assert names == sorted(p.name for p in left.folder.iterdir())
    assert all((whole.folder / n).read_bytes() == (left.folder / n).read_bytes() for n in names)


def test_other_views_teachers_and_sets_have_other_labels(tiny_set: Path, tmp_path: Path, teacher: Teacher) -> None:
    """The folder's key knows them; `labels.json` says what it is of."""
    folders = [stored(tmp_path, tiny_set, teacher, spec)[0].folder for spec in (SPEC, replace(SPEC, seed=1))]
    folders.append(stored(tmp_path, tiny_set, teacher, replace(SPEC, rotate=0.3))[0].folder)
    with torch.no_grad():
        next(teacher.net.parameters()).mul_(1.5)
    folders.append(stored(tmp_path, tiny_set, teacher)[0].folder)
    assert len(set(folders)) == 4
    assert json.loads((folders[0] / "labels.json").read_text())["rows"] == ROWS


def test_large_logits_stay_float32_and_broken_ones_are_refused(
    tiny_set: Path, tmp_path: Path, teacher: Teacher
) -> None:
    """float16 ends at 65,504."""
    head = teacher.classifier
    assert head is not None
    with torch.no_grad():
        head.weight.mul_(1e7)
    labels, _ = stored(tmp_path, tiny_set, teacher)
    assert float(labels.of(np.arange(4), np.zeros(4, np.int64)).abs().max()) > 65504
    with torch.no_grad():
        head.weight[0, 0] = float("nan")
    with pytest.raises(SynthkdError, match="logits are not finite"):
        stored(tmp_path, tiny_set, teacher)


def test_damaged_and_impossible_labels_are_one_line(tiny_set: Path, tmp_path: Path, teacher: Teacher) -> None:
    """A cut file, labels that lack a set's folder, and losses that need the teacher."""
    labels, _ = stored(tmp_path, tiny_set, teacher)
    path = labels.folder / "view-0001-000000000.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SynthkdError, match=r"view-0001.*not readable"):
        StoredLabels(labels.folder, labels.sight, 3).of(np.arange(3), np.ones(3, np.int64))
    with pytest.raises(SynthkdError, match="not a set in a folder"):
        distill(open_set(tiny_set), teacher, SPEC)
    with pytest.raises(SynthkdError, match="compare maps with the teacher's"):
        replace(SPEC, cam=1.0)
    with pytest.raises(SynthkdError, match="views is 0"):
        replace(SPEC, views=0)
    with pytest.raises(SynthkdError, match="delete it and run the command again"):
        distill(open_set(tiny_set), teacher, SPEC, labels_root=tmp_path)
    path.unlink()
    assert distill(open_set(tiny_set), teacher, SPEC, labels_root=tmp_path).log
