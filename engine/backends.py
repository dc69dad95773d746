"""Which backend each role of a Synthesizer runs on, built or loaded when it is first needed."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from synthkd.engine.attention import ATTENTIONS, attending, check_attention
from synthkd.engine.errors import SynthkdError, suggest
from synthkd.engine.guidance import Guidance, GuidanceStep
from synthkd.engine.latent_model import LatentModel
from synthkd.engine.quantized import QUANTIZE, check_quality, denoiser_twin
from synthkd.engine.roles import ROLES, Parts, RoleCall, calls_of, given_of, parse_backends, routed_by
from synthkd.export import Compiled, ExportError, Options, build
from synthkd.kernels import implementation

_log = logging.getLogger("synthkd")


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How networks run, none of which decides what an image is but for rounding.

    backends: `role=name` or `name`, on top of the recipe's (roles: ROLES; names: `export.BACKENDS`);
    artifacts: folder of built artifacts (None: `export.default_store`); trust: load machine code from elsewhere;
    options: of the backends; attention: see `engine.attention`; quantize: "", or the denoiser in `fp8`, or with fp8's
    rounding in its own dtype, `fp8-emulated` (see `export.fp8`); check_quality: refuse it where its images are too far
    off (random weights, in a benchmark, cannot be judged so); fixed_batch: build for the batch of most calls alone,
    others are cut and filled up to it (a recorded CUDA run needs that; memory plans with small parts waste by it).
    strict_bits: stop where memory runs out, instead of drawing in smaller parts, which moves last bits.
    """

    backends: tuple[str, ...] = ()
    attention: str = "sdpa"
    quantize: str = ""
    check_quality: bool = True
    fixed_batch: bool = False
    strict_bits: bool = False
    artifacts: str | None = None
    trust: bool = False
    options: Options = Options()  # noqa: RUF009

    def __post_init__(self) -> None:
        """Raise SynthkdError for an unknown attention or quantization."""
        if self.attention not in ATTENTIONS:
            raise SynthkdError(f"attention {self.attention!r}: {suggest(self.attention, ATTENTIONS)}")
        if self.quantize not in QUANTIZE:
            raise SynthkdError(f"quantize {self.quantize!r}: {suggest(self.quantize, QUANTIZE[1:])}")


class Routes:
    """The compiled functions of a Synthesizer, by name; empty where every role is eager."""

    def __init__(self, recipe_says: Sequence[str], execution: Execution) -> None:
        """Raises SynthkdError for an unknown role or backend, and two that exclude each other; nothing is built yet."""
        self.chosen = parse_backends((*recipe_says, *execution.backends))
        self.compiled: dict[str, Compiled] = {}
        self.quality: dict[str, float] = {}
        self._execution, self.ready = execution, False
        self._twin: nn.Module | None = None
        self._whole: Callable[..., Any] | None = None
        whole = self.chosen.get("unet", "eager")
        if execution.quantize and whole not in ("eager", "compile"):
            raise SynthkdError(f"quantize {execution.quantize!r}: unet={whole} takes no fp8; use eager or compile")

    @property
    def key(self) -> str:
        """For the environment key: `unet onnx, vae onnx, attention flash`; "" where all is as by default."""
        told = [f"{role} {name}" for role, name in self.chosen.items()]
        told += [f"attention {self._execution.attention}"] * (self._execution.attention != "sdpa")
        told += [f"quantize {self._execution.quantize}"] * bool(self._execution.quantize)
        told += ["fixed_batch True"] * (self._execution.fixed_batch and self.live)
        plain, chosen = Options().to_dict(), self._execution.options.to_dict()
        told += [f"{name} {chosen[name]}" for name in plain if chosen[name] != plain[name] and self.live]
        return ", ".join(told)

    @property
    def live(self) -> bool:
        """Whether any role is not eager."""
        return bool(self.chosen)

    @property
    def strict_bits(self) -> bool:
        """Whether to stop where memory runs out."""
        return self._execution.strict_bits

    def forget(self) -> None:
        """Build or load anew with the next group: the parts that a group is drawn in have changed."""
        self.compiled.clear()
        self._whole, self.ready = None, False

    @contextmanager
    def on(self, parts: Parts, say: Callable[[str], None] | None = None) -> Iterator[None]:
        """Within it networks compute as chosen; what is not there yet is built or loaded first.

        Networks are frozen, fused and tapped as for a group. Raises SynthkdError where a role cannot have the backend
        that was asked for, where no layer can have the attention, and where quantized images are too far off.
        """
        model, attention = parts.model, self._execution.attention
        networks = [*model.modules(), parts.look.module]
        with ExitStack() as stack:
            if not self.ready:
                check_attention(networks, attention, model.device)
            stack.enter_context(attending(networks, attention, model.device))
            if self._execution.quantize:
                stack.enter_context(self._quantized(parts))
            if not self.ready:
                self._prepare(parts, say)
            stack.enter_context(self._put_in(model))
            self.ready = True
            yield

    @contextmanager
    def _quantized(self, parts: Parts) -> Iterator[None]:
        model: Any = parts.model
        if self._twin is None:
            self._twin = denoiser_twin(model, parts.recipe, self._execution.quantize)
            if self._execution.check_quality:
                self.quality = check_quality(parts, self._twin)
        with model.replaced(self._twin):
            yield

    def _prepare(self, parts: Parts, say: Callable[[str], None] | None) -> None:
        for role in ROLES:
            if role not in self.chosen:
                continue
            for call in calls_of(role, parts):
                if call.name not in self.compiled:
                    self.compiled[call.name] = self._built(call, self.chosen[role], say)
                self._whole = call.run if role == "gradient" else self._whole

    def _built(self, call: RoleCall, backend: str, say: Callable[[str], None] | None) -> Compiled:
        folder = self._execution.artifacts
        try:
            with implementation("reference" if backend != "compile" or call.gradient else "auto"):
                return build(
                    call.function,
                    call.inputs,
                    backend=backend,
                    modules=call.modules,
                    batched=call.batched,
                    dynamic=call.dynamic and not self._execution.fixed_batch,
                    most=call.most,
                    gradient=call.gradient,
                    traced=call.traced,
                    name=call.name,
                    identity={**call.identity, "attention": self._execution.attention if backend == "aoti" else ""},
                    store=Path(folder) if folder else None,
                    options=self._execution.options,
                    trust=self._execution.trust,
                    say=say or _log.info,
                )
        except ExportError as error:
            raise SynthkdError(f"backend {call.name}={backend}: {error}") from error

    @contextmanager
    def _put_in(self, model: LatentModel) -> Iterator[None]:
        """The prior's text encoders and denoiser are these, inside; an error of a backend is one of this engine."""
        try:
            with routed_by(model, self.compiled):
                yield
        except ExportError as error:
            raise SynthkdError(f"backend: {error}") from error

    def function(self, name: str, otherwise: Callable[..., Any]) -> Callable[..., Any]:
        """A compiled function, or what it stands for."""
        return self.compiled.get(name, otherwise)

    def gradient(self, guidance: Guidance | None) -> Callable[..., GuidanceStep] | None:
        """(x0, targets, looks, memory) -> GuidanceStep, without autograd; None where the gradient is eager."""
        if "gradient" not in self.chosen or not any(name.startswith("gradient") for name in self.compiled):
            return None
        given, whole = given_of(guidance), self._whole
        pieces = {name.removeprefix("gradient-"): compiled for name, compiled in self.compiled.items()}

        def gradient(x0: Tensor, targets: Tensor, looks: Any, memory: Any) -> GuidanceStep:
            if whole is not None:
                step: GuidanceStep = whole(pieces, given, x0, targets, tuple(looks), memory)
                return step
            return GuidanceStep(*pieces["gradient"](x0, targets, tuple(looks), memory, given))

        return gradient


def seconds_of(compiled: Mapping[str, Compiled]) -> dict[str, float]:
    """Build time of each artifact, as its manifest says."""
    return {n: round(sum(c.manifest.seconds.values()), 2) for n, c in compiled.items() if c.manifest is not None}
