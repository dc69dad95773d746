"""`synthkd fit-prior`: a small text-conditional latent diffusion model from a captioned pool."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from synthkd.dfkd import cli_options as options
from synthkd.dfkd.cli_methods import Deadline, Minutes, parsed_options, without_seed
from synthkd.dfkd.cli_progress import Bars, StopFlag
from synthkd.dfkd.fit_prior import PIPELINE, PriorFit
from synthkd.dfkd.prior_data import load_captioned
from synthkd.dfkd.prior_report import REPORT
from synthkd.dfkd.prior_spec import SIZES, fields_help, prior_spec
from synthkd.dfkd.training import Stopped

EPILOG = f"""Fields of --set, and what the sizes set them to:

{fields_help()}

Example: synthkd fit-prior data/cifar10/pool.npz --out priors/cifar --minutes 9 --set steps=20000"""
out = Console()


def fit(
    pool: Annotated[Path, typer.Argument(help="An .npz of x, y, captions and trained_on (docs/evidence.md).")],
    out_dir: options.Out,
    size: Annotated[str, typer.Option(help=f"Networks and steps: {' or '.join(SIZES)}.")] = "small",
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of the size, NAME=VALUE, see below; may be given several times."),
    ] = None,
    seed: options.Seed = 0,
    minutes: Minutes = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print what prior.json says.")] = False,
    device: options.Device = None,
) -> None:
    """Train a prior on images that are not the teacher's: an autoencoder, then a denoiser of captioned latents.

    What comes out is a diffusers pipeline with a declaration of what it was trained on; --model takes it.
    """
    data = load_captioned(pool)
    spec = prior_spec(size, without_seed(parsed_options(changes, None)) | {"seed": seed})
    with Bars(out) as bars, StopFlag() as stop:
        until = Deadline(stop, minutes)
        job = PriorFit(data=data, spec=spec, out=out_dir, device=options.pick_device(device), progress=bars,
                       should_stop=until.is_set)  # fmt: skip
        try:
            told = job.execute()
        except Stopped:
            raise typer.Exit(stop.exit_code(out, "the same command goes on from here", "step")) from None
    if json_output:
        print(json.dumps(told))
        return
    weights = sum(told["parameters"].values()) / 1e6
    out.print(
        f"{out_dir / PIPELINE}: {weights:.1f} million weights, autoencoder {told['vae']['psnr_held_out']:.1f} dB, "
        f"held-out loss {told['unet']['held_out_loss']:.4f}; report: {out_dir / REPORT}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip
