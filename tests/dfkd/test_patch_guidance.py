"""The patch term: its equation and gradient, parts and graphs, what a fingerprint knows, fitting, replay, refusals."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.dfkd.cached import MemorySource
from synthkd.dfkd.cli_options import Asked, build_job
from synthkd.dfkd.data import LabelledImages
from synthkd.dfkd.fit_patches import PatchSpec, fit_patches
from synthkd.dfkd.generators import PatchDiscriminator, patch_loss
from synthkd.dfkd.job import SynthJob
from synthkd.dfkd.losses import local_realism
from synthkd.dfkd.methods import TeacherGuidance
from synthkd.dfkd.patches import FILE, PatchCritic, load_patches, save_patches
from synthkd.dfkd.presets import unguided
from synthkd.dfkd.replay import replay_sample
from synthkd.dfkd.rounds import draw_set
from synthkd.dfkd.teachers import Teacher, load_teacher
from synthkd.dfkd.tensor_files import read_tensors, write_tensors
from synthkd.engine import GuidanceSpec, Plan, Recipe, Request, SynthkdError
from synthkd.engine.roles import gradient_function

TARGETS = torch.eye(3, dtype=torch.float64)[[0, 1, 1, 2]]


def critic(seed: int = 0, size: tuple[int, int] = (16, 16)) -> PatchCritic:
    """A critic of random weights whose norms have seen something."""
    torch.manual_seed(seed)
    net = PatchDiscriminator(width=4)
    for _ in range(5):
        net(torch.rand(6, 3, *size))
    return PatchCritic(net, size, 4)


@pytest.fixture
def teacher(teacher_card: Path) -> Teacher:
    """The tiny one in float64."""
    return load_teacher(str(teacher_card)).double()


@pytest.fixture
def job(pipeline_folder: Path, teacher_card: Path, recipe: Callable[..., Recipe], tmp_path: Path) -> SynthJob:
    """A guided job with the term."""
    save_patches(critic(), tmp_path / "patches", {})
    guided = recipe(guidance=GuidanceSpec(scale=0.3))
    return SynthJob(
        model=str(pipeline_folder), teacher=str(teacher_card), recipe=guided, patch=0.5,
        patches=str(tmp_path / "patches"),
    )  # fmt: skip


def test_the_equation() -> None:
    """Minus the log of the share that the discriminator gives to real, mean over patches; finite far out."""
    logits = torch.randn(5, 1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    want = [sum(-math.log(1 / (1 + math.exp(-v))) for v in row.flatten().tolist()) / 6 for row in logits]
    torch.testing.assert_close(local_realism(logits), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(local_realism(logits).mean(), patch_loss(logits, True), rtol=1e-12, atol=1e-12)
    half = torch.full((1, 1, 2, 2), -3e4, dtype=torch.float16)
    assert local_realism(half).dtype == torch.float32
    assert local_realism(half).item() == pytest.approx(3e4, rel=1e-3)


@pytest.mark.parametrize("size", [(16, 16), (13, 18)])
def test_gradient_is_the_central_difference(teacher: Teacher, size: tuple[int, int]) -> None:
    """Of the term alone, in float64, also where images have another size than the critic's."""
    guidance = TeacherGuidance(teacher, alpha=0.0, beta=0.0, patch=0.7, patches=critic().double())
    x = torch.rand(4, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss, terms = guidance(x, TARGETS)
    assert set(terms) == {"patch"}
    assert terms["patch"].shape == (4,)
    assert float(loss.detach()) == pytest.approx(0.7 * float(terms["patch"].detach().mean()))
    (grad,) = torch.autograd.grad(loss, x)
    v, h = grad / grad.norm(), 1e-6
    with torch.no_grad():
        up, down = (float(guidance(x + s * h * v, TARGETS)[0]) for s in (1, -1))
    assert (up - down) / (2 * h) == pytest.approx(float((grad * v).sum()), rel=1e-5)


def test_a_group_in_parts_is_the_group(job: SynthJob) -> None:
    """And the term takes part: its curve is there, and images change."""

    def drawn(job: SynthJob, part: int) -> Any:
        synth = replace(job, micro_batch=part).build()
        return synth.run(Plan(job.recipe, Request(num_samples=6)).unit(0), 0)

    whole, parts, without = drawn(job, 6), drawn(job, 4), drawn(replace(job, patch=0.0), 6)
    assert (whole.images.int() - parts.images.int()).abs().max() <= 1
    assert torch.tensor(whole.curves["patch"]).shape == (4, 6)
    curves = [torch.tensor(drawn.curves["patch"]) for drawn in (whole, parts)]
    torch.testing.assert_close(curves[0], curves[1], atol=1e-4, rtol=0)
    assert not torch.equal(whole.images, without.images)
    assert "patch" not in without.curves


def test_the_gradient_as_a_graph_knows_the_critic(job: SynthJob) -> None:
    """Its weights are part of a graph of the gradient, not an input, and the gradient is the same."""
    synth = job.build()
    guidance: Any = synth.guidance
    assert any(isinstance(m, PatchCritic) for m in guidance.constant())
    assert any(isinstance(m, PatchCritic) for m in guidance.modules())
    x0 = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    targets = torch.eye(3)[[0, 1, 2, 0, 1, 2]]
    found = gradient_function(guidance, synth.look)(x0, targets, (), guidance.begin(), guidance.given())
    leaf = x0.clone().requires_grad_()
    loss, _ = guidance(synth.look(leaf).clamp(0, 1), targets)
    torch.testing.assert_close(found.grad, torch.autograd.grad(loss, leaf)[0], atol=1e-6, rtol=1e-5)


def test_what_a_fingerprint_knows(teacher: Teacher) -> None:
    plain = TeacherGuidance(teacher).describe()
    assert TeacherGuidance(teacher, patches=critic(), patch=0.0).describe() == plain
    one, two = (TeacherGuidance(teacher, patches=critic(seed), patch=0.1).describe() for seed in (0, 1))
    assert set(one) - set(plain) == {"patch", "patches_sha256"}
    assert one["patches_sha256"] != two["patches_sha256"]
    assert critic(size=(16, 16)).digest() != critic(size=(16, 18)).digest()


def test_neighbours_do_not_change_what_it_says() -> None:
    judge, images = critic().train(), torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(judge(images)[:1], judge(images[:1]), atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in judge.parameters())


def test_a_set_is_replayed_from_its_manifest(job: SynthJob, tmp_path: Path) -> None:
    draw_set(job, Request(num_samples=6), tmp_path / "set", workers=1)
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["source"]["patches"] == job.patches
    assert manifest["guidance"]["patch"] == 0.5
    assert replay_sample(tmp_path / "set", 2, tmp_path / "2.png", "cpu")[1] == "identical to the stored image"
    save_patches(critic(seed=9), Path(job.patches), {})
    with pytest.raises(SynthkdError, match="changed since the set was drawn"):
        replay_sample(tmp_path / "set", 2, tmp_path / "2.png", "cpu")
    assert unguided(job).patch == 0


def test_fitting_tells_guided_patches_and_comes_out_again(job: SynthJob) -> None:
    """A function of (job, spec): one that guides nothing has nothing to tell apart."""
    spec = PatchSpec(samples=6, steps=40, batch_size=16, width=8)
    one, two = fit_patches(job, spec), fit_patches(job, spec)
    assert one.critic.digest() == two.critic.digest()
    assert one.about["real"] == "prior"
    assert "patch" not in one.about["guidance"]
    noise = (torch.rand(30, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    pool = MemorySource(LabelledImages(noise, torch.zeros(30, dtype=torch.long), ()))
    other = fit_patches(job, spec, pool)  # noise is told from a decoder's patches at once, where a coin has 0.5
    assert min(other.held_out.values()) > 0.8
    assert other.about["curve"][-1]["loss"] < 0.5 * math.log(2)
    with pytest.raises(SynthkdError, match="nothing is made"):
        fit_patches(replace(job, recipe=replace(job.recipe, guidance=GuidanceSpec(scale=0.0))), spec)


def test_a_critic_comes_back_from_its_file(tmp_path: Path) -> None:
    made, images = critic(size=(16, 20)), torch.rand(2, 3, 16, 20)
    save_patches(made, tmp_path, {"spec": {"steps": 3}})
    found = load_patches(str(tmp_path))
    assert torch.equal(found(images), made(images))
    assert found.digest() == made.digest()


def _changed(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    tensors, note = read_tensors(path)
    change(tensors, note)
    write_tensors(path, tensors, note)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "expected what `synthkd fit-patches` wrote"),
        (lambda t, n: n.update(format=7), "not of format 1"),
        (lambda t, n: n["shape"].update(patch=11), "shape.patch is 11; expected 10 or 22 or 46"),
        (lambda t, n: t["steps.0.weight"].mul_(1.01), "do not match the digest"),
        (lambda t, n: t.pop("steps.0.bias"), "'steps.0.bias' is no tensor"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, change: Any, said: str) -> None:
    save_patches(critic(), tmp_path, {})
    if change is None:
        (tmp_path / FILE).unlink()
    else:
        _changed(tmp_path / FILE, change)
    with pytest.raises(SynthkdError) as found:
        load_patches(str(tmp_path))
    assert said in str(found.value)
    assert "\n" not in str(found.value)


def test_options_that_do_not_fit_are_one_line(job: SynthJob, teacher: Teacher) -> None:
    base = replace(job, patch=0.0, patches="")
    made = build_job(base, Asked(patches=job.patches, patch=0.25), "cpu")
    assert (made.patch, made.patches) == (0.25, job.patches)
    with pytest.raises(SynthkdError, match="no patches are named"):
        build_job(base, Asked(patch=0.25), "cpu")
    with pytest.raises(SynthkdError, match="expected what `synthkd fit-patches` wrote"):
        build_job(base, Asked(patches="nowhere", patch=0.25), "cpu")
    with pytest.raises(SynthkdError, match="there are no patches"):
        TeacherGuidance(teacher, patch=0.1)
    with pytest.raises(SynthkdError, match=r"patch is -1\.0; expected a number >= 0"):
        TeacherGuidance(teacher, patch=-1.0, patches=critic())
