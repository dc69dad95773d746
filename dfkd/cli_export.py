"""`synthkd export`: build the backends of a run before it, once."""

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from synthkd.dfkd import cli_options as options
from synthkd.dfkd.presets import load_preset
from synthkd.engine import Execution, Recipe, Synthesizer, SynthkdError
from synthkd.engine.errors import suggest
from synthkd.engine.models import load_model
from synthkd.engine.roles import ROLES, native_size
from synthkd.engine.workers import one_thread
from synthkd.export import BACKENDS, Compiled, default_store

out = Console()
err = Console(stderr=True)

Backend = Annotated[str, typer.Option(help="aoti, onnx or tensorrt (eager and compile leave nothing behind).")]
Role = Annotated[
    list[str] | None,
    typer.Option(help="text_encoder, unet, vae, teacher, gradient; may be given several times (default: all)."),
]
Batch = Annotated[
    int | None, typer.Option(help="Samples at a time through UNet and VAE (default: the recipe's group, if it fits).")
]


def export(
    model: Annotated[str | None, typer.Argument(help="Diffusers pipeline folder, hub id, or embedded:digits.")] = None,
    backend: Backend = "onnx",
    role: Role = None,
    batch: Batch = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16 (default: the recipe's).")] = None,
    preset: Annotated[str | None, typer.Option(help="Start from a preset's recipe, model and teacher.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher card; roles teacher and gradient need one.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file of the recipe of the sets to come.")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="LoRA to fuse into the model, PATH or PATH@WEIGHT.")] = None,
    opset: options.Opset = 0,
    provider: options.Provider = "auto",
    fixed_batch: options.FixedBatch = False,
    attention: options.Attention = "sdpa",
    artifacts: options.Artifacts = None,
    trust: options.Trust = False,
    allow_code: options.AllowCode = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON line per artifact.")] = False,
    device: options.Device = None,
) -> None:
    """Build a model's networks for another backend and compare them with eager; a run then starts in seconds.

    An artifact is found again by what it depends on: weights, shapes, dtype, library versions, processor. So give the
    recipe of the sets to come: its size, group and guidance are in it. `synthkd synth --backend onnx` takes the same.
    """
    if backend not in BACKENDS[2:]:
        raise SynthkdError(f"--backend {backend!r}: {suggest(backend, BACKENDS[2:])}")
    for name in role or ():
        if name not in ROLES:
            raise SynthkdError(f"--role {name!r}: {suggest(name, ROLES)}")
    if batch is not None and batch < 1:
        raise SynthkdError(f"--batch is {batch}; expected a whole number >= 1")
    chosen = options.backend_options(opset, provider)
    execution = Execution(
        artifacts=artifacts, trust=trust, options=chosen, fixed_batch=fixed_batch, attention=attention
    )
    told = [name for name in role or () if name in ("teacher", "gradient")]
    if told and not (teacher or preset):
        raise SynthkdError(f"--role {told[0]}: needs a --teacher (or a --preset that brings one)")
    asked = options.Asked(
        model=model, teacher=teacher, recipe=recipe, loras=lora or (), allow_code=allow_code,
        micro_batch=str(batch) if batch else "auto", compile="off",
    )  # fmt: skip
    synth = _synthesizer(asked, preset, execution, role, backend, dtype, device)
    rows = _built(synth, json_output)
    if json_output:
        for row in rows:
            print(json.dumps(row))
        return
    out.print(_table(rows))
    out.print(f"artifacts: {artifacts or default_store()}", highlight=False, soft_wrap=True)


def _synthesizer(
    asked: options.Asked, preset: str | None, execution: Execution, role: list[str] | None, backend: str,
    dtype: str | None, device: str | None,
) -> Synthesizer:  # fmt: skip
    """A Synthesizer of the roles asked for."""
    chosen = load_preset(preset).job if preset else None
    if chosen is None and asked.teacher is None:
        return _unguided(asked, execution, role, backend, dtype, device)
    job = options.build_job(chosen, asked, device)
    recipe = replace(job.recipe, backends=(), dtype=dtype or job.recipe.dtype)
    entries = _entries(role or _all(recipe), backend)
    job = replace(job, recipe=recipe, execution=replace(execution, backends=entries))
    if "gradient" in (role or ()) and recipe.guidance.scale == 0:
        raise SynthkdError("--role gradient: guidance.scale is 0, which guides nothing; raise it in the --recipe")
    return job.build()


def _unguided(
    asked: options.Asked, execution: Execution, role: list[str] | None, backend: str, dtype: str | None,
    device: str | None,
) -> Synthesizer:  # fmt: skip
    if asked.model is None:
        raise SynthkdError("export needs a MODEL, or a --preset that brings one")
    said = options.recipe_fields(asked.recipe) | ({"dtype": dtype} if dtype else {})
    fields: dict[str, Any] = {"classes": ["thing"], "classes_per_group": 1, **said}
    fields["guidance"] = {**fields.get("guidance", {}), "scale": 0.0, "decoder": "vae"}
    checked = Recipe.from_dict(fields)
    fields["backends"] = []
    prior = load_model(
        asked.model, device=options.pick_device(device), dtype=getattr(torch, checked.dtype), loras=asked.loras
    )
    size = native_size(prior)
    if size is not None:
        fields = {"height": size[0], "width": size[1], **fields}
    entries = _entries(role or ["text_encoder", "unet", "vae"], backend)
    batch: Any = options.part_of(asked.micro_batch)
    return Synthesizer(
        prior, Recipe.from_dict(fields), fuse="off", micro_batch=batch, execution=replace(execution, backends=entries)
    )


def _all(recipe: Recipe) -> list[str]:
    return [name for name in ROLES if name != "gradient" or recipe.guidance.scale > 0]


def _entries(roles: list[str], backend: str) -> tuple[str, ...]:
    return tuple(f"{name}={backend}" for name in roles)


def _built(synth: Synthesizer, quiet: bool) -> list[dict[str, Any]]:
    """A row per artifact."""
    said: list[str] = []
    start = time.perf_counter()
    status: Any = nullcontext() if quiet else err.status("loading")
    with status as shown:

        def say(line: str) -> None:
            said.append(line)
            if shown is not None:
                shown.update(f"{line} ({time.perf_counter() - start:.0f} s so far)")

        with one_thread(synth.model.device):  # as every worker has
            routes = synth.prepare(say)
    fresh = {line.removeprefix("building ").partition(" for ")[0] for line in said if line.startswith("building ")}
    return [_row(name, compiled, name in fresh) for name, compiled in routes.compiled.items()]


def _row(name: str, compiled: Compiled, fresh: bool) -> dict[str, Any]:
    told = compiled.manifest
    assert told is not None
    rows = list(told.verified.values())
    return {
        "name": name,
        "backend": told.backend,
        "built": fresh,
        "build_seconds": round(sum(told.seconds.values()), 2),
        "bytes": told.bytes,
        "max_abs_diff": max(row["max_abs"] for row in rows),
        "relative": max(row["relative"] for row in rows),
        "psnr": min(row["psnr"] for row in rows),
        "key": told.key,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("role", "backend", "built", "MiB", "max abs", "relative", "PSNR, dB", title="against eager")
    for row in rows:
        state = f"in {row['build_seconds']:.1f} s" if row["built"] else "before"
        numbers = (f"{row['bytes'] / 2**20:.1f}", f"{row['max_abs_diff']:.0e}", f"{row['relative']:.0e}")
        table.add_row(row["name"], row["backend"], state, *numbers, f"{row['psnr']:.0f}")
    return table
