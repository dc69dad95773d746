"""`synthkd evaluate`: score a classifier or a dense network, from its card or as it ships, on labelled images."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from synthkd.dfkd import cli_options as options
from synthkd.dfkd.cli_progress import Bars
from synthkd.dfkd.data import LabelledImages, load_synthetic, load_test_set
from synthkd.dfkd.dense import DenseImages
from synthkd.dfkd.dense_task import load_dense_set
from synthkd.dfkd.evaluate import DENSE_BATCH, DenseScore, Network, Score, evaluate_dense
from synthkd.dfkd.evaluate import evaluate as score
from synthkd.dfkd.progress import Progress
from synthkd.dfkd.ship import Shipped, load_shipped
from synthkd.dfkd.teachers import Teacher, load_teacher
from synthkd.engine import SynthkdError

out = Console()
err = Console(stderr=True)

_SET = "set:"
_SHOWN = 20  # classes of a table
_ROWS = {
    "top5": ("among the five likeliest", "%"),
    "nll": ("negative log-likelihood", "nats"),
    "calibration_error": ("expected calibration error", "%"),
    "teacher_agreement": ("agrees with the teacher", "%"),
    "teacher_kl": ("KL(teacher || network)", "nats"),
}


def evaluate(
    card: Annotated[str, typer.Argument(help="Card of a student or teacher, or a shipped student (.onnx, .pt2).")],
    data: Annotated[
        str,
        typer.Option(help="digits:test, class folders, .npz of x and y, set:FOLDER (synthetic), segments:test."),
    ],
    teacher: Annotated[str | None, typer.Option(help="Card of a teacher to compare with on the same images.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print all scores as JSON.")] = False,
    batch_size: Annotated[int, typer.Option(help="Images per pass.")] = 256,
    limit: Annotated[int | None, typer.Option(help="Score only so many images, evenly spread over the set.")] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Trust a module:callable of a card, and a .pt2, to run code.")
    ] = False,
    device: options.Device = None,
) -> None:
    """Score a classifier on labelled images: accuracy, likelihood, calibration, agreement with a teacher.

    A dense network (task "segmentation" of its card) is scored on label maps: intersection over union, pixel accuracy.
    """
    if batch_size < 1:
        raise SynthkdError(f"--batch-size is {batch_size}; expected a whole number >= 1")
    if limit is not None and limit < 1:
        raise SynthkdError(f"--limit is {limit}; expected a whole number >= 1")
    where = options.pick_device(device)
    net = _network(card, where, allow_code)
    if net.dense:
        _evaluate_dense(card, net, data, (teacher, limit, batch_size), json_output)
        return
    beside = load_teacher(teacher, where, allow_code=allow_code) if teacher is not None else None
    if beside is not None and len(beside.classes) != len(net.classes):
        counts = f"{len(beside.classes)} classes, {card!r} {len(net.classes)}"
        raise SynthkdError(f"--teacher {teacher!r}: has {counts}; they must agree")
    images = _spread(_images(data, net), limit)
    with Bars(err if json_output else out) as bars:  # standard output is JSON's alone
        result = _scored(net, images, beside, batch_size, bars)
    if json_output:
        print(json.dumps(result.to_dict()))
        return
    out.print(f"{card}: {result.accuracy:.2f} % on {data}", soft_wrap=True, highlight=False, markup=False)
    out.print(_table(result, net.classes, len(images)))


def _evaluate_dense(
    card: str, net: Teacher | Shipped, data: str, asked: tuple[str | None, int | None, int], json_output: bool
) -> None:
    """asked: --teacher, --limit and --batch-size."""
    teacher, limit, batch_size = asked
    if teacher is not None:
        what = f"{card!r} is a dense network, which is compared with none"
        raise SynthkdError(f"--teacher {teacher!r}: {what}; leave it out")
    found = load_dense_set(data, net.classes)
    if limit is not None and limit < len(found):
        rows = [i * len(found) // limit for i in range(limit)]
        found = DenseImages(found.images[rows], found.masks[rows], found.classes)
    with Bars(err if json_output else out) as bars:
        bars.begin("evaluate", len(found), "images")
        told = partial(bars.advance, "evaluate")
        result = evaluate_dense(net, found, batch_size=min(batch_size, DENSE_BATCH), on_batch=told)
        bars.end("evaluate")
    if json_output:
        print(json.dumps(result.to_dict()))
        return
    out.print(f"{card}: mIoU {result.mean_iou:.2f} % on {data}", soft_wrap=True, highlight=False, markup=False)
    out.print(_dense_table(result, net.classes, len(found)))


def _dense_table(result: DenseScore, classes: tuple[str, ...], count: int) -> Table:
    table = Table(title=f"{count} images", show_header=False)
    table.add_row("mean intersection over union", f"{result.mean_iou:.2f} %")
    table.add_row("accuracy of pixels", f"{result.accuracy:.2f} %")
    for name, value in list(zip(classes, result.class_iou, strict=True))[:_SHOWN]:
        table.add_row(f"IoU of {escape(name)}", "nowhere" if value is None else f"{value:.2f} %")
    if len(classes) > _SHOWN:
        table.add_row(f"{len(classes) - _SHOWN} more classes", "--json has all")
    table.add_row("images per second", f"{result.images_per_second:.0f}")
    return table


def _network(card: str, device: str, allow_code: bool) -> Teacher | Shipped:
    """From a card, or a shipped file by its suffix."""
    if Path(card).suffix in (".onnx", ".pt2"):
        return load_shipped(Path(card), device, allow_code=allow_code)
    return load_teacher(card, device, allow_code=allow_code)


def _images(reference: str, net: Teacher | Shipped) -> LabelledImages:
    """See --data."""
    if not reference.startswith(_SET):
        return load_test_set(reference, net.classes, net.input_size)
    folder = Path(reference.removeprefix(_SET))
    found = load_synthetic(folder, None, net.input_size, previews=False)
    if len(found.classes) != len(net.classes):
        counts = f"{len(found.classes)} classes, the network {len(net.classes)}"
        raise SynthkdError(f"data {reference!r}: has {counts}; they must agree")
    return found


def _spread(data: LabelledImages, limit: int | None) -> LabelledImages:
    """At most `limit` images at equal distances, so that sorted sets keep their classes."""
    if limit is None or limit >= len(data):
        return data
    rows = [i * len(data) // limit for i in range(limit)]
    return LabelledImages(data.images[rows], data.labels[rows], data.classes)


def _scored(
    net: Network, images: LabelledImages, teacher: Teacher | None, batch_size: int, bars: Progress
) -> Score:
    """Scores, with a bar."""
    bars.begin("evaluate", len(images) * (1 if teacher is None else 2), "images")
    found = score(net, images, teacher=teacher, batch_size=batch_size, on_batch=partial(bars.advance, "evaluate"))
    bars.end("evaluate")
    return found


def _table(result: Score, classes: tuple[str, ...], count: int) -> Table:
    table = Table(title=f"{count} images", show_header=False)
    table.add_row("accuracy", f"{result.accuracy:.2f} %")
    for name, (words, unit) in _ROWS.items():
        value = getattr(result, name)
        if value is not None:
            table.add_row(words, f"{value:.{2 if unit == '%' else 4}f} {unit}")
    each = result.class_accuracy or []
    order = sorted(range(len(each)), key=lambda k: math.inf if (v := each[k]) is None else v)
    for k in order[:_SHOWN]:
        value = each[k]
        table.add_row(f"class {escape(classes[k])}", "no image" if value is None else f"{value:.2f} %")
    if len(order) > _SHOWN:
        table.add_row(f"{len(order) - _SHOWN} more classes", "each above these; --json has all")
    table.add_row("images per second", f"{result.images_per_second:.0f}")
    return table
