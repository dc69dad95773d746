"""Losses, one equation each."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from synthkd.dfkd.taps import Tap
from synthkd.engine.errors import SynthkdError, suggest

DIVERGENCES = ("kl", "js")


def bn_distance(taps: Sequence[Tap]) -> Tensor:
    """Distance of a group's BatchNorm statistics from the teacher's running ones, a scalar.

    sum over layers of ||mu - mu_run||_2 + ||var - var_run||_2, unweighted, on the inputs of each BatchNorm
    (arXiv 1912.08795, eq. 4, with norms not squared, as in arXiv 2504.00870). A property of the group; the
    biased variance makes it the same for a group and for copies of it. The same for taps of stored moments. Zero for
    no taps.
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
    return -(targets * F.log_softmax(wide(logits), dim=1)).sum(dim=1)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy per sample [B], in nats, of softmax(logits [B,K]): -sum_k p_k log p_k."""
    log_p = F.log_softmax(wide(logits), dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def disagreement(student_logits: Tensor, teacher_logits: Tensor, kind: str = "kl") -> Tensor:
    """Per sample [B]: 1[argmax s = argmax t] D(t || s), where both name one class (arXiv 2504.00870, L_adv negated).

    student_logits, teacher_logits: [B,K]; kind: `kl` for sum_k t_k log(t_k / s_k), `js` for the Jensen-Shannon
    divergence in nats, at most log 2. float32 at least. Raises SynthkdError for another kind.
    """
    if kind not in DIVERGENCES:
        raise SynthkdError(f"guidance: divergence is {kind!r}; {suggest(str(kind), DIVERGENCES)}")
    s, t = F.log_softmax(wide(student_logits), dim=1), F.log_softmax(wide(teacher_logits), dim=1)
    apart = _kl(t, s) if kind == "kl" else _js(t, s)
    return (s.argmax(dim=1) == t.argmax(dim=1)).to(apart.dtype) * apart


def divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(t || s) per sample [B], in nats, of logits [B,K]: sum_k t_k log(t_k / s_k), at temperature 1.

    MosaicKD's generator raises it wherever the student is (arXiv 2110.15094, eq. 3); DiffDFKD's `disagreement` only
    where both name one class.
    """
    return _kl(F.log_softmax(wide(teacher_logits), dim=1), F.log_softmax(wide(student_logits), dim=1))


def class_balance(logits: Tensor) -> Tensor:
    """How far a group's mean prediction is from all classes alike, in bits: sum_k p_k log2 p_k, p = mean_b p(k | x_b).

    logits: [B,K]. A scalar from -log2 K (all alike) to 0 (one class): minus the entropy of the mean prediction
    (the information loss of arXiv 1904.01186, eq. 8; in bits as MosaicKD's published weight of 10 takes it).
    """
    log_p = F.log_softmax(wide(logits), dim=1).logsumexp(dim=0) - math.log(len(logits))
    return (log_p.exp() * log_p).sum() / math.log(2)


def class_rows(logits: Tensor) -> Tensor:
    """Logits [B,K] as they are; of label maps, [B,K,h,w], every position as a row of its own: [B h w,K]."""
    return logits if logits.dim() == 2 else logits.movedim(1, -1).flatten(0, -2)


def competition(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """1 - JS(t, s) per sample [B], in nats, of logits [B,K] (R_compete of arXiv 1912.08795, eq. 6). float32 at least.

    Small where the networks differ on an image, unlike `disagreement` also where they name two classes.
    """
    return 1 - _js(F.log_softmax(wide(teacher_logits), dim=1), F.log_softmax(wide(student_logits), dim=1))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def local_realism(logits: Tensor) -> Tensor:
    """Per image [B], in nats: mean over patches of softplus(-l), l the logits [B,1,h,w] of a patch discriminator.

    The generator's side of MosaicKD's patch game (arXiv 2110.15094, eq. 4): low where every patch passes for real. Its
    mean over images is `generators.patch_loss(logits, real=True)`.
    """
    return F.softplus(-wide(logits)).flatten(1).mean(dim=1)


def _js(log_p: Tensor, log_q: Tensor) -> Tensor:
    middle = torch.logaddexp(log_q, log_p) - math.log(2)
    return (_kl(log_p, middle) + _kl(log_q, middle)) / 2


def total_variation(images: Tensor) -> Tensor:
    """Total variation per image [B]: the sum of ||x - x shifted by one pixel||_2 over four directions.

    Right, down and both diagonals, over all channels, on what both images cover (R_TV of arXiv 1912.08795, eq. 3, in
    the norm of the authors' code, there over a whole batch). images: [B,C,H,W]; an image one pixel wide or high has no
    neighbours that way. float32 at least; the gradient of a flat image is 0.
    """
    x = wide(images)
    pairs = [
        (x[..., :, 1:], x[..., :, :-1]),
        (x[..., 1:, :], x[..., :-1, :]),
        (x[..., 1:, 1:], x[..., :-1, :-1]),
        (x[..., 1:, :-1], x[..., :-1, 1:]),
    ]
    return torch.stack([image_norm(a - b) for a, b in pairs]).sum(dim=0)


def image_norm(images: Tensor) -> Tensor:
    """||x||_2 per image [B] (R_l2 of arXiv 1912.08795, eq. 3); images: [B,C,H,W]. float32 at least."""
    return torch.linalg.vector_norm(wide(images).flatten(1), dim=1)


def head_alignment(features: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """How far class means of features lie from the classifier's own directions, a scalar in [0, 2].

    Mean over the classes k of the group of 1 - cos(m_k - m, w_k - mean_j w_j): m_k the mean feature of class k, m of
    the group, w_k rows of the last linear layer. At the end of training the two are parallel (self-duality, NC3 of
    Papyan, Han and Donoho 2020, PNAS, arXiv 2008.08186, sec. 2).
    features: [B,D]; targets: class shares [B,K], which weigh the samples; weight: [K,D]. A class whose mean is the
    group's (one class alone, equal features) counts 1 and has no gradient.
    """
    f, w = wide(features), weight.to(wide(features).dtype)
    y = targets.to(f.dtype)
    shares = y.sum(dim=0)
    present = shares > 0
    means = (y.T @ f) / torch.where(present, shares, 1)[:, None]
    away, wanted = means - f.mean(dim=0), w - w.mean(dim=0)
    squared, size = away.square().sum(dim=1), f.square().sum(dim=1).mean()
    defined = squared > (256 * torch.finfo(f.dtype).eps) ** 2 * size  # below, the difference is rounding
    norm = torch.where(defined, squared, 1).sqrt() * wanted.norm(dim=1).clamp_min(torch.finfo(f.dtype).tiny)
    cosine = torch.where(defined, (away * wanted).sum(dim=1) / norm, 0)
    return ((1 - cosine) * present).sum() / present.sum()


def wide(x: Tensor) -> Tensor:
    """float32 at least; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
