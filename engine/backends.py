"""Which backend each role of a Synthesizer runs on, built or loaded when it is first needed."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from synthkd.engine.errors import SynthkdError
from synthkd.engine.guidance import Guidance, GuidanceStep
from synthkd.engine.latent_model import LatentModel
from synthkd.engine.roles import ROLES, Parts, RoleCall, calls_of, given_of, parse_backends, routed_by
from synthkd.export import Compiled, ExportError, Options, build
from synthkd.kernels import implementation

_log = logging.getLogger("synthkd")


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How networks run, none of which decides what an image is but for rounding.

    backends: `role=name` or `name`, on top of the recipe's (roles: ROLES; names: `export.BACKENDS`);
    artifacts: folder of built artifacts (None: `export.default_store`); trust: load machine code from elsewhere;
    options: of the backends.
    """

    backends: tuple[str, ...] = ()
    artifacts: str | None = None
    trust: bool = False
    options: Options = Options()  # noqa: RUF009


class Routes:
    """The compiled functions of a Synthesizer, by name; empty where every role is eager."""

    def __init__(self, recipe_says: Sequence[str], execution: Execution) -> None:
        """Raises SynthkdError for an unknown role or backend; nothing is built yet."""
        self.chosen = parse_backends((*recipe_says, *execution.backends))
        self.compiled: dict[str, Compiled] = {}
        self._execution = execution

    @property
    def key(self) -> str:
        """For the environment key: `unet onnx, vae onnx`; "" where every role is eager."""
        return ", ".join(f"{role} {name}" for role, name in self.chosen.items())

    @property
    def live(self) -> bool:
        """Whether any role is not eager."""
        return bool(self.chosen)

    def prepare(self, parts: Parts, say: Callable[[str], None] | None = None) -> None:
        """Build or load what is not there yet; networks are frozen, fused and tapped as for a group.

        Raises SynthkdError where a role cannot have the backend that was asked for.
        """
        for role in ROLES:
            if role not in self.chosen:
                continue
            for call in calls_of(role, parts):
                if call.name not in self.compiled:
                    self.compiled[call.name] = self._built(call, self.chosen[role], say)

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
                    dynamic=call.dynamic,
                    most=call.most,
                    gradient=call.gradient,
                    name=call.name,
                    identity=call.identity,
                    store=Path(folder) if folder else None,
                    options=self._execution.options,
                    trust=self._execution.trust,
                    say=say or _log.info,
                )
        except ExportError as error:
            raise SynthkdError(f"backend {call.name}={backend}: {error}") from error

    @contextmanager
    def on(self, model: LatentModel) -> Iterator[None]:
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
        compiled = self.compiled.get("gradient")
        if compiled is None:
            return None
        given = given_of(guidance)

        def gradient(x0: Tensor, targets: Tensor, looks: Any, memory: Any) -> GuidanceStep:
            return GuidanceStep(*compiled(x0, targets, tuple(looks), memory, given))

        return gradient


def seconds_of(compiled: Mapping[str, Compiled]) -> dict[str, float]:
    """Build time of each artifact, as its manifest says."""
    return {n: round(sum(c.manifest.seconds.values()), 2) for n, c in compiled.items() if c.manifest is not None}
