"""batchnorm_stats and merge_stats: equal to torch.var_mean on the concatenation, in awkward shapes and dtypes."""

from functools import reduce

import pytest
import torch

from synthkd.kernels import batchnorm_stats, merge_stats

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
