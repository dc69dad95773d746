"""Rebuild the embedded default from nothing: glyphs, tokenizer, autoencoder, readers, prior, decoder, dense teacher.

Every stage is seeded. Scratch files go to build/assets at the repository's root, results to
engine/assets/digits, those of the dense teacher to engine/assets/segments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent
SCRATCH = HERE.parents[2] / "build" / "assets"
STAGES = ("glyphs", "letters", "tokenizer", "vae", "readers", "unet", "decoder", "dense", "records")
MINUTES = {"vae": 15.0, "unet": 45.0}
STEPS = {"vae": 3_000, "unet": 10_000}


def command(stage: str, scale: float) -> list[str]:
    """Give the command line of one training stage."""
    if stage == "decoder":
        target = str(ASSETS / "digits" / "decoder")
        return [sys.executable, "-m", "synthkd.dfkd.cli", "fit-decoder", "--preset", "digits", "--out", target]
    script = f"{stage}.py" if stage in ("glyphs", "letters", "tokenizer") else f"train_{stage}.py"
    line = [sys.executable, str(HERE / script)]
    if stage in MINUTES:
        line += [
            "--minutes",
            str(MINUTES[stage] * scale),
            "--iterations",
            str(max(1, round(STEPS[stage] * scale))),
        ]
    return line


def write_log() -> None:
    """Gather the stages' figures into training_log.json."""
    names = ("vae", "teacher", "judge", "unet")
    found = {
        name: json.loads((SCRATCH / f"{name}.json").read_text())
        for name in names
        if (SCRATCH / f"{name}.json").exists()
    }
    (ASSETS / "digits" / "training_log.json").write_text(json.dumps(found, indent=2) + "\n")


def write_samples() -> None:
    """Draw the sheet of samples for the README: eight rows per prompt, one column per digit."""
    import glyphs
    import torch
    import train_unet
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        ASSETS / "digits" / "pipeline", use_safetensors=True, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    parts = [
        train_unet.sample(pipe, template, 4, seed=3).view(10, 4, 3, 32, 32).transpose(0, 1)
        for template in (train_unet.PLAIN, train_unet.GREY)
    ]
    pixels = torch.stack(parts, 2).reshape(-1, 3, 32, 32).mul(255).round().byte().permute(0, 2, 3, 1)
    glyphs.sheet(pixels.numpy(), ASSETS.parents[1] / "docs" / "images" / "prior.png", columns=20)


def write_sums() -> None:
    """Write SHA256SUMS over all result files, with relative paths."""
    files = [
        p
        for p in sorted(ASSETS.rglob("*"))
        if p.is_file()
        and p.relative_to(ASSETS).parts[0] != "build"
        and p.suffix in (".safetensors", ".json", ".toml", ".txt", ".png", ".webp")
    ]
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(ASSETS).as_posix()}" for p in files]
    (ASSETS / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def run_stage(stage: str, scale: float) -> None:
    """Run one stage to its end."""
    print(f"== {stage}", flush=True)
    if stage == "records":
        write_log()
        write_samples()
        write_sums()
        return
    subprocess.run(command(stage, scale), check=True, env={"OMP_NUM_THREADS": "1", **os.environ})


def main() -> None:
    """Run all stages, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=STAGES, help="run this one stage, from what earlier stages left")
    parser.add_argument(
        "--minutes-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="multiply the iterations and the time caps of the vae and unet stages (default 1.0; "
        "0.02 gives a quick smoke run, which overwrites the results)",
    )
    args = parser.parse_args()
    for stage in [args.only] if args.only else STAGES:
        run_stage(stage, args.minutes_scale)


if __name__ == "__main__":
    main()
