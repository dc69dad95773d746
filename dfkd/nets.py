"""Built-in networks, by name; a teacher card's `arch` and `arch_args` build one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from synthkd.engine.errors import SynthkdError, suggest


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut (arXiv 1512.03385, fig. 5 left)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        """A 1x1 convolution is the shortcut where shape or stride change."""
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """x [B,c_in,H,W] -> [B,c_out,H/stride,W/stride]."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A BatchNorm residual classifier for small images: one stage per width, halved between stages."""

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        stem_stride: int = 1,
        in_channels: int = 3,
    ) -> None:
        """widths, blocks: channels and number of blocks of each stage."""
        super().__init__()
        if len(widths) != len(blocks) or not widths or min(*widths, *blocks) < 1:
            raise ValueError(f"widths {list(widths)} and blocks {list(blocks)} must be equally many positive numbers")
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs = [widths[0], *widths[:-1]]
        self.layers = nn.ModuleList(
            nn.Sequential(
                BasicBlock(c_in, c_out, 1 if i == 0 else 2), *(BasicBlock(c_out, c_out, 1) for _ in range(count - 1))
            )
            for i, (c_in, c_out, count) in enumerate(zip(inputs, widths, blocks, strict=True))
        )
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,in_channels,H,W], normalised -> logits [B,num_classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class PlainCNN(nn.Module):
    """A plain convolutional classifier with GroupNorm, for 32x32 images; no BatchNorm statistics to lean on."""

    def __init__(self, num_classes: int, widths: Sequence[int], in_channels: int = 3) -> None:
        """widths: channels of each stage, every one halved by max pooling."""
        super().__init__()
        steps: list[nn.Module] = []
        for c_in, c_out in zip([in_channels, *widths[:-1]], widths, strict=True):
            steps += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.GroupNorm(8, c_out), nn.GELU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*steps)
        self.fc = nn.Linear(widths[-1] * (32 >> len(widths)) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,in_channels,32,32], normalised -> logits [B,num_classes]."""
        logits: Tensor = self.fc(self.features(x).flatten(1))
        return logits


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"resnet": ResNet, "plain_cnn": PlainCNN}


def build_net(arch: str, num_classes: int, arch_args: Mapping[str, Any]) -> nn.Module:
    """A fresh network by name; raises SynthkdError for an unknown name or wrong arguments."""
    if arch not in ARCHITECTURES:
        raise SynthkdError(f"arch {arch!r} is unknown; {suggest(arch, ARCHITECTURES)}")
    try:
        return ARCHITECTURES[arch](num_classes, **arch_args)
    except (TypeError, ValueError) as error:
        raise SynthkdError(f"arch {arch!r}: arch_args do not fit: {error}") from error


def count_parameters(net: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in net.parameters())
