"""DeepInversion (arXiv 1912.08795): pixels of whole groups, optimised until the teacher knows them as its own data."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from synthkd.dfkd.fields import ABOVE_ZERO, AMOUNT, TEXT, YES_NO, whole
from synthkd.dfkd.losses import bn_distance, class_scores, competition, image_norm, total_variation
from synthkd.dfkd.methods.base import MethodFeed, MethodJob
from synthkd.dfkd.methods.growing import DrawnSet, frame
from synthkd.dfkd.methods.inversion import Jitter, OneGraph, device_of, moved, need_statistics, normal, redrawn
from synthkd.dfkd.teachers import Teacher, load_teacher, teacher_digest
from synthkd.engine.batch import Batch
from synthkd.engine.config import Request
from synthkd.engine.errors import SynthkdError
from synthkd.engine.plan import Plan, WorkUnit

_BETAS = (0.9, 0.999)
_KINDS = {
    "steps": whole(1), "samples_per_class": whole(2), "lr": ABOVE_ZERO, "ce": AMOUNT, "bn": AMOUNT, "tv": AMOUNT,
    "l2": AMOUNT, "compete": AMOUNT, "student": TEXT, "shift": whole(0), "flip": YES_NO,
}  # fmt: skip


@dataclass(frozen=True)
class InversionSpec:
    """steps of Adam at lr on the normalised pixels of a group, samples_per_class of each class.

    ce, bn, tv, l2, compete: weights of the terms (see `Inversion`); student: card of the network that `compete` sets
    apart from the teacher; shift: pixels by which each step moves the group at most; flip: and mirrors it half of the
    time. The defaults are the published ones for CIFAR-10 (groups of 256; their total variation is one norm of the
    whole group, 16 times the mean of the images' own, so 2.5e-5 there is 4e-4 here).
    """

    steps: int = 2000
    samples_per_class: int = 24
    lr: float = 0.05
    ce: float = 1.0
    bn: float = 10.0
    tv: float = 4e-4
    l2: float = 0.0
    compete: float = 0.0
    student: str = ""
    shift: int = 2
    flip: bool = False


def deepinversion(job: MethodJob) -> MethodFeed:
    """A set of inverted images, made before the student's first step; only what is missing is drawn.

    Raises SynthkdError for a statistics term on a teacher without statistics, for `compete` without a student, and
    NonFiniteError (see `redrawn`).
    """
    return job.set_feed(inverted_set(job, check_deepinversion(job)).written())


def check_deepinversion(job: MethodJob) -> InversionSpec:
    """The method's settings; raises SynthkdError for a wrong one, and for what the teacher has no statistics for."""
    job.need_classifier()
    spec = job.settings(InversionSpec, _KINDS)
    need_statistics(job, spec.bn)
    return spec


def inverted_set(job: MethodJob, spec: InversionSpec) -> DrawnSet:
    """The set as a SampleStream: every group is a function of (spec, teacher, seed, group)."""
    need_statistics(job, spec.bn)
    rival = _rival(job, spec)
    settings = asdict(spec) | ({"student": teacher_digest(rival)} if rival is not None else {})
    plan = Plan(frame(job, spec.samples_per_class), Request(num_samples=job.num_images, seed=job.seed))
    return DrawnSet(job, plan, settings, Inversion(job, spec, rival, plan.num_groups).group)


def _rival(job: MethodJob, spec: InversionSpec) -> Teacher | None:
    """The frozen student to be told from the teacher; None where nothing asks for one."""
    if not spec.compete:
        return None
    if not spec.student:
        raise SynthkdError(f"method {job.name}: compete is {spec.compete}, but there is no student; name its card")
    rival = load_teacher(spec.student, device_of(job.teacher))
    if rival.classes != job.teacher.classes:
        ours, theirs = len(rival.classes), len(job.teacher.classes)
        raise SynthkdError(f"method {job.name}: student {spec.student!r} names {ours} classes, the teacher {theirs}")
    return rival


class Inversion:
    """L = ce CE(t, y) + bn R_bn + tv R_TV + l2 R_l2 + compete (1 - JS(t, s)): arXiv 1912.08795, eq. 2 to 7.

    R_bn is the group's; the others are means over its images, moved as the step moves them. TV and l2 are those of the
    normalised image, as published. Neither network takes a gradient.
    """

    def __init__(self, job: MethodJob, spec: InversionSpec, rival: Teacher | None, groups: int) -> None:
        """groups: that will be drawn."""
        self.job, self.spec, self.teacher, self.rival = job, spec, job.teacher, rival
        self._loss = OneGraph(job, self.loss, spec.steps * groups)
        mean, std = (self.teacher.get_buffer(name) for name in ("mean", "std"))
        self._mean, self._std = mean, std
        self._least, self._most = -mean / std, (1 - mean) / std

    def loss(self, pixels: Tensor, rows: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
        """Of normalised pixels [B,3,H,W] and class shares [B,K], seen through one step's shift; a scalar, float32."""
        spec, x = self.spec, moved(pixels, rows, columns)
        images = x * self._std + self._mean
        look = self.teacher.look(images)
        total = spec.ce * class_scores(look.logits, targets).mean()
        if spec.bn:
            total = total + spec.bn * bn_distance([*look.taps, *look.stored])
        if spec.tv:
            total = total + spec.tv * total_variation(x).mean()
        if spec.l2:
            total = total + spec.l2 * image_norm(x).mean()
        if self.rival is not None:
            total = total + spec.compete * competition(self.rival(images), look.logits).mean()
        return total

    def group(self, unit: WorkUnit) -> Batch:
        """One group; raises NonFiniteError."""
        with self.teacher.attached():
            return redrawn(self.job, unit, lambda attempt: self._drawn(unit, attempt))

    def _drawn(self, unit: WorkUnit, attempt: int) -> Tensor | None:
        """One attempt: images [B,3,H,W] in [0,1], or None where they are not finite."""
        spec, size, device = self.spec, self.teacher.input_size, self._mean.device
        start = normal(self.job.seed, unit, "pixels", (3, *size), attempt, device)
        pixels = start.clamp(self._least, self._most).requires_grad_()
        targets = torch.eye(len(self.teacher.classes), device=device)[list(unit.classes)]
        jitter = Jitter.drawn(self.job.seed, unit, attempt, spec.steps, size, spec.shift, spec.flip).to(device)
        adam = torch.optim.Adam([pixels], spec.lr, betas=_BETAS, fused=True)
        for step in range(spec.steps):
            (pixels.grad,) = torch.autograd.grad(self._loss(pixels, *jitter.at(step), targets), [pixels])
            adam.step()
            with torch.no_grad():  # what an image cannot show is taken back at once
                pixels.clamp_(self._least, self._most)
        finite = bool(pixels.isfinite().all())  # the one wait of a group
        return pixels.detach() * self._std + self._mean if finite else None
