"""FastDFKD: its meta gradients, its growing set, exact resumption, and what it leaves alone."""

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.evaluate import predict
from synthkd.dfkd.losses import bn_distance
from synthkd.dfkd.methods.base import MethodJob
from synthkd.dfkd.methods.fastdfkd import FastFeed, FastSpec, Meta, MetaGenerator, fastdfkd, inner_adam
from synthkd.dfkd.nets import build_net
from synthkd.dfkd.parallel import Ranks
from synthkd.dfkd.presets import load_preset
from synthkd.dfkd.student import fresh_student
from synthkd.dfkd.taps import averaged
from synthkd.dfkd.teachers import Teacher
from synthkd.dfkd.train_options import TrainOptions
from synthkd.dfkd.training import Stopped, Training
from synthkd.engine.errors import NonFiniteError, SynthkdError
from synthkd.engine.verify import verify_set

SIZE = (20, 28)
NET = {"widths": [4, 6], "blocks": [1, 1]}
FEW = {"inner": 2, "samples_per_class": 2, "noise": 8, "widths": (6, 5, 4), "warmup": 3, "shift": 1}
STEPS = 8


def a_teacher() -> Teacher:
    """Of 20x28 images and three classes, with statistics of its own."""
    torch.manual_seed(3)
    net = build_net("resnet", 3, NET).train()
    for _ in range(10):
        net(torch.rand(8, 3, *SIZE) * 2)
    return Teacher(net, mean=[0.4] * 3, std=[0.3] * 3, input_size=SIZE, classes=("a", "b", "c"))


def a_job(folder: Path, **options: Any) -> MethodJob:
    """Eight groups of six images, the last one cut, and a fresh student."""
    spec, teacher = DistillSpec(arch_args=NET, steps=STEPS, batch_size=4, select="last"), a_teacher()
    return MethodJob(
        preset=load_preset("digits"), spec=spec, num_images=46, folder=folder, teacher=teacher,
        student=fresh_student(teacher, spec), how=TrainOptions(checkpoint_seconds=0), name="fastdfkd",
        options={**FEW, **options},
    )  # fmt: skip


def akin(student: Teacher, teacher: Teacher) -> None:
    """Let a student name the teacher's classes, and be surer of them."""
    state = {name: value.clone() for name, value in teacher.net.state_dict().items()}
    student.net.load_state_dict(state | {name: state[name] * 5 for name in ("fc.weight", "fc.bias")})


def trained(job: MethodJob, until: int = STEPS) -> dict[str, torch.Tensor]:
    """The student's tensors after a run that is stopped after `until` steps, where that is before the end."""
    feed, done = fastdfkd(job), 0

    def on_step(step: int) -> None:
        nonlocal done
        done = step

    training = Training(
        student=job.student, teacher=job.teacher, feed=feed, held=feed.held,
        wanted=predict(job.teacher, feed.held).argmax(dim=1), spec=job.spec, options=job.how, ranks=Ranks(),
        folder=job.folder, on_step=on_step, should_stop=lambda: done >= until,
    )  # fmt: skip
    training.run()
    return job.student.net.state_dict()


def files(job: MethodJob) -> dict[str, bytes]:
    """Shards by name."""
    return {p.name: p.read_bytes() for p in sorted(job.shards.glob("*.tar"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[MethodJob, dict[str, torch.Tensor]]:
    """A run from beginning to end, and its student."""
    job = a_job(tmp_path_factory.mktemp("fast") / "whole")
    return job, {name: value.clone() for name, value in trained(job).items()}


def test_meta_gradients_are_those_derived_by_hand() -> None:
    """L = (a^2 + 4 b^2) / 2 + z a from (1, -1), z = 0; two inner steps of Adam at lr 0.1, betas 0.5 and 0.999."""
    for kind in ("fomaml", "reptile"):
        slow = [torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (1.0, -1.0)]
        fast = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in slow]
        z, meta = torch.zeros(1, dtype=torch.float64, requires_grad=True), Meta(slow, fast, kind, 0.2)
        meta.begin()
        adam = inner_adam(meta.fast, z, 0.1, 0.0)
        for _ in range(2):
            a, b = meta.fast
            gradients = torch.autograd.grad((a**2 + 4 * b**2).sum() / 2 + (z * a).sum(), [a, b, z])
            meta.note(gradients[:-1])
            for p, g in zip([a, b, z], gradients, strict=True):
                p.grad = g
            adam.step()
        # Adam's first step is lr times a sign: (1, -1) -> (0.9, -0.9), so the gradients are (1, -4), then (0.9, -3.6).
        expected = [1.9, -7.6]
        if kind == "reptile":  # m = g1 / 4 + g2 / 2 over 1 - 0.25; v = 0.001 (0.999 g1^2 + g2^2) over 1 - 0.999^2
            m, v = (0.25 + 0.5 * 0.9) / 0.75, 0.001 * (0.999 + 0.81) / (1 - 0.999**2)
            moved = 0.1 + 0.1 * m / math.sqrt(v)
            expected = [67 * moved, -67 * moved]
        assert [g.item() for g in meta.gradient()] == pytest.approx(expected, rel=1e-6)
        meta.step(meta.gradient())
        assert [p.item() for p in slow] == pytest.approx([0.8, -0.8], rel=1e-6)  # Adam's first step on theta


def test_the_loss_is_its_equation(tmp_path: Path) -> None:
    """In float64: momentum statistics, cross-entropy, and the gated divergence, summed by hand."""
    job = a_job(tmp_path, shift=0, flip=False)
    job.teacher.double()
    job.student.double()
    akin(job.student, job.teacher)
    made = MetaGenerator(job, FastSpec(**{**FEW, "bn": 3.0, "oh": 0.7, "adv": 1.3, "bn_momentum": 0.6}), 1)
    made.net.double()
    z, targets = torch.randn(6, 8, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0, 1, 2]]
    memory = {name: (mean.double() + 0.5, var.double() * 2) for name, (mean, var) in made.memory.items()}
    still = torch.arange(SIZE[0]), torch.arange(SIZE[1])
    with torch.no_grad():
        loss, images, after, terms = made.loss(z, *still, targets, memory, True)
        look, told = job.teacher.look(images), made.seen(images)
    bn = 0.0
    for tap in look.taps:
        mean = 0.4 * tap.stats.mean + 0.6 * memory[tap.name][0]
        var = 0.4 * tap.stats.var + 0.6 * memory[tap.name][1]
        bn += ((mean - tap.running_mean) ** 2).sum().sqrt().item() + ((var - tap.running_var) ** 2).sum().sqrt().item()
        assert torch.allclose(after[tap.name][0], mean)
    t, s = look.logits.softmax(1), told.softmax(1)
    ce = -(targets * t.log()).sum().item() / 6
    same = (t.argmax(1) == s.argmax(1)).double()
    adv = -(same * (t * (t / s).log()).sum(1)).mean().item()
    assert adv < -1e-4
    assert bn_distance(averaged(look.taps, memory, 0.6)[0]).item() == pytest.approx(bn, rel=1e-12)
    assert terms.tolist() == pytest.approx([bn, ce, adv], rel=1e-10)
    assert loss.item() == pytest.approx(3.0 * bn + 0.7 * ce + 1.3 * adv, rel=1e-10)


def test_groups_grow_while_the_student_learns(whole: tuple[MethodJob, Any], tmp_path: Path) -> None:
    """The warm-up before the first step, the rest evenly; held-out images are never in a batch; the set verifies."""
    job, _ = whole
    assert verify_set(job.shards).problems == ()
    assert verify_set(job.shards).samples == 46
    feed = FastFeed(a_job(tmp_path, fill=1.0), FastSpec(**{**FEW, "fill": 1.0}))
    assert feed.set.groups == 3
    assert feed.held.shape == (6, 3, *SIZE)
    groups, held = [], {x.numpy().tobytes() for x in feed.held}
    for batch in feed.batches(0, STEPS):
        groups.append(feed.set.groups)
        assert batch.images.shape == (4, 3, *SIZE)
        assert not held & {x.contiguous().numpy().tobytes() for x in batch.images}
    assert groups == [3, 3, 4, 4, 5, 6, 6, 7]
    assert set(feed.terms()) == {"bn", "ce", "adv"}


@pytest.mark.parametrize("until", [0, 1, 5])
def test_a_killed_run_ends_in_the_same_student_and_set(
    whole: tuple[MethodJob, dict[str, torch.Tensor]], tmp_path: Path, until: int
) -> None:
    """In the warm-up, between groups, and with groups on disk that the checkpoint does not know of."""
    job, asked = a_job(tmp_path / "cut"), iter([False, False])
    with pytest.raises(Stopped):
        trained(job if until else replace(job, should_stop=lambda: next(asked, True)), until)
    if until == 0:
        assert len(files(job)) == 2
        os.truncate(job.shards / "shard-000001.tar", 700)  # it counts as missing
    if until == 1:  # killed later on, after its last checkpoint: the first one is gone on from
        checkpoint = (job.folder / "checkpoint.safetensors").read_bytes()
        with pytest.raises(Stopped):
            trained(a_job(job.folder), 5)
        assert len(files(job)) > 4
        (job.folder / "checkpoint.safetensors").write_bytes(checkpoint)
    again = trained(a_job(job.folder))
    assert all(torch.equal(value, again[name]) for name, value in whole[1].items())
    assert files(job) == files(whole[0])


def test_a_stopped_warm_up_goes_on(
    whole: tuple[MethodJob, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call makes the groups that are left, and none twice: one group a call comes to the same end."""
    made, group = list[int](), MetaGenerator.group

    def counted(self: MetaGenerator, unit: Any) -> Any:
        made.append(unit.group)
        return group(self, unit)

    monkeypatch.setattr(MetaGenerator, "group", counted)
    for _ in range(2):
        asked = iter([False])
        with pytest.raises(Stopped):
            trained(replace(a_job(tmp_path), should_stop=lambda asked=asked: next(asked, True)))  # type: ignore[misc]
    assert made == [0, 1]
    again = trained(a_job(tmp_path))
    assert made == list(range(8))
    assert all(torch.equal(value, again[name]) for name, value in whole[1].items())
    assert files(a_job(tmp_path)) == files(whole[0])
    assert not (tmp_path / "warmup.safetensors").exists()


def test_networks_are_looked_through_and_left_alone(tmp_path: Path) -> None:
    """A group after the warm-up, with the student in training mode: no gradient, no statistic, no mode changes."""
    job = a_job(tmp_path)
    akin(job.student, job.teacher)
    job.student.net.train().requires_grad_(True)
    before = [v.clone() for net in (job.teacher, job.student) for v in net.state_dict().values()]
    made = MetaGenerator(job, FastSpec(**{**FEW, "warmup": 0}), 1)
    theta = [p.clone() for p in made.meta.slow]
    made.group(FastFeed(a_job(tmp_path), FastSpec(**FEW)).set.plan.unit(0))
    after = [v for net in (job.teacher, job.student) for v in net.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for net in (job.teacher, job.student) for p in net.parameters())
    assert job.student.net.training
    assert not job.teacher.net.training
    assert made.terms()["adv"] != 0
    assert not any(torch.equal(a, b) for a, b in zip(theta, made.meta.slow, strict=True))


def test_a_group_that_is_not_finite_teaches_the_generator_nothing(tmp_path: Path) -> None:
    """And ends the run after three attempts, before anything is written."""
    job = a_job(tmp_path)
    made = MetaGenerator(job, FastSpec(**FEW), 8)
    unit = FastFeed(a_job(tmp_path / "sound"), FastSpec(**FEW)).set.plan.unit(0)
    theta = [p.clone() for p in made.meta.slow]
    job.teacher.net.conv1.weight.fill_(math.nan)  # type: ignore
    with pytest.raises(NonFiniteError, match="group 0 was not finite in 3 attempts"):
        made.group(unit)
    assert made.made == 0
    assert all(torch.equal(a, b) for a, b in zip(theta, made.meta.slow, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"meta": "maml"}, "meta is 'maml'; expected 'fomaml' or 'reptile'"),
        ({"inners": 5}, "unknown field 'inners'; did you mean 'inner'"),
        ({"widths": [8, 4]}, "widths is .8, 4.; expected three whole numbers"),
        ({"samples_per_class": 50}, "46 images are one group; make at least 151"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Before anything is made."""
    job = a_job(tmp_path, **change)
    with pytest.raises(SynthkdError, match=message):
        fastdfkd(job)
    with pytest.raises(SynthkdError, match="crop and mix need a finished set"):
        fastdfkd(replace(a_job(tmp_path), spec=replace(job.spec, mix=0.5)))
    assert not job.shards.exists()
