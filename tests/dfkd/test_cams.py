"""CAM, Grad-CAM and feature matching, each against its equation in loops, float64."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from synthkd.dfkd.cams import (
    cam_consistency,
    check_cam,
    check_grad_cam,
    class_activation,
    grad_cam_consistency,
    gradient_activation,
    slopes_of,
)
from synthkd.dfkd.feature_losses import FeatureMatcher
from synthkd.dfkd.nets import build_net
from synthkd.dfkd.stages import Stages
from synthkd.engine.errors import SynthkdError

B, K = 2, 3


def _drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_class_activation_is_the_equation() -> None:
    """Per class and position; the mean is the logit, pooled or flattened; one class per sample picks its map."""
    maps, pooled, flat = _drawn((B, 4, 2, 3), (K, 4), (K, 24))
    wanted = torch.zeros(B, K, 2, 3, dtype=torch.float64)
    for b, k, y, x in itertools.product(range(B), range(K), range(2), range(3)):
        wanted[b, k, y, x] = sum(pooled[k, c] * maps[b, c, y, x] for c in range(4))
    found = class_activation(maps, pooled)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found.mean(dim=(2, 3)), maps.mean(dim=(2, 3)) @ pooled.T)
    torch.testing.assert_close(class_activation(maps, flat).mean(dim=(2, 3)), maps.flatten(1) @ flat.T)
    classes = torch.tensor([2, 0])
    for head in (pooled, flat):
        whole = class_activation(maps, head)
        torch.testing.assert_close(class_activation(maps, head, classes)[:, 0], whole[[0, 1], classes])
    with pytest.raises(SynthkdError, match="reads 5 values, the deepest maps are"):
        class_activation(maps, torch.ones(K, 5))


def test_cam_consistency() -> None:
    """A mean over all classes and positions, at the deepest stage; gradients as differences say."""
    (early, s, t, sw, tw) = _drawn((B, 2, 4, 6), (B, 4, 2, 3), (B, 5, 2, 3), (K, 4), (K, 5))
    total = 0.0
    for b, k, y, x in itertools.product(range(B), range(K), range(2), range(3)):
        total += float((sw[k] @ s[b, :, y, x] - tw[k] @ t[b, :, y, x]).detach()) ** 2
    found = cam_consistency([early, s], [t], sw, tw)
    assert found.item() == pytest.approx(total / (B * K * 6), rel=1e-12)
    fixed = (t.detach(), tw.detach())

    def loss(s: Tensor, sw: Tensor) -> Tensor:
        return cam_consistency([s], [fixed[0]], sw, fixed[1], torch.tensor([1, 2]), train_head=True)

    assert torch.autograd.gradcheck(loss, (s, sw))
    assert torch.autograd.grad(found, [s, t, sw, tw], allow_unused=True)[1:] == (None, None, None)


class Small(nn.Module):
    """Two stages and a third, each half as large; smooth, so that differences are gradients."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width + 1, 3, 2, 1)
        self.c, self.fc = nn.Conv2d(width + 1, 4, 3, 2, 1), nn.Linear(4, K)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,3,H,W]"""
        return self.rest(self.a(x), 0)

    def rest(self, x: Tensor, stage: int) -> Tensor:
        """What follows the map of a stage."""
        x = self.b(torch.tanh(x)) if stage == 0 else x
        return self.fc(torch.tanh(self.c(torch.tanh(x))).mean(dim=(2, 3)))


def _networks() -> tuple[Small, Small, Tensor]:
    torch.manual_seed(3)
    student, teacher = Small(2).double(), Small(4).double().requires_grad_(False)
    return student, teacher, torch.randn(B, 3, 5, 6, dtype=torch.float64)


def test_grad_cam_is_the_equation() -> None:
    """Slopes by finite differences, averaged, times the maps; earlier stages only; the teacher's top class for both."""
    student, teacher, x = _networks()
    s, t = Stages(student, (5, 6)), Stages(teacher, (5, 6))
    total = 0.0
    top = teacher(x).argmax(dim=1)
    for stage in range(2):
        cams = []
        for net, stages in ((student, s), (teacher, t)):
            cam = torch.zeros(B, *stages.sizes[stage], dtype=torch.float64)
            seen_map = stages.reading(lambda net=net: net(x))[1][stage].detach()
            for b, c in itertools.product(range(B), range(stages.channels[stage])):
                step, slope = 1e-6, 0.0
                for y, z in itertools.product(*map(range, stages.sizes[stage])):
                    moved = seen_map.clone()
                    moved[b, c, y, z] += step
                    slope += float((net.rest(moved, stage) - net(x))[b, top[b]].detach()) / step
                cam[b] += slope / (cam.shape[1] * cam.shape[2]) * seen_map[b, c]
            cams.append(cam)
        total += float((cams[0] - cams[1]).square().mean())
    logits, maps = s.reading(lambda: student(x))
    theirs, seen = t.reading(lambda: teacher(x), differentiable=True)
    assert grad_cam_consistency(maps, logits, seen, theirs).item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("through", [False, True])
def test_gradient_of_grad_cam(through: bool) -> None:
    """Through maps alone, as if the channels' weights were given, or through both; against differences."""
    student, teacher, x = _networks()
    stages, classes = Stages(student, (5, 6)), torch.tensor([0, 2])
    theirs, seen = Stages(teacher, (5, 6)).reading(lambda: teacher(x), differentiable=True)
    logits, maps = stages.reading(lambda: student(x))
    given = slopes_of(logits, maps[:2], classes)
    wanted = [g.detach() for g in gradient_activation(seen[:2], slopes_of(theirs, seen[:2], classes))]

    @torch.no_grad()
    def _mean(found: list[Tensor]) -> float:
        return float(sum((a - b).square().mean() for a, b in zip(found, wanted, strict=True)))

    def value() -> float:
        logits, maps = stages.reading(lambda: student(x))
        slopes = slopes_of(logits, maps[:2], classes) if through else given
        return _mean(gradient_activation(maps[:2], slopes))

    loss = grad_cam_consistency(maps, logits, seen, theirs, classes, through_weights=through)
    (slope,) = torch.autograd.grad(loss, [student.a.weight])
    assert loss.item() == pytest.approx(value(), rel=1e-12)
    for place in ((0, 0, 0, 0), (1, 2, 1, 1)):
        moved = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                student.a.weight[place] += step
            moved.append(value())
            with torch.no_grad():
                student.a.weight[place] -= step
        assert (moved[0] - moved[1]) / 2e-6 == pytest.approx(slope[place].item(), rel=1e-5)


def test_refusals_and_extremes() -> None:
    """One line without gradients or stages; finite for constant maps, saturated logits, one class; half in float32."""
    student, teacher, x = _networks()
    logits, maps = Stages(student, (5, 6)).reading(lambda: student(x))
    theirs, seen = Stages(teacher, (5, 6)).reading(lambda: teacher(x))
    with pytest.raises(SynthkdError, match="maps have no graph; read them with differentiable=True"):
        grad_cam_consistency(maps, logits, seen, theirs)
    with pytest.raises(SynthkdError, match="one stage in common"):
        grad_cam_consistency(maps, logits, seen[-1:], theirs)
    s, t = Stages(student, (5, 6)), Stages(teacher, (5, 6))
    check_cam(s, t, [student.fc.weight, teacher.fc.weight])
    check_grad_cam(s, t)
    with pytest.raises(SynthkdError, match="reads 5 values"):
        check_cam(s, t, [student.fc.weight, torch.ones(K, 5)])
    with pytest.raises(SynthkdError, match="one stage in common"):
        check_grad_cam(s, Stages(teacher, (5, 6), ("c",)))
    same = torch.full((B, 4, 1, 2), 60000.0, dtype=torch.float16)
    head = torch.full((1, 4), 100.0, dtype=torch.float16)
    assert cam_consistency([same], [same / 2], head, head).isfinite()
    assert cam_consistency([same], [same], head, head) == 0
    flat = torch.zeros(B, 4, 2, 2, requires_grad=True)
    saturated = (flat.mean(dim=(2, 3)) @ torch.full((4, 1), 1e4)) * 1e4
    loss = grad_cam_consistency([flat, flat], saturated, [flat, flat], saturated)
    assert loss == 0
    assert torch.autograd.grad(loss, flat)[0].isfinite().all()


def test_whole_step_in_one_graph() -> None:
    """CAM and Grad-CAM, traced without a break, give eager's loss and gradient."""
    student, teacher, x = (m.float() for m in _networks())
    s, t = Stages(student, (5, 6)), Stages(teacher, (5, 6))

    def step(x: Tensor) -> Tensor:
        logits, maps = s.reading(lambda: student(x))
        wanted, seen = t.reading(lambda: teacher(x), differentiable=True)
        region = grad_cam_consistency(maps, logits, seen, wanted)
        return region + cam_consistency(maps, seen, student.fc.weight, teacher.fc.weight)

    with s.attached(), t.attached(), torch._dynamo.config.patch(trace_autograd_ops=True):
        plain = step(x)
        traced = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(traced, plain)
    parameters = [student.a.weight, student.c.weight]
    for a, b in zip(*(torch.autograd.grad(y, parameters) for y in (plain, traced)), strict=True):
        torch.testing.assert_close(a, b)


def test_feature_matching() -> None:
    """The equation in loops; free of the teacher's scale; regressors only where channels differ, the same each time."""
    student = Stages(build_net("resnet", K, {"widths": [4, 6], "blocks": [1, 1]}), (6, 8))
    teacher = Stages(build_net("resnet", K, {"widths": [3, 5, 6], "blocks": [1, 1, 1]}), (6, 8))
    matcher, again = (FeatureMatcher(student, teacher).double() for _ in range(2))
    assert [type(r) for r in matcher.regressors] == [nn.Conv2d, nn.Identity]
    assert torch.equal(matcher.regressors[0].weight, again.regressors[0].weight)
    s, (first, *t) = _drawn((B, 4, 3, 4), (B, 6, 2, 2)), _drawn((B, 3, 6, 8), (B, 5, 3, 4), (B, 6, 2, 2), seed=1)
    wanted = 0.0
    for i, (mine, theirs) in enumerate(zip(s, t, strict=True)):
        error = size = 0.0
        for b, y, x in itertools.product(range(B), *map(range, mine.shape[2:])):
            seen = mine[b, :, y, x]
            if i == 0:
                seen = matcher.regressors[0].weight[:, :, 0, 0] @ seen + matcher.regressors[0].bias
            error += float((theirs[b, :, y, x] - seen).square().sum().detach())
            size += float(theirs[b, :, y, x].square().sum().detach())
        wanted += error / size / 2 / 2
    found = matcher(s, [first, *t])
    assert found.item() == pytest.approx(wanted, rel=1e-12)
    assert torch.autograd.grad(found, [*s, *t], allow_unused=True)[2:] == (None, None)
    assert torch.autograd.gradcheck(lambda *s: matcher(s, [m.detach() for m in (first, *t)]), tuple(s))
    assert matcher([s[0], 0 * s[1]], [first, 0 * t[0] + 1, 1e6 * t[1].detach()]).isfinite()
    assert matcher(s, [first, 0 * t[0], 0 * t[1]]).isfinite()
    resized = matcher([s[0][:, :, :2, :3], s[1]], [first, *t])
    assert resized.isfinite()
