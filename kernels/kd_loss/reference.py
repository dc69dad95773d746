"""Eager oracle of `kd_loss`; runs in any float dtype, float64 included."""

import torch
import torch.nn.functional as F
from torch import Tensor


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Distillation loss, a scalar: T^2 KL(softmax(t/T) || softmax(s/T)), mean over the batch (arXiv 1503.02531).

    student_logits, teacher_logits: [B,K]; temperature T > 0. Half precision is computed in float32.
    """
    s = F.log_softmax(_wide(student_logits) / temperature, dim=1)
    t = F.log_softmax(_wide(teacher_logits) / temperature, dim=1)
    return F.kl_div(s, t, reduction="batchmean", log_target=True) * temperature**2


def _wide(x: Tensor) -> Tensor:
    """float32 at least; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
