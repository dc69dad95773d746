"""The engine's randomness: Philox-4x64-10 by the paper, sound statistics, no state between draws."""

import hashlib
import itertools

import numpy as np
import pytest

from synthkd.engine import rng

MASK = 2**64 - 1


def _philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x64-10 in whole numbers (Salmon et al., SC 2011, section 3.3)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (b >> 64) ^ c1 ^ k0, b & MASK, (a >> 64) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [c0, c1, c2, c3]


def test_the_oracle_has_the_published_answers() -> None:
    """Known answers of Random123 1.14, kat_vectors, philox4x64 10."""
    assert _philox([0] * 4, [0] * 2)[0] == 0x16554D9ECA36314C
    assert _philox([MASK] * 4, [MASK] * 2)[0] == 0x87B092C3013FE90B


@pytest.mark.parametrize(("seed", "index", "attempt"), [(0, 0, 0), (7, 17_431_007, 0), (2**63 - 1, 10**12, 2)])
def test_words_are_philox_of_seed_purpose_id_and_attempt(seed: int, index: int, attempt: int) -> None:
    tag = int.from_bytes(hashlib.blake2b(b"latents", digest_size=8).digest(), "little")
    want = [_philox([block, attempt, index, 0], [seed, tag]) for block in (1, 2, 3)]
    assert rng.raw(seed, index, "latents", 10, attempt).tolist() == list(itertools.chain(*want))[:10]


def test_numpy_gives_the_same_words() -> None:
    key = np.array([3, int.from_bytes(hashlib.blake2b(b"x", digest_size=8).digest(), "little")], dtype=np.uint64)
    philox = np.random.Philox(key=key, counter=np.array([0, 1, 5, 0], dtype=np.uint64))
    assert np.array_equal(rng.raw(3, 5, "x", 9, attempt=1), philox.random_raw(9))


def test_golden_values_never_change() -> None:
    """Every set on disk depends on these."""
    assert rng.raw(0, 0, "latents", 2).tolist() == [4409672076915722256, 3145313773898730739]
    assert rng.permutation(0, 0, "class order", 10).tolist() == [8, 5, 6, 1, 9, 3, 4, 7, 0, 2]
    normal = [-0.06593142449855804, 1.291624665260315, 0.7023038864135742]
    np.testing.assert_allclose(rng.normal(0, 1, "latents", 3), normal, rtol=1e-6)


def test_normal_has_the_moments_of_a_normal() -> None:
    """Over many ids, as latents are drawn; four standard errors of each moment."""
    x = np.stack([rng.normal(0, i, "latents", 256) for i in range(2000)]).astype(np.float64)
    n = x.size
    assert x.dtype == np.float64
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
    across = np.corrcoef(x[:-1].ravel(), x[1:].ravel())[0, 1]  # one id and the next
    within = np.corrcoef(x[:, :128].ravel(), x[:, 128:].ravel())[0, 1]  # the two halves of Box and Muller
    assert abs(across) < 4 / n**0.5
    assert abs(within) < 4 / (n / 2) ** 0.5


def test_uniform_is_open_and_flat() -> None:
    u = rng.uniform(1, 2, "flat", 100_000)
    assert 0.0 < u.min() < u.max() < 1.0
    counts, _ = np.histogram(u, bins=50, range=(0, 1))
    assert ((counts - 2000) ** 2 / 2000).sum() < 100  # chi-squared, 49 degrees of freedom


def test_integers_cover_their_range() -> None:
    drawn = [rng.integer(0, i, "prompt", 5) for i in range(2000)]
    assert set(drawn) == set(range(5))
    assert max(abs(drawn.count(k) - 400) for k in range(5)) < 90


def test_permutations_are_permutations_and_unbiased() -> None:
    drawn = [tuple(rng.permutation(0, i, "order", 3).tolist()) for i in range(1200)]
    assert {tuple(sorted(p)) for p in drawn} == {(0, 1, 2)}
    assert all(140 < drawn.count(p) < 260 for p in itertools.permutations(range(3)))


def test_draws_do_not_know_of_each_other() -> None:
    first = {i: rng.normal(0, i, "latents", 7) for i in range(20)}
    rng.uniform(5, 5, "something else", 1000)
    for i in reversed(range(20)):
        assert np.array_equal(rng.normal(0, i, "latents", 7), first[i])


def test_every_argument_matters() -> None:
    draws = [
        rng.raw(0, 0, "a", 4), rng.raw(1, 0, "a", 4), rng.raw(0, 1, "a", 4), rng.raw(0, 0, "b", 4),
        rng.raw(0, 0, "a", 4, attempt=1),
    ]  # fmt: skip
    assert len({tuple(d.tolist()) for d in draws}) == 5


def test_a_longer_draw_begins_with_the_shorter() -> None:
    assert np.array_equal(rng.raw(0, 0, "a", 100)[:10], rng.raw(0, 0, "a", 10))
    assert rng.normal(0, 0, "a", 5).shape == (5,)
    assert rng.normal(0, 0, "a", 5).dtype == np.float32
