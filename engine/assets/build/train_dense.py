"""Train the teacher of the segmentation task on scenes of scikit-learn's train digits; a few minutes on one thread."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from synthkd.dfkd.dense import dense_confusion, dense_hard_loss, mean_iou
from synthkd.dfkd.dense_nets import DeepLab
from synthkd.dfkd.dense_task import SIDE, digit_glyphs, digit_scenes, scenes, waves

SEED, STEPS, BATCH, RATE = 7, 800, 64, 4e-3
BLOCK = 50 * BATCH  # scenes that are drawn at once
ARGS = {"widths": [16, 32, 64, 64], "blocks": [1, 1, 1, 1], "pyramid": 40}
MEAN, STD = [0.35] * 3, [0.25] * 3
FOLDER = Path(__file__).resolve().parents[1] / "segments"
LICENSE = "UCI Optical Recognition of Handwritten Digits, CC BY 4.0, as shipped with scikit-learn"


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Fresh scenes: images of 0..1 and label maps."""
    glyphs, labels, _ = digit_glyphs("train")
    for start in range(0, steps, BLOCK // BATCH):
        images, masks = scenes(glyphs, labels, BLOCK, 1000 + start, waves)
        for rows in torch.arange(BLOCK).split(BATCH)[: steps - start]:
            yield images[rows].float() / 255, masks[rows]


def normalised(x: Tensor) -> Tensor:
    """As the card says."""
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def fit(net: nn.Module) -> None:
    """AdamW with half a cosine."""
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.02)
    for step, (x, masks) in enumerate(batches(STEPS)):
        rate = RATE * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimiser.param_groups[0]["lr"] = rate
        loss = dense_hard_loss(net(normalised(x)), masks)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        if step % 100 == 0:
            print(step, round(loss.item(), 4), flush=True)


@torch.no_grad()
def scored(net: nn.Module) -> tuple[float, float]:
    """Mean IoU and pixel accuracy on the 500 test scenes, percent."""
    data, confusion = digit_scenes("test"), torch.zeros(11, 11, dtype=torch.int64)
    for x, masks in zip(data.images.split(100), data.masks.split(100), strict=True):
        large = nn.functional.interpolate(net(normalised(x.float() / 255)), size=(SIDE, SIDE), mode="bilinear")
        confusion += dense_confusion(large.argmax(1), masks, 11)
    return mean_iou(confusion), 100 * float(confusion.diagonal().sum() / confusion.sum())


def write(state: dict[str, Tensor], iou: float, pixels: float) -> None:
    """Weights, and the card beside them."""
    FOLDER.mkdir(exist_ok=True)
    target = FOLDER / "teacher.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, target)
    target.chmod(0o644)
    about = {
        "description": "The dense network to distil: DeepLabV3+-type, reads scenes of handwritten digits.",
        "trained_on": ["digits/train"],
        "data": "scenes of the 1,000 train digits (digits_split.json) on striped grounds, new ones each step",
        "license": LICENSE,
        "mean_iou": f"{iou:.2f} % of the 500 test scenes, {pixels:.2f} % of their pixels",
    }
    names = digit_glyphs("train")[2]
    lines = ['task = "segmentation"', 'arch = "deeplab"', 'weights = "teacher.safetensors"']
    lines += [f"input_size = [{SIDE}, {SIDE}]", f"mean = {MEAN}", f"std = {STD}", f"classes = {json.dumps(names)}"]
    lines += ["", "[arch_args]", *(f"{key} = {value}" for key, value in ARGS.items())]
    lines += ["", "[about]", *(f"{key} = {json.dumps(value)}" for key, value in about.items())]
    (FOLDER / "teacher.toml").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Train, round the matrices to fp16, score, write."""
    torch.manual_seed(SEED)
    start, net = time.time(), DeepLab(11, **ARGS)
    fit(net.train())
    state = {k: v.half() if v.dim() > 1 else v for k, v in net.state_dict().items()}
    net.load_state_dict(state)
    iou, pixels = scored(net.eval())
    write(state, iou, pixels)
    print(json.dumps({"mean_iou": iou, "pixels": pixels, "minutes": round((time.time() - start) / 60, 2)}), flush=True)


if __name__ == "__main__":
    main()
