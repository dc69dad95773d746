"""How much of a group is computed at once: the largest parts whose measured cost fits the free memory.

Costs are measured on fake tensors, which have shapes but no values: nothing is allocated and no kernel runs. A pass
is counted by the most bytes that its tensors hold at one moment, weights aside, as a line through batches of one and
of two. What a library allocates for itself (cuDNN's workspaces, an allocator's gaps) is not seen: a tenth
of the free memory is left for it.
"""

import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from synthkd.engine.errors import SynthkdError

RESERVE = 0.1  # of the free memory
_MEMINFO = Path("/proc/meminfo")
_PLENTY = 64 * 2**10  # bytes a pixel


@dataclass(frozen=True)
class Cost:
    """Bytes of a pass as a line: fixed + each x batch."""

    fixed: int
    each: int

    def at(self, batch: int) -> int:
        """Bytes for a batch."""
        return self.fixed + self.each * batch

    def fits(self, room: int, most: int) -> int:
        """The largest batch up to `most` that fits into `room` bytes, 0 where not even one does."""
        if self.at(1) > room:
            return 0
        return most if self.at(most) <= room else (room - self.fixed) // self.each


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the passes of a step cost, and what a group holds beside them.

    denoise: the denoiser without a gradient; guide: guidance decoder and loss (and the denoiser under gradient "unet"),
    forward and backward; guide_checkpointed: finds out the same for a checkpointed decoder, asked where the plain one
    does not fit (None: there is none); decode: the final decoder.
    held: by the group all along (latents); image: bytes of a finished image, which waits for the others of a group.
    """

    denoise: Cost
    guide: Cost
    guide_checkpointed: Callable[[], Cost] | None
    decode: Cost
    held: Cost = Cost(0, 0)
    image: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """How many of a group's samples go through each pass at a time.

    denoise: without a gradient; guide: guidance decoder and loss with gradient (through the denoiser under gradient
    "unet"), in two exact passes where it is less than the group; decode: the final decoder; checkpoint: whether the
    guidance decoder is checkpointed. needed, free: bytes at the fullest moment, and those at hand; `reason` where
    nothing was measured.
    """

    group: int
    denoise: int
    guide: int
    decode: int
    checkpoint: bool
    needed: int
    free: int
    reason: str = ""

    @property
    def whole(self) -> bool:
        """Whether every pass takes the whole group, and nothing is computed twice."""
        return min(self.denoise, self.guide, self.decode) >= self.group and not self.checkpoint

    @property
    def key(self) -> int | str:
        """What an environment says of it: the group's size, or the parts."""
        parts = f"{self.denoise}/{self.guide}/{self.decode}" + (", checkpointed" if self.checkpoint else "")
        return self.group if self.whole else parts

    def describe(self) -> str:
        """One line: what was picked, and why."""
        if self.reason:
            return f"memory: groups of {self.group} whole; {self.reason}"
        why = f"needs {_size(self.needed)}, {_size(self.free)} free"
        if self.whole:
            return f"memory: groups of {self.group} whole; {why}"
        guide = f"guidance {self.guide}"
        if self.guide < self.group:
            guide += " in two passes (decoder and loss forward once more)"
        if self.checkpoint:
            guide += " with a checkpointed decoder (its forward once more)"
        parts = f"denoiser {self.denoise}, {guide}, final decoder {self.decode}"
        return f"memory: of groups of {self.group} at once: {parts}; {why}"


def choose_plan(costs: Costs, group: int, free: int, splits: bool = True, size: str = "") -> MemoryPlan:
    """The plan for a group under `free` bytes: everything whole if that fits; else the largest parts that do.

    Parts of denoiser and final decoder cost nothing; those of the guidance one more forward pass of decoder and loss,
    and a checkpointed decoder, taken where one sample does not fit without, another one of the decoder.
    splits: whether the guidance can be taken in parts; size: of the images, for messages.
    Raises SynthkdError where a single sample does not fit: what is needed, what is free, what to lower.
    """
    held, waiting = costs.held.at(group), costs.image * group
    final = Cost(costs.decode.fixed, max(costs.decode.each - costs.image, 0))
    least, room = 1 if splits else group, free - held
    denoise = _part(costs.denoise.fits(room, group), group)
    decode = _part(final.fits(room - waiting, group), group)
    guide, checkpoint, cost = _part(costs.guide.fits(room, group), group), False, costs.guide
    if guide < least and costs.guide_checkpointed is not None:
        cost, checkpoint = costs.guide_checkpointed(), True
        guide = _part(cost.fits(room, group), group)
    needs = {
        "denoiser": held + costs.denoise.at(denoise or 1),
        "guidance": held + cost.at(max(guide, least)),
        "final decoder": held + waiting + final.at(decode or 1),
    }
    short = next((name for name, need in needs.items() if need > free), None)
    if short:
        part = {"denoiser": denoise or 1, "guidance": least, "final decoder": 1}[short]
        what = f"{part} of a group's {group} images" + (f" of {size}" if size else "")
        raise SynthkdError(
            f"memory: the {short} needs {_size(needs[short])} for {what}, {_size(free)} is free; {_ADVICE[short]}"
        )
    return MemoryPlan(group, denoise, guide, decode, checkpoint, max(needs.values()), free)


def _fits_whole(costs: Costs, group: int, free: int) -> bool:
    """Whether no pass needs to be taken in parts."""
    most = max(cost.at(group) for cost in (costs.denoise, costs.guide, costs.decode))
    return costs.held.at(group) + most <= free


_ADVICE = {
    "denoiser": "lower height and width or classes_per_group, or take dtype 'bfloat16'",
    "guidance": "take a smaller guidance.decoder ('pooled:2', 'fitted:PATH', 'tiny:PATH'), guidance.gradient 'x0', "
    "guidance.looks 1, or dtype 'bfloat16'",
    "final decoder": "lower height and width or classes_per_group, or take dtype 'bfloat16'",
}


def _part(fits: int, group: int) -> int:
    """A part of a group, `fits` at most: a divisor of the group where one is above half of it, else even parts."""
    if fits in (0, group):
        return fits
    divisor = max(d for d in range(1, fits + 1) if group % d == 0)
    return divisor if 2 * divisor > fits else -(-group // -(-group // fits))


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def free_memory(device: torch.device, workers: int = 1) -> int | None:
    """Bytes that one of `workers` processes may use, a tenth kept back; None where the system does not say.

    CUDA: what the driver has free, and what torch's allocator holds unused. CPU: MemAvailable of /proc/meminfo.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        found: int | None = torch.cuda.mem_get_info(device)[0] + unused
    else:
        found = _available()
    return None if found is None else int(found * (1 - RESERVE)) // max(1, workers)


def _available() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def small_group(group: int, pixels: int, device: torch.device, workers: int = 1) -> MemoryPlan | None:
    """The whole group, unmeasured, where 64 KiB are free for each of its pixels; None where not.

    Stable Diffusion's VAE takes 12 KiB a pixel for its gradient in half precision, its UNet 14 more.
    """
    free = free_memory(device, workers)
    if free is None or pixels * _PLENTY > free:
        return None
    return MemoryPlan(group, group, group, group, False, pixels * _PLENTY, free)


def checked_part(micro_batch: int | str) -> Any:
    """`auto` or a whole number of samples; raises SynthkdError for anything else."""
    if micro_batch == "auto" or (type(micro_batch) is int and micro_batch >= 1):
        return micro_batch
    raise SynthkdError(f"micro_batch is {micro_batch!r}; expected 'auto' or a whole number >= 1")


def plan_of(group: int, key: object) -> MemoryPlan | None:
    """The plan that an environment's `micro_batch` names; None where it names none."""
    if key == group:
        return MemoryPlan(group, group, group, group, False, 0, 0, "as drawn")
    found = re.fullmatch(r"(\d+)/(\d+)/(\d+)(, checkpointed)?", str(key))
    if found is None or not all(1 <= int(part) <= group for part in found.groups()[:3]):
        return None
    denoise, guide, decode = (int(part) for part in found.groups()[:3])
    return MemoryPlan(group, denoise, guide, decode, bool(found[4]), 0, 0, "as drawn")


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make, for as long as anything holds them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not any(r.alias_info for r in func._schema.returns):  # a view holds nothing of its own
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._hold(leaf.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, count = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        self._live.add(key)
        self.now += count
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, count).atexit = False

    def _drop(self, key: int, count: int) -> None:
        self._live.discard(key)
        self.now -= count


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that tensors made by `work` hold at one moment; call it under a FakeTensorMode."""
    with _LiveBytes() as live:
        result = work()
    del result
    return live.peak


def line(bytes_of: Callable[[int], int], rough: bool = False) -> Cost:
    """Bytes as a line through batches of one and of two; rough: through zero and one, which is never less."""
    one = bytes_of(1)
    two = 2 * one if rough else bytes_of(2)
    each = max(two - one, 0)
    return Cost(max(one - each, 0), each)


Denoise = Callable[[Tensor], Any]
Decode = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What a step computes, as plain functions of a batch of any size.

    denoise: latents [B,C,h,w] -> one or two outputs like them, guidance halves and all; decode: the final decoder;
    look, look_checkpointed: what guidance looks through, None where there is none; loss: images [B,3,H,W] in [0,1]
    and targets [B,K] -> [], with every view that it takes. shape: (C, h, w); through: gradient "unet".
    """

    denoise: Denoise
    decode: Decode
    shape: tuple[int, int, int]
    classes: int
    device: torch.device
    dtype: torch.dtype
    look: Decode | None = None
    look_checkpointed: Decode | None = None
    loss: Loss | None = None
    through: bool = False

    def latents(self, batch: int) -> Tensor:
        """Latents without content."""
        return torch.empty(batch, *self.shape, device=self.device, dtype=self.dtype)

    def denoised(self, batch: int) -> Any:
        """The denoiser's pass."""
        with torch.no_grad():
            return self.denoise(self.latents(batch))

    def guided(self, batch: int, look: Decode) -> Any:
        """A guidance pass, forward and backward."""
        if self.loss is None:
            return None
        with torch.enable_grad():
            x0 = z = self.latents(batch).requires_grad_()
            if self.through:
                x0 = sum((x for x in tree_leaves(self.denoise(z)) if isinstance(x, Tensor)), z)
            targets = torch.full((batch, self.classes), 1.0 / self.classes, device=self.device)
            return torch.autograd.grad(self.loss(look(x0).clamp(0.0, 1.0), targets), z)

    def decoded(self, batch: int) -> Tensor:
        """The final decoder's pass."""
        with torch.no_grad():
            return self.decode(self.latents(batch))


_LATENTS_HELD = 8  # z, both outputs, x0, its gradient, the solver's history and noise, and the next z


def measure(passes: Passes, rough: bool = False) -> Costs:
    """Costs of the passes, on fake tensors; weights stay where they are (frozen, or they count) and no kernel runs.

    rough: bounds from above, from batches of one alone, in half the time.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # one for all: it keeps what it made of the weights

    def cost(work: Callable[[int], object]) -> Cost:
        with mode:
            return line(lambda batch: peak_bytes(lambda: work(batch)), rough)

    def guide(look: Decode) -> Cost:
        return cost(lambda batch: passes.guided(batch, look))

    again = passes.look_checkpointed
    with mode:
        image, latent = (t.numel() * t.element_size() for t in (passes.decoded(1), passes.latents(1)))
    return Costs(
        denoise=cost(passes.denoised),
        guide=guide(passes.look) if passes.look else Cost(0, 0),
        guide_checkpointed=(lambda: guide(again)) if again else None,
        decode=cost(passes.decoded),
        held=Cost(0, _LATENTS_HELD * latent),
        image=image,
    )


def plan_memory(
    passes: Passes, group: int, *, workers: int = 1, splits: bool = True, free: int | None = None, size: str = ""
) -> MemoryPlan:
    """Measure the passes and choose a plan; free: bytes at hand, found out by default.

    Everything whole, unmeasured, where the system does not say what is free, and where a network cannot run without
    values (a guidance that reads one, say): `MemoryPlan.reason` says so. Raises SynthkdError as `choose_plan` does.
    """
    room = free_memory(passes.device, workers) if free is None else free
    if room is None:
        return MemoryPlan(group, group, group, group, False, 0, 0, "the system does not say how much is free")
    try:
        costs = measure(passes, rough=True)
        if not _fits_whole(costs, group, room):
            costs = measure(passes)
    except RuntimeError as error:
        said = " ".join(str(error).split())[:120]
        return MemoryPlan(group, group, group, group, False, 0, room, f"not measured ({said})")
    return choose_plan(costs, group, room, splits, size)
