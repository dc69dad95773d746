"""A set in rounds: the student between them, resume at any moment, growth, replay, and what is refused."""

import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from synthkd.dfkd.replay import replay_sample
from synthkd.dfkd.rounds import DrawOptions, draw_set
from synthkd.dfkd.student import DistillSpec
from synthkd.engine import GuidanceSpec, Plan, Request, Synthesizer, SynthkdError
from synthkd.engine.errors import NotYetError
from synthkd.engine.index import read_manifest
from synthkd.engine.rows import Part, all_group_rows
from synthkd.engine.verify import verify_set

COUNT = 20  # four groups of 6 in shards of one group: rounds 0, 1, 2, 2; the last group keeps 2


@pytest.fixture(scope="session")
def round_job(tiny_job: Any) -> Any:
    """Three rounds of one group, then the rest; a student of a few steps between them."""
    recipe = replace(tiny_job.recipe, rounds=3, groups_per_shard=1, steps=3)
    student = DistillSpec(
        arch="resnet", arch_args={"widths": [4], "blocks": [1]}, steps=4, batch_size=4, warmup_steps=1
    )
    return replace(tiny_job, recipe=recipe, gamma=1.0, round_student=student)


def files(folder: Path) -> dict[str, bytes]:
    """Shards and checkpoints."""
    found = [*folder.glob("shard-*"), *folder.glob("rounds/*/student*")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(found)}


@pytest.fixture(scope="session")
def whole(round_job: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set that nothing disturbed."""
    folder = tmp_path_factory.mktemp("rounds") / "whole"
    draw_set(round_job, Request(num_samples=COUNT, seed=5), folder, workers=1)
    return folder


def draw(job: Any, folder: Path, count: int = COUNT, **options: Any) -> Any:
    """Draw the set in this process."""
    how = DrawOptions(shards=options.pop("shards", None), part=options.pop("part", None))
    workers = options.pop("workers", 1)
    return draw_set(job, Request(num_samples=count, seed=5), folder, workers=workers, how=how, **options)


def metas(folder: Path) -> dict[int, dict[str, Any]]:
    """The json of every sample."""
    out = {}
    for path in folder.glob("shard-*.tar"):
        with tarfile.open(path) as tar:
            for info in tar:
                if info.name.endswith(".json"):
                    out[int(info.name[:-5])] = json.load(tar.extractfile(info))  # type: ignore[arg-type]
    return out


def test_rounds_are_fixed_by_the_recipe(round_job: Any) -> None:
    plans = [Plan(round_job.recipe, Request(num_samples=n)) for n in (6, 12, 13, 60)]
    assert [p.num_rounds for p in plans] == [1, 2, 3, 3]
    assert [u.round for u in plans[3].units()] == [0, 1, 2, 2, 2, 2, 2, 2, 2, 2]
    assert [list(plans[3].round_shards(r)) for r in range(3)] == [[0], [1], [2, 3, 4, 5, 6, 7, 8, 9]]
    wide = Plan(replace(round_job.recipe, groups_per_shard=2, groups_per_round=4), Request(num_samples=66))
    assert [list(wide.round_shards(r)) for r in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert [u.round for u in wide.units()] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


def test_the_student_takes_part_from_the_second_round_on(whole: Path) -> None:
    rows = list(all_group_rows(whole))
    assert ["adv" in g.curves for g in rows] == [False, True, True, True]
    terms = [v for g in rows[1:] for v in g.curves["adv"]]
    assert max(terms) <= 0  # minus a divergence, where student and teacher agree
    assert min(terms) < 0
    assert {i: m["round"] for i, m in metas(whole).items()} == {i: min(i // 6, 2) for i in range(COUNT)}
    manifest = read_manifest(whole)
    assert set(manifest["checkpoints"]) == {"1", "2"}
    assert manifest["checkpoints"]["1"] != manifest["checkpoints"]["2"]
    assert manifest["guidance"]["gamma"] == 1.0
    assert verify_set(whole).problems == ()


def test_the_first_round_is_that_of_a_set_without_the_term(round_job: Any, whole: Path, tmp_path: Path) -> None:
    plain = replace(round_job, gamma=0.0, recipe=replace(round_job.recipe, rounds=1))
    draw(plain, tmp_path / "plain")
    ours, theirs = (_images(f) for f in (whole, tmp_path / "plain"))
    same = [i for i in range(COUNT) if ours[i] == theirs[i]]
    assert same[:6] == list(range(6))
    assert len(same) < COUNT


def _images(folder: Path) -> dict[int, bytes]:
    out = {}
    for path in folder.glob("shard-*.tar"):
        with tarfile.open(path) as tar:
            for info in tar:
                if info.name.endswith(".png"):
                    out[int(info.name[:-4])] = tar.extractfile(info).read()  # type: ignore[union-attr]
    return out


def test_a_stop_after_any_group_changes_nothing(
    round_job: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped as soon as one more group is drawn, again and again."""
    folder, drawn, run = tmp_path / "set", list[int](), Synthesizer.run
    monkeypatch.setattr(Synthesizer, "run", lambda self, unit, seed: drawn.append(unit.group) or run(self, unit, seed))
    for present in (6, 12, 18, COUNT):
        drawn.clear()
        summary = draw(round_job, folder, should_stop=lambda: bool(drawn))
        assert summary.present == present
        assert summary.stopped
    assert files(folder) == files(whole)


def test_a_stop_is_heard_while_a_student_learns(round_job: Any, whole: Path, tmp_path: Path) -> None:
    """Asked for at its third step, the training ends there, its checkpoint is kept, and the same call goes on."""
    folder, asked = tmp_path / "set", iter([False] * 2 + [True] * 100)
    draw(round_job, folder, 6)
    threads = torch.get_num_threads()
    summary = draw(round_job, folder, should_stop=lambda: next(asked))
    assert summary.stopped
    assert next(asked)
    assert [p.name for p in (folder / "rounds/round-1").iterdir()] == ["checkpoint.safetensors"]
    assert torch.get_num_threads() == threads
    draw(round_job, folder)
    assert files(folder) == files(whole)


def test_a_set_within_the_first_round_says_that_gamma_does_nothing(
    round_job: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw(round_job, tmp_path / "set", 6)
    assert "6 images end within the first round" in caplog.text
    caplog.clear()
    draw(round_job, tmp_path / "set", 7)
    assert "first round" not in caplog.text


def test_a_set_grows_over_the_edge_of_a_round(round_job: Any, whole: Path, tmp_path: Path) -> None:
    for first in (2, 6, 8, 14):
        folder = tmp_path / f"from-{first}"
        draw(round_job, folder, first)
        draw(round_job, folder)
        assert files(folder) == files(whole)
        assert verify_set(folder).problems == ()


def test_two_workers_draw_the_same(round_job: Any, whole: Path, tmp_path: Path) -> None:
    draw(round_job, tmp_path / "set", workers=2)
    assert files(tmp_path / "set") == files(whole)


@pytest.mark.parametrize("point", [0, 3, 6, 9, 12, 16])
def test_a_kill_in_the_second_round(
    round_job: Any, whole: Path, killed: Callable[..., bool], tmp_path: Path, point: int
) -> None:
    """Round 0 is there; SIGKILL at a write to disk while the student is saved or the round is drawn."""
    folder = tmp_path / "set"
    draw(round_job, folder, 6)

    def work() -> None:
        calls, sync, rename = iter(range(10**6)), os.fsync, Path.replace

        def count() -> None:
            if next(calls) == point:
                os.kill(os.getpid(), signal.SIGKILL)

        def fsync(descriptor: int) -> None:
            count()
            sync(descriptor)

        def move(self: Path, target: Any) -> Path:
            count()
            return rename(self, target)

        os.fsync, Path.replace = fsync, move  # type: ignore[method-assign, assignment]
        draw(round_job, folder)

    assert killed(work)
    draw(round_job, folder)
    assert files(folder) == files(whole)
    assert verify_set(folder).problems == ()


@pytest.mark.parametrize("sample", [0, 7, 19])
def test_any_round_is_drawn_again_from_the_manifest(whole: Path, tmp_path: Path, sample: int) -> None:
    path, verdict = replay_sample(whole, sample, tmp_path / "again.png", "cpu")
    assert verdict == "identical to the stored image"
    assert path.read_bytes() == _images(whole)[sample]


def damaged(whole: Path, tmp_path: Path, act: Callable[[Path], object], file: str = "student.safetensors") -> Path:
    """A copy of the set with something done to a file of round 1's student."""
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    act(folder / "rounds" / "round-1" / file)
    return folder


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "weights missing": ("student.safetensors", lambda p: p.unlink()),
    "weights flipped": (
        "student.safetensors", lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])),
    ),
    "card missing": ("student.toml", lambda p: p.unlink()),
    "card changed": ("student.toml", lambda p: p.write_text(p.read_text().replace("[16, 16]", "[8, 8]"))),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_trained_anew(round_job: Any, whole: Path, tmp_path: Path, kind: str) -> None:
    file, act = DAMAGE[kind]
    folder = damaged(whole, tmp_path, act, file)
    problems = verify_set(folder).problems
    assert len(problems) == 1
    assert problems[0].startswith("rounds/round-1: ")
    with pytest.raises(SynthkdError, match="round-1: the student that round 1 was drawn with is missing or damaged"):
        replay_sample(folder, 7, tmp_path / "x.png", "cpu")
    draw(round_job, folder)
    assert files(folder) == files(whole)


def test_another_student_than_the_manifests_is_refused(round_job: Any, whole: Path, tmp_path: Path) -> None:
    folder = damaged(whole, tmp_path, lambda p: p.unlink())
    text = (folder / "manifest.json").read_text()
    known = json.loads(text)["checkpoints"]["1"]
    (folder / "manifest.json").write_text(text.replace(known, "0" * 64))
    with pytest.raises(SynthkdError, match="training it anew gave another one"):
        draw(round_job, folder)


def test_a_round_needs_the_rounds_before_it(round_job: Any, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with pytest.raises(SynthkdError, match="round 2 needs the rounds before it; shard 0 is not finished"):
        draw(round_job, folder, shards=[3])
    with pytest.raises(NotYetError, match="the same command goes on when it is there") as early:
        draw(round_job, folder, part=Part(1, 2))
    assert early.value.exit_code == 75
    draw(round_job, folder, shards=[0])
    draw(round_job, folder, shards=[1])
    draw(round_job, folder, shards=[3, 2])
    assert files(folder) == files(whole)


def test_another_recipes_folder_is_left_alone(round_job: Any, whole: Path, tmp_path: Path) -> None:
    """Not even a student is trained on it."""
    folder = damaged(whole, tmp_path, lambda p: p.unlink())
    before = (folder / "manifest.json").read_text()
    other = replace(round_job, gamma=2.0)
    for shards in (None, [2]):
        with pytest.raises(SynthkdError, match="holds another recipe's set"):
            draw(other, folder, shards=shards)
    assert (folder / "manifest.json").read_text() == before
    assert not (folder / "rounds" / "round-1" / "student.safetensors").exists()


def test_what_is_declared_is_in_the_fingerprint(round_job: Any) -> None:
    def fingerprint(job: Any) -> str:
        found: str = job.build().identity(0)["fingerprint"]
        return found

    base = fingerprint(round_job)
    spec = replace(round_job.round_student, steps=5)
    for other in (replace(round_job, gamma=0.5), replace(round_job, divergence="js"),
                  replace(round_job, round_student=spec)):  # fmt: skip
        assert fingerprint(other) != base
    assert fingerprint(replace(round_job)) == base


def test_a_group_of_another_round_is_not_drawn_by_mistake(round_job: Any) -> None:
    synth = round_job.build()
    unit = synth.stream(Request(num_samples=COUNT)).plan.unit(1)
    with pytest.raises(SynthkdError, match="group 1 belongs to round 1, the guidance stands at round 0"):
        synth.run(unit, 0)


@pytest.mark.parametrize(
    ("job_changes", "recipe_changes", "message"),
    [
        ({}, {"rounds": 1}, "gamma is 1.0, but rounds is 1"),
        ({"gamma": 0.0}, {}, "rounds is 3, but gamma is 0"),
        ({}, {"guidance": GuidanceSpec(scale=0.0)}, "gamma is 1.0, but guidance.scale is 0"),
        ({}, {"height": 2, "width": 2}, "reads images of 16x16, the prior draws 2x2: enlarged 8.0 times"),
    ],
)
def test_jobs_that_make_no_sense(
    round_job: Any, job_changes: dict[str, Any], recipe_changes: dict[str, Any], message: str
) -> None:
    job = replace(round_job, recipe=replace(round_job.recipe, **recipe_changes), **job_changes)
    with pytest.raises(SynthkdError, match=message) as caught:
        job.check()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"rounds": 1, "groups_per_round": 2}, "groups_per_round is 2; expected 0 with rounds = 1"),
        (
            {"rounds": 2, "groups_per_round": 3, "groups_per_shard": 2},
            "groups_per_round is 3; expected a multiple of groups_per_shard 2",
        ),
    ],
)
def test_rounds_that_do_not_fit(tiny_job: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SynthkdError, match=message):
        replace(tiny_job.recipe, **changes)
