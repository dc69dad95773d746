"""What a student is trained for: the weighted losses of a DistillSpec, as one module that is one graph."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthkd.dfkd.cams import cam_consistency, check_cam, check_grad_cam, grad_cams, region_distance
from synthkd.dfkd.dense import check_dense_views, dense_hard_loss, dense_kd_loss
from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.feature_losses import FeatureMatcher
from synthkd.dfkd.losses import class_scores
from synthkd.dfkd.stages import Stages
from synthkd.dfkd.teachers import Teacher
from synthkd.dfkd.views import ViewSpec
from synthkd.engine.errors import SynthkdError
from synthkd.kernels import kd_loss


class Taught(NamedTuple):
    """What the teacher says of a batch, without a graph.

    logits: [B,K], of dense networks [B,K,h,w], float32; maps [B,C,h,w] and Grad-CAMs [B,h,w] of its
    stages where a loss wants them.
    """

    logits: Tensor
    maps: tuple[Tensor, ...] = ()
    cams: tuple[Tensor, ...] = ()


class Objective(nn.Module):
    """Images, the teacher's word and labels -> the loss, a scalar.

    kl T^2 KL(teacher || student) (`kernels.kd_loss`) + hard * cross-entropy with the labels + cam * `cam_consistency` +
    grad_cam * `region_distance` of Grad-CAMs + features * `FeatureMatcher`. Of dense networks the first two are means
    over pixels (`dense_kd_loss`, `dense_hard_loss`), and CAMs there are none. Parameters are the student's, and those
    that match features, which are thrown away.
    """

    def __init__(self, student: Teacher, teacher: Teacher, spec: DistillSpec) -> None:
        """student: its `net` is trained, in train mode. Raises SynthkdError for a loss that the networks rule out."""
        super().__init__()
        self.net, self.spec, self.num_classes = student.net, spec, len(student.classes)
        self.dense = student.dense
        if self.dense:
            _check_dense(spec)
        self._others = {"student": student, "teacher": teacher}  # in a dict: neither is a child, nor in the state
        self._stages: dict[str, Stages] = {}
        self.matcher: FeatureMatcher | None = None
        if spec.cam or spec.grad_cam or spec.features:
            self._stages = {name: Stages(t.net, t.input_size) for name, t in self._others.items()}
        if spec.features:
            device = student.get_buffer("mean").device
            self.matcher = FeatureMatcher(self._stages["student"], self._stages["teacher"], spec.seed).to(device)
        if spec.cam:
            check_cam(self._stages["student"], self._stages["teacher"], [self._head("student"), self._head("teacher")])
        if spec.grad_cam:
            check_grad_cam(self._stages["student"], self._stages["teacher"])

    @property
    def student(self) -> Teacher:
        """The network that learns, with its preprocessing."""
        return self._others["student"]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within it the hooks on both networks are on, once for all steps."""
        with ExitStack() as stack:
            for stages in self._stages.values():
                stack.enter_context(stages.attached())
            yield

    def _head(self, name: str) -> Tensor:
        layer = self._others[name].classifier
        if layer is None:
            raise SynthkdError(f"distill: cam needs a linear layer behind the maps, the {name} has none; set it to 0")
        return layer.weight

    def teach(self, x: Tensor) -> Taught:
        """Images [B,3,H,W] in [0,1] -> the teacher's word."""
        teacher = self._others["teacher"]
        with torch.set_grad_enabled(self.spec.grad_cam > 0):
            if not self._stages:
                return Taught(teacher(x).float())
            stages = self._stages["teacher"]
            logits, maps = stages.reading(lambda: teacher(x), differentiable=self.spec.grad_cam > 0)
            cams = grad_cams(maps, logits.float(), logits.argmax(1)) if self.spec.grad_cam else []
        return Taught(logits.detach().float(), tuple(m.detach() for m in maps), tuple(c.detach() for c in cams))

    def forward(self, x: Tensor, taught: Taught, labels: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss, and the student's logits [B,K] without a graph.

        x [B,3,H,W] in [0,1]; labels int64 [B]; targets: class shares [B,K] where images are blended.
        """
        maps: list[Tensor] = []
        if self._stages:
            logits, maps = self._stages["student"].reading(lambda: self.net(self.student.preprocess(x)))
        else:
            logits = self.net(self.student.preprocess(x))
        logits = logits.float()
        with torch.autocast(x.device.type, enabled=False):
            terms = [*self._of_logits(logits, taught, labels, targets), *self._of_maps(logits, maps, taught)]
            if not (self.spec.kl or self.spec.hard):  # so that every parameter has a gradient, as DDP wants
                terms.append(0 * logits.sum())
        return torch.stack(terms).sum(), logits.detach()

    def _of_logits(self, logits: Tensor, taught: Taught, labels: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        if self.spec.kl:
            between = dense_kd_loss if self.dense else kd_loss
            yield self.spec.kl * between(logits, taught.logits, self.spec.temperature)
        if self.spec.hard and self.dense:
            yield self.spec.hard * dense_hard_loss(logits, labels)
        elif self.spec.hard:
            plain = F.cross_entropy(logits, labels) if targets is None else class_scores(logits, targets).mean()
            yield self.spec.hard * plain

    def _of_maps(self, logits: Tensor, maps: list[Tensor], taught: Taught) -> Iterator[Tensor]:
        spec = self.spec
        if spec.cam:
            yield spec.cam * cam_consistency(maps, taught.maps, self._head("student"), self._head("teacher"))
        if spec.grad_cam:
            yield spec.grad_cam * region_distance(grad_cams(maps, logits, taught.logits.argmax(1)), taught.cams)
        if self.matcher is not None:
            yield spec.features * self.matcher(maps, taught.maps)


def _check_dense(spec: DistillSpec) -> None:
    """Raise SynthkdError for losses and views that label maps do not have."""
    if spec.cam or spec.grad_cam:
        raise SynthkdError("distill: cam and grad_cam are of classifiers, and the teacher is dense; set them to 0")
    if spec.hard:
        check_dense_views(ViewSpec.of(spec))
