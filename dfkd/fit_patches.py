"""Fits a patch discriminator for the guidance: what guidance does to patches against a prior's own, or a pool's.

No data of the teacher's: real are the clean latents of unguided runs of the prior, or a pool's images, made are those
of guided runs, at the calls that are guided and through the decoder that guidance looks through. Seeds are none of a
set's.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthkd.dfkd.feed import ReadOptions, Request, Source
from synthkd.dfkd.fields import ABOVE_ZERO, Kind, check_fields, is_whole, whole
from synthkd.dfkd.generators import PATCHES, PatchDiscriminator, patch_loss
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.patches import PatchCritic
from synthkd.dfkd.presets import unguided
from synthkd.dfkd.progress import Progress, Silent
from synthkd.dfkd.teachers import load_teacher
from synthkd.dfkd.training import Stopped
from synthkd.dfkd.views import Views
from synthkd.engine import rng
from synthkd.engine.calibration import Recorder, images_at_once, own_seed
from synthkd.engine.errors import SynthkdError
from synthkd.engine.fitted import resized
from synthkd.engine.looked import looked_through
from synthkd.engine.models import load_model
from synthkd.engine.workers import one_thread

_KINDS: Mapping[str, Kind] = {
    "samples": whole(1),
    "steps": whole(1),
    "batch_size": whole(2),
    "learning_rate": ABOVE_ZERO,
    "patch": Kind(lambda v: is_whole(v) and v in PATCHES, " or ".join(map(str, PATCHES))),
    "width": Kind(lambda v: is_whole(v, 1, 4097), "1 to 4096"),
    "seed": Kind(lambda v: is_whole(v, 0, 2**63), "0 <= seed < 2**63"),
}


@dataclass(frozen=True, kw_only=True)
class PatchSpec:
    """samples: of each kind, rounded up to whole groups, all guided calls of each; steps of Adam (0.5, 0.999).

    A step sees batch_size images of each kind; patch: pixels that a logit sees; width: channels of the first layer.
    """

    samples: int = 200
    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 1e-3
    patch: int = 10
    width: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise SynthkdError for a value of the wrong type or outside its range."""
        check_fields("fit-patches", {f.name: getattr(self, f.name) for f in fields(self)}, _KINDS)


@dataclass(frozen=True)
class FittedPatches:
    """A critic, how it was fitted, its losses, and the share of patches that it names rightly, of groups held out."""

    critic: PatchCritic
    about: dict[str, Any]

    @property
    def held_out(self) -> dict[str, float]:
        """Shares by kind."""
        found: dict[str, float] = self.about["held_out"]
        return found


def fit_patches(
    job: SynthJob,
    spec: PatchSpec,
    pool: Source | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> FittedPatches:
    """Fit a critic to a job's guidance; a function of (job, spec, pool), on a CPU with one thread.

    Raises SynthkdError for a job that guides nothing and where a loss is not finite; Stopped where that is asked for.
    """
    if job.recipe.guidance.scale == 0:
        raise SynthkdError("fit-patches: guidance.scale is 0, so nothing is made that could be told from real images")
    told, draw = progress or Silent(), _Drawn(replace(job, patch=0.0, gamma=0.0))
    groups = max(1, math.ceil(spec.samples / job.recipe.group_size))
    with one_thread(job.device):
        told.begin("patch runs", 2 * groups + 2, "groups")
        kinds: dict[str, list[Tensor]] = {}
        for kind in ("real", "made"):
            kinds[kind] = []
            for group in range(groups + 1):  # the last one is held out
                if should_stop():
                    raise Stopped
                of_pool = kind == "real" and pool is not None
                kinds[kind].append(draw.pooled(pool, spec, group) if of_pool and pool else draw(kind, spec.seed, group))
                told.advance("patch runs", 1)
        told.end("patch runs")
        net, curve = _trained(kinds, spec, draw, told, should_stop)
    critic = PatchCritic(net, draw.size, spec.width)
    held = {kind: round(_right(critic, parts[-1].to(job.device), kind == "real"), 4) for kind, parts in kinds.items()}
    about = {"spec": asdict(spec), "curve": curve, "held_out": held, "recipe": job.recipe.to_dict()}
    about |= {"guidance": draw.guidance.describe(), "real": "prior" if pool is None else pool.digest}
    return FittedPatches(critic, about)


class _Drawn:
    """Images of groups beside a set, uint8 on the host at the teacher's size, as the guidance sees them."""

    def __init__(self, job: SynthJob) -> None:
        teacher = load_teacher(job.teacher, job.device, allow_code=job.allow_code)
        self._job, self.guidance, self.size = job, job.guidance(teacher), teacher.input_size
        prior = load_model(job.model, device=job.device, dtype=getattr(torch, job.recipe.dtype), loras=job.loras)
        self._look = looked_through(prior, job.recipe)
        plain = unguided(job).recipe
        self._runs = {"real": Recorder(prior, plain), "made": Recorder(prior, job.recipe, self.guidance, self._look)}

    @torch.no_grad()
    def __call__(self, kind: str, seed: int, group: int) -> Tensor:
        """All guided calls of one group."""
        recipe = self._job.recipe
        run = self._runs[kind](own_seed(seed, f"fit-patches {kind}"), group)
        part = images_at_once(recipe.group_size, recipe.height, recipe.width)
        calls = [x for i, x in enumerate(run.latents) if recipe.guidance.active(i, recipe.steps)]
        seen = [resized(self._look(z).float(), self.size) for x in calls for z in torch.split(x, part)]
        return (torch.cat(seen).clamp(0, 1) * 255).round().to("cpu", torch.uint8)

    def pooled(self, pool: Source, spec: PatchSpec, group: int) -> Tensor:
        """As many images of a pool as a group has."""
        order, count = rng.permutation(spec.seed, 0, "fit-patches pool", len(pool)), self._job.recipe.group_size
        rows = order[np.arange(group * count, (group + 1) * count) % len(pool)].astype(np.int64)
        reader = pool.reader(self.size, ReadOptions(strict=True, crops=False))
        try:
            (pixels,) = reader.read([Request(rows, Views.plain(rows))])
        finally:
            reader.close()
        return pixels.images.cpu()


def _trained(
    kinds: Mapping[str, list[Tensor]], spec: PatchSpec, draw: _Drawn, told: Progress, should_stop: Callable[[], bool]
) -> tuple[PatchDiscriminator, list[dict[str, float]]]:
    """A new network, and its losses. Both kinds share a batch, so that its statistics are those of eval mode."""
    real, made = (torch.cat(kinds[kind][:-1]) for kind in ("real", "made"))
    device = draw.guidance.teacher.get_buffer("mean").device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        net = PatchDiscriminator(spec.patch, spec.width).to(device)
    adam = torch.optim.Adam(net.parameters(), spec.learning_rate, betas=(0.5, 0.999))
    generator, curve = torch.Generator().manual_seed(own_seed(spec.seed, "fit-patches batches")), []
    told.begin("patches", spec.steps, "steps")
    for step in range(spec.steps):
        picks = [x[torch.randint(len(x), (spec.batch_size,), generator=generator)] for x in (real, made)]
        logits = net(torch.cat(picks).to(device).float() / 255)
        loss = patch_loss(logits[: spec.batch_size], True) / 2 + patch_loss(logits[spec.batch_size :], False) / 2
        adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        if (step + 1) % 50 == 0 or step + 1 == spec.steps:
            curve.append({"step": step + 1, "loss": round(float(loss.detach()), 5)})
            _check_finite(curve[-1])
        told.advance("patches", 1)
        if should_stop():
            raise Stopped
    told.end("patches")
    return net, curve


def _check_finite(row: Mapping[str, float]) -> None:
    if not math.isfinite(row["loss"]):
        raise SynthkdError(f"fit-patches: the loss is not finite at step {row['step']}; lower learning_rate")


@torch.no_grad()
def _right(critic: PatchCritic, images: Tensor, real: bool) -> float:
    """Share of the patches of uint8 images that a critic takes for what they are."""
    logits = torch.cat([critic(part.float() / 255) for part in torch.split(images, 256)])
    return float(((logits > 0) == real).float().mean())
