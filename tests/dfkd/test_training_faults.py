"""Training over damaged images, on several processes, with settings that do not fit."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from synthkd.dfkd.distill_spec import DistillSpec, check_parts
from synthkd.dfkd.feed import Order
from synthkd.dfkd.loader import Loader
from synthkd.dfkd.nets import build_net
from synthkd.dfkd.objective import Objective
from synthkd.dfkd.parallel import Ranks, joined  # noqa: F401 - for the pair
from synthkd.dfkd.sets import open_set
from synthkd.dfkd.soft_labels import store_labels
from synthkd.dfkd.step import Step
from synthkd.dfkd.student import Hooks, Stopped, TrainOptions, distill, fresh_student
from synthkd.dfkd.teachers import Teacher, teacher_digest
from synthkd.dfkd.training import rhythm, sight_of
from synthkd.dfkd.views import looks
from synthkd.engine.errors import SynthkdError

SPEC = DistillSpec(
    arch_args={"widths": [4], "blocks": [1]}, steps=12, batch_size=8, mix=0.5, crop=0.6, flip=True, views=2,
    soft_labels="stored", hard=0.1,
)  # fmt: skip
DAMAGED = ("000000002", "000000009", "000000017", "000000021")
Make = Callable[..., Path]


def teacher(size: tuple[int, int] = (12, 10)) -> Teacher:
    """A random network of three classes."""
    torch.manual_seed(1)
    net = build_net("resnet", 3, {"widths": [6], "blocks": [1]})
    return Teacher(net, mean=[0.4] * 3, std=[0.3] * 3, input_size=size, classes=("a", "b", "c"))


@pytest.fixture
def folder(file_set: Make, tmp_path: Path) -> Path:
    """Forty pictures, four of them damaged."""
    return file_set(tmp_path / "set", 40, (12, 10), flipped=DAMAGED)


def test_labels_of_stand_ins_are_their_own(folder: Path, tmp_path: Path) -> None:
    """With blends, crops and stored labels every image of every batch has the label of what it shows."""
    guide, source, sight = teacher(), open_set(folder), sight_of(SPEC, 36)
    reader = source.reader((12, 10), TrainOptions(crops=True))
    labels, _ = store_labels(tmp_path, source, reader, guide, sight)
    seen = set()
    feed = Loader(source, reader, Order(36, 9, 0), sight, torch.device("cpu"), labels)
    for batch in feed.batches(0, 16):
        with torch.no_grad():
            said = guide(looks(batch.images, batch.views, sight.spec, batch.partners))
        assert batch.logits is not None
        torch.testing.assert_close(batch.logits, said, rtol=2e-3, atol=2e-3)
        assert batch.labels.tolist() == source.labels[batch.rows].tolist()
        seen |= set(batch.keys)
    assert not seen & set(DAMAGED)
    assert set(reader.damaged) == set(DAMAGED)


def test_damage_is_remembered_over_a_stop(folder: Path, tmp_path: Path) -> None:
    """Found before the stop, listed in the end."""
    spec = replace(SPEC, soft_labels="teacher", views=0, steps=9)
    seen: list[int] = []
    hooks = Hooks(on_step=seen.append, should_stop=lambda: bool(seen) and seen[-1] == 8)
    with pytest.raises(Stopped):
        distill(open_set(folder), teacher(), spec, folder=tmp_path, hooks=hooks)
    assert set(distill(open_set(folder), teacher(), spec, folder=tmp_path).damaged) == set(DAMAGED)


def test_a_teacher_is_known_by_all_that_it_says() -> None:
    """The same tensors at another size, or in another order of layers, are another teacher."""
    assert teacher_digest(teacher()) == teacher_digest(teacher())
    assert teacher_digest(teacher()) != teacher_digest(teacher((24, 24)))
    other = teacher()
    other.net.bn1.eps = 0.1
    assert teacher_digest(teacher()) != teacher_digest(other)


@pytest.mark.parametrize("steps", [1, 30, 99, 500, 1000, 5050, 9999, 12345, 27501, 50100])
def test_held_out_images_are_looked_at_often_enough(steps: int) -> None:
    """Looks fall on log rows, about fifty of them in a long training, every hundred steps in a short one."""
    every, judged = rhythm(steps)
    assert judged % every == 0
    assert 25 <= every <= max(25, steps // 1000)
    assert judged <= 1.5 * max(100, steps // 50)


def test_batches_are_cut_evenly() -> None:
    """Ranks times parts; BatchNorm sees two images at least."""
    spec = replace(SPEC, batch_size=12, accumulate=4, soft_labels="teacher")
    for world, fits in ((1, True), (2, False), (3, False)):
        if fits:
            check_parts(spec, world)
        else:
            with pytest.raises(SynthkdError, match="expected equal parts of two images or more"):
                check_parts(spec, world)


def test_losses_on_maps_alone_reach_every_parameter() -> None:
    """As DDP wants: none is left without a gradient."""
    guide = teacher()
    for change in ({"features": 1.0}, {"cam": 1.0}):
        spec = replace(SPEC, kl=0.0, hard=0.0, soft_labels="teacher", views=0, **change)
        student = fresh_student(guide, spec)
        student.net.requires_grad_(True).train()
        step = Step(Objective(student, guide, spec), spec, Ranks(), torch.float32, None)
        x = torch.rand(8, 3, 12, 10)
        with step.objective.attached():
            loss, _ = step.objective(x, step.objective.teach(x), torch.zeros(8, dtype=torch.long), None)
        loss.backward()
        assert all(p.grad is not None for p in step.parameters)


def test_a_compiler_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """No traceback of inductor's."""

    def broken(self: Any, *_: Any) -> Any:
        raise TorchDynamoException("no\nworking C++ compiler")

    monkeypatch.setattr(Step, "_part", broken)
    with pytest.raises(SynthkdError, match=r"cannot compile the step here \(no working C\+\+ compiler\)"):
        distill(open_set(folder), teacher(), replace(SPEC, soft_labels="teacher"))


@pytest.mark.slow
@pytest.mark.skipif(" " in torch.__file__, reason="torch's C++ compiler calls break at a space in its own path")
def test_a_compiled_training_is_the_eager_one(file_set: Make, tmp_path: Path) -> None:
    """By inductor, one graph each for teacher and student whatever the batch: the losses of the eager training."""
    source, spec = open_set(file_set(tmp_path / "set", 40, (12, 10))), replace(SPEC, soft_labels="teacher")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = distill(source, teacher(), spec, options=TrainOptions(compile="default"))
    assert counters["stats"]["unique_graphs"] == 2
    eager = distill(source, teacher(), spec, options=TrainOptions(compile="off"))
    assert compiled.log[-1]["loss"] == pytest.approx(eager.log[-1]["loss"], rel=1e-3)


PAIR = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import importlib.util
spec = importlib.util.spec_from_file_location("case", sys.argv[1])
case = importlib.util.module_from_spec(spec); spec.loader.exec_module(case)
folder = Path(sys.argv[2])
with case.joined("cpu") as ranks:
    student = case.distill(case.open_set(folder), case.teacher(), case.SPEC, ranks=ranks, labels_root=folder.parent)
    total = sum(float(v.double().sum()) for v in student.net.state_dict().values())
    told = {"total": total, "agreement": student.agreement, "damaged": sorted(student.damaged)}
    (folder.parent / f"rank-{ranks.rank}.json").write_text(json.dumps(told))
"""


@pytest.mark.slow
def test_two_processes_share_labels_and_what_they_find(folder: Path) -> None:
    """Stored labels made by both, damage seen by either, one student, one agreement."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = [sys.executable, "-c", PAIR, __file__, str(folder)]
    started = [subprocess.Popen(words, env={**shared, "RANK": r, "LOCAL_RANK": r}) for r in ("0", "1")]
    assert [p.wait(timeout=240) for p in started] == [0, 0]
    told = [json.loads((folder.parent / f"rank-{r}.json").read_text()) for r in (0, 1)]
    assert told[0] == told[1]
    assert told[0]["damaged"] == sorted(DAMAGED)
    assert len(list(folder.parent.glob("soft_labels/*/view-*"))) == 2
    assert np.isfinite(told[0]["total"])
