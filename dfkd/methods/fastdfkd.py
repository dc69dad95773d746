"""FastDFKD (arXiv 2112.06253): a generator that a few steps adapt to each new group of images, met again and again."""

import copy
import math
import time
from collections.abc import Generator as Iterating
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synthkd.dfkd.feed import Batch
from synthkd.dfkd.fields import ABOVE_ZERO, AMOUNT, SHARE, YES_NO, Kind, is_number, is_whole, whole
from synthkd.dfkd.generators import Generator
from synthkd.dfkd.losses import bn_distance, class_scores, disagreement
from synthkd.dfkd.methods.base import MethodFeed, MethodJob
from synthkd.dfkd.methods.growing import GrowingSet, growing_plan
from synthkd.dfkd.methods.inversion import Jitter, OneGraph, device_of, moved, need_statistics, normal, redrawn
from synthkd.dfkd.sight import Sight, in_memory
from synthkd.dfkd.taps import Memory, averaged, batchnorm_layers
from synthkd.dfkd.tensor_files import read_tensors, write_tensors
from synthkd.dfkd.training import Stopped
from synthkd.dfkd.views import ViewSpec
from synthkd.engine import rng
from synthkd.engine.batch import Batch as Group
from synthkd.engine.errors import SynthkdError
from synthkd.engine.plan import WorkUnit

METAS = ("fomaml", "reptile")
_WARMING = "warmup.safetensors"  # the generator of a warm-up that was asked to stop
_BETAS = (0.5, 0.999)
_REPTILE = 67.0  # of the authors' code; Adam's step hardly knows it
_TERMS = ("bn", "ce", "adv")
_WIDTHS = Kind(
    lambda v: isinstance(v, (list, tuple)) and len(v) == 3 and all(is_whole(w, 1) for w in v),
    "three whole numbers >= 1",
)
_KINDS = {
    "inner": whole(1), "samples_per_class": whole(1), "lr_g": ABOVE_ZERO, "lr_z": ABOVE_ZERO, "bn": AMOUNT,
    "oh": AMOUNT, "adv": AMOUNT, "bn_momentum": SHARE,
    "meta": Kind(lambda v: v in METAS, " or ".join(map(repr, METAS))), "noise": whole(1), "widths": _WIDTHS,
    "warmup": whole(2), "fill": Kind(lambda v: is_number(v) and 0 < v <= 1, "0 < share <= 1"), "shift": whole(0),
    "flip": YES_NO,
}  # fmt: skip


@dataclass(frozen=True)
class FastSpec:
    """A group of samples_per_class images of each class is made by `inner` steps of Adam.

    At lr_g on a clone of the generator, at lr_z on its noise of `noise` numbers; bn, oh, adv: weights of the terms (see
    `MetaGenerator`); bn_momentum: share of earlier groups in the statistics compared; meta: how the generator learns
    from the clone, `fomaml` or `reptile`; widths: channels of the generator's three resolutions; warmup: groups before
    the student's first step, without adversary; fill: share of the training by whose end all groups are made; shift,
    flip: how far, in pixels, each inner step moves the group, and whether it may mirror it. The defaults are the
    published ones of Fast-5 on CIFAR-10, but for the group, which is there 256 images of random classes.
    """

    inner: int = 5
    samples_per_class: int = 24
    lr_g: float = 3e-3
    lr_z: float = 1e-2
    bn: float = 10.0
    oh: float = 0.5
    adv: float = 1.0
    bn_momentum: float = 0.9
    meta: str = "fomaml"
    noise: int = 256
    widths: Sequence[int] = (128, 128, 64)
    warmup: int = 20
    fill: float = 0.8
    shift: int = 4
    flip: bool = True


def fastdfkd(job: MethodJob) -> MethodFeed:
    """A set that grows while the student learns from what there is of it.

    Raises SynthkdError as `check_fastdfkd` does; NonFiniteError (see `inversion.redrawn`).
    """
    return FastFeed(job, check_fastdfkd(job))


def check_fastdfkd(job: MethodJob) -> FastSpec:
    """The settings; raises SynthkdError for a wrong one, too few images, no statistics, views of a second image."""
    job.need_classifier()
    spec, view = job.settings(FastSpec, _KINDS), ViewSpec.of(job.spec)
    if view.crop < 1 or view.mix:
        raise SynthkdError(f"method {job.name}: crop and mix need a finished set; set crop to 1 and mix to 0")
    need_statistics(job, spec.bn)
    plan = growing_plan(job, spec.samples_per_class)
    if plan.num_groups < 2:
        least = plan.recipe.group_size + 1
        raise SynthkdError(
            f"method {job.name}: {job.num_images} images are one group; make at least {least}, or lower "
            "samples_per_class: one group is held out"
        )
    return spec


class Meta:
    """theta, its clone theta', and what theta learns once theta' has made its group (arXiv 2112.06253, sec. 3.3)."""

    def __init__(self, slow: Sequence[Tensor], fast: Sequence[Tensor], kind: str, lr: float) -> None:
        """slow, fast: theta and theta', leaves of one shape; kind: one of METAS; lr: of Adam on theta."""
        self.slow, self.fast, self.kind = list(slow), list(fast), kind
        self.adam = torch.optim.Adam(self.slow, lr, betas=_BETAS, fused=True)
        self._sum: list[Tensor] = []

    @torch.no_grad()
    def begin(self) -> None:
        """theta' <- theta."""
        torch._foreach_copy_(self.fast, self.slow)
        self._sum = [torch.zeros_like(p) for p in self.slow]

    def note(self, gradients: Sequence[Tensor]) -> None:
        """Gradients of the loss at theta', of one inner step."""
        torch._foreach_add_(self._sum, list(gradients))

    @torch.no_grad()
    def gradient(self) -> list[Tensor]:
        """FOMAML: the sum of the inner gradients (eq. 5, first order); Reptile: 67 (theta - theta')."""
        if self.kind == "fomaml":
            return self._sum
        return [_REPTILE * (s - f) for s, f in zip(self.slow, self.fast, strict=True)]

    def step(self, gradient: Sequence[Tensor]) -> None:
        """Adam on theta."""
        for p, g in zip(self.slow, gradient, strict=True):
            p.grad = g
        self.adam.step()

    def state(self) -> dict[str, Tensor]:
        """theta and its Adam, by name."""
        out = {f"theta.{i}": p.detach().clone() for i, p in enumerate(self.slow)}
        for i, p in enumerate(self.slow):
            out |= {f"adam.{i}.{n}": torch.as_tensor(v).clone() for n, v in self.adam.state.get(p, {}).items()}
        return out

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state; raises KeyError or RuntimeError for another's."""
        for i, p in enumerate(self.slow):
            p.copy_(state[f"theta.{i}"])
            mine = {n.split(".", 2)[2]: v for n, v in state.items() if n.startswith(f"adam.{i}.")}
            if mine:
                self.adam.state[p] = {n: v.to(p.device).clone() for n, v in mine.items()}


def inner_adam(fast: Sequence[Tensor], z: Tensor, lr_g: float, lr_z: float) -> torch.optim.Adam:
    """Adam of one group, on theta' and on its noise."""
    groups: list[dict[str, Any]] = [{"params": list(fast)}, {"params": [z], "lr": lr_z}]
    return torch.optim.Adam(groups, lr_g, betas=_BETAS, fused=True)


class MetaGenerator:
    """Makes groups: L = bn R_bn + oh CE(t, y) - adv 1[argmax s = argmax t] KL(t || s), of G(z; theta') (eq. 2 to 4).

    R_bn compares momentum statistics: bn_momentum parts of earlier groups', which begin as the teacher's running ones,
    the rest this group's. Of the iterates the one of the lowest loss is kept. Teacher and student take no gradient, and
    the student's statistics stay as they are: a frozen copy of it is looked through.
    """

    def __init__(self, job: MethodJob, spec: FastSpec, groups: int) -> None:
        """groups: that will be made."""
        self.job, self.spec, self.teacher, device = job, spec, job.teacher, device_of(job.teacher)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.raw(job.seed, 0, "generator", 1)[0] >> 1))
            slow = Generator(job.teacher.input_size, spec.noise, spec.widths)
        self.net, self.device = copy.deepcopy(slow).to(device), device
        theta = [p.detach().to(device).requires_grad_() for p in slow.parameters()]
        self.meta = Meta(theta, list(self.net.parameters()), spec.meta, spec.lr_g * spec.inner)
        self.seen = copy.deepcopy(job.student).eval().requires_grad_(False)
        layers = batchnorm_layers(job.teacher.net) if spec.bn and spec.bn_momentum else {}
        self.memory: Memory = {
            name: (layer.running_mean.clone(), layer.running_var.clone())  # type: ignore[operator]
            for name, layer in layers.items()
        }
        self.made = 0
        self.sums, self.counted = torch.zeros(len(_TERMS), device=device), 0
        # Two graphs: as one, with the images among its outputs, inductor (torch 2.13) gave a gradient of zero.
        self._draw, self._judge = (OneGraph(job, call, spec.inner * groups) for call in (self.net, self.judge))

    def loss(
        self, z: Tensor, rows: Tensor, columns: Tensor, targets: Tensor, memory: Memory, adversarial: bool
    ) -> tuple[Tensor, Tensor, Memory, Tensor]:
        """The loss [], the images [B,3,H,W], statistics to remember, and the terms [3], of noise z [B,D]."""
        images = self._draw(z)
        total, after, terms = self._judge(images, rows, columns, targets, memory, adversarial)
        return total, images.detach(), after, terms

    def judge(
        self, images: Tensor, rows: Tensor, columns: Tensor, targets: Tensor, memory: Memory, adversarial: bool
    ) -> tuple[Tensor, Memory, Tensor]:
        """See `loss`; only the loss has a gradient."""
        spec, x = self.spec, moved(images, rows, columns)
        look = self.teacher.look(x)
        taps, after = averaged(look.taps, memory, spec.bn_momentum) if memory else (look.taps, {})
        ce = class_scores(look.logits, targets).mean()
        bn = bn_distance([*taps, *look.stored]).to(ce) if spec.bn else torch.zeros_like(ce)
        adv = -disagreement(self.seen(x), look.logits).mean() if adversarial else torch.zeros_like(ce)
        kept = {name: (mean.detach(), var.detach()) for name, (mean, var) in (after or {}).items()}
        return spec.bn * bn + spec.oh * ce + spec.adv * adv, kept, torch.stack([bn, ce, adv]).detach()

    def group(self, unit: WorkUnit) -> Group:
        """The next group, of which the generator learns; raises NonFiniteError, then having learned nothing."""
        assert unit.group == self.made
        self.seen.net.load_state_dict(self.job.student.net.state_dict())
        self.net.train()
        with self.teacher.attached():
            batch = redrawn(self.job, unit, lambda attempt: self._drawn(unit, attempt))
        self.made += 1
        return batch

    def _drawn(self, unit: WorkUnit, attempt: int) -> Tensor | None:
        """One attempt: images [B,3,H,W] in [0,1]; None, and nothing learned, where anything is not finite."""
        spec, size, seed = self.spec, self.teacher.input_size, self.job.seed
        z = normal(seed, unit, "noise", (spec.noise,), attempt, self.device).requires_grad_()
        targets = torch.eye(len(self.teacher.classes), device=self.device)[list(unit.classes)]
        jitter = Jitter.drawn(seed, unit, attempt, spec.inner, size, spec.shift, spec.flip).to(self.device)
        self.meta.begin()
        adam, adversarial = inner_adam(self.meta.fast, z, spec.lr_g, spec.lr_z), unit.group >= spec.warmup
        best, kept, terms = torch.full((), math.inf, device=self.device), None, self.sums
        after = self.memory
        for step in range(spec.inner):
            loss, images, after, terms = self.loss(
                z, *jitter.at(step), targets, self.memory, adversarial and spec.adv > 0
            )
            gradients = torch.autograd.grad(loss, [*self.meta.fast, z])
            self.meta.note(gradients[:-1])
            kept = images if kept is None else torch.where(loss.detach() < best, images, kept)
            best = torch.minimum(best, loss.detach())
            for p, g in zip([*self.meta.fast, z], gradients, strict=True):
                p.grad = g
            adam.step()
        gradient = self.meta.gradient()
        if kept is None or not _finite([best, kept, *gradient]):
            return None
        self.meta.step(gradient)
        self.memory = after
        self.sums, self.counted = self.sums + terms, self.counted + 1
        return kept

    def terms(self) -> dict[str, float]:
        """Means of the terms, at the last inner step, of the groups since it was last asked."""
        if not self.counted:
            return {}
        means = (self.sums / self.counted).tolist()
        self.sums, self.counted = torch.zeros_like(self.sums), 0
        return dict(zip(_TERMS, means, strict=True))

    def state(self) -> dict[str, Tensor]:
        """All that the next group hangs on beside the student."""
        out = self.meta.state() | {"made": torch.tensor(self.made), "sums": self.sums.clone()}
        out["counted"] = torch.tensor(self.counted)
        for name, (mean, var) in self.memory.items():
            out |= {f"memory.{name}.mean": mean.clone(), f"memory.{name}.var": var.clone()}
        return out

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See `Feed.load`."""
        self.meta.load(state)
        self.memory = {
            name: tuple(state[f"memory.{name}.{part}"].to(self.device) for part in ("mean", "var"))  # type: ignore[misc]
            for name in self.memory
        }
        self.made, self.counted = int(state["made"]), int(state["counted"])
        self.sums = state["sums"].to(self.device)


def _finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all values are finite; the one wait of a group."""
    return bool(torch.stack([x.isfinite().all() for x in tensors]).all())


class FastFeed:
    """The feed: groups are made when they are due, and batches drawn from all there are, by (seed, step) alone.

    The last of the warm-up's groups are held out. What is on disk beyond a checkpoint is made again for the generator's
    sake, and not written again.
    """

    def __init__(self, job: MethodJob, spec: FastSpec) -> None:
        """Makes the warm-up's groups, or reads them; raises Stopped where that is asked for."""
        settings = {**asdict(spec), "num_images": job.num_images, "distill": asdict(job.spec)}
        self.job, self.spec, self.waited = job, spec, 0.0
        self.set = GrowingSet(job, settings, spec.samples_per_class)
        groups = self.set.plan.num_groups
        self.first = min(spec.warmup, groups)
        self.making = MetaGenerator(job, spec, groups)
        self._sight = Sight(ViewSpec.of(job.spec), job.spec.seed, job.spec.views, job.spec.batch_size)
        self._warm_up()
        count = min(max(1, round(groups * job.spec.held_out)), self.first - 1)
        sizes = [self.set.plan.unit(g).kept for g in range(self.first)]
        self._kept_out = slice(sum(sizes[:-count]), sum(sizes))
        self.held = self.set.images[self._kept_out].cpu()

    def _warm_up(self) -> None:
        """Have the first groups in memory; raises Stopped where that is asked for: the next call goes on from there."""
        kept = self.job.folder / _WARMING
        if self.set.on_disk() >= self.first:
            self.set.read(self.first)
        else:
            self._go_on(kept)
            self._warmed(kept)
        kept.unlink(missing_ok=True)

    def _warmed(self, kept: Path) -> None:
        told, stage, plan = self.job.progress, "synthesize", self.set.plan
        told.begin(stage, sum(plan.unit(g).kept for g in range(self.first)), "images")
        told.advance(stage, self.set.size)
        try:
            for group in range(self.making.made, self.first):
                if self.job.should_stop():
                    write_tensors(kept, self.making.state(), {"set": self.set.fingerprint})
                    raise Stopped
                self._grow(group + 1)
                told.advance(stage, plan.unit(group).kept)
        finally:
            told.end(stage)

    def _go_on(self, kept: Path) -> None:
        """Take up the generator that a stopped call left, if it is of this very set, whose groups are all there."""
        state, note = read_tensors(kept) if kept.is_file() else ({}, {})
        if note.get("set") == self.set.fingerprint and int(state["made"]) <= self.set.on_disk():
            self.load(state)

    @property
    def made(self) -> int:
        """Images of the set."""
        return self.set.size

    @property
    def reading(self) -> Mapping[str, str]:
        """Images never leave memory."""
        return {"reader": "memory", "decoder": "none"}

    @property
    def damaged(self) -> dict[str, str]:
        """None."""
        return {}

    def close(self) -> None:
        """Nothing to give back."""

    def batches(self, start: int, stop: int) -> Iterating[Batch]:
        """See `Feed`."""
        for step in range(start, stop):
            began = time.perf_counter()
            self._grow(self._due(step))
            self.waited += time.perf_counter() - began
            yield self._batch(step)

    def _due(self, step: int) -> int:
        """Groups that a step may draw from: the warm-up's, and the rest evenly over the first `fill` of the steps."""
        groups, steps = self.set.plan.num_groups, self.job.spec.steps
        share = min(1.0, step / max(1.0, self.spec.fill * steps))
        return self.first + math.floor((groups - self.first) * share)

    def _grow(self, groups: int) -> None:
        """Have the generator make groups up to a number of them; those in memory already are left as they are."""
        while self.making.made < groups:
            batch = self.making.group(self.set.plan.unit(self.making.made))
            if self.set.groups == batch.group:
                self.set.add(batch)

    def _batch(self, step: int) -> Batch:
        """Rows of all groups but those held out, with repetition."""
        out, size = self._kept_out, self.job.spec.batch_size
        count = self.set.size - (out.stop - out.start)
        rows = np_rows(self.job.seed, step, size, count)
        rows = torch.from_numpy(rows + (rows >= out.start) * (out.stop - out.start)).to(self.set.device)
        return in_memory(self._sight, step, self.set.images[rows], self.set.labels[rows])

    def learned(self, batch: Batch, student_logits: Tensor, teacher_logits: Tensor) -> None:
        """See `Feed`: nothing; the student is looked through when a group is due."""

    def terms(self) -> dict[str, float]:
        """See `MetaGenerator.terms`."""
        return self.making.terms()

    def state(self) -> dict[str, Tensor]:
        """The generator's; the images are on disk."""
        return self.making.state()

    def load(self, state: dict[str, Tensor]) -> None:
        """See `Feed.load`."""
        self.making.load(state)
        self.set.read(self.making.made)


def np_rows(seed: int, step: int, size: int, count: int) -> Any:
    """int64 [size] in 0 .. count - 1."""
    return (rng.uniform(seed, step, "replay", size) * count).astype("int64").clip(0, count - 1)
