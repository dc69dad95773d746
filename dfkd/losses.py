"""Losses, one equation each."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from synthkd.dfkd.teachers import Tap


def bn_distance(taps: Sequence[Tap]) -> Tensor:
    """Distance of a group's BatchNorm statistics from the teacher's running ones, a scalar.

    sum over layers of ||mu - mu_run||_2 + ||var - var_run||_2, unweighted, on the inputs of each BatchNorm
    (arXiv 1912.08795, eq. 4, with norms not squared, as in arXiv 2504.00870). A property of the group; the
    biased variance makes it the same for a group and for copies of it. Zero for a teacher without BatchNorm.
    """
    if not taps:
        return torch.zeros(())
    terms = [
        torch.linalg.vector_norm(t.stats.mean - t.running_mean) + torch.linalg.vector_norm(t.stats.var - t.running_var)
        for t in taps
    ]
    return torch.stack(terms).sum()


def class_scores(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy per sample [B] of logits [B,K] against class shares [B,K]: -sum_k y_k log p_k."""
    return -(targets * F.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, dim=1)).sum(dim=1)


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Distillation loss, a scalar: T^2 KL(softmax(t/T) || softmax(s/T)), mean over the batch (arXiv 1503.02531).

    student_logits, teacher_logits: [B,K]; temperature T > 0.
    """
    s = F.log_softmax(student_logits / temperature, dim=1)
    t = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(s, t, reduction="batchmean", log_target=True) * temperature**2
