"""The training loop: kills, parts of batches, running means, selection, several processes, no waits."""

import json
import os
import signal
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
from torch import Tensor

from synthkd.dfkd.cached import MemorySource
from synthkd.dfkd.data import LabelledImages
from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.feed import Order
from synthkd.dfkd.nets import build_net
from synthkd.dfkd.objective import Objective
from synthkd.dfkd.parallel import Ranks
from synthkd.dfkd.sight import Sight, batch_of, request_for
from synthkd.dfkd.step import Step
from synthkd.dfkd.student import Hooks, Stopped, TrainOptions, distill, fresh_student
from synthkd.dfkd.teachers import Teacher
from synthkd.dfkd.training import CHECKPOINT, sight_of
from synthkd.dfkd.views import ViewSpec, looks
from synthkd.engine.errors import SynthkdError

Killed = Callable[[Callable[[], object]], bool]
SPEC = DistillSpec(
    arch_args={"widths": [4], "blocks": [1]}, steps=60, batch_size=8, warmup_steps=5, ema=0.9, mix=0.3, flip=True,
    hard=0.2, accumulate=2,
)  # fmt: skip
HOW = TrainOptions(checkpoint_seconds=0.0)


def images(count: int = 41) -> LabelledImages:
    """Random images of three classes, 9x7."""
    made = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (count, 3, 9, 7), generator=made, dtype=torch.uint8)
    return LabelledImages(pixels, torch.arange(count) % 3, ("a", "b", "c"))


def teacher() -> Teacher:
    """A random network of three classes."""
    torch.manual_seed(1)
    net = build_net("resnet", 3, {"widths": [6], "blocks": [1]})
    return Teacher(net, mean=[0.4] * 3, std=[0.3] * 3, input_size=(9, 7), classes=("a", "b", "c"))


def weights(spec: DistillSpec, **options: Any) -> dict[str, Tensor]:
    """A student's tensors."""
    return distill(images(), teacher(), spec, **options).net.net.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("change", [{}, {"optimizer": "sgd", "select": "last", "ema": 0.0}])
def test_killed_anywhere_the_student_is_the_same(change: dict[str, Any], tmp_path: Path, killed: Killed) -> None:
    """SIGKILL after steps 3, 26 and 51, twice in a row among them: bit-equal to the undisturbed run."""
    spec = replace(SPEC, **change)
    whole = weights(spec, options=HOW)

    def until(stop: int) -> Callable[[], object]:
        def kill(step: int) -> None:
            if step == stop:
                os.kill(os.getpid(), signal.SIGKILL)

        return lambda: weights(spec, options=HOW, folder=tmp_path, hooks=Hooks(on_step=kill))

    for stop in (3, 26, 27, 51):
        assert killed(until(stop))
    assert (tmp_path / CHECKPOINT).exists()
    begun: list[int] = []
    assert same(whole, weights(spec, options=HOW, folder=tmp_path, hooks=Hooks(on_step=begun.append)))
    assert begun[0] == 50  # it went on, and did not begin again


def test_a_stop_keeps_the_step_it_was_at(tmp_path: Path) -> None:
    """SIGTERM's way: a checkpoint is written at once, between log rows too."""
    seen: list[int] = []
    hooks = Hooks(on_step=seen.append, should_stop=lambda: bool(seen) and seen[-1] == 7)
    with pytest.raises(Stopped):
        weights(SPEC, options=TrainOptions(), folder=tmp_path, hooks=hooks)
    again: list[int] = []
    found = weights(SPEC, options=TrainOptions(), folder=tmp_path, hooks=Hooks(on_step=again.append))
    assert again[0] == 7
    assert same(found, weights(SPEC))


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    """The message names what differs; a damaged file is named too."""
    with pytest.raises(Stopped):
        weights(SPEC, folder=tmp_path, hooks=Hooks(should_stop=lambda: True))
    with pytest.raises(SynthkdError, match=r"another training \(temperature is 4.0 there, 2.0 here\)"):
        weights(replace(SPEC, temperature=2.0), folder=tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SynthkdError, match="not readable"):
        weights(SPEC, folder=tmp_path)


def parts(spec: DistillSpec, net: str = "plain_cnn", **options: Any) -> tuple[Step, Any]:
    """A Step and a batch for it."""
    data, guide = images(), teacher()
    student = fresh_student(guide, replace(spec, arch="resnet")) if net == "resnet" else _plain(guide)
    student.net.requires_grad_(True).train()
    step = Step(Objective(student, guide, spec), spec, Ranks(), options.get("dtype", torch.float32), None)
    source, sight = MemorySource(data), sight_of(spec, 30)
    rows, epochs = Order(30, spec.batch_size, spec.seed).at(0)
    asked = request_for(rows, epochs, sight, 0)
    reader = source.reader((9, 7), TrainOptions())
    return step, batch_of(source, asked, next(iter(reader.read([asked.request]))))


def _plain(guide: Teacher) -> Teacher:
    """A student without BatchNorm: parts of a batch are then exactly the batch."""
    torch.manual_seed(5)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(140, 3))
    return Teacher(net, mean=[0.4] * 3, std=[0.3] * 3, input_size=(9, 7), classes=guide.classes)


def test_parts_of_a_batch_have_the_gradient_of_the_batch() -> None:
    """Accumulated in four, and at once."""
    found = []
    for count in (1, 4):
        step, batch = parts(replace(SPEC, accumulate=count, ema=0.0))
        loss, ours, theirs = step.run(batch, 3)
        found.append([loss, ours, theirs, *(p.grad for p in step.parameters)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_running_mean_is_what_it_says() -> None:
    """mean <- d mean + (1 - d) weights with d = min(ema, (1 + t) / (10 + t)), BatchNorm's statistics included."""
    step, batch = parts(replace(SPEC, ema=0.3), "resnet")
    mean = {n: v.double() for n, v in step.net.state_dict().items() if v.is_floating_point()}
    for t in range(4):
        step.run(batch, t)
        decay = min(0.3, (1 + t) / (10 + t))
        now = step.net.state_dict()
        mean = {n: decay * v + (1 - decay) * now[n].double() for n, v in mean.items()}
    for name, value in mean.items():
        torch.testing.assert_close(step.weights()[name].double(), value, rtol=1e-5, atol=1e-6)
    assert any("running_var" in name for name in mean)


def test_blended_images_are_labelled_by_their_shares() -> None:
    """The hard loss of a batch with partners is the cross-entropy with both labels, weighed."""
    step, batch = parts(replace(SPEC, kl=0.0, hard=1.0, mix=1.0, accumulate=1))
    x = looks(batch.images, batch.views, ViewSpec.of(SPEC), batch.partners)
    step.net.eval()
    with torch.no_grad():
        log_p = step.objective.student(x).log_softmax(1).double()
    share = torch.from_numpy(batch.views.share).double()
    rows = torch.arange(len(x))
    want = -(share * log_p[rows, batch.labels] + (1 - share) * log_p[rows, batch.partner_labels]).mean()
    step.net.train()
    torch.testing.assert_close(step.run(batch, 0)[0].double(), want, rtol=1e-5, atol=1e-6)
    assert (share < 1).all()


def test_a_step_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value is read back to the host: each way of doing so raises here."""
    step, batch = parts(SPEC, "resnet")
    step.run(batch, 0)

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("the step waits for the device")

    for name in ("item", "cpu", "numpy", "tolist", "nonzero", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, refused)
    loss, *_ = step.run(batch, 1)
    monkeypatch.undo()
    assert torch.isfinite(loss)


def test_bfloat16_is_near_float32() -> None:
    """Networks under autocast, losses in float32."""
    exact, half = (parts(SPEC, "resnet", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    a, b = exact[0].run(exact[1], 0), half[0].run(half[1], 0)
    assert b[0].dtype == b[1].dtype == b[2].dtype == torch.float32
    assert float(a[0]) == pytest.approx(float(b[0]), rel=0.1)
    assert not torch.equal(a[1], b[1])


@pytest.mark.slow
def test_a_compiled_step_is_the_eager_one() -> None:
    """Teacher and student as whole graphs: the same weights after three steps but for rounding."""
    spec = replace(SPEC, mix=0.0, hard=0.0, accumulate=1)
    eager, batch = parts(spec, "resnet")
    compiled, _ = parts(spec, "resnet")
    compiled._teach, compiled._loss = (
        torch.compile(call, fullgraph=True, backend="aot_eager") for call in (compiled._teach, compiled._loss)
    )
    for t in range(3):
        eager.run(batch, t), compiled.run(batch, t)
    for name, value in eager.weights().items():
        torch.testing.assert_close(compiled.weights()[name], value, rtol=1e-4, atol=1e-5)


def test_the_weights_that_agree_most_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of agreements 50, 90, 70 the second's weights; of equals the later ones; `last` takes the last."""
    from synthkd.dfkd.training import Training

    def run(scores: list[float], select: str) -> tuple[float, dict[str, Tensor], list[dict[str, Tensor]]]:
        seen: list[dict[str, Tensor]] = []
        told = iter(scores)

        def agreement(self: Training) -> float:
            seen.append({n: v.clone() for n, v in self._step.weights().items()})
            return next(told)

        monkeypatch.setattr(Training, "_agreement", agreement)
        student = distill(images(), teacher(), replace(SPEC, steps=300, select=select))
        return student.agreement, student.net.net.state_dict(), seen

    found, kept, seen = run([50.0, 90.0, 70.0], "best")
    assert found == 90.0
    assert same(kept, seen[1])
    assert same((equal := run([90.0, 90.0, 70.0], "best"))[1], equal[2][1])
    found, kept, seen = run([50.0, 90.0, 70.0], "last")
    assert found == 70.0
    assert same(kept, seen[2])


def test_ranks_see_disjoint_parts_of_the_same_batches() -> None:
    """Two processes together see what one sees, and an epoch has each sample once."""
    alone, pair = Order(37, 8, 5), [Order(37, 8, 5, rank, 2) for rank in (0, 1)]
    rows = []
    for step in range(40):
        halves = [order.at(step) for order in pair]
        assert not set(zip(*halves[0], strict=True)) & set(zip(*halves[1], strict=True))
        whole = alone.at(step)
        for i in (0, 1):
            assert np.array_equal(np.concatenate([h[i] for h in halves]), whole[i])
        rows += list(zip(whole[1].tolist(), whole[0].tolist(), strict=True))
    assert sorted(r for epoch, r in rows if epoch == 3) == list(range(37))
    assert [r for e, r in rows if e == 0] != [r for e, r in rows if e == 1]
    with pytest.raises(SynthkdError, match="leaves a remainder"):
        Order(37, 9, 5, 0, 2)


PAIR = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
import importlib.util
spec = importlib.util.spec_from_file_location("case", sys.argv[2])
case = importlib.util.module_from_spec(spec); spec.loader.exec_module(case)
from synthkd.dfkd.parallel import joined
from synthkd.dfkd.student import Hooks, save_student, distill
folder, stop = Path(sys.argv[3]), int(sys.argv[4])
def kill(step):
    if step == stop:
        os.kill(os.getpid(), signal.SIGKILL)
with joined("cpu") as ranks:
    student = distill(case.images(), case.teacher(), case.SPEC, options=case.HOW, ranks=ranks, folder=folder,
                      hooks=Hooks(on_step=kill))
    if ranks.first:
        save_student(student, case.SPEC, folder, {})
"""


def _two(folder: Path, stop: int = -1) -> list[int]:
    """Exit statuses of two gloo processes that train one student; both are killed after step `stop`."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = [sys.executable, "-c", PAIR, str(Path.cwd()), __file__, str(folder), str(stop)]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [subprocess.Popen(words, env={**shared, "RANK": r, "LOCAL_RANK": r}) for r in ("0", "1")]
    return [p.wait(timeout=240) for p in started]


@pytest.mark.slow
def test_two_processes_killed_and_run_again_end_in_the_same_student(tmp_path: Path) -> None:
    """Bit-equal to the undisturbed pair, and near to one process: BatchNorm sees halves of a batch there."""
    assert _two(tmp_path / "whole") == [0, 0]
    assert _two(tmp_path / "killed", 33) == [-signal.SIGKILL] * 2
    assert (tmp_path / "killed" / CHECKPOINT).exists()
    assert _two(tmp_path / "killed") == [0, 0]
    names = ("whole", "killed")
    assert len({(tmp_path / name / "student.safetensors").read_bytes() for name in names}) == 1
    logs = [[json.loads(line) for line in (tmp_path / n / "student_log.jsonl").read_text().splitlines()] for n in names]
    assert [[row["step"], row["loss"], row["agreement"]] for row in logs[0]] == [
        [row["step"], row["loss"], row["agreement"]] for row in logs[1]
    ]
    alone = distill(images(), teacher(), SPEC).log
    assert logs[0][-1]["loss"] == pytest.approx(alone[-1]["loss"], rel=0.2)


def test_views_are_functions_of_seed_view_and_row() -> None:
    """In any company, at any place in a batch; another view or seed is another one."""
    sight = Sight(ViewSpec(0.5, True, 0.1, 0.2, 0.1, 0.5), 7, 0, 50)
    rows, epochs = np.array([3, 40, 3, 9]), np.array([2, 1, 1, 2])
    views = sight.of(rows, epochs)
    for i in range(4):
        one = sight.of(rows[i : i + 1], epochs[i : i + 1])
        for name in views.__dataclass_fields__:
            assert np.array_equal(getattr(views, name)[i], getattr(one, name)[0])
    assert not np.array_equal(views.box[0], views.box[2])
    assert not np.array_equal(replace(sight, seed=8).of(rows, epochs).box, views.box)
    turns = replace(sight, views=2)
    assert np.array_equal(turns.of(rows, epochs).box, turns.of(rows, epochs + 2).box)
