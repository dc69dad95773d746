"""A teacher's taps on the Triton kernel: it is called, and guidance is what the reference makes it."""

from pathlib import Path

import pytest
import torch

from synthkd.dfkd.methods import TeacherGuidance
from synthkd.dfkd.nets import build_net
from synthkd.dfkd.teachers import Teacher, load_teacher
from synthkd.kernels import implementation
from synthkd.kernels.dispatch import Implementation
from synthkd.kernels.launch import recorded

pytest.importorskip("triton", reason="Triton runs on Linux only")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_a_teacher_s_taps_call_the_kernel(teacher_card: Path) -> None:
    """Two launches per BatchNorm layer, the first of them about the layer's running mean."""
    teacher = load_teacher(str(teacher_card)).to(DEVICE)
    images = torch.rand(4, 3, 16, 16, device=DEVICE)
    with implementation("triton"), recorded() as launches:
        taps = teacher.look(images).taps
    named = [launch.kernel.fn.__name__ for launch in launches]
    assert named == ["_partials", "_merge"] * len(taps)
    assert taps
    for tap, launch in zip(taps, launches[::2], strict=True):
        assert launch.constexprs["SHIFT"]
        assert any(a is tap.running_mean or torch.equal(a, tap.running_mean) for a in _vectors(launch.arguments))
    with implementation("reference"), recorded() as launches:
        teacher.look(images)
    assert not launches


def _vectors(arguments: tuple[object, ...]) -> list[torch.Tensor]:
    return [a for a in arguments if isinstance(a, torch.Tensor) and a.dim() == 1]


def test_guidance_with_kernels_is_that_of_the_reference() -> None:
    """Loss, logged terms and the gradient on the images."""
    torch.manual_seed(3)
    net = build_net("resnet", 4, {"widths": [4, 6], "blocks": [1, 1]}).train()
    for _ in range(10):
        net(torch.rand(8, 3, 9, 7) * 2)
    teacher = Teacher(net, mean=[0.4] * 3, std=[0.3] * 3, input_size=(9, 7), classes="abcd").to(DEVICE)
    guidance = TeacherGuidance(teacher, alpha=0.7, beta=1.0)
    targets = torch.eye(4, device=DEVICE)[[0, 1, 1, 2, 3, 0]]
    images = torch.rand(6, 3, 9, 7, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def run(name: Implementation) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        leaf = images.clone().requires_grad_()
        with implementation(name):
            loss, terms = guidance(leaf, targets)
            (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), {k: v.detach() for k, v in terms.items()}, grad

    got, want = run("triton"), run("reference")
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-6)
    assert want[2].abs().max() > 1e-4
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-7)
