"""TeacherGuidance term by term: values, gradients, what is logged, what a fingerprint sees."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from synthkd.dfkd.losses import bn_distance, disagreement, head_alignment
from synthkd.dfkd.losses import entropy as entropy_of
from synthkd.dfkd.methods import TeacherGuidance
from synthkd.dfkd.nets import build_net
from synthkd.dfkd.taps import Moments, measure_moments
from synthkd.dfkd.teachers import Teacher, load_teacher
from synthkd.engine import GuidanceSpec, Request, Synthesizer
from synthkd.engine.errors import SynthkdError

TARGETS = torch.eye(4, dtype=torch.float64)[[0, 1, 1, 2, 3, 0]] * 0.8 + 0.05
ABOUT = {"rounds": 3, "steps": 40}


class Normed(nn.Module):
    """GroupNorm on images, LayerNorm on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.group = nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6)
        self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits."""
        logits: Tensor = self.fc(self.norm(torch.tanh(self.group(self.conv(x))).mean((2, 3))))
        return logits


def wrapped(net: nn.Module, moments: Moments | None = None, size: tuple[int, int] = (9, 7)) -> Teacher:
    """A float64 teacher of four classes."""
    made = Teacher(net, mean=[0.4] * 3, std=[0.3] * 3, input_size=size, classes="abcd", moments=moments)
    return made.double()


def with_bn(seed: int = 3, size: tuple[int, int] = (9, 7)) -> Teacher:
    """BatchNorm with running statistics of its own."""
    torch.manual_seed(seed)
    net = build_net("resnet", 4, {"widths": [4, 6], "blocks": [1, 1]}).double().train()
    for _ in range(10):
        net(torch.rand(8, 3, *size, dtype=torch.float64) * 2)
    return wrapped(net, size=size)


def without_bn(stored: bool) -> Teacher:
    """No statistics, or moments of other images."""
    torch.manual_seed(5)
    net = Normed()
    if not stored:
        return wrapped(net)
    stats = measure_moments(net, [torch.randn(20, 3, 9, 7) * 2])
    return wrapped(net, Moments({name: (s.mean, s.var) for name, s in stats.items()}))


def student() -> Teacher:
    """Another network, with an input size of its own."""
    return with_bn(seed=8, size=(6, 5))


def images() -> Tensor:
    """Six images."""
    return torch.rand(6, 3, 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


OFF = {"alpha": 0.0, "beta": 0.0, "gamma": 0.0, "entropy": 0.0, "head": 0.0}
CASES: dict[str, Callable[[], TeacherGuidance]] = {
    "bn": lambda: TeacherGuidance(with_bn(), **OFF | {"alpha": 1.0}),
    "moments": lambda: TeacherGuidance(without_bn(True), **OFF | {"alpha": 1.0}),
    "ce": lambda: TeacherGuidance(with_bn(), **OFF | {"beta": 1.0}),
    "adv": lambda: TeacherGuidance(with_bn(), student=student(), **OFF | {"gamma": 1.0}),
    "adv js": lambda: TeacherGuidance(with_bn(), student=student(), divergence="js", **OFF | {"gamma": 1.0}),
    "entropy": lambda: TeacherGuidance(with_bn(), **OFF | {"entropy": 1.0}),
    "head": lambda: TeacherGuidance(without_bn(False), **OFF | {"head": 1.0}),
    "all": lambda: TeacherGuidance(
        without_bn(True), alpha=0.3, beta=0.9, gamma=0.7, entropy=0.2, head=0.5, student=student()
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_the_central_difference(case: str) -> None:
    """In float64, along random directions and the gradient itself."""
    guidance, x = CASES[case](), images().requires_grad_()
    loss, terms = guidance(x, TARGETS)
    assert case == "all" or set(terms) == {case.split()[0]}
    (grad,) = torch.autograd.grad(loss, x)
    assert grad.dtype == torch.float64
    assert grad.norm() > 0
    generator, h = torch.Generator().manual_seed(0), 1e-6
    for _ in range(3):
        random = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        v = random / random.norm() + grad / grad.norm()
        with torch.no_grad():
            up, down = (float(guidance(x + s * h * v, TARGETS)[0]) for s in (1, -1))
        want = float((grad * v).sum())
        assert abs((up - down) / (2 * h) - want) <= 1e-5 * abs(want), case


def test_the_loss_is_the_weighted_sum() -> None:
    """Each term from its own definition; one forward pass of the teacher."""
    guidance, x = CASES["all"](), images()
    calls: list[int] = []
    guidance.teacher.net.register_forward_hook(lambda *_: calls.append(1))
    loss, terms = guidance(x, TARGETS)
    assert len(calls) == 1
    seen = guidance.teacher.look(x)
    assert seen.features is not None
    told = guidance.student(x)  # type: ignore[misc]
    want = {
        "moments": bn_distance(seen.stored),
        "ce": -(TARGETS * seen.logits.log_softmax(1)).sum(1),
        "adv": -disagreement(told, seen.logits, "kl"),
        "entropy": entropy_of(seen.logits),
        "head": head_alignment(seen.features, TARGETS, guidance.teacher.net.fc.weight),  # type: ignore[union-attr,arg-type]
    }
    assert list(terms) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(terms[name], value)
    assert terms["adv"].shape == (6,)
    assert (terms["adv"] <= 0).all()
    total = sum(w * want[n].mean() for n, w in zip(want, (0.3, 0.9, 0.7, 0.2, 0.5), strict=True))
    torch.testing.assert_close(loss, total)


def test_what_is_active_by_default() -> None:
    """Entropy and head where there are no statistics, and only there; numbers that were said are kept."""
    x = images()
    assert set(TeacherGuidance(with_bn())(x, TARGETS)[1]) == {"bn", "ce"}
    assert set(TeacherGuidance(without_bn(True))(x, TARGETS)[1]) == {"moments", "ce"}
    bare = TeacherGuidance(without_bn(False))
    assert set(bare(x, TARGETS)[1]) == {"ce", "entropy", "head"}
    assert (bare.entropy, bare.head) == (0.1, 0.5)
    assert set(TeacherGuidance(without_bn(False), entropy=0, head=0)(x, TARGETS)[1]) == {"ce"}
    assert set(TeacherGuidance(with_bn(), head=0.2)(x, TARGETS)[1]) == {"bn", "ce", "head"}


def test_both_kinds_of_statistics_add_up() -> None:
    """A network with BatchNorm and stored moments of its other norms has both terms, under one weight."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    )
    loss, terms = TeacherGuidance(wrapped(net, Moments({"2": (torch.ones(4), torch.ones(4))})), alpha=2.0, beta=0.0)(
        images(), TARGETS
    )
    assert set(terms) == {"bn", "moments"}
    torch.testing.assert_close(loss, 2 * (terms["bn"] + terms["moments"]))


def test_the_adversarial_term_waits_for_a_student() -> None:
    """Round 0 has none: not logged, no effect, the same fingerprint; alone it leaves a zero gradient."""
    x = images().requires_grad_()
    before, after = (
        TeacherGuidance(with_bn(), gamma=0.5, student=s, round=r, about=ABOUT) for s, r in ((None, 0), (student(), 2))
    )
    assert set(before(x, TARGETS)[1]) == {"bn", "ce"}
    assert torch.equal(before(x, TARGETS)[0], TeacherGuidance(with_bn())(x, TARGETS)[0])
    assert set(after(x, TARGETS)[1]) == {"bn", "ce", "adv"}
    assert (before.round, after.round) == (0, 2)
    assert before.describe() == after.describe()
    assert len(list(before.modules())) == 1
    assert list(after.modules())[1] is after.student
    alone = TeacherGuidance(with_bn(), alpha=0, beta=0, gamma=1.0)
    loss, terms = alone(x, TARGETS)
    assert terms == {}
    assert not torch.autograd.grad(loss, x)[0].any()


def test_fingerprints_of_today_do_not_move() -> None:
    """Without anything new, four entries as ever; each new part adds its own, if and only if it is active."""
    guidance = TeacherGuidance(with_bn(), alpha=0.3, entropy=0.0, about=ABOUT, divergence="js")
    plain = guidance.describe()
    assert plain == {"kind": "diffdfkd", "alpha": 0.3, "beta": 1.0, "teacher_sha256": plain["teacher_sha256"]}
    told = TeacherGuidance(with_bn(), alpha=0.3, gamma=0.5, divergence="js", head=0.2, about=ABOUT | {"alpha": 9})
    assert told.describe() == plain | {"gamma": 0.5, "divergence": "js", "head": 0.2} | ABOUT
    stored = TeacherGuidance(without_bn(True)).describe()
    assert set(stored) == set(plain) | {"moments_sha256"}
    assert stored["teacher_sha256"] == TeacherGuidance(without_bn(False)).describe()["teacher_sha256"]
    assert "moments_sha256" not in TeacherGuidance(without_bn(True), alpha=0.0).describe()
    json.dumps(told.describe())


def test_the_digest_of_the_embedded_teacher() -> None:
    """As it stands in the manifests of sets already drawn."""
    digest = TeacherGuidance(load_teacher("embedded:digits")).describe()["teacher_sha256"]
    assert digest == "a87999df3ba536befa6d516467419e10e5efc59f2a7cee2daf965edc542c2475"


def test_what_is_lost_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """One warning where alpha cannot work, none where it was not asked for or where there are statistics."""
    with caplog.at_level(logging.WARNING, "synthkd"):
        TeacherGuidance(with_bn())
        TeacherGuidance(without_bn(True))
        TeacherGuidance(without_bn(False), alpha=0.0)
        assert not caplog.records
        TeacherGuidance(without_bn(False))
    assert [r.getMessage() for r in caplog.records] == [
        "teacher has no BatchNorm and no stored moments: the statistics term (alpha) is off; class, entropy and head "
        "terms steer alone"
    ]


def headless() -> Teacher:
    """Classifies by a convolution."""
    return wrapped(nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TeacherGuidance(with_bn(), alpha=-1), "alpha is -1; expected a number >= 0"),
        (lambda: TeacherGuidance(with_bn(), head=float("nan")), "head is nan"),
        (lambda: TeacherGuidance(with_bn(), gamma=float("inf")), "gamma is inf"),
        (lambda: TeacherGuidance(with_bn(), alpha=0, beta=0), "all weights are 0; for an unguided set"),
        (
            lambda: TeacherGuidance(without_bn(False), beta=0, entropy=0, head=0),
            r"all weights are 0 \(alpha does not count: the teacher has no statistics\)",
        ),
        (lambda: TeacherGuidance(with_bn(), divergence="kll"), "divergence is 'kll'; did you mean 'kl'"),
        (
            lambda: TeacherGuidance(headless(), head=0.1),
            "head is 0.1, but the teacher has no linear layer of 4 outputs",
        ),
        (
            lambda: TeacherGuidance(
                with_bn(),
                student=Teacher(nn.Linear(1, 1), mean=[0.0], std=[1.0], input_size=(1, 1), classes="ab"),
            ),
            "the student names 2 classes, the teacher 4",
        ),
        (lambda: TeacherGuidance(with_bn())(images(), torch.eye(3)[[0] * 6]), "4 outputs, the recipe 3 classes"),
    ],
)
def test_wrong_settings(make: Callable[[], object], message: str) -> None:
    """One line each."""
    with pytest.raises(SynthkdError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_network_without_a_linear_layer_is_steered_by_class_and_entropy() -> None:
    """No features, no head term, no error."""
    assert set(TeacherGuidance(headless())(images(), TARGETS)[1]) == {"ce", "entropy"}


def test_no_term_waits_for_a_value() -> None:
    """Under FakeTensor, where a value cannot be read, all terms and their gradient are still made."""
    guidance, x, targets = CASES["all"](), images(), TARGETS
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x).requires_grad_()
        loss, terms = guidance(fake, targets)
        assert torch.autograd.grad(loss, fake)[0].shape == x.shape
    assert len(terms) == 5


def test_an_adversarial_run(pipeline: Any, recipe: Callable[..., Any], teacher_card: Path, tmp_path: Path) -> None:
    """On the tiny pipeline: the term is logged per sample, and the images differ from those without it."""
    teacher = load_teacher(str(teacher_card))
    torch.manual_seed(2)
    net = build_net("wrn", 3, {"depth": 10, "width": 1})
    other = Teacher(net, mean=[0.5] * 3, std=[0.5] * 3, input_size=(16, 16), classes=teacher.classes)
    drawn = {}
    for name, who in (("without", None), ("with", other)):
        guidance = TeacherGuidance(teacher, gamma=5.0, student=who)
        synth = Synthesizer.from_pipeline(pipeline, recipe(guidance=GuidanceSpec(scale=0.3)), guidance=guidance)
        drawn[name] = synth.run(synth.stream(Request(num_samples=6)).plan.unit(0), 0)
    assert set(drawn["without"].curves) == {"bn", "ce"}
    assert set(drawn["with"].curves) == {"bn", "ce", "adv"}
    assert len(drawn["with"].curves["adv"][0]) == 6
    assert torch.tensor(drawn["with"].curves["adv"]).isfinite().all()
    assert not torch.equal(drawn["with"].images, drawn["without"].images)
