"""Built-in networks, by name; a teacher card's or a student's `arch` and `arch_args` build one.

Tensor names follow the layouts in which CIFAR weights are commonly published, so that such files load strictly.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from synthkd.dfkd.dense_nets import DeepLab
from synthkd.engine.errors import SynthkdError, suggest


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut (arXiv 1512.03385, fig. 5 left)."""

    def __init__(self, c_in: int, c_out: int, stride: int, shortcut: nn.Module | None = None) -> None:
        """shortcut: by default a 1x1 convolution where shape or stride change."""
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = shortcut or nn.Identity()
        if shortcut is None and (stride != 1 or c_in != c_out):
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
        widths: Sequence[int] = (16, 32, 64),
        blocks: Sequence[int] = (1, 1, 1),
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


class PaddedShortcut(nn.Module):
    """A shortcut without weights: every second pixel, new channels zero (arXiv 1512.03385, option A)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        """The new channels are split: half before the old ones, half behind."""
        super().__init__()
        self.stride, self.pad = stride, (c_out - c_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """x [B,c_in,H,W] -> [B,c_out,H/stride,W/stride]."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))


def padded_block(c_in: int, c_out: int, stride: int) -> BasicBlock:
    """A BasicBlock whose shortcut has no weights."""
    return BasicBlock(c_in, c_out, stride, PaddedShortcut(c_in, c_out, stride))


class StagedResNet(nn.Module):
    """Residual classifier for 32x32 images: 3x3 stem without pooling, `layer1`, `layer2`, … and `linear`.

    The CIFAR ResNet of arXiv 1512.03385, sec. 4.2, has three stages of 16, 32 and 64 channels of padded blocks; the
    32-pixel form of ResNet-18 and -34 has four of BasicBlock (its shortcut's tensors: `shortcut.0`, `shortcut.1`).
    """

    def __init__(
        self,
        num_classes: int,
        *,
        block: Callable[[int, int, int], nn.Module],
        widths: Sequence[int],
        blocks: Sequence[int],
        in_channels: int = 3,
    ) -> None:
        """block: (c_in, c_out, stride) -> a block; widths, blocks: channels and number of blocks of each stage."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages = [f"layer{i + 1}" for i in range(len(widths))]
        inputs = [widths[0], *widths[:-1]]
        for i, (c_in, c_out, count) in enumerate(zip(inputs, widths, blocks, strict=True)):
            first = block(c_in, c_out, 1 if i == 0 else 2)
            rest = [block(c_out, c_out, 1) for _ in range(count - 1)]
            self.add_module(self.stages[i], nn.Sequential(first, *rest))
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,in_channels,H,W], normalised -> logits [B,num_classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


class WideBlock(nn.Module):
    """Pre-activated pair of 3x3 convolutions (arXiv 1605.07146, fig. 1)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        """Where the channels change, the shortcut is a 1x1 convolution of the activated input."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B,c_in,H,W] -> [B,c_out,H/stride,W/stride]."""
        active = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + (x if self.convShortcut is None else self.convShortcut(active))


class WideStage(nn.Module):
    """One stage of a wide ResNet; it exists for the `.layer.` in its tensors' names."""

    def __init__(self, c_in: int, c_out: int, count: int, stride: int) -> None:
        """count: number of blocks, the first of which has the stride."""
        super().__init__()
        rest = [WideBlock(c_out, c_out, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(WideBlock(c_in, c_out, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,c_in,H,W] -> [B,c_out,H/stride,W/stride]."""
        y: Tensor = self.layer(x)
        return y


class WideResNet(nn.Module):
    """WRN-depth-width for 32x32 images (arXiv 1605.07146, table 1), without dropout."""

    def __init__(self, num_classes: int, depth: int, width: int, in_channels: int = 3) -> None:
        """Raises ValueError where depth is not 6n + 4."""
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(f"depth {depth} and width {width}: depth must be 6n + 4 (10, 16, 22, …), width at least 1")
        widths, count = [16, 16 * width, 32 * width, 64 * width], (depth - 4) // 6
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.block1, self.block2, self.block3 = (
            WideStage(c_in, c_out, count, stride)
            for (c_in, c_out), stride in zip(pairwise(widths), (1, 2, 2), strict=True)
        )
        self.bn1 = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,in_channels,H,W], normalised -> logits [B,num_classes]."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        logits: Tensor = self.fc(F.relu(self.bn1(x)).mean(dim=(2, 3)))
        return logits


class VGG(nn.Module):
    """VGG with BatchNorm and one linear layer, for 32x32 images (arXiv 1409.1556, table 1)."""

    def __init__(self, num_classes: int, *, blocks: Sequence[int], in_channels: int = 3) -> None:
        """blocks: 3x3 convolutions at 64, 128, 256, 512 and 512 channels, max pooling behind each block."""
        super().__init__()
        steps: list[nn.Module] = []
        channels = in_channels
        for width, count in zip((64, 128, 256, 512, 512), blocks, strict=True):
            for _ in range(count):
                steps += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            steps.append(nn.MaxPool2d(2, ceil_mode=True))  # below 32 px the last blocks see 1x1 and keep it
        self.features = nn.Sequential(*steps)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,in_channels,H,W], normalised -> logits [B,num_classes]."""
        logits: Tensor = self.classifier(self.features(x).mean(dim=(2, 3)))
        return logits


def _cifar_resnet(depth: int) -> Callable[..., nn.Module]:
    """ResNet-(6n+2) of arXiv 1512.03385, sec. 4.2."""
    return partial(StagedResNet, block=padded_block, widths=(16, 32, 64), blocks=((depth - 2) // 6,) * 3)


def _resnet32px(*blocks: int) -> Callable[..., nn.Module]:
    return partial(StagedResNet, block=BasicBlock, widths=(64, 128, 256, 512), blocks=blocks)


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "resnet": ResNet,
    "plain_cnn": PlainCNN,
    **{f"resnet{depth}": _cifar_resnet(depth) for depth in (8, 20, 32, 44, 56, 110)},
    "resnet18": _resnet32px(2, 2, 2, 2),
    "resnet34": _resnet32px(3, 4, 6, 3),
    "wrn": WideResNet,
    **{f"wrn{d}_{w}": partial(WideResNet, depth=d, width=w) for d, w in ((16, 1), (16, 2), (40, 1), (40, 2))},
    "vgg8": partial(VGG, blocks=(1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, blocks=(1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, blocks=(2, 2, 2, 2, 2)),
    "deeplab": DeepLab,
    "vgg16": partial(VGG, blocks=(2, 2, 3, 3, 3)),
}


def build_net(arch: str, num_classes: int, arch_args: Mapping[str, Any]) -> nn.Module:
    """A fresh network by name; raises SynthkdError for an unknown name or wrong arguments."""
    if arch not in ARCHITECTURES:
        raise SynthkdError(f"arch {arch!r} is unknown; {suggest(arch, ARCHITECTURES)}")
    try:
        return ARCHITECTURES[arch](num_classes, **arch_args)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SynthkdError(f"arch {arch!r}: arch_args do not fit: {reason}") from error


def count_parameters(net: nn.Module) -> int:
    """Number of trainable values."""
    return sum(p.numel() for p in net.parameters())
