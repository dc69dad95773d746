"""Stable Diffusion 1.5's VAE decoder, forward and with the gradient of its input: stock modules and fused ones.

A row holds one direction. Weights are random: neither times nor rounding depend on them. Errors are against the stock
decoder in float32; a contender that errs more than twice as much as the stock one in the same dtype has no time.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from synthkd.bench.kernels import dtype_name
from synthkd.bench.record import stamped
from synthkd.bench.timing import Call, Stopwatch, full_precision
from synthkd.engine.errors import SynthkdError
from synthkd.engine.fusion import fuse
from synthkd.engine.models import random_vae

DIRECTIONS = ("forward", "forward+input gradient")
_FLOOR = 1e-4  # relative errors below come from the order of float32 sums through thirty layers

Decode = Callable[[Tensor], Tensor]
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """What is measured: images of size x size, one row per direction; config: changes to Stable Diffusion 1.5's."""

    size: int = 512
    batch: int = 8
    dtype: torch.dtype = torch.bfloat16
    device: torch.device
    repeats: int = 10
    directions: tuple[str, ...] = DIRECTIONS
    config: Mapping[str, Any] = field(default_factory=dict)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Latents, and the gradient that arrives at the images; float32. Raises SynthkdError for a size that is odd."""
        shrink = 2 ** (len(self.config.get("block_out_channels", (0,) * 4)) - 1)
        if self.size < shrink or self.size % shrink:
            raise SynthkdError(f"--size is {self.size}; expected a multiple of {shrink}")
        g, side = torch.Generator().manual_seed(0), self.size // shrink
        z = torch.randn(self.batch, self.config.get("latent_channels", 4), side, side, generator=g)
        upstream = torch.randn(self.batch, 3, self.size, self.size, generator=g)
        return z.to(self.device), upstream.to(self.device)


def measure_decoder(spec: DecoderSpec, tell: Tell = lambda _: None) -> Iterator[dict[str, Any]]:
    """One row per direction; tell: hears of each step, as compilers take minutes."""
    z, upstream = spec.inputs()
    for direction in spec.directions:
        with full_precision():
            want, flops = _oracle(spec, z, upstream, direction)
            tell(f"{direction}: {flops / 1e12:.3g} TFLOP, float32 outputs made")
            row = _row(spec, direction, z.to(spec.dtype), upstream.to(spec.dtype), want, flops, tell)
        yield stamped(row)


def call_of(decode: Decode, z: Tensor, upstream: Tensor, direction: str) -> Callable[[], list[Tensor]]:
    """A call that returns [image], or [image, gradient of sum(image upstream) in z]."""
    if direction == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [decode(z)]

        return forward
    leaf = z.detach().requires_grad_()

    def both() -> list[Tensor]:
        image = decode(leaf)
        return [image.detach(), *torch.autograd.grad(image, leaf, upstream)]

    return both


def _oracle(spec: DecoderSpec, z: Tensor, upstream: Tensor, direction: str) -> tuple[list[Tensor], int]:
    """Stock outputs in float32, a sample at a time, and their arithmetic, with which all contenders are credited."""
    stock = _decode(random_vae(**spec.config).to(spec.device))
    calls = [
        call_of(lambda x: stock(x * 1), z[i : i + 1], upstream[i : i + 1], direction)  # a counted module takes no leaf
        for i in range(len(z))
    ]
    with FlopCounterMode(display=False) as counter:
        parts = [call() for call in calls]
    return [torch.cat(column) for column in zip(*parts, strict=True)], counter.get_total_flops()


def _decode(vae: Any) -> Decode:
    return lambda z: vae.decode(z, return_dict=False)[0]


def contenders(spec: DecoderSpec) -> dict[str, Decode]:
    """stock, fused, and on a GPU both compiled; each on a decoder of its own."""
    kinds = ("stock", "fused")
    found = {kind: _decode(_vae(spec, fused=kind == "fused")) for kind in kinds}
    if spec.device.type == "cuda":
        found |= {f"{kind} compiled": torch.compile(found[kind], mode="max-autotune") for kind in kinds}
    return found


def _vae(spec: DecoderSpec, *, fused: bool) -> Any:
    vae: Any = random_vae(**spec.config).to(spec.device, spec.dtype)
    if fused:
        fuse(vae)
    return vae


def _row(
    spec: DecoderSpec, direction: str, z: Tensor, upstream: Tensor, want: list[Tensor], flops: int, tell: Tell
) -> dict[str, Any]:
    watch, entries, calls = Stopwatch(spec.device), {}, {}
    for name, decode in contenders(spec).items():
        call = call_of(decode, z, upstream, direction)
        entries[name] = _entry(call, want, watch, spec.device)
        if _sound(entries[name], entries["stock"]):
            calls[name] = call
        tell(f"{direction}, {name}: {entries[name]['failed'] or 'warm'}")
    found = watch.rounds(calls, spec.repeats)
    for name, q in found.items():
        entries[name]["milliseconds"] = {k: round(v / 1e3, 4) for k, v in asdict(q).items()}
        entries[name]["tflop_per_s"] = round(flops / q.median / 1e6, 4)
    ours = found.get("fused compiled") or found.get("fused")
    return {
        "size": spec.size,
        "batch": spec.batch,
        "dtype": dtype_name(spec.dtype),
        "device": spec.device.type,
        "direction": direction,
        "torch": torch.__version__,
        "tera_flop": flops / 1e12,
        "contenders": entries,
        "times_faster_than": {n: round(q.median / ours.median, 3) for n, q in found.items()} if ours else None,
    }


def _entry(call: Call, want: list[Tensor], watch: Stopwatch, device: torch.device) -> dict[str, Any]:
    """Warm-up, errors relative to the largest value wanted, and on a GPU the memory above what was there before."""
    entry: dict[str, Any] = {"error": None, "milliseconds": None, "tflop_per_s": None, "peak_gb": None, "failed": None}
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # a compiled contender keeps a pool of its own
        entry["warm_up_seconds"] = round(watch.warm_up(call), 3)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        got = call()
        if device.type == "cuda":
            entry["peak_gb"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 3)
        assert isinstance(got, list)
        pairs = zip(("image", "gradient"), got, want, strict=False)
        entry["error"] = {name: float((x.float() - w).abs().max() / w.abs().max()) for name, x, w in pairs}
    except Exception as error:  # a compiler may fail; the others are still timed
        entry["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return entry


def _sound(entry: dict[str, Any], stock: dict[str, Any]) -> bool:
    """Whether its time may be told; says why not in the entry."""
    if entry["failed"] or stock["error"] is None:
        return False
    for name, error in entry["error"].items():
        if not math.isfinite(error) or error > max(2 * stock["error"][name], _FLOOR):
            entry["failed"] = f"{name}: error {error:.3g}, stock {stock['error'][name]:.3g}"
            entry["error"] = {n: e if math.isfinite(e) else None for n, e in entry["error"].items()}
            return False
    return True
