"""batchnorm_stats and merge_stats: equal to torch.var_mean on the concatenation, in awkward shapes and dtypes."""

import sys
from functools import reduce

import pytest
import torch

from synthkd.kernels import batchnorm_stats, merge_stats
from synthkd.kernels.launch import recorded

SHAPES = [(2, 3, 1, 1), (1, 3, 63, 65), (33, 3, 5, 9), (7, 3), (4, 3, 11)]


def _values(shape: tuple[int, ...]) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x * 3 + 100  # far from zero: a sum of squares minus the squared mean would lose digits


@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_are_torch_var_mean_over_all_but_the_channel(shape: tuple[int, ...]) -> None:
    x = _values(shape)
    stats = batchnorm_stats(x)
    var, mean = torch.var_mean(x.transpose(0, 1).reshape(3, -1), dim=1, correction=0)
    assert stats.count == x.numel() // 3
    torch.testing.assert_close(stats.mean, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(stats.var, var, rtol=1e-12, atol=0)


@pytest.mark.parametrize("parts", [(1, 1), (1, 32), (2, 3, 28), (33,)])
def test_merged_parts_are_the_concatenation(parts: tuple[int, ...]) -> None:
    x = _values((sum(parts), 3, 5, 9))
    merged = reduce(merge_stats, (batchnorm_stats(p) for p in x.split(parts)))
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    assert merged.count == x.numel() // 3
    torch.testing.assert_close(merged.mean, mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.var, var, rtol=1e-12, atol=0)


def test_merging_has_no_order() -> None:
    a, b, c = (batchnorm_stats(p) for p in _values((33, 3, 4, 4)).split([1, 12, 20]))
    left, right = merge_stats(merge_stats(a, b), c), merge_stats(c, merge_stats(b, a))
    torch.testing.assert_close(left.mean, right.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(left.m2, right.m2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_accumulate_in_float32(dtype: torch.dtype) -> None:
    x = _values((33, 3, 16, 16)).to(dtype)
    stats = batchnorm_stats(x)
    assert stats.mean.dtype == stats.m2.dtype == torch.float32
    var, mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(stats.mean.double(), mean, rtol=1e-6, atol=0)  # float32 rounding; float16 errs by 1e-3
    torch.testing.assert_close(stats.var.double(), var, rtol=1e-4, atol=0)


def test_copies_of_a_batch_have_its_statistics() -> None:
    x = _values((4, 3, 5, 9))
    one, four = batchnorm_stats(x), batchnorm_stats(x.repeat(4, 1, 1, 1))
    torch.testing.assert_close(four.var, one.var, rtol=1e-12, atol=0)


def test_statistics_can_be_differentiated() -> None:
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stats = batchnorm_stats(x)
        return stats.mean, stats.var

    assert torch.autograd.gradcheck(moments, x)


def _moved(shape: tuple[int, ...], mean: float, *, channels_last: bool = False) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)) + mean
    return x.to(memory_format=torch.channels_last) if channels_last else x


def test_the_reference_does_not_look_at_the_shift() -> None:
    """Images drawn on a CPU keep their bits."""
    x = _moved((3, 4, 5, 9), 1.0)
    plain, shifted = batchnorm_stats(x), batchnorm_stats(x, torch.ones(4))
    assert torch.equal(plain.mean, shifted.mean)
    assert torch.equal(plain.m2, shifted.m2)


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("shift", [None, 0.0, 999.0, -2000.0])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_mean_of_1000_deviations_keeps_the_variance(
    shift: float | None, channels_last: bool, device: torch.device
) -> None:
    """In float32 a sum of squares minus the squared mean would keep no digit of the variance; a wrong shift is safe."""
    x = _moved((9, 3, 16, 31), 1000.0, channels_last=channels_last).to(device)
    near = None if shift is None else torch.full((3,), shift, device=device)
    stats = batchnorm_stats(x, near)
    var, mean = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(stats.mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.var.double(), var, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("programs", [1, 3])
def test_runs_of_many_tiles(
    programs: int, channels_last: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """What only large inputs do: runs of several tiles, which go on into the next sample and end in the last."""
    stats = batchnorm_stats(_moved((1, 3, 1, 1), 0.0).to(device))  # imports the kernels
    monkeypatch.setattr(sys.modules["synthkd.kernels.moments"], "PROGRAMS", programs)
    x = _moved((5, 3, 41, 43), 10.0, channels_last=channels_last).to(device).requires_grad_()
    with recorded() as launches:
        stats = batchnorm_stats(x)
        (grad,) = torch.autograd.grad((stats.mean + stats.var).sum(), x)
    assert launches[0].constexprs["STEPS"] > 1
    assert launches[-1].constexprs["STEPS"] > 1
    var, mean = torch.var_mean(x.detach().double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(stats.mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.var.double(), var, rtol=1e-5, atol=0)
    want = (1 + 2 * (x.detach().double() - mean.view(1, 3, 1, 1))) / stats.count
    torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-9)


@pytest.mark.usefixtures("kernels_on")
def test_values_that_drift_within_a_run(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """The first tile's mean is far from the others': nothing more than its share of the run is lost."""
    batchnorm_stats(_moved((1, 3, 1, 1), 0.0).to(device))
    monkeypatch.setattr(sys.modules["synthkd.kernels.moments"], "PROGRAMS", 1)
    x = _moved((16, 2, 16, 16), 0.0).to(device)
    x[1:] += 1000.0
    var, _ = torch.var_mean(x.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(batchnorm_stats(x).var.double(), var, rtol=16 * 2e-6, atol=0)


@pytest.mark.usefixtures("kernels_on")
def test_large_half_values_do_not_overflow(device: torch.device) -> None:
    x = torch.full((33, 2, 5, 9), 3e4, dtype=torch.float16, device=device)
    x[::2] *= -1
    stats = batchnorm_stats(x)
    assert torch.isfinite(stats.m2).all()
    var = torch.var(x.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(stats.var.double(), var, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("kernels_on")
def test_strided_inputs_are_copied(device: torch.device) -> None:
    x = _moved((4, 5, 6, 7), 1.0).to(device)
    view = x[:, ::2, 1:, :5]
    got, want = batchnorm_stats(view), batchnorm_stats(view.contiguous())
    assert torch.equal(got.mean, want.mean)
    assert torch.equal(got.m2, want.m2)


@pytest.mark.usefixtures("kernels_on")
def test_the_traced_gradient_is_the_eager_one(device: torch.device) -> None:
    """Inside a compiled function that asks for a gradient itself, as the guided step does."""
    x, shift = _moved((3, 4, 5, 9), 1.0).to(device).requires_grad_(), torch.full((4,), 0.9, device=device)

    def step(leaf: torch.Tensor) -> torch.Tensor:
        stats = batchnorm_stats(leaf, shift)
        (grad,) = torch.autograd.grad((stats.mean - 0.3).norm() + (stats.var - 2.0).norm(), leaf)
        return grad

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(x)
    assert compiled.abs().min() > 0
    torch.testing.assert_close(compiled, step(x), rtol=0, atol=0)


@pytest.mark.parametrize("shift", [torch.zeros(3), torch.zeros(4, 1)])
def test_a_shift_that_is_not_per_channel_is_refused(shift: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"shift is .*expected \(4,\)"):
        batchnorm_stats(torch.zeros(2, 4, 3), shift)


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"empty tensor \(0, 4, 3\)"):
        batchnorm_stats(torch.zeros(0, 4, 3))
