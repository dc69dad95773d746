"""A workload of an op: what tests check and benchmarks time, written down once."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]

_PAD = 64  # elements of poison on each side; a multiple of 16, so that alignment stays


class Maker:
    """Makes the tensors of a case: the same numbers on every device, NaN all round them in memory."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0, *, large: bool = False) -> None:
        """dtype: of the op's main inputs; values are drawn in float64 and rounded to it.

        large: drawn where they are used, as a CPU would take seconds a tensor; then devices differ.
        """
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device if large else "cpu").manual_seed(seed)

    def randn(
        self, *shape: int, channels_last: bool = False, dtype: torch.dtype | None = None, scale: float = 1.0
    ) -> Tensor:
        """Normal values of the given scale [*shape], contiguous or channels_last."""
        drawn_on = self._generator.device
        x = torch.randn(shape, generator=self._generator, dtype=torch.float64, device=drawn_on).mul_(scale)
        return self.place(x.to(dtype or self.dtype), channels_last=channels_last)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Whole numbers 0 to high - 1."""
        drawn_on = self._generator.device
        return torch.randint(high, shape, generator=self._generator, device=drawn_on).to(dtype).to(self.device)

    def scalar(self, value: float) -> Tensor:
        """A 0-d float32 tensor, as the solver's coefficients are."""
        return torch.tensor(value, dtype=torch.float32, device=self.device)

    def place(self, x: Tensor, *, channels_last: bool = False) -> Tensor:
        """x on the device, its memory between NaNs, which a read past an end would find."""
        guarded = torch.full((x.numel() + 2 * _PAD,), math.nan, dtype=x.dtype, device=self.device)
        inner = guarded[_PAD : _PAD + x.numel()]
        if channels_last:
            moved = x.movedim(1, -1)
            return inner.view(moved.shape).copy_(moved).movedim(-1, 1)
        return inner.view(x.shape).copy_(x)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload.

    arguments: makes the op's arguments by name; differentiable: those whose gradients are checked; traffic: bytes
    (forward, backward) that the op must move at least, of a dtype's item size: the floor of a roofline; measured:
    whether benchmarks time it on a GPU (sizes larger than the L2 cache) or on a CPU; the others are for tests.
    """

    name: str
    arguments: Callable[[Maker], Arguments]
    differentiable: tuple[str, ...] = ()
    traffic: Callable[[int], tuple[int, int]] = lambda size: (0, 0)
    measured: str = ""  # "", "cpu" or "gpu"

    @property
    def large(self) -> bool:
        """Whether its numbers are drawn on the device that uses them."""
        return self.measured == "gpu"

    def made(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Arguments:
        """Its arguments on a device."""
        return self.arguments(Maker(device, dtype, seed, large=self.large))


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """|got - want| <= atol scale + rtol |want|, with the reason why it cannot be less.

    scale: the largest |want| of the tensor, at most 1 and at least 1e-9: gradients of a mean over millions of values
    are all small. What the dtype itself cannot hold, half of its smallest step, is allowed on top.
    """

    rtol: float
    atol: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Suite:
    """An op with its oracle, its cases and its tolerances.

    op and reference take the same arguments; both return a tensor or a tuple of tensors and Nones.
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    cases: tuple[Case, ...]
    tolerances: Mapping[torch.dtype, Tolerance]


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors in what an op returned, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [x for x in result if isinstance(x, Tensor)]


def widened(arguments: Mapping[str, Any]) -> Arguments:
    """The same arguments with every float tensor in float64, for the oracle."""

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: wide(value) for name, value in arguments.items()}


@dataclass(frozen=True)
class Outcome:
    """How far an op is from its oracle: the largest error in units of what the tolerance allows, and where."""

    worst: float
    where: str

    @property
    def passed(self) -> bool:
        """Whether every value, forward and backward, is within the tolerance."""
        return self.worst <= 1.0


def check(suite: Suite, case: Case, device: torch.device, dtype: torch.dtype, *, backward: bool = True) -> Outcome:
    """Run a case through the op and, in float64, through the reference; compare outputs and gradients."""
    tolerance = suite.tolerances[dtype]
    got = evaluate(suite.op, case, case.made(device, dtype), backward=backward)
    want = evaluate(suite.reference, case, widened(case.made(device, dtype)), backward=backward)
    worst = Outcome(0.0, "")
    if got.keys() != want.keys():
        return Outcome(math.inf, f"found {sorted(got)}, expected {sorted(want)}")
    for name, value in got.items():
        error = _excess(value, want[name], tolerance)
        worst = worst if worst.worst >= error else Outcome(error, name)
    return worst


def _excess(got: Tensor, want: Tensor, tolerance: Tolerance) -> float:
    if got.shape != want.shape:
        return math.inf
    finest = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps if got.is_floating_point() else 0.0
    got, want = got.double(), want.double()
    scale = want.abs().max().clamp(1e-9, 1.0)
    allowed = tolerance.atol * scale + tolerance.rtol * want.abs() + finest / 2
    error = ((got - want).abs() / allowed).max()
    return math.inf if bool(error.isnan()) else float(error)


def evaluate(op: Callable[..., Any], case: Case, arguments: Arguments, *, backward: bool = True) -> dict[str, Tensor]:
    """Outputs of an op, and gradients of a fixed linear functional of them, by name."""
    leaves = {name: arguments[name].detach().requires_grad_() for name in case.differentiable if backward}
    outputs = tensors_of(op(**{**arguments, **leaves}))
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    if leaves:
        smooth = [x for x in outputs if x.requires_grad]
        weights = [cotangent(x, large=case.large) for x in smooth]
        grads = torch.autograd.grad(smooth, list(leaves.values()), weights, allow_unused=True, materialize_grads=True)
        found |= {f"gradient of {name}": g for name, g in zip(leaves, grads, strict=True)}
    return found


def cotangent(x: Tensor, *, large: bool = False) -> Tensor:
    """What a backward pass is fed with: normal values in the dtype and layout of x; large: drawn on its device."""
    drawn_on = x.device if large else torch.device("cpu")
    generator = torch.Generator(drawn_on).manual_seed(1)
    half = torch.randn(x.shape, generator=generator, dtype=torch.float64, device=drawn_on)
    # rounded to bfloat16, so that every dtype and the oracle are fed the same numbers
    return torch.empty_like(x).copy_(half.bfloat16())
