"""`synthkd fit-decoder`: a small decoder for guidance, from a prior alone."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from synthkd.dfkd import cli_options as options
from synthkd.dfkd.apart import hand_down
from synthkd.dfkd.cli_progress import Bars, StopFlag
from synthkd.dfkd.fit_decoder import FitSpec, Source, Stopped, about, fit_decoder
from synthkd.dfkd.presets import load_preset
from synthkd.dfkd.teachers import load_teacher
from synthkd.engine.fitted import save_fitted
from synthkd.engine.models import load_model

out = Console()


def fit(
    out_dir: options.Out,
    preset: Annotated[str | None, typer.Option(help="Start from a preset's recipe, model and teacher.")] = None,
    model: Annotated[str | None, typer.Option(help="Diffusers pipeline folder, hub id, or embedded:digits.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher card (TOML), or embedded:digits.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file of recipe fields, [guidance], [cutmix].")] = None,
    lora: Annotated[list[str] | None, typer.Option(help="LoRA to fuse into the model, PATH or PATH@WEIGHT.")] = None,
    samples: Annotated[int | None, typer.Option(help="Latents to learn from, rounded up to whole groups.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    seed: options.Seed = 0,
    allow_code: options.AllowCode = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the held-out errors as JSON.")] = False,
    device: options.Device = None,
) -> None:
    """Fit a small decoder to a model's own VAE, on latents of the model's own runs; no data is needed.

    Guidance then looks through it, where a recipe says `decoder = "fitted:FOLDER"`, at a fraction of the VAE's price.
    Use the recipe of the sets to come: its prompts, sampler and guidance decide which latents are learned from.
    """
    # through the VAE, whatever the recipe names: it may name what is made here
    asked = options.Asked(
        model=model, teacher=teacher, recipe=recipe, loras=lora or (), allow_code=allow_code, decoder="vae"
    )
    job = options.build_job(load_preset(preset).job if preset else None, asked, device)
    given = {name: value for name, value in (("samples", samples), ("steps", steps)) if value is not None}
    spec = FitSpec(**given, seed=seed)
    seen_by = load_teacher(job.teacher, job.device, allow_code=job.allow_code)
    prior = load_model(job.model, device=job.device, dtype=getattr(torch, job.recipe.dtype), loras=job.loras)
    source = Source(prior, job.recipe, seen_by.input_size, job.guidance(seen_by))
    with Bars(out) as bars, StopFlag() as stop:
        try:
            fitted = fit_decoder(source, spec, bars, stop.is_set)
        except Stopped:
            raise typer.Exit(stop.exit_code(out, "nothing was written; the same command begins anew")) from None
    save_fitted(fitted.net, out_dir, about(source, fitted))
    hand_down(out_dir, *job.seen().values())
    if json_output:
        print(json.dumps(fitted.errors))
        return
    found = fitted.errors
    says = f"held-out PSNR {min(found['psnr']):.1f} to {max(found['psnr']):.1f} dB over the run's noise levels"
    says += f", mean cosine of the guidance's gradients with the VAE's {found['mean_cosine']:.2f}"
    out.print(f"{out_dir}: {says}", soft_wrap=True, highlight=False)
