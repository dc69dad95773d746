"""MosaicKD: its losses in float64, its networks, what its players leave alone, and runs that are killed."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.feed import Batch
from synthkd.dfkd.generators import PATCHES, PatchDiscriminator, patch_loss
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.losses import class_balance, class_rows, divergence, entropy
from synthkd.dfkd.method_run import MethodRun, Stopped
from synthkd.dfkd.methods import players as module
from synthkd.dfkd.methods.base import MethodJob
from synthkd.dfkd.methods.mosaickd import MosaicFeed, mosaickd
from synthkd.dfkd.methods.players import GameSpec, Players
from synthkd.dfkd.pools import Pool, highest_entropy
from synthkd.dfkd.presets import Preset
from synthkd.dfkd.student import fresh_student
from synthkd.dfkd.teachers import Teacher, load_teacher
from synthkd.dfkd.train_options import TrainOptions
from synthkd.engine import Recipe
from synthkd.engine.errors import SynthkdError
from synthkd.engine.verify import verify_set

SMALL = {"widths": [6, 5, 4], "patch_width": 4, "noise": 7}
STUDENT = DistillSpec(
    arch="resnet", arch_args={"widths": [4], "blocks": [1]}, steps=13, batch_size=9, warmup_steps=2, flip=True, crop=0.7
)
OPTIONS = TrainOptions(reader="torch", cache="memory")


@pytest.fixture(scope="module")
def pool_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty 16x16 images of stripes."""
    drawn = np.random.default_rng(0).integers(0, 2, (40, 1, 16, 3)) * 200 + 20
    path = tmp_path_factory.mktemp("pool") / "pool.npz"
    np.savez(path, x=np.broadcast_to(drawn, (40, 16, 16, 3)).astype(np.uint8))
    return path


@pytest.fixture
def run(teacher_card: Path, pool_file: Path, tmp_path: Path) -> Callable[..., MethodRun]:
    """A run of the method that takes a second."""

    def make(name: str = "run", **changes: Any) -> MethodRun:
        names = ("cat", "dog", "bird")
        recipe = Recipe(classes=names, prompts=("{class}",), height=16, width=16, classes_per_group=3)
        job = SynthJob(model="none", teacher=str(teacher_card), recipe=recipe)
        preset = Preset(name="tiny", job=job, num_images=25, distill=changes.pop("distill", STUDENT))
        options = {**SMALL, "student_steps": 3, **changes.pop("options", {})}
        return MethodRun(
            preset=preset, method="mosaickd", out=tmp_path / name, pool=str(pool_file), how=OPTIONS, options=options,
            **changes,
        )  # fmt: skip

    return make


@pytest.fixture
def feed(run: Callable[..., MethodRun], teacher_card: Path) -> Callable[..., MosaicFeed]:
    """The method's feed, without a training."""

    def make(**options: Any) -> MosaicFeed:
        asked = run()
        teacher = load_teacher(str(teacher_card))
        spec = replace(STUDENT, crop=1.0, flip=False, batch_size=8)
        job = MethodJob(
            preset=asked.preset, spec=spec, num_images=25, folder=asked.out, teacher=teacher, how=OPTIONS,
            student=fresh_student(teacher, spec), pool=asked.pool, name="mosaickd", options={**SMALL, **options},
        )  # fmt: skip
        made = mosaickd(job)
        assert isinstance(made, MosaicFeed)
        return made

    return make


def game(teacher: Teacher, student: Teacher, **changes: Any) -> Players:
    """Small players."""
    return Players(GameSpec(**{**SMALL, **changes}), teacher, student, batch=6, rounds=40, seed=3, how=OPTIONS)


def stripes(count: int) -> Tensor:
    """uint8 [count,3,16,16]: columns, black or white at random."""
    drawn = torch.rand(count, 1, 1, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    return (255 * drawn).to(torch.uint8).expand(count, 3, 16, 16)


def test_losses_against_direct_sums() -> None:
    """KL(t || s), and the entropy of the mean prediction in bits, written out."""
    torch.manual_seed(0)
    s, t = torch.randn(2, 5, 4, dtype=torch.float64) * 3
    told = divergence(s, t)
    p, q = t.exp() / t.exp().sum(1, keepdim=True), s.exp() / s.exp().sum(1, keepdim=True)
    for b in range(5):
        direct = sum(float(p[b, k]) * math.log(float(p[b, k] / q[b, k])) for k in range(4))
        assert math.isclose(told[b].item(), direct, rel_tol=1e-12)
    mean = [sum(float(p[b, k]) for b in range(5)) / 5 for k in range(4)]
    assert math.isclose(class_balance(t).item(), sum(m * math.log2(m) for m in mean), rel_tol=1e-12)
    assert math.isclose(class_balance(torch.eye(4, dtype=torch.float64) * 99).item(), -2.0, rel_tol=1e-12)
    maps = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    rows = class_rows(maps)
    assert rows.shape == (30, 4)
    assert torch.equal(rows[15 + 2 * 5 + 1], maps[1, :, 2, 1])


def test_patch_loss_against_direct_sums() -> None:
    """Cross-entropy with the sigmoid of each patch logit."""
    logits = torch.randn(3, 1, 2, 4, dtype=torch.float64)
    chances = [1 / (1 + math.exp(-v)) for v in logits.flatten().tolist()]
    assert math.isclose(patch_loss(logits, True).item(), -sum(map(math.log, chances)) / 24, rel_tol=1e-12)
    assert math.isclose(patch_loss(logits, False).item(), -sum(math.log(1 - c) for c in chances) / 24, rel_tol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saturated_outputs_stay_finite(dtype: torch.dtype) -> None:
    """Probabilities of exactly 0 and 1: p log p is NaN in the released code, whose sort then puts such images first."""
    logits = torch.tensor([[3e4, -3e4, 0.0], [3e4, -2e4, 1.0]], dtype=dtype, requires_grad=True)
    other = torch.tensor([[-3e4, 3e4, 0.0], [3e4, 3e4, 1.0]], dtype=dtype)
    assert (logits.float().softmax(1)[:, 0] == 1).all()
    for loss in (entropy(logits).sum(), class_balance(logits), divergence(logits, other).sum()):
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()
    found = entropy(torch.tensor([[9.0, 0.0], [torch.nan, 0.0], [0.1, 0.0], [torch.inf, 0.0], [4.0, 0.0]])).numpy()
    assert np.isnan(found[[1, 3]]).all()
    assert highest_entropy(found, 2).tolist() == [2, 4]
    assert highest_entropy(found, 9).tolist() == [0, 2, 4]


def test_a_pool_selects_no_image_without_an_entropy(feed: Callable[..., MosaicFeed]) -> None:
    """And its images keep their order."""
    source = feed().job.opened_pool().source
    told = np.linspace(0, 1, 40, dtype=np.float32)
    told[30:] = np.nan
    chosen = Pool(source, told).selected(5)
    assert np.array_equal(chosen.entropy, told[25:30])
    assert np.array_equal(Pool(source, told).selected(40).entropy, told[:30])


@pytest.mark.parametrize("patch", sorted(PATCHES))
def test_a_logit_sees_its_patch(patch: int) -> None:
    """The receptive field by gradient, and the stride by the distance of two logits' fields."""
    net = PatchDiscriminator(patch, width=4).eval()
    x = torch.randn(1, 3, 96, 96, requires_grad=True)
    logits = net(x)
    middle = logits.shape[-1] // 2
    fields = []
    for at in (middle, middle + 1):
        (gradient,) = torch.autograd.grad(logits[0, 0, at, at], x, retain_graph=True)
        rows = gradient[0].abs().sum((0, 2)).nonzero().flatten()
        fields.append((int(rows.min()), int(rows.max())))
    assert fields[0][1] - fields[0][0] + 1 == patch
    assert fields[1][0] - fields[0][0] == net.stride


def test_a_pool_image_and_a_made_one_are_normalised_alike(feed: Callable[..., MosaicFeed]) -> None:
    """The released code takes the pool's own mean and deviation; here equal pixels give equal logits, to the bit."""
    made = feed(student_steps=100)
    seen: list[Tensor] = []
    made.players.learn = lambda real, _: seen.append(real)  # type: ignore[method-assign]
    made._made = lambda _: (seen[0], torch.zeros(4, dtype=torch.long))  # type: ignore[method-assign]
    batch: Batch = next(made.batches(0, 1))
    teacher, x = made.job.teacher, batch.images.float() / 255
    assert torch.equal(batch.images[0::2], batch.images[1::2])
    assert torch.equal(teacher(x)[0::2], teacher(x)[1::2])
    assert torch.equal(batch.images[0::2], seen[0])
    real = torch.stack([seen[0][0], 255 - seen[0][0]])
    told: list[Tensor] = []
    made.players.discriminator.register_forward_pre_hook(lambda _, given: told.append(given[0]))
    Players.learn(made.players, real, 0)
    assert torch.equal(told[1] * 255, real.float())  # the discriminator's too: pixels, no normalisation


def test_players_touch_neither_teacher_nor_student(teacher_card: Path) -> None:
    """A teacher that somebody has unfrozen, and a student in training: no gradients, no statistics, no weights."""
    teacher = load_teacher(str(teacher_card)).requires_grad_(True)
    student = fresh_student(teacher, STUDENT)
    student.net.requires_grad_(True).train()
    tensors = [*teacher.state_dict().values(), *student.state_dict().values()]
    before = [v.clone() for v in tensors]
    players = game(teacher, student)
    start = [p.detach().clone() for p in players.generator.parameters()]
    players.learn(stripes(6), 0)
    for net in (teacher, student):
        assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert student.net.training
    assert all(map(torch.equal, before, tensors))
    assert not any(torch.equal(a, b) for a, b in zip(start, players.generator.parameters(), strict=True))


def test_the_generator_sees_the_student_as_it_is_now(teacher_card: Path) -> None:
    """Not as it was when the feed was opened."""
    teacher = load_teacher(str(teacher_card))
    student = fresh_student(teacher, STUDENT)
    players = game(teacher, student)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.5)
    players.learn(stripes(6), 0)
    x = torch.rand(2, 3, 16, 16)
    assert torch.allclose(players._copy(x), student(x), rtol=1e-5)  # another memory layout


def test_the_generators_loss_is_the_sum_of_its_terms(teacher_card: Path) -> None:
    """By its parts, and per position for a dense teacher."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 2, 2)) for _ in range(2)]
    card = load_teacher(str(teacher_card))
    teacher, student = (
        Teacher(net, mean=[0.5] * 3, std=[0.2] * 3, input_size=card.input_size, classes=card.classes) for net in nets
    )
    players = game(teacher, student, local=0.5, align=0.25, adv=2.0, balance=3.0)
    images = torch.rand(4, 3, 16, 16)
    loss, parts = players.generator_loss(images)
    t, s = (net(images).movedim(1, -1).reshape(4 * 8 * 8, 3).softmax(1).double() for net in (teacher, student))
    direct = [-(t * t.log()).sum(1).mean(), (t * (t / s).log()).sum(1).mean(), (t.mean(0) * t.mean(0).log2()).sum()]
    for found, expected in zip(parts[1:], direct, strict=True):
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    told = 0.5 * parts[0] + 0.25 * parts[1] - 2 * parts[2] + 3 * parts[3]
    assert loss.item() == pytest.approx(told.item(), rel=1e-6)


def test_the_discriminator_learns(teacher_card: Path) -> None:
    """Stripes against what a generator makes that does not care: its loss falls below chance, ln 2."""
    teacher = load_teacher(str(teacher_card))
    players = game(teacher, fresh_student(teacher, STUDENT), patch_width=16, lr=1e-2, local=0.0)
    players.learn(stripes(6), 0)
    first = players.terms()["discriminator"]
    for i in range(1, 30):
        players.learn(stripes(6), i)
        last = players.terms()
    assert last["discriminator"] < 0.9 * math.log(2) < first
    assert players.terms() == {}


def test_a_loss_that_is_not_finite_is_one_line(teacher_card: Path) -> None:
    """Noticed at a log row, with the name of the term."""
    teacher = load_teacher(str(teacher_card))
    players = game(teacher, fresh_student(teacher, STUDENT))
    with torch.no_grad():
        next(players.generator.parameters()).fill_(torch.nan)
    players.learn(stripes(6), 0)
    with pytest.raises(SynthkdError, match="discriminator is nan; lower lr"):
        players.terms()


@pytest.mark.parametrize("keep", [False, True])
def test_a_stopped_run_ends_in_the_same_student(run: Callable[..., MethodRun], keep: bool) -> None:
    """Stopped just before a step of the players and between two; weights and images are bit-equal."""
    options = {"keep": keep, "fill": 0.9}
    whole = run("whole", options=options)
    result = whole.execute()
    assert result["num_images"] == (25 if keep else whole._job(load_teacher(whole.preset.job.teacher)).spec.steps * 4)
    assert not verify_set(whole.out / "shards").problems
    cut = run("cut", options=options)
    for after in (6, 8):
        calls = iter(range(100))
        cut.should_stop = lambda calls=calls, last=after: next(calls) >= last - 1 - (6 if last == 8 else 0)
        with pytest.raises(Stopped):
            cut.execute()
    cut.should_stop = lambda: False
    cut.execute()
    ours, theirs = (load_file(r.out / "student.safetensors") for r in (cut, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    tars = sorted((whole.out / "shards").glob("*.tar"))
    assert tars
    assert all(tar.read_bytes() == (cut.out / "shards" / tar.name).read_bytes() for tar in tars)
    rows = [json.loads(line) for line in (whole.out / "student_log.jsonl").read_text().splitlines()]
    assert {"discriminator", "generator", "teacher_entropy", "student_kl"} <= rows[-1].keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patch": 12}, "patch is 12; expected 10 or 22 or 46"),
        ({"betas": [0.5, 1]}, "betas is .*two numbers"),
        ({"widths": [8, 4]}, "widths is .*three whole numbers"),
        ({"balence": 1}, "unknown field 'balence'; did you mean 'balance'"),
        ({"batch": 1}, "batch is 1; expected 0"),
        ({"fill": 0}, "fill is 0; expected"),
    ],
)
def test_wrong_options_are_one_line(run: Callable[..., MethodRun], options: dict[str, Any], words: str) -> None:
    """The method, the field, what was found and what was expected."""
    with pytest.raises(SynthkdError, match=words) as caught:
        run(options=options).execute()
    assert "\n" not in str(caught.value)


def test_what_it_cannot_do_is_said_before_the_pool_is_read(run: Callable[..., MethodRun]) -> None:
    """Blended images, and a batch without two halves."""
    for change in ({"mix": 0.5}, {"batch_size": 2}):
        with pytest.raises(SynthkdError, match="half of it of the pool, and mix 0"):
            run(distill=replace(STUDENT, **change)).execute()
    with pytest.raises(SynthkdError, match="give --pool"):
        replace(run(), pool=None).execute()


def test_compiled_players_play_the_same_game(teacher_card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three calls is one graph; here without a code generator, which would take a minute."""
    teacher, found = load_teacher(str(teacher_card)), []
    for backend in (None, "aot_eager"):
        graph = partial(torch.compile, backend=backend, fullgraph=True, dynamic=False) if backend else None
        monkeypatch.setattr(module, "graph", lambda call, _, graph=graph: graph(call) if graph else call)
        players = game(teacher, fresh_student(teacher, STUDENT))
        for i in range(2):
            players.learn(stripes(6), i)
        found.append((players.images(players.noise("x", 0, 4)), players.terms()))
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-3)
    assert (found[0][0].int() - found[1][0].int()).abs().max() <= 1


def test_images_that_are_not_finite_are_never_kept(feed: Callable[..., MosaicFeed]) -> None:
    """A generator of NaNs draws no group, whatever the guard of the log says."""
    made = feed()
    with torch.no_grad():
        next(made.players.generator.parameters()).fill_(torch.nan)
    plan = made._last_set().plan
    with pytest.raises(SynthkdError, match="not finite"):
        made._group(plan.unit(0))
    made.close()
