"""DiffDFKD's inversion loss (arXiv 2504.00870) as a guidance of the engine: alpha BN + beta CE."""

import hashlib
import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from synthkd.dfkd.losses import bn_distance, class_scores
from synthkd.dfkd.teachers import Teacher
from synthkd.engine.errors import SynthkdError
from synthkd.engine.guidance import Terms
from synthkd.engine.models import weights_digest


class TeacherGuidance:
    """L = alpha * BN distance of the group + beta * mean cross-entropy to the intended classes.

    Both terms are means over the group or properties of it, so their ratio does not depend on its size.
    """

    def __init__(self, teacher: Teacher, *, alpha: float = 0.1, beta: float = 1.0) -> None:
        """alpha, beta: weights of the BatchNorm and the class term; raises SynthkdError for negative ones."""
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not (math.isfinite(value) and value >= 0):
                raise SynthkdError(f"guidance: {name} is {value}; expected a number >= 0")
        if alpha == beta == 0:
            raise SynthkdError("guidance: alpha and beta are both 0; for an unguided set put guidance.scale to 0")
        self.teacher, self.alpha, self.beta = teacher, alpha, beta
        settings = f"{teacher.input_size} {teacher.get_buffer('mean').tolist()} {teacher.get_buffer('std').tolist()}"
        self._digest = hashlib.sha256((weights_digest([teacher]) + settings).encode()).hexdigest()

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Terms]:
        """images [B,3,H,W] in [0,1], targets [B,K] -> loss and the terms bn [] and ce [B], unweighted."""
        if targets.shape[1] != len(self.teacher.classes):
            raise SynthkdError(
                f"guidance: the teacher has {len(self.teacher.classes)} outputs, the recipe {targets.shape[1]} classes"
            )
        logits, taps = self.teacher.with_taps(images)
        bn, ce = bn_distance(taps).to(logits.device), class_scores(logits, targets.to(logits.dtype))
        return self.alpha * bn + self.beta * ce.mean(), {"bn": bn, "ce": ce}

    def describe(self) -> dict[str, Any]:
        """Kind, weights and the teacher's digest."""
        return {"kind": "diffdfkd", "alpha": self.alpha, "beta": self.beta, "teacher_sha256": self._digest}

    def annotate(self, images: Tensor) -> dict[str, Tensor]:
        """The teacher's logits [B,K] on the finished images."""
        logits: Tensor = self.teacher(images)
        return {"logits": logits}

    def modules(self) -> Iterable[nn.Module]:
        """The teacher."""
        return (self.teacher,)
