"""One denoiser call as one graph: UNet, CFG, decode, teacher, loss, gradient and update under torch.compile."""

import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_map

from synthkd.engine.config import AUTO_PIXELS
from synthkd.engine.errors import SynthkdError, suggest
from synthkd.engine.halving import out_of_memory
from synthkd.engine.sampler import Clock, State, one_call

CompileChoice = Literal["auto", "off", "default", "reduce-overhead", "max-autotune", "aot_eager"]
MODES: tuple[CompileChoice, ...] = ("default", "reduce-overhead", "max-autotune", "aot_eager")
COMPILE_CHOICES = ("auto", "off", *MODES)
_MOST_GRAPHS = 64  # kinds of calls: guided or not, CFG or not, with Latent CutMix, noise and history or without
_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def _still(stage: str) -> AbstractContextManager[None]:
    """A clock that a graph can hold."""
    return nullcontext()


def _denoised(denoise: Any, z: Tensor, t: Tensor, cfg: bool) -> Any:
    return denoise(z, t, cfg)


@dataclass(frozen=True)
class _CompiledParts:
    """A denoiser through a compiled function."""

    function: Callable[..., Any]
    denoise: Any

    def __call__(self, z: Tensor, t: Tensor, cfg: bool) -> Any:
        """See `latent_model.Prompted`."""
        return self.function(self.denoise, z, t, cfg)

    def part(self, samples: slice) -> "_CompiledParts":
        """The same for some of the samples."""
        return _CompiledParts(self.function, self.denoise.part(samples))


class CompiledCall:
    """`sampler.one_call` under torch.compile, one graph per kind of call; nothing where it is off.

    off: never; default, reduce-overhead, max-autotune: inductor's modes, the last two with CUDA graphs; aot_eager:
    traced and differentiated, not compiled, for tests; auto: `default` on a GPU for images above AUTO_PIXELS a side,
    off elsewhere (small sets are drawn before their calls are compiled). `graphs` counts what was compiled
    so far; a first call of its kind is timed as `compile`, not `step`. Raises SynthkdError for another word.
    """

    def __init__(self, choice: CompileChoice, device: torch.device, side: int = AUTO_PIXELS + 1) -> None:
        """side: the longer one of the images, in pixels."""
        if choice not in COMPILE_CHOICES:
            raise SynthkdError(f"compile {choice!r}: {suggest(choice, COMPILE_CHOICES[:-1])}")
        if choice == "auto":
            choice = "default" if device.type == "cuda" and side > AUTO_PIXELS else "off"
        self.choice, self.graphs = str(choice), 0
        self._call: Any = None
        self._parts: Any = None
        self._kinds: set[tuple[bool | int, ...]] = set()

    @property
    def advance(self) -> Any:
        """What `sampler.sample` calls; None for the plain function."""
        return None if self.choice == "off" else self._advance

    def in_parts(self, denoise: Any) -> Any:
        """A denoiser for a group that is computed in parts: its calls alone are compiled, one graph per part's size.

        The time of compiling is in the first group's `denoise`.
        """
        if self.choice == "off":
            return denoise
        if self._parts is None:
            self._parts = self._compile(_denoised)
        return _CompiledParts(partial(self._counted, self._parts), denoise)

    def _advance(
        self, setup: Any, denoise: Any, state: State, call: Any, zero: Tensor | None, cfg: bool, clock: Clock
    ) -> Any:
        if self._call is None:
            self._call = self._compile(one_call)
        if self.choice in _CUDA_GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        kind = (zero is None, cfg, call.src_map is None, call.noise is None, state.before is None, len(state.z))
        with clock("step" if kind in self._kinds else "compile"):
            out = self._counted(self._call, setup, denoise, state, call, zero, cfg, _still)
        self._kinds.add(kind)
        if self.choice in _CUDA_GRAPHS:  # a replay writes over what the one before returned
            out = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, out)
        return out

    def _counted(self, function: Any, *arguments: Any) -> Any:
        before = counters["stats"]["unique_graphs"]
        try:
            with torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=_MOST_GRAPHS):
                out = function(*arguments)
        except TorchDynamoException as error:  # a compiler's own failures are among them
            if out_of_memory(error):
                raise
            why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
            raise SynthkdError(
                f"compile {self.choice!r}: a denoiser call cannot be made one graph ({why[:200]}); use --compile off "
                "(compile='off' from Python)"
            ) from error
        self.graphs += counters["stats"]["unique_graphs"] - before
        return out

    def _compile(self, function: Any) -> Any:
        """Of a function of its own: graphs are kept, counted and limited per function."""
        own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
        mode = {"default": None, "aot_eager": None}.get(self.choice, self.choice)
        backend = "aot_eager" if self.choice == "aot_eager" else "inductor"
        return torch.compile(own, fullgraph=True, dynamic=False, backend=backend, mode=mode)
