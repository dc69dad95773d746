"""Losses against direct evaluation in float64."""

import math

import torch

from synthkd.dfkd.losses import bn_distance, class_scores, kd_loss
from synthkd.dfkd.methods import TeacherGuidance
from synthkd.dfkd.nets import build_net
from synthkd.dfkd.teachers import Teacher


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
    _, taps = teacher.with_taps(images)
    assert len(taps) == len(layers) == 6
    assert torch.allclose(bn_distance(taps), direct, rtol=1e-12)
    assert not any(m._forward_pre_hooks for m in teacher.modules())


def test_bn_distance_is_zero_on_its_own_statistics() -> None:
    """Where the running statistics are the batch's, value and gradient vanish."""
    teacher, images = teacher64(), torch.rand(5, 3, 9, 7, dtype=torch.float64)
    _, taps = teacher.with_taps(images)
    layers = [m for m in teacher.net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    first = teacher.net.bn1
    assert first is layers[0]
    first.running_mean.copy_(taps[0].stats.mean)
    first.running_var.copy_(taps[0].stats.var)
    images.requires_grad_()
    _, again = teacher.with_taps(images)
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
