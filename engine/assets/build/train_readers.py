"""Train the teacher (real digits only) and the judge (real digits and glyphs) on scikit-learn's digits."""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import glyphs
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from synthkd.dfkd.nets import PlainCNN, ResNet

SEED = 7
SPLIT_SEED = 2026
TRAIN_SIZE = 1_000
TEACHER = {"widths": [32, 64, 128], "blocks": [2, 2, 2], "stem_stride": 2}
JUDGE = {"widths": [32, 64, 128]}
TEACHER_EPOCHS = 40
JUDGE_EPOCHS = 5
HELD_OUT = 1_000
DIGITS_FOLDER = Path(__file__).resolve().parents[1] / "digits"
LICENSE = "UCI Optical Recognition of Handwritten Digits, CC BY 4.0, as shipped with scikit-learn"
TEACHER_ABOUT = {
    "description": "The classifier to distil: a BatchNorm ResNet that reads scikit-learn's digits.",
    "trained_on": ["digits/train"],
    "data": "1,000 of the 1,797 digits (digits_split.json), enlarged bilinearly to 32x32 RGB",
    "license": LICENSE,
}
JUDGE_ABOUT = {
    "description": "An independent reader of digits in any style, without BatchNorm; used only to score.",
    "trained_on": ["digits/train", "glyphs"],
    "data": "the teacher's 1,000 digits and 47,000 glyphs rendered from fonts",
    "license": LICENSE,
}


@dataclass
class Split:
    """Real digits as floats of 0..1, with labels and channel statistics of the train part."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor
    mean: float
    std: float


def split_indices() -> tuple[np.ndarray, np.ndarray]:
    """Give the fixed stratified split of load_digits: 1,000 train and 797 test indices."""
    target = load_digits().target
    train, test = train_test_split(
        np.arange(len(target)), train_size=TRAIN_SIZE, stratify=target, random_state=SPLIT_SEED
    )
    return np.sort(train), np.sort(test)


def real_digits() -> Split:
    """Load the real digits, upsampled to 32x32 RGB."""
    data = load_digits()
    small = torch.tensor(data.images / 16.0, dtype=torch.float32)[:, None]
    images = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    labels = torch.tensor(data.target)
    train, test = (torch.tensor(part) for part in split_indices())
    x = images[train].contiguous()
    return Split(x, labels[train], images[test].contiguous(), labels[test], float(x.mean()), float(x.std()))


def augment(x: torch.Tensor, generator: torch.Generator, strength: float = 1.0) -> torch.Tensor:
    """Shift, rotate and scale each image a little; the border repeats outwards."""
    draw = torch.rand(4, len(x), generator=generator).mul(2).sub(1).mul(strength)
    angle, scale = draw[0] * 0.2, 1 + 0.1 * draw[1]
    c, s = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta = torch.stack([torch.stack([c, -s, draw[2] * 0.12], 1), torch.stack([s, c, draw[3] * 0.12], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def fit(net: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int, batch: int, norm: tuple[float, float]) -> None:
    """Train by AdamW with a cosine decay and mild augmentation."""
    generator = torch.Generator().manual_seed(SEED)
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.02)
    total, step = epochs * (len(x) // batch), 0
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator)[: len(x) // batch * batch].split(batch):
            optimiser.param_groups[0]["lr"] = (
                2e-3 * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / total)) / 2
            )
            images = (augment(x[rows], generator) - norm[0]) / norm[1]
            loss = F.cross_entropy(net(images), y[rows], label_smoothing=0.05)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            step += 1


@torch.no_grad()
def settle_batchnorm(net: nn.Module, x: torch.Tensor, norm: tuple[float, float]) -> None:
    """Set the BatchNorm statistics to the exact average over clean and mildly augmented train images."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    generator = torch.Generator().manual_seed(SEED + 1)
    views = torch.cat([x, augment(x, generator, 0.5)])
    net.train()
    for rows in torch.randperm(len(views), generator=generator).split(250):
        net((views[rows] - norm[0]) / norm[1])
    net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, x: torch.Tensor, y: torch.Tensor, norm: tuple[float, float]) -> float:
    """Score images of 0..1."""
    net.eval()
    guesses = torch.cat([net((batch - norm[0]) / norm[1]).argmax(1) for batch in x.split(500)])
    return float((guesses == y).float().mean())


def keep(net: nn.Module, name: str) -> None:
    """Round the matrices to fp16 in place (statistics and biases stay fp32) and write the weights."""
    state = {k: v.half() if v.dim() > 1 else v for k, v in net.state_dict().items()}
    net.load_state_dict(state)
    target = DIGITS_FOLDER / f"{name}.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, target)
    target.chmod(0o644)


def card(name: str, arch: str, args: dict, split: Split, about: dict[str, object]) -> None:
    """Write the card beside the weights."""
    lines = [f'arch = "{arch}"', f'weights = "{name}.safetensors"', "input_size = [32, 32]"]
    lines += [f"mean = {[round(split.mean, 6)] * 3}", f"std = {[round(split.std, 6)] * 3}"]
    lines += [f"classes = {json.dumps(list(glyphs.DIGITS))}", "", "[arch_args]"]
    lines += [f"{key} = {value}" for key, value in args.items()]
    lines += ["", "[about]", *(f"{key} = {json.dumps(value)}" for key, value in about.items())]
    (DIGITS_FOLDER / f"{name}.toml").write_text("\n".join(lines) + "\n")


def train_teacher(split: Split) -> dict[str, float]:
    """Train the teacher on the real train digits and write it."""
    torch.manual_seed(SEED)
    start, norm = time.time(), (round(split.mean, 6), round(split.std, 6))
    net = ResNet(num_classes=10, **TEACHER)
    fit(net, split.train_x, split.train_y, TEACHER_EPOCHS, 64, norm)
    settle_batchnorm(net, split.train_x, norm)
    keep(net, "teacher")
    score = accuracy(net, split.test_x, split.test_y, norm)
    about = TEACHER_ABOUT | {"accuracy": f"{score:.2%} of the 797 test digits"}
    card("teacher", "resnet", TEACHER, split, about)
    return {
        "test_accuracy": round(score, 4),
        "epochs": TEACHER_EPOCHS,
        "minutes": round((time.time() - start) / 60, 2),
    }


def train_judge(split: Split) -> dict[str, float]:
    """Train the judge on the real train digits and on rendered glyphs, and write it."""
    torch.manual_seed(SEED)
    start, norm = time.time(), (round(split.mean, 6), round(split.std, 6))
    images, looks = glyphs.load()
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    y = torch.tensor([look.digit for look in looks])
    train_x = torch.cat([x[HELD_OUT:], split.train_x.repeat(6, 1, 1, 1)])
    train_y = torch.cat([y[HELD_OUT:], split.train_y.repeat(6)])
    net = PlainCNN(num_classes=10, **JUDGE)
    fit(net, train_x, train_y, JUDGE_EPOCHS, 64, norm)
    keep(net, "judge")
    real, drawn = (
        accuracy(net, split.test_x, split.test_y, norm),
        accuracy(net, x[:HELD_OUT], y[:HELD_OUT], norm),
    )
    scores = f"{real:.2%} of the 797 test digits, {drawn:.2%} of {HELD_OUT:,} held-out glyphs"
    card("judge", "plain_cnn", JUDGE, split, JUDGE_ABOUT | {"accuracy": scores})
    return {
        "test_accuracy": round(real, 4),
        "glyph_accuracy": round(drawn, 4),
        "epochs": JUDGE_EPOCHS,
        "minutes": round((time.time() - start) / 60, 2),
    }


def write_split() -> None:
    """Write the split's indices into load_digits."""
    train, test = split_indices()
    about = "indices into sklearn.datasets.load_digits(); stratified, train_test_split random_state"
    content = {"about": about, "seed": SPLIT_SEED, "train": train.tolist(), "test": test.tolist()}
    (DIGITS_FOLDER / "digits_split.json").write_text(json.dumps(content) + "\n")


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["teacher", "judge"], help="train one of the two")
    args = parser.parse_args()
    split = real_digits()
    write_split()
    trainers = {"teacher": train_teacher, "judge": train_judge}
    for name in [args.only] if args.only else list(trainers):
        figures = trainers[name](split)
        (glyphs.SCRATCH / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n")
        print(name, json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
