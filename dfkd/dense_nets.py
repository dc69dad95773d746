"""A built-in network for dense tasks, of the DeepLabV3+ type: dilated residual encoder, pyramid of rates, decoder."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DilatedBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, holes (arXiv 1606.00915) and a shortcut (arXiv 1512.03385, fig. 5 left).

    rate: pixels from tap to tap of both convolutions.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, rate: int = 1) -> None:
        """The shortcut is a 1x1 convolution where shape or stride change."""
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, rate, rate, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, rate, rate, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """x [B,c_in,H,W] -> [B,c_out,H/stride,W/stride], sides rounded up."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling with a branch of the whole image's mean (arXiv 1706.05587, fig. 5)."""

    def __init__(self, c_in: int, c_out: int, rates: Sequence[int]) -> None:
        """rates: of a 3x3 branch each, beside the 1x1 branch and the mean's."""
        super().__init__()
        self.branches = nn.ModuleList([_unit(c_in, c_out, 1), *(_unit(c_in, c_out, 3, rate) for rate in rates)])
        # Without BatchNorm: one position an image, so that a batch of one can be trained on.
        self.mean = nn.Conv2d(c_in, c_out, 1)
        self.project = _unit((2 + len(rates)) * c_out, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,c_in,h,w] -> [B,c_out,h,w]."""
        whole = F.relu(self.mean(x.mean(dim=(2, 3), keepdim=True))).expand(-1, -1, *x.shape[2:])
        y: Tensor = self.project(torch.cat([*(branch(x) for branch in self.branches), whole], dim=1))
        return y


class DeepLab(nn.Module):
    """Images -> a logit per class and position at half their size, rounded up (arXiv 1802.02611, fig. 2).

    A stem and a first stage at stride 2, whose map the decoder joins; the second stage at 4, the others at 8, the
    fourth and later ones with holes in place of a stride.
    """

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int] = (16, 32, 64, 64),
        blocks: Sequence[int] = (1, 1, 1, 1),
        pyramid: int = 48,
        rates: Sequence[int] = (1, 2, 3),
        low_level: int = 12,
        in_channels: int = 3,
    ) -> None:
        """widths, blocks: channels and number of blocks of each stage, three at least.

        pyramid: channels behind the encoder; rates: of its branches, in positions of the map; low_level: channels that
        the first stage's map is brought to. Raises ValueError for fewer stages and numbers below 1.
        """
        super().__init__()
        if len(widths) != len(blocks) or len(widths) < 3 or min(*widths, *blocks, *rates, pyramid, low_level) < 1:
            asked = f"widths {list(widths)} and blocks {list(blocks)}"
            raise ValueError(f"{asked} must be equally many, three or more; all numbers at least 1")
        self.stem = _unit(in_channels, widths[0], 3, stride=2)
        stages: list[nn.Module] = []
        for i, (c_in, c_out, count) in enumerate(zip([widths[0], *widths[:-1]], widths, blocks, strict=True)):
            stride, rate = (2 if i in (1, 2) else 1), 2 ** max(0, i - 2)
            first = DilatedBlock(c_in, c_out, stride, rate)
            stages.append(nn.Sequential(first, *(DilatedBlock(c_out, c_out, 1, rate) for _ in range(count - 1))))
        self.low, self.deep = stages[0], nn.Sequential(*stages[1:])
        self.pyramid = Pyramid(widths[-1], pyramid, rates)
        self.join = _unit(widths[0], low_level, 1)
        self.decode = _unit(pyramid + low_level, pyramid, 3)
        self.head = nn.Conv2d(pyramid, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,in_channels,H,W], normalised -> logits [B,num_classes,H/2,W/2], sides rounded up."""
        low = self.low(self.stem(x))
        deep = self.pyramid(self.deep(low))
        deep = F.interpolate(deep, size=low.shape[2:], mode="bilinear", align_corners=False)
        logits: Tensor = self.head(self.decode(torch.cat([deep, self.join(low)], dim=1)))
        return logits


def _unit(c_in: int, c_out: int, kernel: int, rate: int = 1, stride: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU; the size stays at stride 1."""
    convolution = nn.Conv2d(c_in, c_out, kernel, stride, rate * (kernel // 2), rate, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.ReLU())
