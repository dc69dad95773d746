"""Scores of a classifier on labelled images."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from synthkd.dfkd.data import LabelledImages


@dataclass(frozen=True)
class Score:
    """accuracy in percent; confusion: counts [K][K], rows true, columns predicted."""

    accuracy: float
    confusion: list[list[int]]


@torch.no_grad()
def predict(net: nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Logits [N,K] of a network that takes images in [0,1], for uint8 images [N,3,H,W]."""
    device = next(iter(net.parameters())).device
    parts = [net(chunk.to(device).float() / 255).cpu() for chunk in torch.split(images, batch_size)]
    return torch.cat(parts)


def evaluate(net: nn.Module, data: LabelledImages) -> Score:
    """Accuracy and confusion matrix of a network that takes images in [0,1]."""
    predicted, num_classes = predict(net, data.images).argmax(dim=1), len(data.classes)
    flat = torch.bincount(data.labels * num_classes + predicted, minlength=num_classes**2)
    accuracy = (predicted == data.labels).float().mean().item() * 100
    return Score(round(accuracy, 4), flat.view(num_classes, num_classes).tolist())
