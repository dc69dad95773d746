"""`synthkd fit-patches`: a patch discriminator for guidance, from a prior or a pool."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from synthkd.dfkd import cli_options as options
from synthkd.dfkd.apart import check_pool, hand_down, pool_declares
from synthkd.dfkd.cli_progress import Bars, StopFlag
from synthkd.dfkd.fit_patches import PatchSpec, fit_patches
from synthkd.dfkd.patches import save_patches
from synthkd.dfkd.pools import open_images
from synthkd.dfkd.presets import load_preset
from synthkd.dfkd.training import Stopped

out = Console()


def fit(
    out_dir: options.Out,
    preset: Annotated[str | None, typer.Option(help="Start from a preset's recipe, model and teacher.")] = None,
    model: Annotated[str | None, typer.Option(help="Diffusers pipeline folder, hub id, or embedded:digits.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher card (TOML), or embedded:digits.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file of recipe fields, [guidance], [cutmix].")] = None,
    pool: Annotated[str | None, typer.Option(help="Real images, in place of the prior's unguided ones.")] = None,
    samples: Annotated[int | None, typer.Option(help="Images of each kind, rounded up to whole groups.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    patch: Annotated[int | None, typer.Option(help="Pixels that a logit sees: 10, 22 or 46.")] = None,
    seed: options.Seed = 0,
    allow_code: options.AllowCode = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the held-out shares as JSON.")] = False,
    device: options.Device = None,
) -> None:
    """Fit a patch discriminator: patches that guidance makes against a prior's own, or a pool's; no data is needed.

    `synthkd synth ... --patches FOLDER --patch-weight 0.1` then keeps guided images locally real.
    """
    asked = options.Asked(model=model, teacher=teacher, recipe=recipe, allow_code=allow_code)
    job = options.build_job(load_preset(preset).job if preset else None, asked, device)
    given = {"samples": samples, "steps": steps, "patch": patch}
    spec = PatchSpec(**{name: value for name, value in given.items() if value is not None}, seed=seed)
    check_pool(pool, job.teacher)
    real = open_images(pool) if pool is not None else None
    with Bars(out) as bars, StopFlag() as stop:
        try:
            fitted = fit_patches(job, spec, real, bars, stop.is_set)
        except Stopped:
            raise typer.Exit(stop.exit_code(out, "nothing was written; the same command begins anew")) from None
    save_patches(fitted.critic, out_dir, fitted.about)
    hand_down(out_dir, *job.seen().values(), *([pool_declares(pool)] if pool is not None else []))
    if json_output:
        print(json.dumps(fitted.held_out))
        return
    shares = ", ".join(f"{100 * share:.0f} % of {kind}" for kind, share in fitted.held_out.items())
    out.print(f"{out_dir}: names {shares} patches rightly, of groups held out", soft_wrap=True, highlight=False)
