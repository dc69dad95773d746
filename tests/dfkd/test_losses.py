"""Losses against direct evaluation in float64."""

import math

import pytest
import torch

from synthkd.dfkd.losses import bn_distance, class_scores, disagreement, entropy, head_alignment
from synthkd.dfkd.methods import TeacherGuidance
from synthkd.dfkd.nets import build_net
from synthkd.dfkd.teachers import Teacher
from synthkd.engine.errors import SynthkdError
from synthkd.kernels import kd_loss


def teacher64() -> Teacher:
    """A small float64 teacher with running statistics of its own."""
    torch.manual_seed(3)
    net = build_net("resnet", 4, {"widths": [4, 6], "blocks": [1, 1]}).double().train()
    for _ in range(10):
        net(torch.rand(8, 3, 9, 7, dtype=torch.float64) * 2)
    made = Teacher(net, mean=[0.4] * 3, std=[0.3] * 3, input_size=(9, 7), classes="abcd")
    return made.double()


def test_kd_loss_is_the_sum_over_classes() -> None:
    """T^2 sum_k t_k (log t_k - log s_k), averaged."""
    torch.manual_seed(0)
    s, t = torch.randn(2, 5, 7, dtype=torch.float64)
    for temperature in (1.0, 4.0):
        direct = 0.0
        for a, b in zip(s / temperature, t / temperature, strict=True):
            za, zb = sum(map(math.exp, a.tolist())), sum(map(math.exp, b.tolist()))
            for x, y in zip(a.tolist(), b.tolist(), strict=True):
                direct += math.exp(y) / zb * ((y - math.log(zb)) - (x - math.log(za)))
        expected = direct / 5 * temperature**2
        assert math.isclose(kd_loss(s, t, temperature).item(), expected, rel_tol=1e-12)
    assert kd_loss(t, t, 4.0).abs() < 1e-12


def test_kd_loss_survives_saturated_logits() -> None:
    """No NaN where a probability underflows to zero."""
    s = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = kd_loss(s, torch.tensor([[-1e4, 1e4]]), 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(s.grad).all()


def test_class_scores_take_shares() -> None:
    """Cross-entropy against a mixture of classes."""
    logits = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64)
    p = logits.softmax(1)[0]
    shares = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64)
    assert torch.allclose(class_scores(logits, shares), -(0.25 * p[0].log() + 0.75 * p[1].log()))


def test_bn_distance_against_hooks_by_hand() -> None:
    """Sum over layers of the two norms, with the layer inputs taken by a plain forward hook."""
    teacher, images = teacher64(), torch.rand(6, 3, 9, 7, dtype=torch.float64)
    seen = {}
    layers = {n: m for n, m in teacher.net.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    handles = [m.register_forward_hook(lambda m, i, o, n=n: seen.update({n: i[0]})) for n, m in layers.items()]
    teacher(images)
    for handle in handles:
        handle.remove()
    direct = sum(
        (x.mean((0, 2, 3)) - layers[n].running_mean).norm()
        + (x.var((0, 2, 3), correction=0) - layers[n].running_var).norm()
        for n, x in seen.items()
    )
    taps = teacher.look(images).taps
    assert len(taps) == len(layers) == 6
    assert torch.allclose(bn_distance(taps), direct, rtol=1e-12)
    assert not any(m._forward_pre_hooks for m in teacher.modules())


def test_bn_distance_is_zero_on_its_own_statistics() -> None:
    """Where the running statistics are the batch's, value and gradient vanish."""
    teacher, images = teacher64(), torch.rand(5, 3, 9, 7, dtype=torch.float64)
    taps = teacher.look(images).taps
    layers = [m for m in teacher.net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    first = teacher.net.bn1
    assert first is layers[0]
    first.running_mean.copy_(taps[0].stats.mean)
    first.running_var.copy_(taps[0].stats.var)
    images.requires_grad_()
    again = teacher.look(images).taps
    value = bn_distance(again[:1])
    (grad,) = torch.autograd.grad(value, images)
    assert value < 1e-12
    assert torch.isfinite(grad).all()


def test_a_teacher_without_batchnorm_has_no_bn_term() -> None:
    """Nothing is logged for it, and the other terms still guide."""
    net = build_net("plain_cnn", 3, {"widths": [8, 16]})
    teacher = Teacher(net, mean=[0.5] * 3, std=[0.5] * 3, input_size=(32, 32), classes="abc")
    images = torch.rand(4, 3, 32, 32, requires_grad=True)
    loss, terms = TeacherGuidance(teacher)(images, torch.eye(3)[[0, 1, 2, 0]])
    assert set(terms) == {"ce", "entropy", "head"}
    assert torch.autograd.grad(loss, images)[0].abs().sum() > 0


def test_teacher_stays_in_eval_mode_and_frozen() -> None:
    """Calling train() changes nothing: its statistics are the target."""
    teacher = teacher64()
    before = teacher.net.bn1.running_mean.clone()
    teacher.train()
    teacher(torch.rand(4, 3, 9, 7, dtype=torch.float64))
    assert not teacher.net.training
    assert torch.equal(before, teacher.net.bn1.running_mean)
    assert not any(p.requires_grad for p in teacher.parameters())


def brute_disagreement(s: list[float], t: list[float], kind: str) -> float:
    """By hand, in float64."""
    p, q = ([math.exp(x - max(row)) for x in row] for row in (t, s))
    p, q = ([x / sum(row) for x in row] for row in (p, q))
    if p.index(max(p)) != q.index(max(q)):
        return 0.0

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * (math.log(x) - math.log(y)) for x, y in zip(a, b, strict=True))

    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return kl(p, q) if kind == "kl" else (kl(p, middle) + kl(q, middle)) / 2


@pytest.mark.parametrize("kind", ["kl", "js"])
def test_disagreement_against_brute_force(kind: str) -> None:
    """Zero where the two name different classes, else the divergence; some of both are in the batch."""
    torch.manual_seed(2)
    t = torch.randn(40, 5, dtype=torch.float64) * 2
    s = t + torch.randn(40, 5, dtype=torch.float64) * 1.5
    found = disagreement(s, t, kind)
    assert found.dtype == torch.float64
    want = [brute_disagreement(a, b, kind) for a, b in zip(s.tolist(), t.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-14)
    assert 0 < sum(w == 0 for w in want) < 40
    assert disagreement(s.half(), t.half(), kind).dtype == torch.float32
    assert disagreement(t, t, kind).abs().max() < 1e-12


def test_jensen_shannon_is_bounded() -> None:
    """At most log 2, however far the two are, with gradients that stay finite; KL is not bounded."""
    t, s = torch.tensor([[60.0, 0.0, 59.0]]), torch.tensor([[60.0, 59.9, -200.0]], requires_grad=True)
    value = disagreement(s, t, "js")
    assert 0.1 < value.item() <= math.log(2)
    assert torch.autograd.grad(value.sum(), s)[0].isfinite().all()
    assert disagreement(s, t, "kl").item() > 10
    with pytest.raises(SynthkdError, match=r"divergence is 'jz'; .*js, kl"):
        disagreement(s, t, "jz")


def test_entropy() -> None:
    """log K of equal logits, 0 of a certain answer, finite gradients in both."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e4, 0.0, 0.0, -1e4]], requires_grad=True)
    value = entropy(logits)
    torch.testing.assert_close(value.detach(), torch.tensor([math.log(4), 0.0]))
    assert torch.autograd.grad(value.sum(), logits)[0].isfinite().all()


def test_head_alignment_falls_as_features_turn() -> None:
    """0 where class means are the centred rows, 2 where they are opposed, and in between on the way."""
    torch.manual_seed(0)
    weight = torch.randn(3, 8, dtype=torch.float64)
    targets = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0, 1, 2]]
    along = targets @ (weight - weight.mean(0)) + 5.0
    other = torch.randn(6, 8, dtype=torch.float64)
    values = [float(head_alignment((1 - a) * other + a * along, targets, weight)) for a in (0.0, 0.3, 0.6, 1.0)]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 1e-12
    assert float(head_alignment(-along, targets, weight)) == pytest.approx(2.0)


def test_head_alignment_by_hand_with_soft_targets() -> None:
    """Class shares weigh the samples; a class that is not there does not count; copies change nothing."""
    torch.manual_seed(1)
    f, w = torch.randn(5, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    y = torch.tensor([[1, 0, 0, 0], [0.25, 0.75, 0, 0], [0, 1, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 1, 0]]).double()
    want = 0.0
    for k in range(3):
        mean = sum(y[b, k] * f[b] for b in range(5)) / y[:, k].sum()
        a, b = mean - f.mean(0), w[k] - w.mean(0)
        want += float(1 - a @ b / (a.norm() * b.norm())) / 3
    assert float(head_alignment(f, y, w)) == pytest.approx(want, rel=1e-12)
    assert float(head_alignment(f.repeat(3, 1), y.repeat(3, 1), w)) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("case", ["equal", "zero", "one class", "one sample"])
def test_head_alignment_without_a_direction(case: str) -> None:
    """Where class means do not differ from the group's, the gradient is zero, never NaN or rounding blown up."""
    torch.manual_seed(4)
    features = {"equal": torch.full((6, 9), 0.3), "zero": torch.zeros(6, 9)}.get(case, torch.rand(6, 9) * 1e3)
    targets = torch.eye(3)[[0, 1, 2, 0, 1, 2]] if case in ("equal", "zero") else torch.eye(3)[[1] * 6]
    if case == "one sample":
        features, targets = features[:1], targets[:1]
    features = features.clone().requires_grad_()
    value = head_alignment(features, targets, torch.randn(3, 9))
    assert value.item() == 1.0
    assert not torch.autograd.grad(value, features)[0].any()
