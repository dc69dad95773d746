"""DDA: which variations are kept, of which sources, with which labels; the set as any other; what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.methods import dda
from synthkd.dfkd.methods.base import MethodFeed, MethodJob
from synthkd.dfkd.methods.growing import DrawnSet, frame, group_batch
from synthkd.dfkd.presets import Preset
from synthkd.dfkd.student import fresh_student
from synthkd.dfkd.teachers import load_teacher
from synthkd.dfkd.train_options import TrainOptions
from synthkd.engine import CutMixSpec, GuidanceSpec, Plan, Recipe, Request, SynthkdError
from synthkd.engine.reading import read_shard
from synthkd.engine.verify import verify_set

SPEC = DistillSpec(arch="resnet", arch_args={"widths": [8], "blocks": [1]}, steps=2, batch_size=4)


@pytest.fixture
def job(
    pipeline_folder: Path, teacher_card: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> Callable[..., MethodJob]:
    """A job on the tiny pipeline and teacher, guided, with a pool of all of the teacher's classes; options as given."""
    wanted = recipe(guidance=GuidanceSpec(scale=0.3), cutmix=CutMixSpec(every=1, last_clean=1))
    teacher = load_teacher(str(teacher_card))
    np.savez(tmp_path / "pool.npz", x=_pool(teacher))

    def make(**options: Any) -> MethodJob:
        synth = SynthJob(model=str(pipeline_folder), teacher=str(teacher_card), recipe=wanted)
        preset = Preset(name="tiny", job=synth, num_images=14)
        return MethodJob(
            preset=preset, spec=SPEC, num_images=14, folder=tmp_path / "run", teacher=teacher,
            student=fresh_student(teacher, SPEC), how=TrainOptions(), name="dda", options=options,
            pool=str(tmp_path / "pool.npz"),
        )  # fmt: skip

    return make


def _pool(teacher: Any, each: int = 5) -> Any:
    """uint8 [N,16,16,3]: some random images of each class that the teacher names."""
    coarse = torch.rand(400, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 1, 400).view(
        -1, 1, 1, 1
    )
    images = (torch.nn.functional.interpolate(coarse, size=16, mode="nearest") * 255).to(torch.uint8)
    with torch.no_grad():
        named = teacher(images.float() / 255).argmax(dim=1)
    rows = torch.cat([torch.nonzero(named == c).flatten()[:each] for c in range(3)])
    assert len(set(named[rows].tolist())) >= 2
    return images[rows].permute(0, 2, 3, 1).numpy()


def samples(folder: Path) -> list[Any]:
    """All images of a set with their json."""
    count = len(list(folder.glob("shard-*.tar")))
    return [s for shard in range(count) for s in read_shard(folder, shard)]


def test_the_most_similar_are_chosen() -> None:
    nan = float("nan")
    found = torch.tensor([0.2, 0.9, nan, 0.9, 0.5, 0.95])
    among = torch.tensor([True, True, True, True, True, False])
    assert dda.most_similar(found, among, 3, -1.0) == [1, 3, 4]
    assert dda.most_similar(found, among, 9, 0.3) == [1, 3, 4]
    assert dda.most_similar(found, among, 9, -1.0) == [1, 3, 4, 0]  # a NaN is never chosen


def test_a_set_of_variations(job: Callable[..., MethodJob]) -> None:
    """Labels, similarity and source of each image, from the images themselves; the set verifies; a lost shard too."""
    this = job(strength=0.5, variations=2, keep=0.5)
    feed = dda.dda(this)
    feed.close()
    assert not verify_set(this.shards).problems
    pool, found = this.opened_pool(), samples(this.shards)
    assert len(found) == 14
    pixels = torch.from_numpy(np.load(str(this.pool))["x"]).permute(0, 3, 1, 2)
    rows = [int(s.meta["source"]) for s in found]
    assert [s.meta["label"] for s in found] == [int(pool.source.labels[row]) for row in rows]
    images = torch.from_numpy(np.stack([s.pixels for s in found])).permute(0, 3, 1, 2)
    again = _cosine(this.teacher, images, pixels[rows])
    torch.testing.assert_close(torch.tensor([s.meta["similarity"] for s in found]), again, atol=1e-4, rtol=0)
    assert all(s.meta["class"] in s.meta["prompt"] for s in found)
    before = {p.name: p.read_bytes() for p in this.shards.glob("shard-*.tar")}
    assert len(before) > 1
    drawn = dda.varied_set(this, dda.DdaSpec(strength=0.5, variations=2, keep=0.5))
    last = drawn.draw_group(drawn.plan.unit(drawn.plan.num_groups - 1))  # alone, out of order
    tail = found[-len(last.ids) :]
    assert torch.equal(last.images, torch.from_numpy(np.stack([s.pixels for s in tail])).permute(0, 3, 1, 2))


def _cosine(teacher: Any, one: Tensor, other: Tensor) -> Tensor:
    a, b = (teacher.features(x.float() / 255).double() for x in (one, other))
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).float()


def test_the_filter_keeps_the_better_share(job: Callable[..., MethodJob]) -> None:
    """Of the very variations that a set without a filter keeps."""
    spec = dda.DdaSpec(strength=0.5, variations=2, keep=1.0, guided=False)
    every = dda.varied_set(job(), spec)
    some = dda.varied_set(job(), replace(spec, keep=0.5))
    whole, kept = (s.draw_group(replace(s.plan.unit(0), kept=len(s.plan.unit(0).ids))) for s in (every, some))
    for label in set(whole.labels.tolist()):
        scores = whole.notes["similarity"][whole.labels == label].sort(descending=True).values
        assert kept.notes["similarity"][kept.labels == label].sort(descending=True).values.tolist() == (
            scores[: len(scores) // 2].tolist()
        )


def test_too_few_alike_is_one_line(job: Callable[..., MethodJob]) -> None:
    with pytest.raises(SynthkdError, match=r"are needed \(the middle one has .*lower least or strength"):
        dda.dda(job(strength=0.5, least=0.999999, variations=1))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strength": 0}, "strength is 0; expected 0 < share <= 1"),
        ({"strength": 0.1}, "of 4 steps none is left"),
        ({"source": "web"}, "expected 'pool' or 'deepinversion'"),
        ({"keeps": 0.5}, "unknown field 'keeps'"),
    ],
)
def test_wrong_options_are_one_line(job: Callable[..., MethodJob], options: dict[str, Any], said: str) -> None:
    with pytest.raises(SynthkdError) as found:
        dda.dda(job(**options))
    assert said in str(found.value)


def test_inverted_images_are_made_first(job: Callable[..., MethodJob], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the method of that name, in a folder of their own, with its options."""
    seen: list[MethodJob] = []

    def invert(inner: MethodJob) -> MethodFeed:
        seen.append(inner)
        plan = Plan(frame(inner, 2), Request(num_samples=inner.num_images, seed=inner.seed))

        def draw(unit: Any) -> Any:
            noise = torch.rand(len(unit.ids), 3, 16, 16, generator=torch.Generator().manual_seed(unit.group))
            return group_batch(unit, (noise * 255).to(torch.uint8), torch.tensor(unit.classes), 3)

        return inner.set_feed(DrawnSet(inner, plan, {}, draw).written())

    monkeypatch.setattr(dda, "load_method", lambda name: invert)
    this = job(source="deepinversion", strength=0.5, inversion={"steps": 3}, guided=False)
    dda.dda(this).close()
    (inner,) = seen
    assert (inner.name, inner.options, inner.num_images) == ("deepinversion", {"steps": 3}, 7)
    assert inner.shards == this.folder / "sources" / "shards"
    labels = {s.meta["key"]: s.meta["label"] for s in samples(inner.shards)}
    assert all(labels[s.meta["source"]] == s.meta["label"] for s in samples(this.shards))
    declared = json.loads((this.shards / "manifest.json").read_text())["guidance"]
    assert declared["kind"] == "dda"
    assert declared["source"] == "deepinversion"
