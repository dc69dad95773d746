"""DeepInversion: its equations, its set, what it leaves alone and what it refuses."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.losses import competition, image_norm, total_variation
from synthkd.dfkd.methods.base import MethodJob
from synthkd.dfkd.methods.deepinversion import Inversion, InversionSpec, deepinversion, inverted_set
from synthkd.dfkd.methods.inversion import Jitter, moved
from synthkd.dfkd.nets import build_net
from synthkd.dfkd.presets import load_preset
from synthkd.dfkd.teachers import Teacher
from synthkd.dfkd.train_options import TrainOptions
from synthkd.dfkd.training import Stopped
from synthkd.engine.errors import NonFiniteError, SynthkdError
from synthkd.engine.reading import read_shard
from synthkd.engine.verify import verify_set

SIZE = (20, 28)
NET = {"widths": [4, 6], "blocks": [1, 1]}
FEW = {"steps": 6, "samples_per_class": 3, "lr": 0.1}


@pytest.fixture
def job(tmp_path: Path) -> MethodJob:
    """A teacher of 20x28 images with statistics of its own, three classes; twelve images to make."""
    torch.manual_seed(3)
    net = build_net("resnet", 3, NET).train()
    for _ in range(10):
        net(torch.rand(8, 3, *SIZE) * 2)
    teacher = Teacher(net, mean=[0.4] * 3, std=[0.3] * 3, input_size=SIZE, classes=("a", "b", "c"))
    spec = DistillSpec(arch_args=NET, steps=4, batch_size=4)
    return MethodJob(
        preset=load_preset("digits"), spec=spec, num_images=12, folder=tmp_path / "run", teacher=teacher,
        student=teacher, how=TrainOptions(reader="torch"), name="deepinversion", options=FEW,
    )  # fmt: skip


def test_total_variation_and_norm_are_what_they_say() -> None:
    """Float64, pixel by pixel, on a size that is odd one way; and finite differences of both."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    for image, found, size in zip(x.detach().tolist(), total_variation(x), image_norm(x), strict=True):
        pixels = {(c, i, j): image[c][i][j] for c in range(3) for i in range(4) for j in range(5)}
        direct = 0.0
        for di, dj in ((0, 1), (1, 0), (1, 1), (1, -1)):
            pairs = [(v, pixels.get((c, i + di, j + dj))) for (c, i, j), v in pixels.items()]
            direct += math.sqrt(sum((v - w) ** 2 for v, w in pairs if w is not None))
        assert math.isclose(found.item(), direct, rel_tol=1e-12)
        assert math.isclose(size.item(), math.sqrt(sum(v * v for v in pixels.values())), rel_tol=1e-12)
    assert torch.autograd.gradcheck(lambda y: total_variation(y) + image_norm(y), (x,))
    flat = torch.ones(1, 3, 1, 6, dtype=torch.float16, requires_grad=True)
    (grad,) = torch.autograd.grad(total_variation(flat).sum(), [flat])
    assert total_variation(flat).dtype == torch.float32
    assert torch.equal(grad, torch.zeros_like(grad))


def test_competition_is_one_minus_the_divergence() -> None:
    """Float64, class by class; 1 for equal networks, finite for saturated ones."""
    torch.manual_seed(0)
    s, t = torch.randn(2, 4, 3, dtype=torch.float64)
    for a, b, found in zip(s.softmax(1).tolist(), t.softmax(1).tolist(), competition(s, t), strict=True):
        js = sum(
            0.5 * p * math.log(2 * p / (p + q)) + 0.5 * q * math.log(2 * q / (p + q)) for p, q in zip(a, b, strict=True)
        )
        assert math.isclose(found.item(), 1 - js, rel_tol=1e-12)
    assert torch.allclose(competition(s, s), torch.ones(4, dtype=torch.float64))
    assert torch.isfinite(competition(torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]]))).all()


def test_a_shift_only_moves_pixels(job: MethodJob) -> None:
    """Each step is a roll, mirrored or not, and all reaches up to `shift` come up."""
    unit = inverted_set(job, InversionSpec(**FEW)).plan.unit(0)
    x = torch.arange(3 * 20 * 28, dtype=torch.float32).view(1, 3, *SIZE)
    jitter, found = Jitter.drawn(0, unit, 0, 200, SIZE, 2, True), set()
    rolls = {
        (dy, dx, mirror): torch.roll(x, (dy, dx), (2, 3)).flip(3) if mirror else torch.roll(x, (dy, dx), (2, 3))
        for dy in range(-2, 3) for dx in range(-2, 3) for mirror in (False, True)
    }  # fmt: skip
    for step in range(200):
        seen = moved(x, *jitter.at(step))
        found |= {name for name, roll in rolls.items() if torch.equal(roll, seen)}
    assert len(found) > 45  # of 50 kinds, 200 draws


def test_pixels_go_where_the_loss_falls_and_networks_stay_as_they_are(job: MethodJob) -> None:
    """The loss of the finished group is lower than that of its noise; nobody's tensors change or take a gradient."""
    spec = InversionSpec(steps=25, samples_per_class=3, lr=0.1, compete=0.1)
    rival = Teacher(
        build_net("resnet", 3, NET), mean=[0.4] * 3, std=[0.3] * 3, input_size=SIZE, classes=("a", "b", "c")
    )
    before = [p.clone() for net in (job.teacher, rival) for p in net.state_dict().values()]
    made = Inversion(job, spec, rival, 1)
    unit = inverted_set(job, replace(spec, compete=0.0)).plan.unit(0)
    still, seen = Jitter.drawn(0, unit, 0, 1, SIZE, 0, False).at(0), []
    whole = made.loss
    made._loss = lambda *a: seen.append(whole(a[0].detach(), *still, a[3]).item()) or whole(*a)  # type: ignore
    batch = made.group(unit)
    assert seen[-1] < 0.8 * seen[0]
    assert batch.images.shape == (9, 3, *SIZE)
    assert batch.images.dtype == torch.uint8
    after = [p for net in (job.teacher, rival) for p in net.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for net in (job.teacher, rival) for p in net.parameters())


def test_the_set_is_a_function_of_settings_and_seed(job: MethodJob, tmp_path: Path) -> None:
    """Stopped after its first group it ends in the very same set, which verifies; its last group is cut."""
    feed = deepinversion(job)
    assert feed.held.shape[1:] == (3, *SIZE)
    assert len(list(feed.batches(0, 4))) == 4
    feed.close()
    assert verify_set(job.shards).problems == ()
    other = replace(job, folder=tmp_path / "other")
    units = iter([False, True, True])
    with pytest.raises(Stopped):
        deepinversion(replace(other, should_stop=lambda: next(units, True)))
    deepinversion(other).close()
    for shard in range(2):
        pairs = zip(read_shard(job.shards, shard), read_shard(other.shards, shard), strict=True)
        assert all(np.array_equal(a.pixels, b.pixels) for a, b in pairs)
    assert [s.meta["label"] for s in read_shard(job.shards, 1)] != []
    with pytest.raises(SynthkdError, match="other"):
        deepinversion(replace(job, options={**job.options, "bn": 1.0}))


def test_a_group_that_is_not_finite_is_redrawn_or_ends_the_run(job: MethodJob, monkeypatch: Any) -> None:
    """With attempt + 1, noted in its json; never written as it is."""
    drawn: Callable[..., Any] = Inversion._drawn
    monkeypatch.setattr(
        Inversion, "_drawn", lambda self, unit, attempt: drawn(self, unit, attempt) if attempt else None
    )
    deepinversion(job).close()
    assert {s.meta["attempt"] for s in read_shard(job.shards, 0)} == {1}
    monkeypatch.undo()
    never = replace(job, folder=job.folder.with_name("never"))
    job.teacher.net.conv1.weight.fill_(math.nan)  # type: ignore
    with pytest.raises(NonFiniteError, match="group 0 was not finite in 3 attempts"):
        deepinversion(never)
    assert not list(never.shards.glob("*.tar"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 5}, "unknown field 'step'; did you mean 'steps'"),
        ({"lr": 0}, "lr is 0; expected a number > 0"),
        ({"compete": 1.0}, "compete is 1.0, but there is no student; name its card"),
    ],
)
def test_wrong_options_are_one_line(job: MethodJob, options: dict[str, Any], message: str) -> None:
    """Before anything is drawn."""
    with pytest.raises(SynthkdError, match=message):
        deepinversion(replace(job, options={**job.options, **options}))
    assert not job.shards.exists()


def test_a_teacher_without_statistics_is_named(job: MethodJob) -> None:
    """And served where nothing compares statistics."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    bare = replace(job, teacher=Teacher(net, mean=[0.4] * 3, std=[0.3] * 3, input_size=SIZE, classes=("a", "b", "c")))
    with pytest.raises(SynthkdError, match="no BatchNorm and no stored moments to compare with; set bn to 0"):
        deepinversion(bare)
    deepinversion(replace(bare, options={**bare.options, "bn": 0})).close()
