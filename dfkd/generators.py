"""Networks that are thrown away after a method has used them: image generators and patch discriminators."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from synthkd.dfkd.losses import wide
from synthkd.engine.errors import SynthkdError

# Pixels that one logit of a PatchDiscriminator sees -> its number of stride-2 convolutions.
PATCHES = {10: 2, 22: 3, 46: 4}


class Generator(nn.Module):
    """Noise -> images in [0,1]: a linear layer, two upsampling convolutions, a sigmoid (arXiv 2110.15094, appendix).

    Without classes: what an image shows is the business of the losses.
    """

    def __init__(self, size: tuple[int, int], noise: int = 100, widths: Sequence[int] = (256, 128, 64)) -> None:
        """size: height and width of the images, any; noise: D; widths: channels of the three resolutions."""
        super().__init__()
        self.size, self.noise, first = size, noise, widths[0]
        self.grid = math.ceil(size[0] / 4), math.ceil(size[1] / 4)
        self.linear = nn.Linear(noise, first * self.grid[0] * self.grid[1])
        self.norm = nn.BatchNorm2d(first)
        steps: list[nn.Module] = []
        for c_in, c_out in pairwise(widths):
            steps += [nn.Upsample(scale_factor=2), nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out)]
            steps.append(nn.LeakyReLU(0.2))
        self.steps = nn.Sequential(*steps, nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        """z [B,D] -> images [B,3,H,W] in [0,1], float32 at least.

        Cut at the right and below where 4 does not divide the size.
        """
        x = self.linear(z).view(len(z), -1, *self.grid)
        y: Tensor = self.steps(self.norm(x))
        return wide(y[:, :, : self.size[0], : self.size[1]]).sigmoid()


class PatchDiscriminator(nn.Module):
    """Images -> a logit per patch: real or made (arXiv 1611.07004, sec. 3.2.2).

    patch: pixels that a logit sees, 10 (stride 4), 22 (stride 8) or 46 (stride 16), as MosaicKD's networks for images
    of 32 pixels and for larger ones.
    """

    def __init__(self, patch: int = 10, width: int = 128, in_channels: int = 3) -> None:
        """width: channels of the first layer, doubled in the second. Raises SynthkdError for another patch."""
        super().__init__()
        if patch not in PATCHES:
            raise SynthkdError(f"patch is {patch}; expected {', '.join(map(str, PATCHES))} pixels")
        channels = [in_channels, width, *[2 * width] * (PATCHES[patch] - 1)]
        steps: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(pairwise(channels)):
            steps.append(nn.Conv2d(c_in, c_out, 4, 2, 1, bias=i == 0))
            steps += [nn.BatchNorm2d(c_out)] if i else []
            steps.append(nn.LeakyReLU(0.2))
        self.patch, self.stride = patch, 2 ** PATCHES[patch]
        self.steps = nn.Sequential(*steps, nn.Conv2d(channels[-1], 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x [B,3,H,W] in [0,1], at least a stride each way -> logits [B,1,h,w]."""
        y: Tensor = self.steps(2 * x - 1)
        return y


def patch_loss(logits: Tensor, real: bool) -> Tensor:
    """Binary cross-entropy of patch logits against all real, or all made, in nats, a scalar: mean of softplus(-+l)."""
    scores = wide(logits)
    return F.softplus(-scores if real else scores).mean()
