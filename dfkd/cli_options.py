"""Options that several subcommands share, and the checks that turn them into jobs."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.presets import load_preset
from synthkd.dfkd.student import DistillSpec
from synthkd.dfkd.teachers import card_path, read_card
from synthkd.engine import Recipe, SynthkdError
from synthkd.engine.errors import suggest
from synthkd.engine.index import read_manifest

Out = Annotated[Path, typer.Option("--out", help="Folder to write to; made where it does not exist.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Workers = Annotated[int | None, typer.Option(help="Processes that draw (default: one per CPU core, one on a GPU).")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")]


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


def read_lines(path: Path, what: str) -> tuple[str, ...]:
    """Non-empty lines of a text file."""
    try:
        lines = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise SynthkdError(f"--{what} {path}: cannot be read ({error})") from error
    if not lines:
        raise SynthkdError(f"--{what} {path}: is empty; expected one entry per line")
    return lines


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """A TOML file as a table; raises SynthkdError naming the option it came from."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise SynthkdError(f"--{what} {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SynthkdError(f"--{what} {path}: not valid TOML ({error})") from error


def build_job(
    preset: str | None,
    model: str | None,
    teacher: str | None,
    recipe: Path | None,
    classes: Path | None,
    prompts: Path | None,
    scale: float | None,
    alpha: float | None,
    beta: float | None,
    device: str | None,
) -> SynthJob:
    """The job that the options of `synthkd synth` describe, checked before any weight is read."""
    base = load_preset(preset).job if preset else None
    model, teacher = model or (base.model if base else None), teacher or (base.teacher if base else None)
    if model is None or teacher is None:
        raise SynthkdError("synth needs --model and --teacher, or a --preset that brings both")
    fields: dict[str, Any] = base.recipe.to_dict() if base else {"classes": list(read_card(card_path(teacher)).classes)}
    if recipe is not None:
        fields = _merge(fields, read_toml(recipe, "recipe"))
    if classes is not None:
        fields["classes"] = list(read_lines(classes, "classes"))
    if prompts is not None:
        fields["prompts"] = list(read_lines(prompts, "prompts"))
    if not base:
        fields.setdefault("classes_per_group", min(10, len(fields["classes"])))
    built = Recipe.from_dict(fields)
    if scale is not None:
        built = replace(built, guidance=replace(built.guidance, scale=scale))
    weights = {"alpha": alpha, "beta": beta}
    chosen = {n: v if v is not None else getattr(base, n, None) for n, v in weights.items()}
    job = SynthJob(
        model=model,
        teacher=teacher,
        recipe=built,
        device=pick_device(device),
        **{name: value for name, value in chosen.items() if value is not None},
    )
    job.check()
    return job


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
    """Training settings: a preset's or the defaults, a file's on top, and single options on top of both."""
    spec = load_preset(preset).distill if preset else DistillSpec()
    given: dict[str, Any] = read_toml(spec_file, "spec") if spec_file else {}
    for name in given:
        if name not in DistillSpec.__dataclass_fields__:
            raise SynthkdError(f"--spec: unknown field {name!r}; {suggest(name, DistillSpec.__dataclass_fields__)}")
    if given.get("arch", spec.arch) != spec.arch:  # another network does not take the preset's arguments
        given.setdefault("arch_args", {})
    given |= {
        k: v for k, v in {"steps": steps, "batch_size": batch_size, "temperature": temperature}.items() if v is not None
    }
    try:
        return replace(spec, seed=seed, **given)
    except TypeError as error:
        raise SynthkdError(f"--spec: a field is of the wrong type ({error})") from error


def set_size(set_dir: Path) -> int:
    """Samples that a set's manifest promises."""
    return int(read_manifest(set_dir)["num_samples"])


def set_teacher(set_dir: Path) -> str:
    """The teacher card that a set's manifest names."""
    source = read_manifest(set_dir).get("source") or {}
    if "teacher" not in source:
        raise SynthkdError(f"{set_dir}: its manifest names no teacher card; pass --teacher")
    return str(source["teacher"])
