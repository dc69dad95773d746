"""DDA (arXiv 2410.17606): a prior's variations of images that have labels, kept where the teacher still sees the same.

The images are a pool's, named by the teacher, or inverted ones; a variation is image-to-image with the class as prompt.
The filter compares what the teacher's last linear layer reads of a variation and of its source.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from synthkd.dfkd.feed import Reader, Request, Rows, Source
from synthkd.dfkd.fields import TABLE, YES_NO, Kind, is_number, whole
from synthkd.dfkd.methods.base import MethodFeed, MethodJob, load_method
from synthkd.dfkd.methods.growing import DrawnSet
from synthkd.dfkd.presets import unguided
from synthkd.dfkd.sets import open_set
from synthkd.dfkd.teachers import Teacher
from synthkd.dfkd.views import Views
from synthkd.engine import Batch, CutMixSpec, Plan, Recipe, Start, Synthesizer, WorkUnit, rng
from synthkd.engine import Request as Wanted
from synthkd.engine.errors import SynthkdError
from synthkd.engine.image_to_image import begins_at

SOURCES = ("pool", "deepinversion")
_CLASSES = 100  # of a group at most
_ROUNDS = 4  # in which a group looks for enough variations before it gives up
_SHARE = Kind(lambda v: is_number(v) and 0 < v <= 1, "0 < share <= 1")
_KINDS: Mapping[str, Kind] = {
    "source": Kind(lambda v: v in SOURCES, " or ".join(map(repr, SOURCES))),
    "select": whole(0),
    "strength": _SHARE,
    "sources_per_class": whole(1),
    "variations": whole(1),
    "keep": _SHARE,
    "least": Kind(lambda v: is_number(v) and -1 <= v < 1, "-1 <= cosine < 1"),
    "guided": YES_NO,
    "inversion": TABLE,
}
_log = logging.getLogger("synthkd")


@dataclass(frozen=True)
class DdaSpec:
    """source: what is varied, the job's pool or images that `deepinversion` makes first (inversion: its options).

    select: images of it, those of a pool of the highest teacher entropy; 0: all of a pool, as many inverted ones as the
    set takes. strength: share of the prior's run that a variation goes through; guided: by the preset's guidance.
    A group takes sources_per_class images of each class and draws `variations` of each. Of a class's variations the
    share `keep` that is most like its sources stays, and none whose cosine is below `least`: then others are drawn.
    """

    source: str = "pool"
    select: int = 0
    strength: float = 0.6
    sources_per_class: int = 2
    variations: int = 4
    keep: float = 0.5
    least: float = -1.0
    guided: bool = True
    inversion: Mapping[str, object] | None = None

    @property
    def kept(self) -> int:
        """Variations of a class that a group keeps."""
        return max(1, round(self.sources_per_class * self.variations * self.keep))


class Candidates(NamedTuple):
    """Variations in the order they were drawn: a batch, cosine [N] with their sources, rows [N] of these."""

    batch: Batch
    similarity: Tensor
    rows: Rows


def dda(job: MethodJob) -> MethodFeed:
    """A set of filtered variations, made before the student's first step; only what is missing is drawn.

    Raises SynthkdError for a teacher without features, a prior without an encoder, and where too few variations are
    like their sources.
    """
    spec = check_dda(job)
    job.preset.job.check()
    base = job.preset.job if spec.guided else unguided(job.preset.job)
    begins_at(spec.strength, _recipe(base.recipe, spec, ()))
    return job.set_feed(varied_set(job, spec).written())


def check_dda(job: MethodJob) -> DdaSpec:
    """The method's settings; raises SynthkdError for a wrong one, and for a teacher without features."""
    job.need_classifier()
    spec = job.settings(DdaSpec, _KINDS)
    if job.teacher.classifier is None:
        raise SynthkdError(f"method {job.name}: the teacher has no linear layer, so it has no features to compare")
    return spec


def varied_set(job: MethodJob, spec: DdaSpec) -> DrawnSet:
    """The set as a SampleStream: every group is a function of (spec, prior, teacher, sources, seed, group)."""
    source = _source(job, spec)
    found = tuple(int(n) for n in np.bincount(source.labels, minlength=len(job.teacher.classes)))
    _say_what_is_missing(job.teacher, found)
    base = job.preset.job if spec.guided else unguided(job.preset.job)
    synth = replace(base, recipe=_recipe(base.recipe, spec, found), gamma=0.0).build()
    plan = Plan(replace(synth.recipe, samples_per_class=spec.kept), Wanted(num_samples=job.num_images, seed=job.seed))
    declared = synth.identity(job.seed)
    settings = {
        **asdict(spec), "source_sha256": source.digest, "prior": {n: declared[n] for n in ("model_sha256", "guidance")}
    }  # fmt: skip
    reader = source.reader((plan.recipe.height, plan.recipe.width), replace(job.how, strict=True, crops=False))
    return DrawnSet(job, plan, settings, Varied(job, spec, synth, source, reader).group)


def _recipe(recipe: Recipe, spec: DdaSpec, found: tuple[int, ...]) -> Recipe:
    """The preset's, for a group of candidates: each class that has sources once; no boxes, since a source is whole."""
    weights = tuple(min(n, 1) for n in found) if found and not all(found) else ()
    return replace(
        recipe, rounds=1, groups_per_round=0, previews=(), cutmix=CutMixSpec(every=0), class_weights=weights,
        classes_per_group=_together_in_a_group(sum(weights) if weights else len(recipe.classes)),
        samples_per_class=spec.sources_per_class * spec.variations, groups_per_shard=1,
    )  # fmt: skip


def _together_in_a_group(classes: int) -> int:
    """Classes of one group: the most that divide them all, so that none is in a group twice, up to 100."""
    return max(n for n in range(1, min(classes, _CLASSES) + 1) if classes % n == 0)


def _say_what_is_missing(teacher: Teacher, found: tuple[int, ...]) -> None:
    lost = [name for name, count in zip(teacher.classes, found, strict=True) if not count]
    if len(lost) == len(found):
        raise SynthkdError("method dda: there is no source image")
    if lost:
        _log.warning("dda: the teacher names no source image %s: the set has none of it", ", ".join(map(repr, lost)))


def _source(job: MethodJob, spec: DdaSpec) -> Source:
    """What is varied, with a label for each image."""
    if spec.source == "pool":
        return job.opened_pool().selected(spec.select or None).source
    count = spec.select or -(-job.num_images * spec.sources_per_class // spec.kept)
    options = {**job.preset.methods.get("deepinversion", {}), **(spec.inversion or {})}
    made = replace(
        job, name="deepinversion", folder=job.folder / "sources", num_images=max(count, 4), options=options, pool=None
    )
    made.folder.mkdir(parents=True, exist_ok=True)
    load_method("deepinversion")(made).close()
    return open_set(made.shards)


class Varied:
    """Draws and filters groups."""

    def __init__(self, job: MethodJob, spec: DdaSpec, synth: Synthesizer, source: Source, reader: Reader) -> None:
        """reader: of the source's images, at the prior's size."""
        self._job, self._spec, self._synth, self._source, self._reader = job, spec, synth, source, reader
        self._rows = {c: np.flatnonzero(source.labels == c) for c in set(source.labels.tolist())}

    def group(self, unit: WorkUnit) -> Batch:
        """One group; raises SynthkdError where too few variations of a class are like their sources."""
        chosen: dict[int, list[tuple[int, int]]] = {c: [] for c in unit.classes}  # (round, candidate)
        drawn: list[Candidates] = []
        need = len(unit.classes) // len(chosen)
        while any(len(picks) < need for picks in chosen.values()):
            if len(drawn) == _ROUNDS:
                raise self._too_few(unit, chosen, drawn, need)
            drawn.append(self._candidates(unit, len(drawn)))
            for label, picks in chosen.items():
                best = most_similar(drawn[-1].similarity, drawn[-1].batch.labels == label, need, self._spec.least)
                picks += [(len(drawn) - 1, i) for i in best][: need - len(picks)]
        return self._kept(unit, chosen, drawn)

    def _candidates(self, unit: WorkUnit, again: int) -> Candidates:
        """All variations of one round of a group."""
        spec, classes = self._spec, tuple(dict.fromkeys(unit.classes))
        rows = np.concatenate([self._sources(c, unit.group, again) for c in classes])
        rows, first = np.repeat(rows, spec.variations), (unit.group * _ROUNDS + again) * self._synth.recipe.group_size
        (pixels,) = self._reader.read([Request(rows, Views.plain(rows))])
        labels = tuple(int(c) for c in self._source.labels[rows])
        ids = range(first, first + len(rows))
        asked = replace(unit, ids=ids, classes=labels, kept=len(rows), round=0)
        batch = self._synth.run(asked, self._job.seed, Start(pixels.images, spec.strength))
        return Candidates(batch, similarity(self._job.teacher, batch.images, pixels.images), rows)

    def _sources(self, label: int, group: int, again: int) -> Rows:
        """Rows [S] of a class for a round of a group: a permutation of them all, group after group, over and over."""
        count, own = self._spec.sources_per_class, self._rows[label]
        at = np.arange(group * count, (group + 1) * count)
        order = rng.permutation(self._job.seed, label, f"dda sources {again}", len(own))
        return own[order[at % len(own)]].astype(np.int64)

    def _kept(self, unit: WorkUnit, chosen: dict[int, list[tuple[int, int]]], drawn: list[Candidates]) -> Batch:
        """The chosen ones in the places of their classes."""
        left = {c: list(picks) for c, picks in chosen.items()}
        picks = [left[c].pop(0) for c in unit.classes]

        def taken(of: Callable[[Candidates], Tensor]) -> Tensor:
            return torch.stack([of(drawn[r])[i] for r, i in picks])

        first, rows = drawn[0].batch, np.array([drawn[r].rows[i] for r, i in picks])
        notes = {name: taken(lambda c, name=name: c.batch.notes[name]) for name in first.notes}  # type: ignore[misc]
        made = Batch(
            group=unit.group, round=0, attempt=first.attempt, ids=tuple(unit.ids),
            prompts=tuple(drawn[r].batch.prompts[i] for r, i in picks), images=taken(lambda c: c.batch.images),
            labels=taken(lambda c: c.batch.labels), targets=taken(lambda c: c.batch.targets),
            notes={**notes, "similarity": taken(lambda c: c.similarity)},
            curves={n: curve for n, curve in first.curves.items() if not isinstance(curve[0], list)},
            seconds=_together([c.batch.seconds for c in drawn]), sources=self._source.keys(rows),
        )  # fmt: skip
        return made.first(unit.kept)

    def _too_few(
        self, unit: WorkUnit, chosen: dict[int, list[tuple[int, int]]], drawn: list[Candidates], need: int
    ) -> SynthkdError:
        short, picks = min(chosen.items(), key=lambda item: len(item[1]))
        found = torch.cat([c.similarity[c.batch.labels == short] for c in drawn])
        middle, name = float(found.median()), self._job.teacher.classes[short]
        return SynthkdError(
            f"method {self._job.name}: of {len(found)} variations of {name!r} in group {unit.group} {len(picks)} have "
            f"a cosine of {self._spec.least} with their source, {need} are needed (the middle one has {middle:.2f}); "
            "lower least or strength"
        )


@torch.no_grad()
def similarity(teacher: Teacher, images: Tensor, sources: Tensor) -> Tensor:
    """Cosine [B], float32, of what the teacher's last linear layer reads of images uint8 [B,3,H,W] and of sources."""
    device = teacher.get_buffer("mean").device
    seen = [teacher.features(x.to(device).float() / 255).float() for x in (images, sources)]
    return F.cosine_similarity(seen[0], seen[1], dim=1)


def most_similar(found: Tensor, among: Tensor, count: int, least: float) -> list[int]:
    """Positions of at most `count` of the highest cosines [B] where `among` [B], none below `least` and no NaN.

    The highest first; of equals the first.
    """
    order = torch.argsort(found.nan_to_num(-2.0), descending=True, stable=True).tolist()
    good = (among & (found >= least)).tolist()
    return [i for i in order if good[i]][:count]


def _together(parts: list[dict[str, float]]) -> dict[str, float]:
    """Seconds of all rounds, by stage."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}
