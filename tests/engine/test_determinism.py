"""image(id) is a function of recipe, seed and group: not of order, count, growth, or workers."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from synthkd.dfkd.job import SynthJob
from synthkd.engine import CutMixSpec, GuidanceSpec, Plan, Request, Synthesizer, SynthkdError, write_shards
from synthkd.engine.encoders import encode_image
from synthkd.engine.index import read_environments
from synthkd.engine.locks import folder_lock
from synthkd.engine.rows import read_index
from synthkd.engine.runner import PoolStream, open_stream
from synthkd.engine.verify import verify_set

Stored = Callable[[Path], dict[str, bytes]]
STEERED = {"guidance": GuidanceSpec(scale=0.3), "cutmix": CutMixSpec(every=1, last_clean=1), "steps": 3}


def _tars(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("shard-*"))}


def test_the_same_request_twice(synthesizer: Callable[..., Synthesizer], tmp_path: Path) -> None:
    """Two synthesizers, two folders: whole shards are byte-identical, and so is the manifest."""
    for name in ("a", "b"):
        write_shards(synthesizer(**STEERED).stream(Request(num_samples=20, seed=9)), tmp_path / name)
    assert len(_tars(tmp_path / "a")) == 2
    assert _tars(tmp_path / "a") == _tars(tmp_path / "b")
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()


def test_a_shard_holds_what_the_stream_yields(
    synthesizer: Callable[..., Synthesizer], stored: Stored, tmp_path: Path
) -> None:
    synth, request = synthesizer(**STEERED), Request(num_samples=14)
    summary = write_shards(synth.stream(request), tmp_path)
    assert (summary.drawn, summary.present, summary.stopped) == (14, 14, False)
    have = stored(tmp_path)
    assert len(have) == 28
    for batch in synth.stream(request):
        pixels = batch.images.permute(0, 2, 3, 1).numpy()
        for key, image in zip(batch.keys, pixels, strict=True):
            assert have[f"{key}.png"] == encode_image(image, "png", 95)


def test_a_shard_is_a_plain_tar_without_times_or_owners(canned: Callable[..., Any], tmp_path: Path) -> None:
    write_shards(canned(6), tmp_path)
    data = (tmp_path / "shard-000000.tar").read_bytes()
    assert data.endswith(b"\0" * 1024)
    with tarfile.open(tmp_path / "shard-000000.tar") as tar:
        infos = tar.getmembers()
    names = [f"{i:09d}.{kind}" for i in range(6) for kind in ("png", "json")]
    assert [i.name for i in infos] == names
    assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in infos} == {(0, 0, 0, "", "", 0o644)}
    assert len(data) == sum(512 + -(-i.size // 512) * 512 for i in infos) + 1024


def test_another_order_of_shards(synthesizer: Callable[..., Synthesizer], tmp_path: Path) -> None:
    synth, request = synthesizer(**STEERED), Request(num_samples=50)
    write_shards(synth.stream(request), tmp_path / "a")
    summary = write_shards(synth.stream(request), tmp_path / "b", shards=[2, 0])
    assert summary.present == 32
    assert read_index(tmp_path / "b").keys() == {0, 2}
    write_shards(synth.stream(request), tmp_path / "b", shards=[1, 2])
    assert _tars(tmp_path / "a") == _tars(tmp_path / "b")


def test_a_set_grows_from_200_to_300_without_changing_an_image(
    synthesizer: Callable[..., Synthesizer], stored: Stored, tmp_path: Path
) -> None:
    """Groups of 6 divide neither: the tail group is padded, and its padding is drawn for good later."""
    small, large = (synthesizer(**STEERED).stream(Request(num_samples=n)) for n in (200, 300))
    write_shards(small, tmp_path / "grown")
    at_200 = stored(tmp_path / "grown")
    summary = write_shards(large, tmp_path / "grown")
    assert (summary.drawn, summary.present) == (100, 300)
    write_shards(large, tmp_path / "whole")
    assert len(at_200) == 400
    assert at_200.items() <= stored(tmp_path / "grown").items()
    assert _tars(tmp_path / "grown") == _tars(tmp_path / "whole")
    assert verify_set(tmp_path / "grown").problems == ()


def test_a_smaller_request_leaves_a_larger_set_alone(canned: Callable[..., Any], tmp_path: Path) -> None:
    write_shards(canned(40), tmp_path)
    before = _tars(tmp_path)
    assert write_shards(canned(25), tmp_path).drawn == 0
    assert _tars(tmp_path) == before
    assert verify_set(tmp_path).samples == 40


def test_growing_one_by_one_ends_where_one_run_does(canned: Callable[..., Any], stored: Stored, tmp_path: Path) -> None:
    for count in (1, 2, 5, 6, 7, 13, 18, 19, 31):
        write_shards(canned(count), tmp_path / "grown")
        assert len(stored(tmp_path / "grown")) == 2 * count
        assert verify_set(tmp_path / "grown").problems == ()
    write_shards(canned(31), tmp_path / "whole")
    assert stored(tmp_path / "grown") == stored(tmp_path / "whole")
    assert _tars(tmp_path / "grown") == _tars(tmp_path / "whole")


def test_an_image_does_not_know_how_many_were_asked_for(synthesizer: Callable[..., Synthesizer]) -> None:
    synth = synthesizer(**STEERED)
    alone = next(iter(synth.stream(Request(num_samples=1))))
    many = list(synth.stream(Request(num_samples=20)))
    assert alone.images.shape[0] == 1
    assert torch.equal(alone.images[0], many[0].images[0])
    assert [len(b.ids) for b in many] == [6, 6, 6, 2]
    last = list(synth.stream(Request(num_samples=24)))[-1]
    assert torch.equal(last.images[:2], many[-1].images)
    assert not torch.equal(many[0].images, many[1].images)


def test_seeds_draw_different_images(synthesizer: Callable[..., Synthesizer]) -> None:
    a, b = (next(iter(synthesizer().stream(Request(num_samples=6, seed=s)))) for s in (0, 1))
    assert not torch.equal(a.images, b.images)


def test_batch_contract(synthesizer: Callable[..., Synthesizer]) -> None:
    batch = next(iter(synthesizer(**STEERED).stream(Request(num_samples=4))))
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == torch.int64
    assert batch.keys == [f"{i:09d}" for i in range(4)]
    assert {len(c) for c in batch.curves.values()} == {3}
    assert [len(v) for v in batch.curves["ce"]] == [4, 4, 4]
    assert batch.notes["logits"].shape == (4, 3)


@pytest.mark.slow
def test_workers_write_the_same_bytes(
    pipeline_folder: Path, teacher_card: Path, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    job = SynthJob(model=str(pipeline_folder), teacher=str(teacher_card), recipe=recipe(**STEERED))
    plan = Plan(job.recipe, Request(num_samples=40))
    pool = open_stream(job.build, plan, workers=2)
    assert isinstance(pool, PoolStream)
    write_shards(open_stream(job.build, plan, workers=1), tmp_path / "one")
    write_shards(pool, tmp_path / "two")
    assert _tars(tmp_path / "one") == _tars(tmp_path / "two")
    assert read_environments(tmp_path / "one") == read_environments(tmp_path / "two")


def test_two_writers_on_one_folder(canned: Callable[..., Any], tmp_path: Path) -> None:
    stream, refused = canned(12), []

    def second(_: int) -> None:
        with pytest.raises(SynthkdError, match="another run is writing there") as caught:
            write_shards(stream, tmp_path)
        refused.append(caught.value)

    write_shards(stream, tmp_path, on_batch=second)
    assert len(refused) == 2
    with folder_lock(tmp_path):  # and the lock is free again afterwards
        pass


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"steps": 3}, "recipe.steps"),
        ({"guidance_scale": 2.0}, "recipe.guidance_scale"),
        ({"cutmix": CutMixSpec(every=1, last_clean=1)}, "recipe.cutmix.every"),
        ({"guidance": GuidanceSpec(scale=0.1)}, "recipe.guidance.scale"),  # the recipe before the teacher
        ({"prompts": ("a {class}",)}, "recipe.prompts"),
    ],
)
def test_a_folder_of_another_recipe_is_refused_by_field(
    canned: Callable[..., Any], tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    write_shards(canned(6), tmp_path)
    before = _tars(tmp_path)
    with pytest.raises(SynthkdError, match=rf"another recipe's set \({field} is ") as caught:
        write_shards(canned(6, **changes), tmp_path)
    assert "\n" not in str(caught.value)
    assert _tars(tmp_path) == before


def test_a_folder_of_another_seed_or_model_is_refused(
    synthesizer: Callable[..., Synthesizer], canned: Callable[..., Any], tmp_path: Path
) -> None:
    write_shards(canned(6), tmp_path)
    with pytest.raises(SynthkdError, match=r"\(seed is 0 there, 1 here\)"):
        write_shards(synthesizer(steps=2).stream(Request(num_samples=6, seed=1)), tmp_path)
    other = synthesizer(steps=2)
    weight = other.model.decoder.module.post_quant_conv.weight
    original = weight.data
    weight.data = original * 1.0001
    try:
        with pytest.raises(SynthkdError, match=r"\(model_sha256 is "):
            write_shards(other.stream(Request(num_samples=6)), tmp_path)
    finally:
        weight.data = original


def test_shards_without_a_manifest_are_not_adopted(canned: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "shard-000000.tar").write_bytes(b"someone else's")
    with pytest.raises(SynthkdError, match=r"holds shards but no manifest\.json"):
        write_shards(canned(6), tmp_path)
    assert (tmp_path / "shard-000000.tar").read_bytes() == b"someone else's"


def test_a_stop_ends_after_the_group_and_the_rest_follows(canned: Callable[..., Any], tmp_path: Path) -> None:
    stream = canned(20)
    stopped = write_shards(stream, tmp_path / "a", should_stop=lambda: True)
    assert (stopped.drawn, stopped.present, stopped.stopped) == (6, 6, True)
    told: list[tuple[str, int]] = []
    rest = write_shards(
        stream,
        tmp_path / "a",
        on_present=lambda n: told.append(("present", n)),
        on_batch=lambda n: told.append(("new", n)),
    )
    assert (rest.drawn, rest.present, rest.stopped) == (14, 20, False)
    assert told == [("present", 6), ("new", 6), ("new", 6), ("new", 2)]
    write_shards(stream, tmp_path / "b")
    assert _tars(tmp_path / "a") == _tars(tmp_path / "b")


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
def test_every_image_format_is_repeatable(
    synthesizer: Callable[..., Synthesizer], stored: Stored, tmp_path: Path, image_format: str
) -> None:
    for name in ("a", "b"):
        write_shards(synthesizer(image_format=image_format).stream(Request(num_samples=6)), tmp_path / name)
    assert _tars(tmp_path / "a") == _tars(tmp_path / "b")
    assert sum(name.endswith(image_format) for name in stored(tmp_path / "a")) == 6
