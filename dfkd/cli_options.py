"""Options that several subcommands share, and the checks that turn them into jobs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from synthkd.dfkd.distill_spec import DistillSpec, spec_from
from synthkd.dfkd.job import SynthJob, read_source
from synthkd.dfkd.presets import load_preset
from synthkd.dfkd.targets import read_targets
from synthkd.dfkd.teachers import card_path, read_card
from synthkd.dfkd.toml_files import read_toml
from synthkd.engine import Execution, Recipe, SynthkdError
from synthkd.engine.errors import suggest
from synthkd.engine.index import read_manifest
from synthkd.engine.ray_runner import ClusterSpec
from synthkd.engine.rows import Part
from synthkd.export import ExportError, Options

Out = Annotated[Path, typer.Option("--out", help="Folder to write to; made where it does not exist.")]
OutOrUrl = Annotated[
    str, typer.Option("--out", help="Folder to write to, or a URL such as s3://bucket/set; made where it is not there.")
]
Spool = Annotated[
    Path | None, typer.Option(help="With a URL: folder where shards grow until they are published (default: a cache).")
]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Workers = Annotated[int | None, typer.Option(help="Processes that draw (default: one per CPU core, one on a GPU).")]
ShardIndex = Annotated[
    int | None, typer.Option(help="Which of --num-shards runs that share the folder this is, from 0 (Slurm, torchrun).")
]
NumShards = Annotated[
    int | None, typer.Option(help="How many runs share the folder; each draws every so many-th shard of the set.")
]
Grace = Annotated[
    float, typer.Option(help="Seconds that a group may take after SIGTERM; then the run ends at once, with 75 too.")
]
GroupDeadline = Annotated[
    float | None,
    typer.Option("--deadline", help="Seconds that a group may take (default: no limit); a hung worker is replaced."),
]
StrictBits = Annotated[
    bool, typer.Option("--strict-bits", help="Stop where memory runs out; by default groups go on in smaller parts.")
]
GRACE = 300.0  # seconds
Encoder = Annotated[
    str,
    typer.Option(help="Of image files: auto (pillow, the same bytes anywhere); for jpg simplejpeg, on a GPU nvjpeg."),
]
Encoders = Annotated[
    int | None, typer.Option(help="Threads that encode (default: one on a CPU, one per core up to 8 on a GPU).")
]
Ray = Annotated[
    str | None,
    typer.Option(help="Draw on a Ray cluster: auto (a running one, else one here), local, HOST:PORT, ray://HOST:PORT."),
]
RayActors = Annotated[
    int | None, typer.Option(help="Actors that draw (default: one per GPU of the cluster, else per CPU slot).")
]
RayWheel = Annotated[Path | None, typer.Option(help="A synthkd wheel that is sent to the cluster.")]
Rounds = Annotated[int | None, typer.Option(help="Rounds; a student learns between them (with --gamma).")]
Gamma = Annotated[float | None, typer.Option(help="Weight of the disagreement with that student; needs --rounds >= 2.")]
Divergence = Annotated[str | None, typer.Option(help="Of that disagreement: kl or js.")]
Patches = Annotated[str | None, typer.Option(help="Folder that fit-patches wrote; needs --patch-weight.")]
PatchWeight = Annotated[float | None, typer.Option(help="Weight of the patch term (with --patches).")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Let a teacher card name a module:callable to import.")]
Fuse = Annotated[
    str, typer.Option(help="Fused modules: auto (decoder, where Triton kernels run), off, decoder, all (the UNet too).")
]
Compile = Annotated[
    str,
    typer.Option(
        help="A graph per denoiser call: auto (on a GPU above 64 pixels), off, default, reduce-overhead, max-autotune."
    ),
]
MicroBatch = Annotated[
    str, typer.Option(help="Samples of a group at a time, exactly as at once: auto (for the free memory) or a number.")
]
GuidanceDecoder = Annotated[
    str | None,
    typer.Option("--decoder", help="What guidance looks through: auto, vae, pooled:N, tiny:PATH, fitted:PATH."),
]
Backend = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        help="ROLE=NAME, or NAME for all roles: eager, compile, aoti, onnx, tensorrt for text_encoder, unet, vae, "
        "teacher, gradient; may be given several times.",
    ),
]
Attention = Annotated[str, typer.Option(help="Kernel: sdpa (torch's choice), or on a GPU cudnn, flash, xformers.")]
Quantize = Annotated[
    str, typer.Option(help="fp8: the UNet in 8-bit floats (GPUs that have them); fp8-emulated: its rounding anywhere.")
]
Opset = Annotated[int, typer.Option(help="ONNX opset, 21 or 23 (default: 23; 21 where attention is unknown).")]
Provider = Annotated[str, typer.Option(help="Of onnxruntime: auto, cpu, cuda, tensorrt.")]
FixedBatch = Annotated[bool, typer.Option("--fixed-batch", help="Backends for one batch, others filled up to it.")]
Artifacts = Annotated[
    str | None, typer.Option(help="Folder of built backends (default: $SYNTHKD_ARTIFACTS or the user's cache).")
]
Trust = Annotated[
    bool, typer.Option("--trust-artifacts", help="Load artifacts of machine code that another user or machine made.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")]

_WEIGHTS = ("alpha", "beta", "gamma", "divergence", "patches", "patch")


def pick_device(device: str | None) -> str:
    """The device asked for, or the best there is."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise SynthkdError(f"--device {device!r}: {suggest(device, ('cpu', 'cuda'))}")
    if device == "cuda" and not torch.cuda.is_available():
        raise SynthkdError("--device cuda: this torch sees no CUDA device; use --device cpu")
    return device


def check_workers(workers: int | None) -> int | None:
    """Raise SynthkdError for a count below 1."""
    if workers is not None and workers < 1:
        raise SynthkdError(f"--workers is {workers}; expected a whole number >= 1")
    return workers


def check_seconds(name: str, seconds: float | None) -> float | None:
    """Raise SynthkdError for a time that is not above 0; name: of the option."""
    if seconds is not None and not 0 < seconds < 10**9:
        raise SynthkdError(f"{name} is {seconds}; expected seconds above 0")
    return seconds


def cluster_of(
    address: str | None, actors: int | None, wheel: Path | None, deadline: float | None, device: str | None
) -> ClusterSpec | None:
    """`--ray` and what goes with it; None without, raises SynthkdError for `--ray-actors` or `--ray-wheel` alone."""
    if address is None:
        if actors is not None or wheel is not None:
            raise SynthkdError("--ray-actors and --ray-wheel are for --ray; give it too")
        return None
    return ClusterSpec(address=address, actors=actors, wheel=wheel, deadline=deadline, device=device)


def part_of_run(index: int | None, count: int | None) -> Part | None:
    """`--shard-index` and `--num-shards` as a part; None without both, raises SynthkdError for one alone."""
    if index is None and count is None:
        return None
    if index is None or count is None:
        raise SynthkdError("--shard-index and --num-shards go together; give both")
    return Part(index, count)


def check_limit(limit: int | None, have: int) -> None:
    """Raise SynthkdError for a limit below 1 or above what there is."""
    if limit is not None and not 1 <= limit <= have:
        raise SynthkdError(f"--limit is {limit}; expected 1 to {have}, the images of the set")


def parse_shards(text: str | None, count: int) -> list[int] | None:
    """`2,0,1` as numbers below `count`."""
    if text is None:
        return None
    try:
        chosen = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise SynthkdError(f"--shards {text!r}: expected numbers such as 2,0,1") from error
    if len(set(chosen)) != len(chosen) or not all(0 <= c < count for c in chosen):
        raise SynthkdError(f"--shards {text!r}: expected distinct numbers from 0 to {count - 1}")
    return chosen


def parse_numbers(name: str, text: str) -> list[int]:
    """`0,1,2` as distinct whole numbers >= 0; raises SynthkdError, which names the option, for anything else."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise SynthkdError(f"{name} {text!r}: expected numbers such as 0,1,2") from error
    if len(set(found)) != len(found) or min(found) < 0:
        raise SynthkdError(f"{name} {text!r}: expected distinct numbers >= 0")
    return found


def read_lines(path: Path, what: str) -> tuple[str, ...]:
    """Non-empty lines of a text file."""
    try:
        lines = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise SynthkdError(f"--{what} {path}: cannot be read ({error})") from error
    if not lines:
        raise SynthkdError(f"--{what} {path}: is empty; expected one entry per line")
    return lines


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the options of `synth` and `run` say about a job; None where they say nothing."""

    model: str | None = None
    teacher: str | None = None
    recipe: Path | None = None
    classes: Path | None = None
    prompts: Path | None = None
    targets: Path | None = None
    loras: Sequence[str] = ()
    scale: float | None = None
    rounds: int | None = None
    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None
    divergence: str | None = None
    patches: str | None = None
    patch: float | None = None
    allow_code: bool = False
    decoder: str | None = None
    fuse: str = "auto"
    compile: str = "auto"
    micro_batch: str = "auto"
    backends: Sequence[str] = ()
    artifacts: str | None = None
    trust: bool = False
    attention: str = "sdpa"
    quantize: str = ""
    fixed_batch: bool = False
    strict_bits: bool = False
    opset: int = 0
    provider: str = "auto"

    @property
    def execution(self) -> Execution:
        """What the networks run on."""
        return Execution(
            backends=tuple(self.backends), artifacts=self.artifacts, trust=self.trust, attention=self.attention,
            quantize=self.quantize, fixed_batch=self.fixed_batch, strict_bits=self.strict_bits,
            options=backend_options(self.opset, self.provider),
        )  # fmt: skip


def backend_options(opset: int, provider: str) -> Options:
    """Raises SynthkdError for a value outside its range."""
    try:
        return Options(opset=opset, provider=provider)
    except ExportError as error:
        raise SynthkdError(f"--{error}") from error


def build_job(base: SynthJob | None, asked: Asked, device: str | None) -> SynthJob:
    """A preset's job, or none, with what the options ask on top; checked before any weight is read."""
    model, teacher = asked.model or (base.model if base else None), asked.teacher or (base.teacher if base else None)
    if model is None or teacher is None:
        raise SynthkdError("synth needs --model and --teacher, or a --preset that brings both")
    changes: dict[str, Any] = {
        "model": model,
        "teacher": teacher,
        "recipe": _recipe(base, asked, teacher),
        "allow_code": asked.allow_code or (base.allow_code if base else False),
        "device": pick_device(device),
        "fuse": asked.fuse,
        "compile": asked.compile,
        "micro_batch": part_of(asked.micro_batch),
        "execution": asked.execution,
    }
    if asked.model is not None:
        changes["model_missing"] = ""
    changes |= {n: v for n in _WEIGHTS if (v := getattr(asked, n)) is not None}
    if asked.loras:
        changes["loras"] = tuple(asked.loras)
    job = replace(base, **changes) if base else SynthJob(**changes)
    job.check()
    return job


def _recipe(base: SynthJob | None, asked: Asked, teacher: str) -> Recipe:
    if base:
        fields: dict[str, Any] = base.recipe.to_dict()
    else:
        fields = {"classes": list(read_card(card_path(teacher)).classes)}
    fields = _merge(fields, recipe_fields(asked.recipe))
    if asked.classes is not None:
        fields["classes"] = list(read_lines(asked.classes, "classes"))
    if asked.prompts is not None:
        fields["prompts"] = list(read_lines(asked.prompts, "prompts"))
    if asked.targets is not None:
        fields |= read_targets(asked.targets, _class_names(fields))
    if asked.rounds is not None:
        fields["rounds"] = asked.rounds
    said = {name: value for name in ("scale", "decoder") if (value := getattr(asked, name)) is not None}
    if said and isinstance(guidance := fields.get("guidance", {}), Mapping):
        fields["guidance"] = {**guidance, **said}
    if not base:
        checked = Recipe.from_dict({**fields, "classes_per_group": 1})
        fields.setdefault("classes_per_group", min(10, len(checked.drawn_classes)))
    return Recipe.from_dict(fields)


def recipe_fields(path: Path | None) -> dict[str, Any]:
    """What a --recipe file says; nothing where there is none."""
    return read_toml(path, f"--recipe {path}") if path is not None else {}


def part_of(micro_batch: str) -> int | str:
    """A number where there is one; whether it will do is for the job to say."""
    return int(micro_batch) if micro_batch.isdecimal() and len(micro_batch) < 10 else micro_batch


def _class_names(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes of a recipe that is not whole yet, checked like a whole one's."""
    return Recipe.from_dict({"classes": fields["classes"], "classes_per_group": 1}).classes


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Fields of `over` on top of `base`, table by table."""
    out = dict(base)
    for name, value in over.items():
        out[name] = {**out[name], **value} if isinstance(value, dict) and isinstance(out.get(name), dict) else value
    return out


def distill_spec(
    preset: str | None,
    spec_file: Path | None,
    steps: int | None,
    batch_size: int | None,
    temperature: float | None,
    seed: int,
) -> DistillSpec:
    """Training settings: a preset's or the defaults, a file's on top, and single options on top of both.

    Raises SynthkdError for a file with an unknown field, one of the wrong type, or a seed, and for a wrong option.
    """
    spec = load_preset(preset).distill if preset else DistillSpec()
    given: dict[str, Any] = read_toml(spec_file, f"--spec {spec_file}") if spec_file else {}
    if "seed" in given:
        raise SynthkdError(f"--spec {spec_file}: seed is {given['seed']!r}; expected none there, it is given by --seed")
    if given.get("arch", spec.arch) != spec.arch:  # another network does not take the preset's arguments
        given.setdefault("arch_args", {})
    options: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "temperature": temperature}
    chosen = {name: value for name, value in options.items() if value is not None}
    return replace(spec_from(given, f"--spec {spec_file}", spec), seed=seed, **chosen)


def set_size(set_dir: Path) -> int:
    """Samples that a set's manifest promises."""
    return int(read_manifest(set_dir)["num_samples"])


def set_teacher(set_dir: Path) -> str:
    """The teacher card that a set's manifest names; raises SynthkdError where it names none."""
    source = read_source(read_manifest(set_dir))
    if "teacher" not in source:
        raise SynthkdError(f"{set_dir}: its manifest names no teacher card; pass --teacher")
    return str(source["teacher"])
