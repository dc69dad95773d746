"""The student loop: learns, repeats itself bit by bit, and fails loudly."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from synthkd.dfkd.data import LabelledImages
from synthkd.dfkd.evaluate import evaluate
from synthkd.dfkd.nets import build_net
from synthkd.dfkd.student import DistillSpec, distill, learning_rate, save_student
from synthkd.dfkd.teachers import Teacher, load_teacher
from synthkd.dfkd.views import ViewSpec, affine, draw_views
from synthkd.engine.errors import SynthkdError

SPEC = DistillSpec(arch_args={"widths": [8], "blocks": [1]}, steps=60, batch_size=32, warmup_steps=5, shift=0.0)


@pytest.fixture(scope="module")
def task() -> tuple[LabelledImages, Teacher]:
    """Bars in two directions, and a teacher trained on them for a moment."""
    torch.manual_seed(0)
    labels = torch.arange(200) % 2
    images = torch.rand(200, 3, 12, 12) * 0.3
    for i, label in enumerate(labels):
        at = int(torch.randint(0, 9, ()))
        if label:
            images[i, :, at : at + 3] += 0.6
        else:
            images[i, :, :, at : at + 3] += 0.6
    data = LabelledImages(images.mul(255).to(torch.uint8), labels, ("v", "h"))
    net = build_net("resnet", 2, {"widths": [8, 16], "blocks": [1, 1]}).train()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(40):
        pick = torch.randint(0, 200, (64,))
        loss = torch.nn.functional.cross_entropy(net((images[pick] - 0.3) / 0.3), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return data, Teacher(net, mean=[0.3] * 3, std=[0.3] * 3, input_size=(12, 12), classes=("v", "h"))


def test_student_learns_what_the_teacher_knows(task: tuple[LabelledImages, Teacher]) -> None:
    """The loss falls, and the student reads the images."""
    data, teacher = task
    assert evaluate(teacher, data).accuracy > 95
    student = distill(data, teacher, SPEC)
    first, last = student.log[0]["loss"], student.log[-1]["loss"]
    assert first is not None
    assert last is not None
    assert last < first
    assert evaluate(student.net, data).accuracy > 90
    assert student.agreement > 80


def test_the_same_seed_gives_the_same_weights(task: tuple[LabelledImages, Teacher]) -> None:
    """Bit for bit; another seed gives others."""
    data, teacher = task
    spec = replace(SPEC, steps=6, mix=0.5, flip=True)
    a, b, c = (distill(data, teacher, replace(spec, seed=s)).net.net.state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["conv1.weight"], c["conv1.weight"])


def test_teacher_is_left_alone(task: tuple[LabelledImages, Teacher]) -> None:
    """Neither weights nor statistics of the teacher move."""
    data, teacher = task
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    distill(data, teacher, replace(SPEC, steps=3))
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


def test_affine_pads_with_the_border() -> None:
    """A light image keeps light edges under any shift."""
    x = torch.full((8, 3, 10, 14), 0.9)
    views = draw_views(ViewSpec(shift=0.4, rotate=0.5, zoom=0.1), 0, 0, np.arange(8), 8)
    out = affine(x, torch.from_numpy(views.affine))
    assert out.shape == x.shape
    assert torch.allclose(out, x)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    """The schedule's ends and its peak."""
    spec = DistillSpec(steps=100, warmup_steps=10, learning_rate=0.2)
    assert learning_rate(spec, 0) == pytest.approx(0.02)
    assert learning_rate(spec, 10) == pytest.approx(0.2)
    assert learning_rate(spec, 99) < 0.001


def test_saved_student_loads_from_its_card(task: tuple[LabelledImages, Teacher], tmp_path: object) -> None:
    """The card of a student is a teacher card."""
    from pathlib import Path

    data, teacher = task
    student = distill(data, teacher, replace(SPEC, steps=3))
    card = save_student(student, SPEC, Path(str(tmp_path)), {"note": 'a "quoted" word\nand a line'})
    again = load_teacher(str(card))
    x = torch.rand(4, 3, 12, 12)
    assert torch.equal(again(x), student.net(x))
    assert again.classes == ("v", "h")


def test_non_finite_loss_is_said(task: tuple[LabelledImages, Teacher]) -> None:
    """A run that diverges ends in one line."""
    data, teacher = task
    with pytest.raises(SynthkdError, match="the loss is"):
        distill(data, teacher, replace(SPEC, steps=25, learning_rate=1e18, warmup_steps=0))


@pytest.mark.parametrize("change", [{"steps": 0}, {"batch_size": 1}, {"temperature": 0.0}, {"held_out": 1.0}])
def test_settings_are_checked(change: dict[str, float]) -> None:
    """Each wrong setting is named."""
    with pytest.raises(SynthkdError, match=next(iter(change))):
        replace(SPEC, **change)
