"""Figures about sets: distances against closed forms and loops, near-copies planted and found, accuracy by class."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.dfkd import metrics
from synthkd.dfkd.data import real_digits
from synthkd.dfkd.metrics import (
    frechet_distance,
    kernel_distance,
    near_duplicates,
    per_class_accuracy,
    set_distances,
    set_features,
)
from synthkd.dfkd.teachers import load_teacher


def normal(count: int, dims: int, seed: int = 0) -> Tensor:
    """Standard normal features, float64 [count,dims]."""
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(rows: Tensor, mean: Tensor, root: Tensor) -> Tensor:
    """Rows moved to exactly this mean and to the covariance root^T root (N > D)."""
    centred = rows - rows.mean(dim=0)
    factor = torch.linalg.cholesky(centred.T @ centred / (len(rows) - 1))
    return centred @ torch.linalg.inv(factor).T @ root + mean


def photos(count: int, size: int = 32, seed: int = 0) -> Tensor:
    """Random smooth images, uint8 [count,3,size,size]."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    large = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (large * 250 + 2).to(torch.uint8)


@pytest.mark.parametrize(("n", "m"), [(50, 50), (400, 30)])
def test_frechet_of_diagonal_gaussians_is_the_closed_form(n: int, m: int) -> None:
    """|mean difference|^2 + sum of (standard deviation difference)^2."""
    sigma, tau = torch.linspace(0.5, 3, 6).double(), torch.linspace(2, 0, 6).double()
    mean = torch.arange(6).double()
    a = with_moments(normal(n, 6, 1), mean, sigma.diag())
    b = with_moments(normal(m, 6, 2), -mean, tau.diag())
    expected = (2 * mean).square().sum() + (sigma - tau).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_of_any_gaussians_is_equation_6_by_eigenvalues() -> None:
    """Tr (C_a C_b)^(1/2) from the eigenvalues of the unsymmetric product."""
    a, b = normal(60, 7, 1) @ normal(7, 7, 3), normal(80, 7, 2) @ normal(7, 7, 4) + 1
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(a, b, block=9) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_with_fewer_images_than_features() -> None:
    """Covariances of rank N - 1: 0 to itself, the shift squared to its shifted copy, whatever the dtype."""
    a = normal(10, 64)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-5)
    assert frechet_distance(a, a + 2) == pytest.approx(4 * 64, rel=1e-6)
    assert frechet_distance(a.float(), a.float() * 3) == pytest.approx(
        float(4 * (torch.cov(a.T).trace() + a.mean(0).square().sum())), rel=1e-5
    )


def test_frechet_is_biased_upwards_by_few_images_and_the_kernel_is_not() -> None:
    """Two halves of one distribution, many times."""
    pairs = [(normal(20, 8, 2 * s), normal(20, 8, 2 * s + 1)) for s in range(200)]
    frechet = torch.tensor([frechet_distance(a, b) for a, b in pairs])
    kernel = torch.tensor([kernel_distance(a, b) for a, b in pairs])
    assert frechet.min() > 0.5
    assert kernel.min() < 0 < kernel.max()
    assert kernel.mean().abs() < 3 * kernel.std() / len(pairs) ** 0.5


@pytest.mark.parametrize("block", [1, 4, 1024])
def test_kernel_distance_is_the_naive_double_loop(block: int) -> None:
    a, b = normal(7, 5, 1), normal(9, 5, 2) + 0.5

    def k(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 5 + 1) ** 3)

    within_a = sum(k(x, y) for x, y in itertools.permutations(a, 2)) / (7 * 6)
    within_b = sum(k(x, y) for x, y in itertools.permutations(b, 2)) / (9 * 8)
    across = sum(k(x, y) for x, y in itertools.product(a, b)) / 63
    assert kernel_distance(a, b, block) == pytest.approx(within_a + within_b - 2 * across, rel=1e-10)


def test_every_pair_of_sets_is_compared() -> None:
    found = set_distances({"guided": normal(9, 4, 1), "unguided": normal(9, 4, 2), "real": normal(9, 4, 3) + 1})
    assert list(found) == ["guided_unguided", "guided_real", "unguided_real"]
    assert all(set(both) == {"frechet", "kernel"} for both in found.values())


@pytest.mark.parametrize("bad", [torch.ones(1, 4), torch.full((9, 4), float("nan"))])
def test_sets_that_cannot_be_compared_give_nothing(bad: Tensor) -> None:
    assert set_distances({"guided": normal(9, 4), "unguided": bad}) == {}


def test_a_large_set_enters_the_kernel_as_a_random_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every class of a set whose classes take turns is still there."""
    monkeypatch.setattr(metrics, "KERNEL_SAMPLES", 100)
    rows = torch.arange(1000)[:, None] % 10
    part = metrics._thinned(rows)
    assert len(part) == 100
    assert len(part.unique()) == 10
    assert torch.equal(part, metrics._thinned(rows))


def test_features_are_read_in_batches_without_a_gradient(teacher_card: Any) -> None:
    net, images = load_teacher(str(teacher_card)), photos(7, 16)
    whole = set_features(net, images)
    assert whole.shape[0] == 7
    assert not whole.requires_grad
    assert torch.allclose(set_features(net, images, batch_size=3), whole, atol=1e-6)
    assert torch.allclose(net.features(images.float() / 255), whole, atol=1e-6)


def test_planted_copies_are_found_with_their_origin() -> None:
    images = photos(40)
    noise = torch.randint(-1, 2, (3, 32, 32), generator=torch.Generator().manual_seed(0))
    noisy = (images[5].int() + noise).clamp(0, 255).to(torch.uint8)
    brighter = (images[7].float() * 0.5 + 60).to(torch.uint8)
    found = near_duplicates(torch.cat([images, noisy[None], brighter[None], images[5:6]]))
    assert found.count == 3
    assert {(c.earlier, c.later) for c in found.examples} <= {(5, 40), (7, 41), (5, 42), (40, 42)}
    assert found.examples[0].later == 42
    assert found.examples[0].likeness == pytest.approx(1.0, abs=1e-5)


def test_ordinary_images_are_no_copies_and_noise_does_not_hide_one() -> None:
    """Real digits, small and alike as they are: hardly any repeats, and each is a copy of itself plus noise."""
    pytest.importorskip("sklearn")
    images = real_digits("test").images[:200]
    assert near_duplicates(images).count <= 1
    noise = torch.randint(-1, 2, images.shape, generator=torch.Generator().manual_seed(0))
    noisy = (images.int() + noise).clamp(0, 255).to(torch.uint8)
    assert near_duplicates(torch.cat([images, noisy])).count >= 200


@pytest.mark.parametrize("block", [1, 7, 16])
def test_blocks_of_any_size_find_the_same(block: int) -> None:
    images = torch.cat([photos(30), photos(11)])
    whole = near_duplicates(images, threshold=0.05, examples=99)
    parts = near_duplicates(images, threshold=0.05, examples=99, block=block)
    assert parts.count == whole.count > 11
    assert [(c.earlier, c.later) for c in parts.examples] == [(c.earlier, c.later) for c in whole.examples]


def test_the_count_is_the_loop_over_all_pairs() -> None:
    images = photos(25, seed=3)
    vectors = metrics.shapes(images, 1024)
    naive = sum(any(float(vectors[i] @ vectors[j]) >= 0.05 for j in range(i)) for i in range(25))
    assert near_duplicates(images, threshold=0.05).count == naive > 0


def test_images_without_shape_are_copies_of_one_another_alone() -> None:
    grey = torch.stack([torch.full((3, 32, 32), v, dtype=torch.uint8) for v in (0, 128, 255)])
    assert near_duplicates(torch.cat([grey, photos(5)])).count == 2
    assert near_duplicates(torch.cat([photos(5), grey[:1]])).count == 0


@pytest.mark.parametrize("size", [(4, 4), (16, 20), (40, 9)])
def test_any_shape_of_image_and_any_number(size: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (1, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert near_duplicates(image).count == 0
    assert near_duplicates(image[:0]).count == 0
    assert near_duplicates(image.expand(5, -1, -1, -1), examples=2).count == 4
    assert len(near_duplicates(image.expand(5, -1, -1, -1), examples=2).examples) == 2


def test_accuracy_by_class() -> None:
    assert per_class_accuracy([[3, 1, 0], [0, 5, 0], [0, 0, 0]]) == [75.0, 100.0, None]
