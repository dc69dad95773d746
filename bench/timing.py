"""Interleaved timings: one round runs each contender once, so that drift meets all alike."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_FLUSH = 256 * 2**20  # bytes written between two timings: several times any L2 cache
_AHEAD = 2_000_000  # GPU cycles to wait, about a millisecond, in which the CPU queues what is timed

Call = Callable[[], object]


@dataclass(frozen=True)
class Quartiles:
    """Microseconds over the rounds."""

    median: float
    q1: float
    q3: float


class Stopwatch:
    """Times one call in microseconds: on a GPU by events behind a cleared cache, on a CPU by the clock."""

    def __init__(self, device: torch.device) -> None:
        """device: where the calls run."""
        self._cuda = device.type == "cuda"
        self._flush = torch.empty(_FLUSH, dtype=torch.int8, device=device) if self._cuda else None

    def microseconds(self, call: Call) -> float:
        """One call; on a GPU the time of the GPU, without that of launching."""
        if self._flush is None:
            started = time.perf_counter()
            call()
            return (time.perf_counter() - started) * 1e6
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flush.zero_()
        torch.cuda._sleep(_AHEAD)  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def warm_up(self, call: Call, times: int = 3) -> float:
        """Seconds of the first calls, compilation included."""
        started = time.perf_counter()
        for _ in range(times):
            call()
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    def rounds(self, calls: Mapping[str, Call], repeats: int) -> dict[str, Quartiles]:
        """Median and quartiles of each call over the rounds."""
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                found[name].append(self.microseconds(call))
        return {name: quartiles(values) for name, values in found.items()}


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 convolutions and products are float32 inside; cuDNN's are TF32 by default.

    Not `torch.backends.cudnn.flags(allow_tf32=False)`: that switches cuDNN itself off.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def quartiles(values: list[float]) -> Quartiles:
    """Median and quartiles; of a single value it itself."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(round(median, 3), round(q1, 3), round(q3, 3))


def copy_ceiling(device: torch.device, repeats: int = 11) -> float:
    """GB/s, read and written bytes together, of a copy in device memory: 512 MB on a GPU, 64 MB on a CPU."""
    size = (512 if device.type == "cuda" else 64) * 10**6
    source, to = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    watch = Stopwatch(device)
    watch.warm_up(lambda: to.copy_(source))
    median = watch.rounds({"copy": lambda: to.copy_(source)}, repeats)["copy"].median
    return 2 * size / median / 1e3


def compute_ceiling(device: torch.device, dtype: torch.dtype, repeats: int = 11) -> float:
    """TFLOP/s of a square matrix product or of a 3x3 convolution, whichever is faster, in the fastest of the repeats.

    On a GPU 8192 a side, and 512 channels of 64 x 64 at batch 32; on a CPU 512, and 256 channels of 32 x 32 at batch 4.
    Both, since on some processors the library of matrix products uses half of the vector width that convolutions do.
    """
    cuda = device.type == "cuda"
    side, (batch, channels, pixels) = (8192, (32, 512, 64)) if cuda else (512, (4, 256, 32))
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))  # zeros would draw less power
    x = torch.randn(batch, channels, pixels, pixels, device=device, dtype=dtype)
    w = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    work: dict[Call, int] = {
        lambda: a @ b: 2 * side**3,
        lambda: torch.conv2d(x, w, padding=1): 18 * batch * channels**2 * pixels**2,
    }
    watch, found = Stopwatch(device), []
    for call, flops in work.items():
        watch.warm_up(call)
        found.append(flops / min(watch.microseconds(call) for _ in range(repeats)) / 1e6)
    return max(found)
