"""Roles on other backends: the images of eager, per family, and a guided run without autograd."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.dfkd.methods.diffdfkd import TeacherGuidance
from synthkd.dfkd.presets import load_preset
from synthkd.dfkd.teachers import load_teacher
from synthkd.engine import CutMixSpec, Execution, GuidanceSpec, Plan, Recipe, Request, Synthesizer, SynthkdError
from synthkd.engine.augment import Look
from synthkd.engine.memory import MemoryPlan
from synthkd.engine.models import load_model, wrap_pipeline
from synthkd.engine.parted import PartedGradient
from synthkd.engine.roles import ROLES, Parts, calls_of, parse_backends
from synthkd.export import available, default_store
from synthkd.export.onnx import operators
from synthkd.export.tensorrt_operators import unsupported_operators

pytest.importorskip("onnxruntime", reason="part of the onnx extra")

FAMILIES = ("sd1", "sd2", "sdxl", "dit", "embedded")
LATENTS = 1e-4  # largest difference of final latents and images from eager's, unguided: 4 calls of rounding at 1e-6


@pytest.fixture(autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """One store and one key for all tests of a process."""
    home = tmp_path_factory.getbasetemp() / "artifacts-home"
    monkeypatch.setenv("SYNTHKD_ARTIFACTS", str(home / "store"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))


def words(family: str) -> dict[str, Any]:
    """What a family's recipe needs beside the others'."""
    if family == "embedded":
        return {"height": 32, "width": 32, "prompts": ("a small handwritten digit {class}",)}
    return {"classes": ("0", "1", "2"), "prompts": ("{class}",)} if family == "dit" else {}


@pytest.fixture
def prior(pipelines: Mapping[str, Any]) -> Callable[[str], Any]:
    """The prior of a family."""

    def of(family: str) -> Any:
        if family == "embedded":
            return load_model("embedded:digits", device="cpu", dtype=torch.float32)
        return wrap_pipeline(pipelines[family])

    return of


def check_for_tensorrt(synth: Synthesizer) -> None:
    """Every graph is made of what TensorRT's parser documents; attention and norms stay whole."""
    for name, compiled in synth.routes.compiled.items():
        assert compiled.manifest is not None
        (folder,) = default_store().glob(f"{name}-onnx-{compiled.manifest.key}")
        counts = operators(folder)
        assert not unsupported_operators(counts, "10.15"), (name, counts)
        if name in ("unet", "vae"):
            assert "InstanceNormalization" not in counts
            # the embedded UNet pools its text by one softmax of its own
            assert counts["Attention"] > counts.get("Softmax", 0)
            assert counts.get("GroupNormalization", 0) + counts.get("LayerNormalization", 0) > 0


def drawn(synth: Synthesizer) -> Tensor:
    """The first group's images as floats of 0 to 255, before rounding could hide or show a difference of 1."""
    unit = Plan(synth.recipe, Request(num_samples=synth.recipe.group_size)).unit(0)
    found: list[Tensor] = []
    decoded = synth._decoded
    synth._decoded = lambda z, clock: found.append(decoded(z, clock)) or found[-1]  # type: ignore[method-assign,func-returns-value]
    synth.run(unit, 0)
    return found[0]


def parts_at(group: int, part: int) -> MemoryPlan:
    """A plan that takes `part` samples at a time."""
    return MemoryPlan(group, part, group, part, False, 0, 0, "as the test says")


@pytest.mark.parametrize("family", FAMILIES)
def test_images_are_eagers(family: str, prior: Callable[[str], Any], recipe: Callable[..., Recipe]) -> None:
    """Text encoders, denoiser and decoder in onnxruntime: one artifact each for a group at once, parts, one sample."""
    wanted = recipe(cfg_stop=0.5, **words(family))
    eager = drawn(Synthesizer(prior(family), wanted))
    synth = Synthesizer(prior(family), wanted, execution=Execution(backends=("onnx",)))
    for part in (6, 5, 1):  # 5: a remainder of one
        synth.memory = parts_at(6, part)
        torch.testing.assert_close(drawn(synth), eager, atol=LATENTS, rtol=0)
    names = {"unet", "vae"} | (set() if family == "dit" else {"text_encoder"})
    assert set(synth.routes.compiled) == names | ({"text_encoder_2"} if family == "sdxl" else set())
    check_for_tensorrt(synth)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_remainder(family: str, prior: Callable[[str], Any], recipe: Callable[..., Recipe]) -> None:
    """Built for parts of four alone: the last two of six go with copies of themselves, classifier-free or not."""
    wanted = recipe(cfg_stop=0.5, steps=2, **words(family))
    eager = drawn(Synthesizer(prior(family), wanted))
    execution = Execution(backends=("unet=onnx", "vae=onnx"), fixed_batch=True)
    synth = Synthesizer(prior(family), wanted, micro_batch=4, execution=execution)
    torch.testing.assert_close(drawn(synth), eager, atol=LATENTS, rtol=0)
    assert not synth.routes.compiled["unet"].signature.dynamic
    assert synth.routes.compiled["unet"].signature.batch == 8


GRADIENTS = {"vae": {}, "pooled with looks": {"decoder": "pooled:2", "looks": 2, "look_flip": True}}


@pytest.mark.parametrize("case", GRADIENTS)
def test_a_guided_run(
    case: str, pipelines: Mapping[str, Any], recipe: Callable[..., Recipe], guide: Callable[..., TeacherGuidance]
) -> None:
    """Every role in onnxruntime, or the gradient alone: terms and images of autograd; BatchNorm memory, looks."""
    spec = GuidanceSpec(scale=0.05, **GRADIENTS[case])
    wanted = recipe(guidance=spec, steps=3)
    memory = {"bn_momentum": 0.5} if case == "vae" else {}
    eager = Synthesizer.from_pipeline(pipelines["sd1"], wanted, guidance=guide(**memory))
    roles = Execution(backends=("onnx" if case == "vae" else "gradient=onnx",))
    other = Synthesizer.from_pipeline(pipelines["sd1"], wanted, guidance=guide(**memory), execution=roles)
    torch.testing.assert_close(drawn(other), drawn(eager), atol=2e-3, rtol=0)
    unit = Plan(wanted, Request(num_samples=12)).unit(1)
    ours, theirs = other.run(unit, 0), eager.run(unit, 0)
    for name, curve in theirs.curves.items():
        torch.testing.assert_close(torch.tensor(ours.curves[name]), torch.tensor(curve), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.notes["logits"], theirs.notes["logits"], rtol=1e-2, atol=1e-2)
    check_for_tensorrt(other)


def test_a_group_in_parts(
    pipelines: Mapping[str, Any], recipe: Callable[..., Recipe], guide: Callable[..., TeacherGuidance],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Groups of six in parts of four: look, judge and pull in onnxruntime give what autograd gives at once."""
    wanted = recipe(guidance=GuidanceSpec(scale=0.05, decoder="pooled:2"), steps=3)
    roles = Execution(backends=("gradient=onnx",))
    whole = Synthesizer.from_pipeline(pipelines["sd1"], wanted, guidance=guide())
    other = Synthesizer.from_pipeline(pipelines["sd1"], wanted, guidance=guide(), micro_batch=4, execution=roles)
    torch.testing.assert_close(drawn(other), drawn(whole), atol=2e-3, rtol=0)
    kinds = {f"gradient-{name}" for name in ("look-4", "look-2", "judge-4", "pull-4", "pull-2")}
    assert set(other.routes.compiled) == kinds
    monkeypatch.setattr(torch.autograd, "grad", None)  # neither a second start nor a group takes a gradient
    again = Synthesizer.from_pipeline(pipelines["sd1"], wanted, guidance=guide(), micro_batch=4, execution=roles)
    assert torch.equal(drawn(again), drawn(other))


@pytest.mark.parametrize("memory", [0.0, 0.5])
def test_parts_with_views(
    memory: float, pipelines: Mapping[str, Any], recipe: Callable[..., Recipe], guide: Callable[..., TeacherGuidance]
) -> None:
    """The pieces themselves, eager: two views, a memory, parts of four sizes; against the group at once."""
    guidance, wanted = guide(bn_momentum=memory), recipe(guidance=GuidanceSpec(scale=0.1, looks=3))
    synth = Synthesizer.from_pipeline(pipelines["sd1"], wanted, guidance=guidance)
    (call,) = calls_in(synth)
    x0, targets, looks, before, given = call.inputs
    looks = tuple(Look(look.shift + 0.1 * (i + 1), look.mirror | (i == 1)) for i, look in enumerate(looks))
    with guidance.attached():
        exact = call.function(x0, targets, looks, before, given)
        for chunk in (5, 4, 2, 1):
            parted = PartedGradient(guidance, synth.look, 6, chunk, guidance.using)
            run = {piece.name: piece.function for piece in parted.pieces(x0, targets, looks, before, given)}
            found = parted(run, given, x0, targets, looks, before)
            assert relative(found.grad, exact.grad) < 1e-5
            torch.testing.assert_close(found.loss, exact.loss)
            torch.testing.assert_close(found.terms, exact.terms, rtol=1e-4, atol=1e-5)
            assert (found.memory is None) == (memory == 0.0)


def relative(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||."""
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("decoder", ["vae", "fitted:embedded:digits"])
def test_the_gradient_of_the_embedded_model(decoder: str) -> None:
    """Relative error <= 1e-4 against autograd, the issue's bound; and the whole preset's images where it is well posed.

    The preset itself multiplies a rounding error by 10^5 within a run (docs/backends.md), so its scale is lowered here.
    """
    job = load_preset("digits").job
    spec = replace(job.recipe.guidance, decoder=decoder, scale=0.02)
    wanted = replace(job.recipe, guidance=spec, classes_per_group=4, steps=5, cutmix=CutMixSpec())
    guidance = job.guidance(load_teacher(job.teacher))
    synth = Synthesizer.from_pretrained(
        job.model, wanted, guidance=guidance, device="cpu", execution=Execution(backends=("gradient=onnx",))
    )
    (call,) = calls_in(synth)
    x0, targets, looks, memory, given = call.inputs
    compiled = synth.prepare().compiled["gradient"]
    exact_ones = 0
    for seed in range(4):
        x0 = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
        with guidance.attached():
            exact = call.function(x0, targets, looks, memory, given)
        found = compiled(x0, targets, looks, memory, given)
        apart = sorted(relative(a, b) for a, b in zip(found.grad, exact.grad, strict=True))
        assert apart[-2] <= 1e-4  # in one sample of 40 a value may lie within rounding of a ReLU's kink
        exact_ones += relative(found.grad, exact.grad) <= 1e-4
        torch.testing.assert_close(found.loss, exact.loss, rtol=1e-5, atol=1e-5)
        assert found.memory is None
    assert exact_ones >= 2
    check_for_tensorrt(synth)
    eager = Synthesizer.from_pretrained(job.model, wanted, guidance=guidance, device="cpu")
    torch.testing.assert_close(drawn(synth), drawn(eager), atol=2e-3, rtol=0)


def calls_in(synth: Synthesizer) -> list[Any]:
    """The gradient role's call."""
    parts = Parts(synth.model, synth.recipe, synth._tables, synth.guidance, synth.look, synth.memory)
    return calls_of("gradient", parts)


def test_the_gradient_through_a_tiny_autoencoder(
    build: Any, pipelines: Mapping[str, Any], recipe: Callable[..., Recipe], guide: Callable[..., TeacherGuidance],
    tmp_path: Path,
) -> None:  # fmt: skip
    """And a student, BN targets as inputs of the graph: other values of them need no other artifact."""
    build.tiny_autoencoder().save_pretrained(tmp_path / "tiny")
    wanted = recipe(guidance=GuidanceSpec(scale=0.05, decoder=f"tiny:{tmp_path / 'tiny'}"))
    student = guide().teacher
    with torch.no_grad():  # the same head on other features: both name the same class, their certainty differs
        student.net.fc.weight.mul_(0.5)  # type: ignore[operator,union-attr]
    guidance = guide(gamma=1.0, student=student)
    synth = Synthesizer.from_pipeline(
        pipelines["sd1"], wanted, guidance=guidance, execution=Execution(backends=("gradient=onnx",))
    )
    (call,) = calls_in(synth)
    compiled, key = synth.prepare().compiled["gradient"], None
    x0, targets, looks, memory, _ = call.inputs
    grads = []
    for change in (0.0, 0.3):
        with torch.no_grad():
            for p in student.parameters():
                p.mul_(1 + change)
        given = guidance.given()
        given["targets"] = {name: (mean + change, var) for name, (mean, var) in given["targets"].items()}
        with guidance.attached():
            exact = call.function(x0, targets, looks, memory, given)
        found = compiled(x0, targets, looks, memory, given)
        assert relative(found.grad, exact.grad) <= 1e-4
        torch.testing.assert_close(found.terms["adv"], exact.terms["adv"], rtol=1e-4, atol=1e-5)
        assert float(exact.terms["adv"].abs().max()) > 0
        grads.append(found.grad)
        again = Synthesizer.from_pipeline(
            pipelines["sd1"], wanted, guidance=guidance, execution=Execution(backends=("gradient=onnx",))
        )
        manifest = again.prepare().compiled["gradient"].manifest
        assert manifest is not None
        assert key in (None, manifest.key)
        key = manifest.key
    assert relative(grads[1], grads[0]) > 1e-2  # both were felt


ALONE = """
import json, sys, torch
from synthkd.dfkd.job import SynthJob
from synthkd.engine import Execution, GuidanceSpec, Plan, Recipe, Request
import torch._dynamo
def no_autograd(*args, **kwargs):
    raise AssertionError("autograd was used")
torch.autograd.grad = torch.autograd.backward = torch.Tensor.backward = no_autograd
torch.autograd.graph._engine_run_backward = torch.autograd._engine_run_backward = no_autograd
building = sys.modules["synthkd.export.build"]
def no_building(*args, **kwargs):
    raise AssertionError("something was built")
building.Build = no_building
told = json.loads(sys.argv[1])
job = SynthJob(model=told["model"], teacher=told["teacher"], recipe=Recipe.from_dict(told["recipe"]),
               execution=Execution(backends=tuple(told["backends"])))
with torch.inference_mode():
    synth = job.build()
    batch = synth.run(Plan(synth.recipe, Request(num_samples=6)).unit(0), 0)
torch.save(batch.images, told["out"])
"""


def test_a_guided_run_without_autograd(
    pipeline_folder: Path, teacher_card: Path, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """In another process, where autograd raises and nothing may be built: the images are eager's within 1 of 255.

    The same process with the gradient left to autograd raises, so the guard works.
    """
    from synthkd.dfkd.job import SynthJob

    wanted = recipe(guidance=GuidanceSpec(scale=0.05), steps=3)
    job = SynthJob(model=str(pipeline_folder), teacher=str(teacher_card), recipe=wanted)
    eager = job.build().run(Plan(wanted, Request(num_samples=6)).unit(0), 0).images
    replace(job, execution=Execution(backends=("onnx",))).build().prepare()
    told = {
        "model": job.model, "teacher": job.teacher, "recipe": wanted.to_dict(), "out": str(tmp_path / "images.pt"),
    }  # fmt: skip

    def alone(*backends: str) -> "subprocess.CompletedProcess[str]":
        words = [sys.executable, "-c", ALONE, json.dumps({**told, "backends": backends})]
        return subprocess.run(words, capture_output=True, text=True, timeout=120, env=dict(os.environ))

    done = alone("onnx")
    assert done.returncode == 0, done.stderr
    images = torch.load(tmp_path / "images.pt", weights_only=True)
    assert int((images.int() - eager.int()).abs().max()) <= 1
    refused = alone("onnx", "gradient=eager")
    assert refused.returncode != 0
    assert "autograd was used" in refused.stderr or "inference" in refused.stderr.lower()


def test_a_second_start_builds_nothing(
    pipelines: Mapping[str, Any], recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no other role, batch or recipe of the same size asks for another UNet."""
    wanted = recipe(classes_per_group=2, samples_per_class=2)
    first = Synthesizer.from_pipeline(pipelines["sd1"], wanted, execution=Execution(backends=("vae=onnx",)))
    key = manifest_key(first, "vae")
    monkeypatch.setattr(sys.modules["synthkd.export.build"], "Build", None)
    again = Synthesizer.from_pipeline(
        pipelines["sd1"], replace(wanted, prompts=("another {class}",)), execution=Execution(backends=("vae=onnx",))
    )
    assert manifest_key(again, "vae") == key


def manifest_key(synth: Synthesizer, name: str) -> str:
    """Of a role's artifact, built or loaded."""
    manifest = synth.prepare().compiled[name].manifest
    assert manifest is not None
    return manifest.key


def test_words_for_backends() -> None:
    """Later entries win, eager is left out, a wrong word is one line with the nearest right one."""
    assert parse_backends(("onnx", "vae=eager")) == {r: "onnx" for r in ROLES if r != "vae"}
    assert parse_backends(("unet=aoti", "unet=onnx")) == {"unet": "onnx"}
    assert parse_backends(("onnx", "eager")) == {}
    for entry, line in (
        ("vea=onnx", "role 'vea'; did you mean 'vae'"),
        ("unet=onxx", "backend 'onxx'; did you mean 'onnx'"),
        ("", "backend ''"),
    ):
        with pytest.raises(SynthkdError, match=line):
            parse_backends((entry,))


def test_what_cannot_be(
    pipelines: Mapping[str, Any], recipe: Callable[..., Recipe], guide: Callable[..., TeacherGuidance]
) -> None:
    """One line each, before anything is built."""

    def refused(line: str, wanted: Recipe, guided: bool = True, **how: Any) -> None:
        with pytest.raises(SynthkdError, match=line) as error:
            Synthesizer.from_pipeline(pipelines["sd1"], wanted, guidance=guide() if guided else None, **how).prepare()
        assert "\n" not in str(error.value)

    gradient = Execution(backends=("gradient=onnx",))
    through = recipe(guidance=GuidanceSpec(scale=0.1, gradient="unet"))
    refused("guidance.gradient 'unet' goes through the denoiser", through, execution=gradient)
    guided = recipe(guidance=GuidanceSpec(scale=0.1))
    refused("use one of the two", guided, execution=gradient, compile="default")
    refused("TensorRT is not installed|TensorRT", recipe(backends=("vae=tensorrt",)), guided=False)
    refused("attention 'flash': needs a CUDA GPU", recipe(), guided=False, execution=Execution(attention="flash"))
    for wrong, line in (({"attention": "falsh"}, "did you mean 'flash'"), ({"quantize": "fp9"}, "quantize 'fp9'")):
        with pytest.raises(SynthkdError, match=line):
            Execution(**wrong)
    both = Execution(quantize="fp8-emulated", backends=("unet=onnx",))
    refused("unet=onnx takes no fp8", recipe(), guided=False, execution=both)
    small = Execution(quantize="fp8-emulated")
    refused("no layer of this UNet2DConditionModel", recipe(), guided=False, execution=small)


def test_a_prior_of_ones_own(recipe: Callable[..., Recipe], pipelines: Mapping[str, Any]) -> None:
    """Its decoder can have a backend, its denoiser cannot; that is said."""
    inner = Synthesizer.from_pipeline(pipelines["sd1"], recipe()).model

    class Own:
        def __getattr__(self, name: str) -> Any:
            if name in ("text_calls", "denoiser_call", "routed", "replaced"):
                raise AttributeError(name)
            return getattr(inner, name)

    own: Any = Own()
    Synthesizer(own, recipe(), execution=Execution(backends=("vae=onnx",))).prepare()
    with pytest.raises(SynthkdError, match="has no unet that can be replaced; use unet=eager"):
        Synthesizer(own, recipe(), execution=Execution(backends=("unet=onnx",))).prepare()


def test_fp8_emulated(
    pipelines: Mapping[str, Any], recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin draws, its quality is known, the live denoiser is untouched; a bad one is refused in one line."""
    from synthkd.export import fp8

    real = fp8.quantized
    monkeypatch.setattr(fp8, "quantized", lambda unet, **how: real(unet, smallest=16, **how))
    unet = pipelines["sd1"].unet
    before = {name: p.clone() for name, p in unet.state_dict().items()}
    execution = Execution(quantize="fp8-emulated")
    synth = Synthesizer.from_pipeline(pipelines["sd1"], recipe(steps=2), execution=execution)
    eager = Synthesizer.from_pipeline(pipelines["sd1"], recipe(steps=2))
    assert not torch.equal(drawn(synth), drawn(eager))
    assert synth.routes.quality["psnr"] > fp8.PSNR
    assert synth.model._denoiser is unet  # type: ignore[attr-defined]
    assert all(torch.equal(before[name], p) for name, p in unet.state_dict().items())
    assert synth.stream(Request(num_samples=6)).environment["roles"] == "quantize fp8-emulated"
    monkeypatch.setattr(fp8, "PSNR", 500.0)
    with pytest.raises(SynthkdError, match="at least 500 are needed"):
        Synthesizer.from_pipeline(pipelines["sd1"], recipe(steps=2), execution=execution).prepare()


@pytest.mark.slow
def test_aoti(pipelines: Mapping[str, Any], recipe: Callable[..., Recipe]) -> None:
    """Machine code of one UNet and one decoder, made ahead of time: eager's images, for parts too."""
    if why := available()["aoti"]:
        pytest.skip(why)
    wanted = recipe(classes_per_group=2, samples_per_class=2, steps=2)
    execution = Execution(backends=("unet=aoti", "vae=aoti"))
    synth = Synthesizer.from_pipeline(pipelines["sd1"], wanted, execution=execution)
    eager = drawn(Synthesizer.from_pipeline(pipelines["sd1"], wanted))
    for part in (4, 3, 1):
        synth.memory = parts_at(4, part)
        torch.testing.assert_close(drawn(synth), eager, atol=LATENTS, rtol=0)
    assert {c.manifest.backend for c in synth.routes.compiled.values() if c.manifest} == {"aoti"}

