"""Feature matching: a student's maps, seen through a small regressor, against its teacher's (FitNets)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthkd.dfkd.losses import wide
from synthkd.dfkd.stages import Stages, paired


class FeatureMatcher(nn.Module):
    """FitNets' hint (arXiv 1412.6550, eq. 3), 1/2 ||t - r(s)||^2, on every paired stage.

    Two things differ from the equation: an error is a mean over channels and positions, and it is divided by the mean
    square of the teacher's map. So a stage counts the same whatever its channels, size and scale, and 1/2 is what a
    student of zeros gets. r: a 1x1 convolution where channels differ, else nothing; its parameters train beside the
    student and are no part of it.
    """

    def __init__(self, student: Stages, teacher: Stages, seed: int = 0) -> None:
        """seed: of the regressors' weights, normal with variance 1/C_in."""
        super().__init__()
        self.pairs = paired(student.names, teacher.names)
        generator = torch.Generator().manual_seed(seed)
        self.regressors = nn.ModuleList(
            _regressor(student.channels[s], teacher.channels[t], generator) for s, t in self.pairs
        )

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        """Maps [B,C,h,w] of both networks' stages, the deepest last -> the mean over paired stages, a scalar.

        The student's are resized (bilinear) to the teacher's size; computed in float32 (float64 stays), under autocast
        too. The teacher gets no gradient.
        """
        device = student_maps[-1].device.type
        with torch.autocast(device, enabled=False):
            errors = [
                _relative(regressor(wide(student_maps[s])), wide(teacher_maps[t]).detach())
                for (s, t), regressor in zip(self.pairs, self.regressors, strict=True)
            ]
        return torch.stack(errors).mean()


def _regressor(c_in: int, c_out: int, generator: torch.Generator) -> nn.Module:
    if c_in == c_out:
        return nn.Identity()
    layer = nn.utils.skip_init(nn.Conv2d, c_in, c_out, 1)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / math.sqrt(c_in))
        layer.bias.zero_()
    return layer


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    """Half the mean squared error in units of the mean square of `wanted`; finite for one of zeros."""
    if found.shape[2:] != wanted.shape[2:]:
        found = F.interpolate(found, size=wanted.shape[2:], mode="bilinear", align_corners=False)
    size = wanted.square().mean().clamp_min(torch.finfo(wanted.dtype).eps)
    return (found - wanted).square().mean() / (2 * size)
