"""Trains a teacher on labelled real data: `python -m synthkd.bench.fit_teacher DATA/train.npz --out DATA/teacher`.

Plain cross-entropy; killed anywhere, the same command goes on, on a CPU to the same weights. Averaged weights are kept,
and their BatchNorm statistics measured on the training images. The one place that reads a teacher's own data.
"""

import argparse
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from synthkd.dfkd.cli_methods import Deadline, parsed_options, without_seed
from synthkd.dfkd.cli_options import pick_device
from synthkd.dfkd.cli_progress import Bars, StopFlag
from synthkd.dfkd.data import LabelledImages, load_test_set
from synthkd.dfkd.evaluate import evaluate
from synthkd.dfkd.fields import ABOVE_ZERO, AMOUNT, SHARE, TABLE, TEXT, YES_NO, Kind, check_fields, is_whole, whole
from synthkd.dfkd.nets import build_net, count_parameters
from synthkd.dfkd.prior_loop import StageLoop, StagePlan, checkpoint_of, generator_of
from synthkd.dfkd.progress import Progress, Silent
from synthkd.dfkd.student import card_toml
from synthkd.dfkd.teachers import Teacher, load_teacher
from synthkd.dfkd.training import Stopped
from synthkd.dfkd.views import ViewSpec, draw_views, looks
from synthkd.engine.declared import check_names
from synthkd.engine.environment import environment, versions
from synthkd.engine.errors import SynthkdError
from synthkd.engine.locks import folder_lock
from synthkd.engine.rows import write_atomically

_KINDS: Mapping[str, Kind] = {
    "arch": TEXT,
    "arch_args": TABLE,
    "steps": whole(1),
    "batch_size": whole(2),
    "learning_rate": ABOVE_ZERO,
    "warmup_steps": whole(0),
    "ema": SHARE,
    "flip": YES_NO,
    "shift": AMOUNT,
    "rotate": AMOUNT,
    "zoom": SHARE,
    "held_out": SHARE,
    "seed": Kind(lambda v: is_whole(v, 0, 2**63), "0 <= seed < 2**63"),
}
_SMALL = {"widths": [32, 64, 128, 256], "blocks": [1, 1, 1, 1], "stem_stride": 2}
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class TeacherSpec:
    """How a teacher is trained: AdamW, warm-up and cosine decay, running mean of the weights.

    arch, arch_args: a built-in network (`dfkd/nets.py`); flip, shift, rotate, zoom: augmentation, as in `DistillSpec`;
    held_out: share of the training images that is left out, to choose settings by; 0 for a teacher that is kept.
    """

    arch: str = "resnet"
    arch_args: Mapping[str, Any] = field(default_factory=lambda: dict(_SMALL))
    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    ema: float = 0.998
    flip: bool = True
    shift: float = 0.1
    rotate: float = 0.2
    zoom: float = 0.15
    held_out: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise SynthkdError for a value of the wrong type or outside its range."""
        check_fields("fit-teacher", {f.name: getattr(self, f.name) for f in fields(self)}, _KINDS)


@dataclass(frozen=True)
class TrainingSet:
    """Labelled images, and the data sets that they are from (see `engine.declared`)."""

    data: LabelledImages
    trained_on: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over images, labels and names."""
        told = hashlib.sha256("\n".join((*self.data.classes, *self.trained_on)).encode())
        told.update(self.data.labels.numpy().tobytes())
        told.update(self.data.images.numpy().tobytes())
        return told.hexdigest()


def load_training_set(path: Path) -> TrainingSet:
    """An .npz of x (uint8 [N,H,W,3]), y (integers [N]), classes and trained_on (texts), no pickles.

    Raises SynthkdError where one of them is missing or does not fit.
    """
    classes, trained_on = _texts(path)
    if not classes or not trained_on:
        raise SynthkdError(f"data {path}: classes and trained_on are missing; they name labels and data sets")
    return TrainingSet(load_test_set(str(path), classes, (0, 0)), check_names(f"data {path}: trained_on", trained_on))


def _texts(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What an .npz has as classes and trained_on, () where it has none."""
    try:
        with np.load(path, allow_pickle=False) as data:
            found = [tuple(map(str, data[n].tolist())) if n in data.files else () for n in ("classes", "trained_on")]
    except Exception as error:  # numpy raises whatever it stumbles over
        reason = " ".join(str(error).split())[:120]
        raise SynthkdError(f"data {path}: expected an .npz of x, y, classes and trained_on ({reason})") from error
    return found[0], found[1]


@dataclass(kw_only=True)
class TeacherFit:
    """One training in a folder: NAME.toml, NAME.safetensors and NAME.json, log.jsonl; a checkpoint until it is done."""

    training: TrainingSet
    spec: TeacherSpec
    out: Path
    name: str
    device: str = "cpu"
    progress: Progress = field(default_factory=Silent)
    should_stop: Callable[[], bool] = lambda: False

    def execute(self, test: LabelledImages | None = None) -> dict[str, Any]:
        """Take the steps that are left and return what NAME.json says; raises Stopped where that is asked for.

        test: scored once, at the end, or now where a training that is done has scored none. Raises SynthkdError where
        the folder holds another training of that name, for too few images, a network that does not take them, and a
        loss that is not finite.
        """
        self._identity = {"data": self.training.digest, **json.loads(json.dumps(asdict(self.spec)))}
        self._split()
        self._measure()
        self.out.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.out):
            told = self._finished()
            if told is None:
                told = self._fitted(test)
            elif test is not None and "test_accuracy" not in told:
                told = self._scored(told, test)
            checkpoint = checkpoint_of(self.out, self.name)
            for path in (checkpoint, *self.out.glob(f"{checkpoint.name}.*.tmp")):
                path.unlink(missing_ok=True)
        return told

    def _fitted(self, test: LabelledImages | None) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.spec.seed)
            net = build_net(self.spec.arch, len(self.training.data.classes), self.spec.arch_args)
            self._try_out(net)
            loop = self._loop(net)
            net = loop.run(lambda step: self._loss(loop.module, step), self._held_figures)
        self._settle(net, self._taken)
        return self._save(net, test, loop.figures)

    def _finished(self) -> dict[str, Any] | None:
        """What an earlier call wrote at its end; raises SynthkdError where it is of other data or another spec."""
        path = self.out / f"{self.name}.json"
        if not path.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            whole = {"trained_on", "images", "training"} <= set(found) and (self.out / f"{self.name}.toml").is_file()
            same = whole and found["identity"] == self._identity
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise SynthkdError(f"{path}: not readable; delete it and run the command again") from error
        if not same:
            raise SynthkdError(f"{path}: is of other data or another spec; choose another --name or folder")
        return found

    def _scored(self, told: dict[str, Any], test: LabelledImages) -> dict[str, Any]:
        """The teacher that is there, scored: the card and what NAME.json says, with its accuracy."""
        card = self.out / f"{self.name}.toml"
        score = round(evaluate(load_teacher(str(card), self.device), test).accuracy, 2)
        about = {"trained_on": told["trained_on"], "images": told["images"], "test_accuracy": score}
        write_atomically(card, card_toml(self._card(f"{self.name}.safetensors", about)))
        told = {**told, "test_accuracy": score}
        write_atomically(self.out / f"{self.name}.json", json.dumps(told, indent=2) + "\n")
        return told

    def _split(self) -> None:
        """Which rows are trained on, and which are left out."""
        count = len(self.training.data)
        held = round(count * self.spec.held_out)
        rows = torch.randperm(count, generator=generator_of(self.spec.seed, "held out", 0))
        self._held, self._taken = rows[:held], rows[held:]
        if len(self._taken) < self.spec.batch_size:
            raise SynthkdError(
                f"fit-teacher: {len(self._taken)} images to train on; expected at least one batch of "
                f"{self.spec.batch_size}"
            )

    def _measure(self) -> None:
        """Mean and deviation of the channels of what is trained on, in [0,1]."""
        images = self.training.data.images[self._taken]
        counts = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(3)]).double()
        values = torch.arange(256, dtype=torch.float64) / 255
        share = counts / counts.sum(1, keepdim=True)
        mean = (share * values).sum(1)
        std = ((share * (values - mean[:, None]).square()).sum(1)).sqrt().clamp_min(1e-3)
        self._mean, self._std = ([round(v, 4) for v in found.tolist()] for found in (mean, std))
        self._scale = [torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (self._mean, self._std)]

    def _normalised(self, images: Tensor) -> Tensor:
        """float32 [B,3,H,W] in [0,1] -> what the network reads."""
        return ((images - self._scale[0]) / self._scale[1]).contiguous(memory_format=torch.channels_last)

    def _try_out(self, net: nn.Module) -> None:
        try:
            with torch.no_grad():
                found = net.eval()(torch.zeros(1, *self.training.data.images.shape[1:]))
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            reason = " ".join(str(error).split())[:160]
            raise SynthkdError(f"fit-teacher: arch {self.spec.arch!r} does not take these images ({reason})") from error
        if found.shape != (1, len(self.training.data.classes)):
            raise SynthkdError(f"fit-teacher: arch {self.spec.arch!r} returns {tuple(found.shape)}; expected logits")

    def _loop(self, net: nn.Module) -> StageLoop:
        spec = self.spec
        plan = StagePlan(
            self.name, spec.steps, spec.learning_rate, spec.warmup_steps, spec.ema, spec.batch_size,
            command="fit-teacher",
        )  # fmt: skip
        return StageLoop(plan, net, self.out, self._identity, self.device, self.progress, self.should_stop)

    def _loss(self, module: Callable[[Tensor], Tensor], step: int) -> Tensor:
        """Cross-entropy of a step's batch; an epoch takes each image once, and drops what fills no batch."""
        spec, data = self.spec, self.training.data
        epoch, place = divmod(step, len(self._taken) // spec.batch_size)
        order = torch.randperm(len(self._taken), generator=generator_of(spec.seed, "order", epoch))
        rows = self._taken[order[place * spec.batch_size : (place + 1) * spec.batch_size]]
        kind = ViewSpec(flip=spec.flip, shift=spec.shift, rotate=spec.rotate, zoom=spec.zoom)
        views = draw_views(kind, spec.seed, epoch, rows.numpy(), len(data))
        images = data.images[rows]
        images = torch.where(torch.from_numpy(views.flip).view(-1, 1, 1, 1), images.flip(3), images).to(self.device)
        logits = module(self._normalised(looks(images, views, kind)))
        return F.cross_entropy(logits.float(), data.labels[rows].to(self.device))

    @torch.no_grad()
    def _settle(self, net: nn.Module, rows: Tensor) -> None:
        """BatchNorm's statistics of averaged weights (arXiv 1803.05407, sec. 3.2), measured on images as they are."""
        layers = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches
        net.train()
        for part in torch.chunk(rows, max(1, len(rows) // _AT_ONCE)):
            net(self._normalised(self.training.data.images[part].to(self.device).float() / 255))
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        net.eval()

    def _held_figures(self, net: nn.Module) -> dict[str, float]:
        """Accuracy in percent on what is left out; nothing where nothing is."""
        if not len(self._held):
            return {}
        self._settle(net, self._taken[: 2 * _AT_ONCE])
        data = self.training.data
        left = LabelledImages(data.images[self._held], data.labels[self._held], data.classes)
        return {"accuracy_held_out": round(evaluate(self._teacher(net), left).accuracy, 2)}

    def _teacher(self, net: nn.Module) -> Teacher:
        data = self.training.data
        size = (int(data.images.shape[2]), int(data.images.shape[3]))
        return Teacher(net, mean=self._mean, std=self._std, input_size=size, classes=data.classes).to(self.device)

    def _save(self, net: nn.Module, test: LabelledImages | None, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Weights, card, and NAME.json as the last file of all."""
        weights = self.out / f"{self.name}.safetensors"
        fresh = weights.with_suffix(".tmp")
        save_file({name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}, fresh)
        fresh.replace(weights)
        score = {"test_accuracy": round(evaluate(self._teacher(net), test).accuracy, 2)} if test else {}
        about = {"trained_on": list(self.training.trained_on), "images": len(self._taken), **score}
        write_atomically(self.out / f"{self.name}.toml", card_toml(self._card(weights.name, about)))
        told = {
            "identity": self._identity,
            **about,
            "parameters": count_parameters(net.requires_grad_(True)),
            "training": dict(figures),
            "sha256": {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()},
            "device": environment(torch.device(self.device), 0)["device"],
            "versions": versions(),
        }
        write_atomically(self.out / f"{self.name}.json", json.dumps(told, indent=2) + "\n")
        return told

    def _card(self, weights: str, about: Mapping[str, Any]) -> dict[str, Any]:
        data = self.training.data
        return {
            "arch": self.spec.arch,
            "weights": weights,
            "input_size": list(data.images.shape[2:]),
            "mean": self._mean,
            "std": self._std,
            "classes": list(data.classes),
            "arch_args": dict(self.spec.arch_args),
            "about": dict(about),
        }


def load_apart(path: Path, training: TrainingSet) -> LabelledImages:
    """A test part; raises SynthkdError for one that is declared to hold images of the training part."""
    for theirs in _texts(path)[1]:
        for ours in training.trained_on:  # parts of one data set are apart here: a test part is scored, never learned
            if f"{ours}/".startswith(f"{theirs}/") or f"{theirs}/".startswith(f"{ours}/"):
                raise SynthkdError(f"--test {path}: is {theirs!r}, and {ours!r} is trained on; expected another part")
    test = load_test_set(str(path), training.data.classes, (0, 0))
    if test.images.shape[1:] != training.data.images.shape[1:]:
        shapes = f"{tuple(test.images.shape[1:])}; {tuple(training.data.images.shape[1:])} is trained on"
        raise SynthkdError(f"--test {path}: images are {shapes}")
    return test


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m synthkd.bench.fit_teacher", description=__doc__)
    parser.add_argument("train", type=Path, help="an .npz of x, y, classes and trained_on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the card")
    parser.add_argument("--test", type=Path, help="an .npz of x and y, scored once at the end")
    parser.add_argument("--arch", default=TeacherSpec.arch, help="a built-in network (resnet)")
    parser.add_argument("--set", action="append", help="a field of TeacherSpec, NAME=VALUE, such as steps=3000")
    parser.add_argument("--name", help="of the card's file (the arch)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after so many, exit code 75; the same command goes on")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(words)


def _spec(args: argparse.Namespace) -> TeacherSpec:
    """Raises SynthkdError for a field it does not have, or a wrong value."""
    changes = {"arch": args.arch, "seed": args.seed} | without_seed(parsed_options(args.set, None))
    if changes["arch"] != TeacherSpec.arch:
        changes = {"arch_args": {}} | changes
    check_fields("fit-teacher", changes, _KINDS)
    return replace(TeacherSpec(), **changes)


def main(words: Sequence[str]) -> int:
    """The command: 0; 2 after one line on standard error; 75 (130 after an interrupt) where it stopped before its end.

    On a CPU with one thread.
    """
    args, out, began = _parsed(words), Console(), time.monotonic()
    try:
        if not _NAME.fullmatch(args.name or args.arch):
            raise SynthkdError(f"--name {args.name or args.arch!r}: expected letters, digits, _ and -")
        device = pick_device(args.device)
        training, spec = load_training_set(args.train), _spec(args)
        test = load_apart(args.test, training) if args.test else None
        if device == "cpu":
            torch.set_num_threads(1)
        with Bars(out) as bars, StopFlag() as stop:
            job = TeacherFit(
                training=training, spec=spec, out=args.out, name=args.name or spec.arch, device=device,
                progress=bars, should_stop=Deadline(stop, args.minutes).is_set,
            )  # fmt: skip
            try:
                told = job.execute(test)
            except Stopped:
                return stop.exit_code(out, "the same command goes on from here", "step")
    except (SynthkdError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out / job.name}.toml: {_measured(told)}, {time.monotonic() - began:.0f} s")
    return 0


def _measured(told: Mapping[str, Any]) -> str:
    """The accuracy in words, with what it is of."""
    if "test_accuracy" in told:
        return f"accuracy {told['test_accuracy']} % on the test part"
    held = told["training"].get("accuracy_held_out")
    return "accuracy not measured (--test scores it)" if held is None else f"accuracy {held} % on what is held out"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
