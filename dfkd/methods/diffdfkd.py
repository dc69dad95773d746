"""DiffDFKD's inversion loss (arXiv 2504.00870) as a guidance of the engine; terms for teachers without BatchNorm."""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from synthkd.dfkd.losses import (
    DIVERGENCES,
    bn_distance,
    class_scores,
    disagreement,
    entropy,
    head_alignment,
    local_realism,
)
from synthkd.dfkd.patches import PatchCritic
from synthkd.dfkd.taps import Memory, averaged, batchnorm_layers
from synthkd.dfkd.teachers import Look, Teacher, merged_looks
from synthkd.engine.errors import SynthkdError, suggest
from synthkd.engine.guidance import Terms
from synthkd.engine.models import weights_digest
from synthkd.engine.settings import architecture_of

KIND = "diffdfkd"
# For teachers without statistics, where nothing was said. Not measured: a starting point, no recommendation.
DEFAULT_ENTROPY, DEFAULT_HEAD = 0.1, 0.5


class Evidence(NamedTuple):
    """What some of a group's images show: the teacher's look, the student's logits [b,K] and a critic's [b,1,h,w].

    None where there is no student or no critic.
    """

    look: Look
    told: Tensor | None
    local: Tensor | None = None


def _together(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [x for x in parts if x is not None]
    return None if len(known) < len(parts) else known[0] if len(known) == 1 else torch.cat(known)


class TeacherGuidance:
    """L = alpha (bn + moments) + beta ce + gamma adv + entropy H + head N + patch R, properties or means of the group.

    bn, moments: distance of the group's statistics from the teacher's, of BatchNorm inputs and of stored moments;
    ce: cross-entropy to the intended classes; adv: minus the disagreement of student and teacher where both name one
    class (arXiv 2504.00870, L_adv); H: entropy of the teacher's output; N: alignment of class means with the
    classifier's rows; R: how far patches are from passing a frozen discriminator (`losses.local_realism`). No ratio of
    terms depends on the size of the group.

    `round` and `student` are for the caller: which round of student training this guidance belongs to, and the
    student of it; without one there is no adversarial term.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        alpha: float = 0.1,
        beta: float = 1.0,
        gamma: float = 0.0,
        divergence: str = "kl",
        entropy: float | None = None,
        head: float | None = None,
        bn_momentum: float = 0.0,
        patch: float = 0.0,
        patches: PatchCritic | None = None,
        student: Teacher | None = None,
        round: int = 0,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """alpha, beta, gamma, entropy, head: weights >= 0; divergence: `kl` or `js`, of the adversarial term.

        entropy, head: None is 0 for a teacher with statistics, and DEFAULT_ENTROPY and DEFAULT_HEAD for one without.
        bn_momentum: share of the statistics of a group's earlier calls in those compared, 0 up to below 1; they begin
        as the teacher's running ones and never leave the group (as FastDFKD's momentum statistics do within a batch).
        patch: weight >= 0 of the discriminator `patches`.
        about: plain values that a fingerprint must know where gamma > 0: how the student of each round is trained.
        Raises SynthkdError for a negative weight, for weights of which none steers, for an unknown divergence, for a
        student of other classes, and for `head` on a teacher without a linear layer over the classes.
        """
        known, aligned = teacher.has_statistics, _rows(teacher) is not None
        self.alpha, self.beta, self.gamma, self.divergence = alpha, beta, float(gamma), divergence
        self.bn_momentum, self.patch, self.patches = float(bn_momentum), float(patch), patches
        self.entropy = float(entropy) if entropy is not None else 0.0 if known else DEFAULT_ENTROPY
        self.head = float(head) if head is not None else 0.0 if known or not aligned else DEFAULT_HEAD
        self.teacher, self.student, self.round, self.about = teacher, student, round, dict(about or {})
        self._given: dict[str, Any] | None = None
        self._check(known, aligned)
        if alpha > 0 and not known:
            logging.getLogger("synthkd").warning(
                "teacher has no BatchNorm and no stored moments: the statistics term (alpha) is off; class, entropy "
                "and head terms steer alone"
            )
        mean, std = (teacher.get_buffer(name).tolist() for name in ("mean", "std"))
        settings = f"{json.dumps(architecture_of(teacher.net), sort_keys=True)} {teacher.input_size} {mean} {std}"
        self._digest = hashlib.sha256((weights_digest([teacher]) + settings).encode()).hexdigest()

    def _check(self, has_statistics: bool, has_rows: bool) -> None:
        for name in ("alpha", "beta", "gamma", "entropy", "head", "patch"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise SynthkdError(f"guidance: {name} is {value}; expected a number >= 0")
        if self.patch > 0 and self.patches is None:
            raise SynthkdError(f"guidance: patch is {self.patch}, but there are no patches; see `synthkd fit-patches`")
        if not 0 <= self.bn_momentum < 1:
            raise SynthkdError(f"guidance: bn_momentum is {self.bn_momentum}; expected 0 up to below 1")
        if self.divergence not in DIVERGENCES:
            raise SynthkdError(f"guidance: divergence is {self.divergence!r}; {suggest(self.divergence, DIVERGENCES)}")
        if not any((self.alpha and has_statistics, self.beta, self.gamma, self.entropy, self.head, self.patch)):
            why = " (alpha does not count: the teacher has no statistics)" if self.alpha else ""
            raise SynthkdError(f"guidance: all weights are 0{why}; for an unguided set put guidance.scale to 0")
        if self.head > 0 and not has_rows:
            count = len(self.teacher.classes)
            raise SynthkdError(f"guidance: head is {self.head}, but the teacher has no linear layer of {count} outputs")
        if self.student is not None and self.student.classes != self.teacher.classes:
            ours, theirs = len(self.student.classes), len(self.teacher.classes)
            raise SynthkdError(
                f"guidance: the student names {ours} classes, the teacher {theirs}; they must be the same"
            )

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Terms]:
        """images [B,3,H,W] in [0,1], targets [B,K] -> loss and the active terms, unweighted.

        Group terms []: bn, moments, head; per sample [B]: ce, adv, entropy, patch.
        """
        return self.judge([self.look(images)], targets, self.begin())[:2]

    def look(self, images: Tensor) -> Evidence:
        """What teacher and student show of images [b,3,H,W] in [0,1]."""
        given, told = self._given, None
        if self.gamma > 0 and self.student is not None:
            told = functional_call(self.student, given["student"], images) if given else self.student(images)
        look = self.teacher.look(images)
        local = self.patches(images) if self.patch > 0 and self.patches is not None else None
        return Evidence(_aimed(look, given["targets"]) if given else look, told, local)

    def given(self) -> dict[str, Any]:
        """The statistics to match, and the student's tensors: what a graph of the gradient takes as inputs.

        targets: name of a BatchNorm layer -> (mean, variance), [C] each; student: name -> parameter or buffer.
        """
        layers: dict[str, Any] = batchnorm_layers(self.teacher.net) if self.alpha > 0 else {}
        targets = {name: (layer.running_mean, layer.running_var) for name, layer in layers.items()}
        student = self.student if self.gamma > 0 else None
        named = {} if student is None else {**dict(student.named_parameters()), **dict(student.named_buffers())}
        return {"targets": targets, "student": {name: tensor.detach() for name, tensor in named.items()}}

    @contextmanager
    def using(self, given: dict[str, Any]) -> Iterator[None]:
        """Within it `look` takes these in place of its own."""
        before, self._given = self._given, given
        try:
            yield
        finally:
            self._given = before

    def constant(self) -> Sequence[nn.Module]:
        """The teacher, and the critic where it has a say."""
        return (self.teacher, *self._critics())

    def _critics(self) -> Sequence[nn.Module]:
        return (self.patches,) if self.patch > 0 and self.patches is not None else ()

    def begin(self) -> Memory | None:
        """The running statistics themselves: what the group's are averaged with before it has any."""
        if self.bn_momentum == 0 or self.alpha == 0:
            return None
        layers: dict[str, Any] = batchnorm_layers(self.teacher.net)
        return {name: (layer.running_mean, layer.running_var) for name, layer in layers.items()}

    def attached(self) -> AbstractContextManager[None]:
        """Taps stay on within it."""
        return self.teacher.attached()

    def judge(
        self, seen: Sequence[Evidence], targets: Tensor, memory: Memory | None
    ) -> tuple[Tensor, Terms, Memory | None]:
        """The loss of a group, of all of which `seen` is the looks in order; see `__call__`."""
        if targets.shape[1] != len(self.teacher.classes):
            raise SynthkdError(
                f"guidance: the teacher has {len(self.teacher.classes)} outputs, the recipe {targets.shape[1]} classes"
            )
        look, told = merged_looks([x.look for x in seen]), _together([x.told for x in seen])
        local = _together([x.local for x in seen])
        terms, after = self._statistics(look, memory)
        if self.beta > 0:
            terms["ce"] = (self.beta, class_scores(look.logits, targets.to(look.logits.dtype)))
        if told is not None:
            terms["adv"] = (self.gamma, -disagreement(told, look.logits, self.divergence))
        if self.entropy > 0:
            terms["entropy"] = (self.entropy, entropy(look.logits))
        if self.head > 0:
            terms["head"] = (self.head, self._head(look, targets))
        if local is not None:
            terms["patch"] = (self.patch, local_realism(local))
        if not terms:  # an adversary alone, before its first round: no direction, but a gradient to take
            return look.logits.sum() * 0.0, {}, after
        weighted = [weight * term.mean() for weight, term in terms.values()]
        return reduce(torch.add, weighted), {name: term for name, (_, term) in terms.items()}, after

    def _statistics(
        self, seen: Look, memory: Memory | None
    ) -> tuple[dict[str, tuple[float, Tensor]], Memory | None]:
        if self.alpha == 0:
            return {}, memory
        taps, after = averaged(seen.taps, memory, self.bn_momentum)
        found = {"bn": taps, "moments": seen.stored}
        return {name: (self.alpha, bn_distance(taps)) for name, taps in found.items() if taps}, after

    def _head(self, seen: Look, targets: Tensor) -> Tensor:
        rows = _rows(self.teacher)
        if rows is None or seen.features is None:
            raise SynthkdError("guidance: the teacher's last linear layer is not called in its forward pass; head to 0")
        return head_alignment(seen.features, targets, rows)

    def describe(self) -> dict[str, Any]:
        """Kind, weights, the teacher's digest, and what else is active; nothing of a trained student."""
        out: dict[str, Any] = dict(self.about) if self.gamma > 0 else {}
        out |= {"kind": KIND, "alpha": self.alpha, "beta": self.beta, "teacher_sha256": self._digest}
        if self.gamma > 0:
            out |= {"gamma": self.gamma, "divergence": self.divergence}
        out |= {name: value for name in ("entropy", "head") if (value := getattr(self, name)) > 0}
        if self.patch > 0 and self.patches is not None:
            out |= {"patch": self.patch, "patches_sha256": self.patches.digest()}
        if self.alpha > 0 and self.bn_momentum > 0:
            out["bn_momentum"] = self.bn_momentum
        if self.alpha > 0 and self.teacher.moments is not None:
            out["moments_sha256"] = self.teacher.moments.digest()
        return out

    def annotate(self, images: Tensor) -> dict[str, Tensor]:
        """The teacher's logits [B,K] on the finished images."""
        logits: Tensor = self.teacher(images)
        return {"logits": logits}

    def modules(self) -> Iterable[nn.Module]:
        """The teacher, and the student and the critic where there is one."""
        return (self.teacher, *(() if self.student is None else (self.student,)), *self._critics())


def _aimed(look: Look, targets: Mapping[str, tuple[Tensor, Tensor]]) -> Look:
    """The look with other statistics to match, by layer name."""
    taps = [t._replace(running_mean=targets[t.name][0], running_var=targets[t.name][1]) for t in look.taps]
    return look._replace(taps=taps)


def _rows(teacher: Teacher) -> Tensor | None:
    """Weight [K,D] of the linear layer that gives the class scores, if there is one."""
    last = teacher.classifier
    return last.weight if last is not None and last.out_features == len(teacher.classes) else None
