"""Methods that make a set first, and teach from it: guided and plain diffusion, and distillation on the pool alone."""

from dataclasses import dataclass, replace

from synthkd.dfkd.fields import whole
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.methods.base import MethodFeed, MethodJob
from synthkd.dfkd.presets import unguided
from synthkd.dfkd.rounds import draw_set
from synthkd.dfkd.sets import open_set
from synthkd.dfkd.training import Stopped
from synthkd.engine import Request


def diffdfkd(job: MethodJob) -> MethodFeed:
    """The preset's guided set (arXiv 2504.00870)."""
    return _drawn(job, job.preset.job)


def diffusion(job: MethodJob) -> MethodFeed:
    """The preset's prior without guidance, its teacher naming what comes out (DM-KD, arXiv 2305.12954)."""
    return _drawn(job, unguided(job.preset.job))


def _drawn(job: MethodJob, synth: SynthJob) -> MethodFeed:
    job.settings(_Nothing, {})
    request = Request(num_samples=job.num_images, seed=job.seed)
    summary = draw_set(
        synth, request, job.shards, "synthesize", job.workers, job.progress, job.should_stop
    )
    if summary.stopped:
        raise Stopped
    return job.set_feed(open_set(job.shards, job.num_images))


@dataclass(frozen=True)
class PoolSpec:
    """select: images of the highest teacher entropy that are used; 0: all."""

    select: int = 0


def pool(job: MethodJob) -> MethodFeed:
    """Distillation on out-of-domain images alone: the control of every method that uses some."""
    spec = check_pool(job)
    images = job.opened_pool().selected(spec.select or None)
    return job.set_feed(images.source, replace(job.spec, soft_labels="teacher", views=0))


def check_pool(job: MethodJob) -> PoolSpec:
    """The method's settings; raises SynthkdError for a wrong one."""
    return job.settings(PoolSpec, {"select": whole(0)})


@dataclass(frozen=True)
class _Nothing:
    """No option."""
