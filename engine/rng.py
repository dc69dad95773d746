"""The only randomness of the engine: counter-based, a function of (seed, id, purpose, attempt) alone.

The bits are Philox-4x64-10 (Salmon et al., SC 2011): key = (seed, hash of the purpose), counter =
(block, attempt, id, 0). No state is carried from one draw to the next, so order and workers cannot matter.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray


def raw(seed: int, index: int, purpose: str, count: int, attempt: int = 0) -> NDArray[np.uint64]:
    """`count` 64-bit words."""
    tag = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    key = np.array([seed, tag], dtype=np.uint64)
    counter = np.array([0, attempt, index, 0], dtype=np.uint64)
    words: NDArray[np.uint64] = np.random.Philox(key=key, counter=counter).random_raw(count)
    return words


def uniform(seed: int, index: int, purpose: str, count: int, attempt: int = 0) -> NDArray[np.float64]:
    """`count` float64 values in the open interval (0, 1), 53 bits each."""
    words = raw(seed, index, purpose, count, attempt)
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def normal(seed: int, index: int, purpose: str, count: int, attempt: int = 0) -> NDArray[np.float32]:
    """`count` standard normal float32 values (Box and Muller 1958, in float64)."""
    u = uniform(seed, index, purpose, 2 * ((count + 1) // 2), attempt).reshape(2, -1)
    radius, angle = np.sqrt(-2.0 * np.log(u[0])), 2.0 * np.pi * u[1]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count].astype(np.float32)


def integer(seed: int, index: int, purpose: str, high: int, attempt: int = 0) -> int:
    """One integer in [0, high)."""
    return min(int(uniform(seed, index, purpose, 1, attempt)[0] * high), high - 1)


def permutation(seed: int, index: int, purpose: str, count: int, attempt: int = 0) -> NDArray[np.int64]:
    """A permutation of 0..count-1: the order of `count` random words."""
    order: NDArray[np.int64] = np.argsort(raw(seed, index, purpose, count, attempt), kind="stable")
    return order
