"""What a student is trained for: the weighted losses of a DistillSpec, as one module that is one graph."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.losses import class_scores
from synthkd.dfkd.teachers import Teacher
from synthkd.kernels import kd_loss


class Taught(NamedTuple):
    """What the teacher says of a batch: logits [B,K], float32, and its stages' maps where a loss wants them."""

    logits: Tensor
    maps: tuple[Tensor, ...]


class Objective(nn.Module):
    """Images, the teacher's word and labels -> the loss, a scalar.

    kl * T^2 KL(teacher || student) + hard * cross-entropy with the labels + cam, grad_cam and features, see the files
    of these names. Parameters are the student's, and those that match features, which are thrown away.
    """

    def __init__(self, student: Teacher, teacher: Teacher, spec: DistillSpec) -> None:
        """student: its `net` is trained, in train mode."""
        super().__init__()
        self.net, self.spec, self.num_classes = student.net, spec, len(student.classes)
        self._others = {"student": student, "teacher": teacher}  # in a dict: neither is a child, nor in the state

    @property
    def student(self) -> Teacher:
        """The network that learns, with its preprocessing."""
        return self._others["student"]

    @torch.no_grad()
    def teach(self, x: Tensor) -> Taught:
        """Images [B,3,H,W] in [0,1] -> the teacher's word."""
        return Taught(self._others["teacher"](x).float(), ())

    def forward(self, x: Tensor, taught: Taught, labels: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss, and the student's logits [B,K] without a graph.

        x [B,3,H,W] in [0,1]; labels int64 [B]; targets: class shares [B,K] where images are blended.
        """
        logits = self.net(self.student.preprocess(x)).float()
        spec, terms = self.spec, []
        if spec.kl:
            terms.append(spec.kl * kd_loss(logits, taught.logits, spec.temperature))
        if spec.hard:
            plain = F.cross_entropy(logits, labels) if targets is None else class_scores(logits, targets).mean()
            terms.append(spec.hard * plain)
        return torch.stack(terms).sum(), logits.detach()
