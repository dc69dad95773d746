"""kd_loss: stable where exponentials under- and overflow, its gradient under compilation, and used by the student."""

from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.dfkd import objective
from synthkd.dfkd.nets import build_net
from synthkd.dfkd.student import DistillSpec, distill
from synthkd.dfkd.teachers import Teacher
from synthkd.kernels import implementation, kd_loss
from synthkd.kernels.kd_loss import reference
from synthkd.kernels.launch import recorded

SIZES = [1, 2, 10, 1000, 8192, 8193, 12289]


def _logits(b: int, k: int, device: torch.device, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(k)
    s, t = (torch.randn(b, k, generator=g, dtype=torch.float64) * scale for _ in range(2))
    return s.float().to(device), t.float().to(device)


def _loss_and_gradient(op: Any, s: Tensor, t: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    leaf = s.detach().requires_grad_()
    loss = op(leaf, t, temperature)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("temperature", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("k", SIZES)
def test_logits_of_ten_thousand(k: int, temperature: float, device: torch.device) -> None:
    """Float32 holds logits of 1e4 to 5e-4, divided by T: an absolute error that the loss has to live with."""
    s, t = _logits(3, k, device, scale=1e4)
    got = _loss_and_gradient(kd_loss, s, t, temperature)
    want = _loss_and_gradient(reference, s.double(), t.double(), temperature)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-6 * temperature)


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("k", SIZES)
def test_equal_logits_cost_nothing(k: int, scale: float, device: torch.device) -> None:
    s, _ = _logits(3, k, device, scale)
    loss, gradient = _loss_and_gradient(kd_loss, s, s, 4.0)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("k", [10, 8193])
def test_opposite_certainties_are_finite(k: int, device: torch.device) -> None:
    """Where one side's probability underflows, the other's logarithm is still right."""
    s, t = torch.full((2, k), -1e4, device=device), torch.full((2, k), -1e4, device=device)
    s[:, 0], t[:, -1] = 1e4, 1e4
    loss, gradient = _loss_and_gradient(kd_loss, s, t, 1.0)
    assert loss == pytest.approx(2e4)
    assert gradient[:, 0].tolist() == [0.5, 0.5]
    assert gradient[:, -1].tolist() == [-0.5, -0.5]


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("k", [10, 8193])
def test_large_positive_lone_logits_in_the_last_chunk(k: int, device: torch.device) -> None:
    """The running maximum is raised by the last logit of a row."""
    s, t = _logits(2, k, device)
    s[:, -1] += 50
    t[:, -1] += 40
    got, want = kd_loss(s, t, 2.0), reference(s.double(), t.double(), 2.0)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)  # log p near 0 is off by 1e-7, times T^2


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, device: torch.device) -> None:
    s, t = (x.to(dtype) for x in _logits(5, 100, device))
    loss, gradient = _loss_and_gradient(kd_loss, s, t.float(), 4.0)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss, reference(s.float(), t.float(), 4.0), rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("kernels_on")
def test_a_scaled_loss_keeps_small_gradients_in_float16(device: torch.device) -> None:
    """The batch's share is applied with the upstream factor, in float32: 65536 / B neither over- nor underflows."""
    s, t = (x.half() for x in _logits(64, 10, device, scale=0.01))
    leaf = s.clone().requires_grad_()
    (kd_loss(leaf, t, 4.0) * 65536).backward()
    want = _loss_and_gradient(reference, s.double(), t.double(), 4.0)[1] * 65536
    torch.testing.assert_close(leaf.grad.double(), want, rtol=2**-9, atol=1e-3)


@pytest.mark.usefixtures("kernels_on")
def test_rows_of_any_strides(device: torch.device) -> None:
    s, t = _logits(6, 40, device)
    for a, b in ((s.T.contiguous().T, t), (s[:, ::2], t[:, 1::2]), (s[::2], t[1::2]), (s[:1].expand(6, 40), t)):
        got, want = _loss_and_gradient(kd_loss, a, b, 4.0), _loss_and_gradient(reference, a, b, 4.0)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("kernels_on")
def test_launches_and_what_they_return(device: torch.device) -> None:
    """No gradient is written where none is wanted; a teacher that learns takes the reference."""
    s, t = _logits(3, 10, device)
    with recorded() as launches:
        kd_loss(s, t, 4.0)
        assert [x.constexprs["WANT_GRAD"] for x in launches] == [False]
        kd_loss(s.requires_grad_(), t, 4.0).backward()
        assert len(launches) == 3
        kd_loss(s, t.requires_grad_(), 4.0).backward()
        assert len(launches) == 3
    assert t.grad is not None
    assert t.grad.any()


@pytest.mark.usefixtures("kernels_on")
def test_a_second_backward_pass_is_refused(device: torch.device) -> None:
    s, t = _logits(3, 10, device)
    s.requires_grad_()
    (first,) = torch.autograd.grad(kd_loss(s, t, 4.0), s, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.square().sum(), s)


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("k", [10, 8193])
def test_compiled_gradient_is_the_eager_one(k: int, device: torch.device) -> None:
    """Inside one compiled graph, as a traced torch.autograd.grad."""
    s, t = _logits(3, k, device)
    s.requires_grad_()  # outside: dynamo of torch 2.11 does not trace it

    def gradient(leaf: Tensor) -> tuple[Tensor, Tensor]:
        loss = kd_loss(leaf * 2, t, 4.0)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        got = torch.compile(gradient, fullgraph=True, backend="aot_eager")(s)
    want = gradient(s)
    assert want[1].any()
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("s", "t", "temperature", "message"),
    [
        ((2, 3), (2, 4), 1.0, r"logits are \(2, 3\) and \(2, 4\)"),
        ((2, 3, 4), (2, 3, 4), 1.0, r"expected \[B,K\]"),
        ((0, 3), (0, 3), 1.0, "empty"),
        ((2, 3), (2, 3), 0.0, "temperature is 0.0"),
    ],
)
def test_wrong_input_is_refused(s: tuple[int, ...], t: tuple[int, ...], temperature: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kd_loss(torch.zeros(s), torch.zeros(t), temperature)


def test_float32_of_the_reference_is_plain_torch() -> None:
    """Students trained on a CPU stay what they were, byte for byte."""
    s, t = _logits(33, 10, torch.device("cpu"))
    log_s, log_t = (torch.log_softmax(x / 4.0, dim=1) for x in (s, t))
    plain = torch.nn.functional.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * 4.0**2
    assert torch.equal(kd_loss(s, t, 4.0), plain)


def _task() -> tuple[Any, Teacher]:
    from synthkd.dfkd.data import LabelledImages

    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    net = build_net("resnet", 3, {"widths": [4], "blocks": [1]})
    teacher = Teacher(net, mean=[0.3] * 3, std=[0.3] * 3, input_size=(8, 8), classes="abc")
    return LabelledImages(images, torch.arange(40) % 3, ("a", "b", "c")), teacher


@pytest.mark.usefixtures("kernels_on")
def test_the_student_loop_calls_the_op_and_learns_the_same(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """A few steps with the kernel give the losses of a few steps without."""
    seen: list[float] = []

    def spy(s: Tensor, t: Tensor, temperature: float) -> Tensor:
        loss = kd_loss(s, t, temperature)
        seen.append(loss.item())
        return loss

    monkeypatch.setattr(objective, "kd_loss", spy)
    data, teacher = _task()
    teacher.to(device)
    spec = DistillSpec(arch_args={"widths": [4], "blocks": [1]}, steps=6, batch_size=16, warmup_steps=2)
    with recorded() as launches:
        distill(data, teacher, spec)
    assert len(launches) == 2 * spec.steps
    with implementation("reference"):
        distill(data, teacher, spec)
    assert seen[: spec.steps] == pytest.approx(seen[spec.steps :], rel=1e-5)
    assert len(set(seen[: spec.steps])) == spec.steps
