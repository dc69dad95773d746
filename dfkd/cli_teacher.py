"""`synthkd teacher`: what a card's network is and sees, and the statistics that a network without BatchNorm lacks."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from synthkd.dfkd import cli_options as options
from synthkd.dfkd.cards import CLASSIFICATION, card_path, read_card
from synthkd.dfkd.data import load_test_set
from synthkd.dfkd.evaluate import test_scores
from synthkd.dfkd.losses import bn_distance
from synthkd.dfkd.presets import load_preset
from synthkd.dfkd.taps import batchnorm_layers, channels, measure_moments, statless_layers, write_moments
from synthkd.dfkd.teachers import Teacher, count_parameters, load_teacher
from synthkd.engine import CutMixSpec, GuidanceSpec, Recipe, Request, Synthesizer, SynthkdError
from synthkd.engine.models import EMBEDDED, resolve

app = typer.Typer(
    name="teacher", help="Check a teacher's card; store input statistics of norm layers that keep none.",
    no_args_is_help=True,
)  # fmt: skip
out = Console()

Card = Annotated[str, typer.Argument(help="Teacher card (TOML), or embedded:digits.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Let a card's arch module:function import and run that code.")
]


@app.command(epilog="Example: synthkd teacher check teacher.toml --data real/test-folders --preset digits")
def check(
    card: Card,
    data: Annotated[str | None, typer.Option(help="Real labelled images to score it on, as for evaluate.")] = None,
    model: Annotated[str | None, typer.Option(help="Prior whose unguided images it is shown.")] = None,
    preset: Annotated[str | None, typer.Option(help="Preset that brings prior and recipe.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    allow_code: AllowCode = False,
    device: options.Device = None,
) -> None:
    """Load a card and show what guidance will see: norm layers, outputs on noise and on a prior's images, accuracy.

    Low confidence or few predicted classes on a prior's images mean that guidance has far to go; the BatchNorm
    distance says how far the images' statistics lie from the training data's.
    """
    where = options.pick_device(device)
    drawing = _drawing(card, model, preset)
    teacher = load_teacher(card, where, allow_code=allow_code)
    accuracy = test_scores(teacher, data)["accuracy"] if data else None
    found = _network(card, teacher)
    found["noise"] = _observed(teacher, _noise(teacher).to(where))
    found["prior"] = _observed(teacher, _prior_images(*drawing, where)) if drawing else None
    found["accuracy"] = accuracy
    if json_output:
        print(json.dumps(found))
        return
    out.print(_facts(card, found))
    out.print(_sights(found))


@app.command(
    epilog="Example: synthkd teacher moments vit.toml --data private/train-folders --out vit-moments.safetensors"
)
def moments(
    card: Card,
    data: Annotated[str, typer.Option(help="The teacher's training images: folder, .npz or digits:train.")],
    target: Annotated[Path, typer.Option("--out", help="File to write (safetensors).")],
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 64,
    allow_code: AllowCode = False,
    device: options.Device = None,
) -> None:
    """Store the input mean and variance of every norm layer that keeps none, as a BatchNorm layer would have.

    For whoever holds the training data, once: no image leaves, only two numbers per channel. The card's field
    `moments` then names the file, and guidance compares statistics with a teacher that has no BatchNorm.
    """
    where = options.pick_device(device)
    if batch_size < 1:
        raise SynthkdError(f"--batch-size is {batch_size}; expected a whole number >= 1")
    teacher = load_teacher(card, where, allow_code=allow_code, moments=False)
    images = load_test_set(data, teacher.classes, teacher.input_size).images
    batches = (teacher.preprocess(part.to(where).float() / 255) for part in torch.split(images, batch_size))
    stats = measure_moments(teacher.net, batches)
    write_moments(target, stats, len(images))
    says = f"moments of {len(stats)} layers over {len(images)} images; in the card: moments = {json.dumps(target.name)}"
    out.print(f"{target}: {says}", soft_wrap=True, highlight=False)


def _drawing(card: str, model: str | None, preset: str | None) -> tuple[str, Recipe] | None:
    """The prior and the recipe of one unguided group; the embedded default's own for its cards."""
    guides = read_card(card_path(card), moments=False).task == CLASSIFICATION
    if model is None and preset is None and card.startswith(EMBEDDED) and guides:
        preset = card.removeprefix(EMBEDDED).partition("/")[0]
    if preset is not None:
        job = load_preset(preset).job
        plain = replace(job.recipe, guidance=GuidanceSpec(scale=0.0), cutmix=CutMixSpec())
        return model or job.model, plain
    if model is None:
        return None
    names, (height, width) = read_card(card_path(card)).classes, _model_size(model)
    recipe = Recipe(
        classes=names,
        height=height,
        width=width,
        guidance=GuidanceSpec(scale=0.0),
        classes_per_group=min(4, len(names)),
        samples_per_class=1,
    )
    return model, recipe


def _model_size(model: str) -> tuple[int, int]:
    """Height and width that a pipeline folder was trained at; 512 where it does not say."""
    folder = Path(resolve(model))
    try:
        part = next(p for p in (folder / "unet", folder / "transformer") if (p / "config.json").is_file())
        size = json.loads((part / "config.json").read_text())["sample_size"]
        factor = 2 ** (len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"]) - 1)
    except (StopIteration, OSError, ValueError, LookupError, TypeError):
        return 512, 512
    height, width = size if isinstance(size, list) else (size, size)
    return height * factor, width * factor


def _prior_images(model: str, recipe: Recipe, device: str) -> Tensor:
    """One unguided group [B,3,H,W] in [0,1]."""
    synth = Synthesizer.from_pretrained(model, recipe, device=device)
    batch = next(iter(synth.stream(Request(num_samples=recipe.group_size))))
    return batch.images.float() / 255


def _noise(teacher: Teacher) -> Tensor:
    """Uniform noise [B,3,H,W] of a fixed seed; fewer images where they are large."""
    height, width = teacher.input_size
    count = 64 if height * width <= 96**2 else 16
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def _network(card: str, teacher: Teacher) -> dict[str, Any]:
    def layers(found: Mapping[str, torch.nn.Module]) -> dict[str, int]:
        return {"layers": len(found), "channels": sum(map(channels, found.values()))}

    return {
        "arch": read_card(card_path(card)).arch,
        "parameters": count_parameters(teacher.net),
        "input_size": list(teacher.input_size),
        "classes": list(teacher.classes),
        "batchnorm": layers(batchnorm_layers(teacher.net)),
        "other_norms": layers(statless_layers(teacher.net)),
        "moments": len(teacher.moments.names) if teacher.moments else 0,
    }


@torch.no_grad()
def _observed(teacher: Teacher, images: Tensor) -> dict[str, Any]:
    """What the teacher makes of images [B,3,H,W] in [0,1]; raises SynthkdError where its logits are not finite."""
    seen = teacher.look(images)
    if not bool(seen.logits.isfinite().all()):
        raise SynthkdError("teacher: its logits are not finite; check mean, std and weights")
    top, best = seen.logits.softmax(dim=1).max(dim=1)
    counts = torch.bincount(best.flatten(), minlength=len(teacher.classes))  # of a dense network those of pixels
    return {
        "logits": list(seen.logits.shape),
        "confidence": round(top.mean().item(), 4),
        "predicted_classes": int((counts > 0).sum()),
        "commonest_class_share": round(counts.max().item() / best.numel(), 4),
        "bn_distance": round(bn_distance(seen.taps).item(), 4) if seen.taps else None,
        "moments_distance": round(bn_distance(seen.stored).item(), 4) if seen.stored else None,
    }


def _facts(card: str, found: Mapping[str, Any]) -> Table:
    table = Table(title=card, show_header=False)
    names, bn, others = found["classes"], found["batchnorm"], found["other_norms"]
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    rows = {
        "arch": found["arch"],
        "parameters": f"{found['parameters']:,}",
        "input size": "{} x {}".format(*found["input_size"]),
        "classes": f"{len(names)}: {shown}",
        "BatchNorm": f"{bn['layers']} layers, {bn['channels']:,} channels",
        "other norms": f"{others['layers']} layers, {others['channels']:,} channels; moments of {found['moments']}",
        "accuracy": "not measured (--data)" if found["accuracy"] is None else f"{found['accuracy']:.2f} %",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _sights(found: Mapping[str, Any]) -> Table:
    """One column per kind of image."""
    table = Table("on", "noise", "the prior's images" if found["prior"] else "a prior: --model or --preset")
    sights = [found["noise"], found["prior"] or {}]
    for name in found["noise"]:
        cells = ["none" if s.get(name, "") is None else str(s.get(name, "")) for s in sights]
        table.add_row(name.replace("_", " "), *cells)
    return table
