"""`synthkd bench backends`: each role of a run on every backend, how fast, how far from eager, how long to build.

All backends of a role are timed in one interleaved run, at the batch that a run has. One that is not installed has a
row that says why, as has one that fails. Whole groups are in `bench.backend_runs`.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from synthkd.bench.engine_cases import EMBEDDED, Case, find_case, random_drawer, random_guidance, random_recipe
from synthkd.bench.timing import Stopwatch, quartiles
from synthkd.dfkd.presets import Preset
from synthkd.engine import Execution, Synthesizer, SynthkdError
from synthkd.engine.attention import check_attention
from synthkd.engine.backends import seconds_of
from synthkd.engine.random_models import random_prior
from synthkd.engine.roles import ROLES, calls_of
from synthkd.engine.workers import one_thread
from synthkd.export import ExportError, Options, fp8, onnx, tensorrt
from synthkd.export.artifacts import versions_for
from synthkd.export.making import compared
from synthkd.export.structure import structure_of

Tell = Callable[[str], None]
Row = dict[str, Any]
EAGER, RUN = "eager", "run"
_PART = 8  # images at a time through a published architecture's UNet and VAE
_LEAST = 0.02  # seconds of one timing on a CPU: a shorter call is repeated in it


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What computes a role. backend: of `export.BACKENDS`; roles: it is for these alone."""

    backend: str = EAGER
    provider: str = "auto"
    attention: str = "sdpa"
    quantize: str = ""
    roles: tuple[str, ...] = ROLES

    def execution(self, role: str, artifacts: str | None) -> Execution:
        """Of a Synthesizer with this role alone on the backend."""
        entries = () if self.backend == EAGER else (f"{role}={self.backend}",)
        return Execution(
            backends=entries, attention=self.attention, quantize=self.quantize, artifacts=artifacts,
            options=Options(provider=self.provider),
        )  # fmt: skip

    def why_not(self, device: torch.device) -> str | None:
        """Why this machine does not have it, in one line."""
        try:
            if self.backend in ("onnx", "tensorrt"):
                onnx.check_installed()
            if self.backend == "onnx":
                onnx.pick_provider(Options(provider=self.provider), device)
            if self.quantize and not _computes_fp8(device):
                return "fp8 needs a GPU of compute capability 8.9 or newer"
            check_attention((), self.attention, device)
        except (ExportError, SynthkdError) as error:
            return str(error)
        return tensorrt.unavailable(device) if self.backend == "tensorrt" else None


# onnx is onnxruntime on the CPU, or on a GPU its CUDA provider; fp8 pays in a compiled network alone.
VARIANTS: Mapping[str, Variant] = {
    EAGER: Variant(),
    "compile": Variant(backend="compile"),
    "aoti": Variant(backend="aoti"),
    "onnx": Variant(backend="onnx"),
    "onnx-tensorrt": Variant(backend="onnx", provider="tensorrt"),
    "tensorrt": Variant(backend="tensorrt"),
    "flash": Variant(attention="flash", roles=("unet",)),
    "cudnn": Variant(attention="cudnn", roles=("unet",)),
    "xformers": Variant(attention="xformers", roles=("unet",)),
    "fp8": Variant(backend="compile", quantize="fp8", roles=("unet",)),
}
# torch.compile has nothing over aoti on a CPU but that it compiles again, for minutes, in every process.
ON_CPU = (EAGER, "aoti", "onnx")


def _computes_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= fp8.CAPABILITY


@dataclass(frozen=True, kw_only=True)
class BackendSpec:
    """What is measured. roles: of `ROLES` and `run`, all where empty; backends: of VARIANTS, those of the device where
    empty; dtype: of random weights; artifacts: folder (None: the user's); seed: of the group that is drawn whole."""

    case: str
    device: torch.device
    roles: Sequence[str] = ()
    backends: Sequence[str] = ()
    rounds: int = 5
    dtype: torch.dtype = torch.bfloat16
    artifacts: str | None = None
    seed: int = 0

    @property
    def names(self) -> list[str]:
        """Variants in their order; eager is always one: the others are compared with it."""
        usual = [n for n in VARIANTS if n != "fp8" or self.case != EMBEDDED]  # which has no layer that is wide enough
        asked = self.backends or (ON_CPU if self.device.type == "cpu" else usual)
        return [name for name in VARIANTS if name in asked or name == EAGER]

    def has(self, role: str) -> bool:
        """Whether a role is asked for; with random weights and nothing said, UNet, VAE and the whole run are."""
        usual = (*ROLES, RUN) if self.case == EMBEDDED else ("unet", "vae", RUN)
        return role in (self.roles or usual)


@dataclass
class Contender:
    """One way to compute the same, warm, or why it is not: skipped (it is not there) or failed.

    ready: networks are set up within it, outside of what is timed; compiles: with its first call; timed: False for one
    whose results alone count; bytes: of artifacts; spent: seconds by round, of which each is that of `number` calls.
    """

    call: Callable[[], Any] | None = None
    ready: Callable[[], AbstractContextManager[Any]] = nullcontext
    skipped: str | None = None
    failed: str | None = None
    compiles: bool = False
    timed: bool = True
    batch: int | None = None
    build_seconds: float | None = None
    load_seconds: float | None = None
    bytes: int | None = None
    mix: Mapping[str, str] | None = None
    parity: Mapping[str, float] = field(default_factory=dict)
    spent: list[float] = field(default_factory=list)
    number: int = 1

    @property
    def runs(self) -> bool:
        """Whether it has something to time."""
        return self.call is not None and self.failed is None


def rounds(found: Mapping[str, Contender], device: torch.device, repeats: int) -> None:
    """Interleaved: a round times each contender once; one that fails now drops out."""
    watch = Stopwatch(device)
    for _ in range(repeats):
        for entry in found.values():
            if entry.runs and entry.timed:
                with attempted(entry), entry.ready():
                    entry.spent.append(watch.microseconds(lambda e=entry: _repeated(e)) / entry.number / 1e6)  # type: ignore[misc]


def _repeated(entry: Contender) -> None:
    for _ in range(entry.number):
        entry.call()  # type: ignore[misc]


@contextmanager
def attempted(entry: Contender) -> Iterator[None]:
    """An error inside is the entry's own: the others are still measured."""
    try:
        yield
    except Exception as error:  # memory, a compiler, a builder
        entry.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def warmed(entry: Contender, cuda: bool) -> Any:
    """The second call's result; where calls are compiled, the first one's time above it is that of building."""
    with entry.ready(), torch.no_grad():
        first, _ = _timed(entry, cuda)
        second, result = _timed(entry, cuda)
    if entry.compiles:
        entry.build_seconds = round(max(0.0, first - second), 3)
    entry.number = 1 if cuda else max(1, math.ceil(_LEAST / max(second, 1e-6)))
    return result


def _timed(entry: Contender, cuda: bool) -> tuple[float, Any]:
    started = time.perf_counter()
    result = entry.call()  # type: ignore[misc]
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result, on the host."""
    tensors: list[Tensor] = []
    structure_of(result, tensors)
    return [x.detach().cpu() for x in tensors]


def rebuilt(
    base: Synthesizer, execution: Execution, kind: type[Synthesizer] = Synthesizer, **changes: Any
) -> Synthesizer:
    """The same networks and group, computed in another way; changes: to the arguments of a Synthesizer."""
    given: dict[str, Any] = {"recipe": replace(base.recipe, backends=()), "guidance": base.guidance}
    given |= {"decoder": base.look, "compile": "off", "micro_batch": base.recipe.group_size, **changes}
    unchecked = replace(execution, check_quality=False)  # random weights draw nothing whose quality could be judged
    return kind(base.model, execution=unchecked, **given)


@contextmanager
def ready(synth: Synthesizer) -> Iterator[None]:
    """Networks as they are while a group is drawn."""
    with ExitStack() as stack:
        synth._settle(stack)
        stack.enter_context(synth.routes.on(synth._parts()))
        yield


def measure_role(base: Synthesizer, role: str, spec: BackendSpec, tell: Tell) -> dict[str, Contender]:
    """Every variant of a role, timed; one thread on a CPU."""
    names = [name for name in spec.names if role in VARIANTS[name].roles]
    cuda, wanted = spec.device.type == "cuda", None
    found: dict[str, Contender] = {}
    with one_thread(spec.device):
        for name in names:
            entry = found[name] = Contender(skipped=VARIANTS[name].why_not(spec.device))
            if entry.skipped is None:
                with attempted(entry):
                    _prepare(entry, base, role, VARIANTS[name], spec)
                    result = flat(warmed(entry, cuda))
                    wanted = result if wanted is None else wanted
                    entry.parity = compared(result, wanted)
            tell(f"{spec.case}, {role}, {name}: {entry.skipped or entry.failed or 'warm'}")
        with torch.no_grad():
            rounds(found, spec.device, spec.rounds)
    return found


def _prepare(entry: Contender, base: Synthesizer, role: str, variant: Variant, spec: BackendSpec) -> None:
    """Build it where it is not yet, then load it as a second start does."""
    execution = variant.execution(role, spec.artifacts)
    synth = rebuilt(base, execution)
    routes = synth.prepare().compiled
    made = [c.manifest for c in routes.values() if c.manifest is not None]
    if made:
        entry.build_seconds = sum(seconds_of(routes).values())
        entry.bytes = sum(m.bytes for m in made)
        del routes
        synth = rebuilt(base, execution)
        started = time.perf_counter()
        synth.prepare()
        entry.load_seconds = round(time.perf_counter() - started, 3)
    entry.compiles = variant.backend == "compile"
    entry.ready = lambda: ready(synth)
    with entry.ready():
        entry.call, entry.batch = _calling(synth, role)


def _calling(synth: Synthesizer, role: str) -> tuple[Callable[[], Any], int]:
    """All functions of a role, one after another, on their example inputs, and the batch of those."""
    pairs = [(synth.routes.function(c.name, c.function), c.inputs) for c in calls_of(role, synth._parts())]
    if not pairs:
        raise SynthkdError(f"this run has no {role}")
    return (lambda: [function(*inputs) for function, inputs in pairs]), len(pairs[0][1][0])


def base_of(spec: BackendSpec, preset: Preset) -> Synthesizer:
    """The eager run whose roles are measured: the preset's, or a published architecture with random weights.

    Raises SynthkdError for such a one without a GPU, and for its text encoder, which it has not.
    """
    if spec.case == EMBEDDED:
        job = preset.on(spec.device.type).job
        return replace(job, micro_batch=job.recipe.group_size, compile="off").build()
    case = find_case(spec.case)
    if spec.device.type != "cuda":
        raise SynthkdError(f"--case {spec.case!r}: needs a CUDA GPU, found {spec.device.type}; use embedded")
    if "text_encoder" in spec.roles:
        raise SynthkdError(f"--role 'text_encoder': {spec.case} has random weights and no text encoder; use embedded")
    return _random_base(case, spec)


def _random_base(case: Case, spec: BackendSpec) -> Synthesizer:
    """Guided, through a fitted decoder, only where teacher or gradient are asked for."""
    guided = any(role in ("teacher", "gradient") for role in spec.roles)
    prior = random_prior(case.architecture, device=spec.device, dtype=spec.dtype)
    name = "guided" if guided else "plain"
    guidance = random_guidance(random_recipe(case, name, spec.dtype).classes)
    drawer = random_drawer(case, name, prior, guidance, group=_PART)
    assert isinstance(drawer, Synthesizer)
    return drawer


def row_of(spec: BackendSpec, dtype: str, role: str, run: str | None, name: str, found: Mapping[str, Contender]) -> Row:
    """One row; times_eager: how many times faster than eager, the median of the rounds' ratios."""
    entry, eager = found[name], found.get(EAGER)
    seconds = entry.spent if entry.runs else []
    return {
        "kind": "backends", "case": spec.case, "role": role, "run": run, "backend": name,
        "device": spec.device.type, "batch": entry.batch, "dtype": dtype, "rounds": spec.rounds,
        "skipped": entry.skipped, "failed": entry.failed, "mix": dict(entry.mix) if entry.mix else None,
        "seconds": spread(seconds),
        "images_per_second": digits(entry.batch / statistics.median(seconds)) if seconds and entry.batch else None,
        "times_eager": ratio(eager, entry) if eager else None,
        "max_abs_diff": digits(entry.parity.get("max_abs")), "relative": digits(entry.parity.get("relative")),
        "psnr": entry.parity.get("psnr"), "off_by_more_than_1": digits(entry.parity.get("off")),
        "build_seconds": entry.build_seconds, "load_seconds": entry.load_seconds, "bytes": entry.bytes,
        "versions": versions_for("onnx"),
    }  # fmt: skip


def spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Median, quartiles and extremes of one interleaved run."""
    if not seconds:
        return None
    found = quartiles([s * 1e6 for s in seconds])
    named = {"median": found.median / 1e6, "q1": found.q1 / 1e6, "q3": found.q3 / 1e6}
    return {n: float(f"{x:.5g}") for n, x in (named | {"min": min(seconds), "max": max(seconds)}).items()}


def ratio(slow: Contender | None, fast: Contender | None) -> float | None:
    """Median over the rounds of the times of one by those of the other; None where one has none."""
    if slow is None or fast is None or not (slow.runs and fast.runs and slow.spent and fast.spent):
        return None
    return digits(statistics.median(a / b for a, b in zip(slow.spent, fast.spent, strict=False)))


def digits(value: float | None) -> float | None:
    """Five of them; None for what JSON has no number for."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def fastest(found: Mapping[str, Contender]) -> str:
    """The fastest backend of a role whose results are eager's: no other attention, no fp8."""
    times = {
        name: statistics.median(entry.spent)
        for name, entry in found.items()
        if entry.runs and entry.spent and VARIANTS[name] == Variant(backend=VARIANTS[name].backend)
    }
    return min(times, key=lambda name: times[name]) if times else EAGER
