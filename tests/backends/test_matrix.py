"""`make test-backends`: every backend of every small pipeline and role, at batch 1, the micro-batch and a remainder."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

pytest.importorskip("diffusers", reason="pipelines are diffusers' own")

from synthkd.dfkd.methods.diffdfkd import TeacherGuidance
from synthkd.dfkd.presets import load_preset
from synthkd.dfkd.teachers import load_teacher
from synthkd.engine import CutMixSpec, Execution, GuidanceSpec, Plan, Request, Synthesizer
from synthkd.engine.decoders import Decoder
from synthkd.engine.fitted import FittedDecoder, FittedNet, shape_for
from synthkd.engine.memory import MemoryPlan
from synthkd.engine.models import load_model
from synthkd.engine.roles import ROLES, RoleCall, calls_of
from synthkd.export import available
from synthkd.export import build as build_backend

pytestmark = pytest.mark.backends

BACKENDS = ("onnx", "aoti", "compile")
PIPELINES = ("sd1", "sd2", "sdxl", "dit", "digits")
GROUP, PART = 6, 4  # a part of 4 and a remainder of 2
SERIES = [
    (name, role) for name in PIPELINES for role in ROLES[:-1] if (name, role) != ("dit", "text_encoder")
]  # its classes are no text
DECODERS = [("sd1", "tiny"), ("sd1", "pooled:2"), ("sd1", "fitted")]
DECODERS += [("digits", "fitted:embedded:digits"), ("digits", "pooled:2")]
DECODERS += [(name, "vae") for name in PIPELINES]


@pytest.fixture(autouse=True)
def there(request: pytest.FixtureRequest) -> None:
    """A backend that cannot be used here says why."""
    for name, why_not in available().items():
        if why_not and f"-{name}" in request.node.name:
            pytest.skip(why_not)


@pytest.fixture(autouse=True)
def one_thread_and_graphs_of_its_own() -> Any:
    """What is compiled in a test counts against its own limit of recompilations."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of this session, shared by its processes: whole runs find what tests of roles have built."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "artifacts"


@pytest.fixture(scope="module")
def priors(pipelines: Mapping[str, Any]) -> Callable[[str], Any]:
    """A prior by name: a tiny pipeline of its family, or the embedded one."""
    loaded: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name == "digits" and name not in loaded:
            loaded[name] = load_model("embedded:digits", device="cpu", dtype=torch.float32)
        return loaded.get(name) or pipelines[name]

    return get


@pytest.fixture
def make(
    priors: Callable[[str], Any],
    recipe: Callable[..., Any],
    teacher_card: Path,
    store: Path,
    build: Any,
    tmp_path: Path,
) -> Callable[..., Synthesizer]:
    """A guided Synthesizer of a pipeline, two of its parts computed 4 samples at a time."""

    def synth(name: str, decoder: str = "vae", backends: tuple[str, ...] = ()) -> Synthesizer:
        look = decoder if decoder.startswith(("pooled", "fitted:")) else "vae"
        if decoder == "tiny":
            build.tiny_autoencoder().save_pretrained(tmp_path / "tiny")
            look = f"tiny:{tmp_path / 'tiny'}"
        spec = GuidanceSpec(scale=0.2, decoder=look, looks=2)
        if name == "digits":
            job = load_preset("digits").job
            guidance = job.guidance(load_teacher(job.teacher))
            changes: dict[str, Any] = {"classes_per_group": 3, "samples_per_class": 2, "cutmix": CutMixSpec()}
            told = replace(job.recipe, steps=4, guidance=spec, **changes)
        else:
            words = {"prompts": ("{class}",)} if name == "dit" else {}
            told, guidance = recipe(guidance=spec, **words), TeacherGuidance(load_teacher(str(teacher_card)))
        execution = Execution(backends=backends, artifacts=str(store))
        given = _fitted() if decoder == "fitted" else None
        prior = priors(name)
        wrap: Any = Synthesizer if name == "digits" else Synthesizer.from_pipeline
        ours: Synthesizer = wrap(prior, told, guidance=guidance, decoder=given, fuse="off", execution=execution)
        ours.memory = MemoryPlan(GROUP, PART, GROUP, PART, False, 0, 0, "of the test")
        return ours

    return synth


def _fitted() -> Decoder:
    """For the tiny pipelines, of random weights."""
    torch.manual_seed(7)
    net = FittedNet(shape_for((4, 8, 8), 2, (16, 16), hidden=8, blocks=1))
    return FittedDecoder(net.eval().requires_grad_(False))


def _at(call: RoleCall, batch: int, seed: int) -> tuple[Any, ...]:
    """Arguments of a batch; floating tensors have values that no build has seen."""
    generator = torch.Generator().manual_seed(seed)
    batched = call.batched or (True,) * len(call.inputs)

    def one(x: Tensor, cut: bool) -> Tensor:
        x = torch.cat([x] * batch)[:batch] if cut and x.dim() else x
        if not x.is_floating_point() or not x.dim():
            return x
        noise = torch.randn(x.shape, generator=generator)
        return x + 0.3 * noise if float(x.detach().std()) else (x + 0.2 * noise).clamp(0, 1)

    return tuple(
        tree_map(lambda x, cut=cut: one(x, cut) if isinstance(x, Tensor) else x, value)
        for value, cut in zip(call.inputs, batched, strict=True)
    )


def _off(found: Any, wanted: Any) -> float:
    """Largest relative difference of any tensor, by norms."""
    both = ([x for x in tree_flatten(value)[0] if isinstance(x, Tensor)] for value in (found, wanted))
    pairs = zip(*both, strict=True)
    rows = [(float((a.double() - b.double()).norm()), float(b.double().norm())) for a, b in pairs]
    return max(error / size if size else error for error, size in rows)


def _calls(synth: Synthesizer, role: str) -> list[RoleCall]:
    synth.prepare()
    return calls_of(role, synth._parts())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "role"), SERIES)
def test_role(make: Callable[..., Synthesizer], name: str, role: str, backend: str) -> None:
    """Eager's results at batch 1, the example's, and one more than fits at once: cut, the remainder of another size."""
    synth = make(name, backends=(f"{role}={backend}",))
    for call in _calls(synth, role):
        compiled = synth.routes.compiled[call.name]
        most, example = compiled.signature.most, compiled.signature.batch
        sizes = (1,) if role == "text_encoder" else (1, example, most + 1)
        for batch in sizes:
            given = _at(call, batch, seed=batch)
            with torch.no_grad():
                assert _off(compiled(*given), call.function(*given)) <= 1e-4, (call.name, batch)


@pytest.mark.parametrize("role", ["unet", "vae"])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_fixed_batch_is_filled_up(make: Callable[..., Synthesizer], store: Path, name: str, role: str) -> None:
    """A graph of 4 alone computes 1 and 6: the remainder is padded, and what the padding computes is cut off."""
    (call,) = _calls(make(name), role)
    inputs = _at(call, PART, seed=0)
    compiled = build_backend(
        call.function, inputs, backend="onnx", modules=call.modules, batched=call.batched, dynamic=False,
        name=f"{name}-fixed-{role}", identity=call.identity, store=store,
    )  # fmt: skip
    for batch in (1, PART, GROUP):
        given = _at(call, batch, seed=batch)
        with torch.no_grad():
            assert _off(compiled(*given), call.function(*given)) <= 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "decoder"), DECODERS)
def test_gradient(make: Callable[..., Synthesizer], name: str, decoder: str, backend: str) -> None:
    """Autograd's gradient, loss and terms through each decoder, at latents and targets of their own.

    But for one sample at most: a value within rounding of a ReLU's edge may take its other side there.
    """
    synth = make(name, decoder, backends=(f"gradient={backend}",))
    (call,) = _calls(synth, "gradient")
    x0, targets, *rest = call.inputs
    generator = torch.Generator().manual_seed(3)
    given = (torch.randn(x0.shape, generator=generator), torch.rand(targets.shape, generator=generator).softmax(1))
    wanted = call.function(*given, *rest)
    assert float(wanted.grad.norm()) > 0
    found = synth.routes.compiled["gradient"](*given, *rest)
    assert sorted(_off(a, b) for a, b in zip(found.grad, wanted.grad, strict=True))[-2] <= 1e-4
    assert _off((found.loss, found.terms, found.memory), (wanted.loss, wanted.terms, wanted.memory)) <= 1e-4


@pytest.mark.parametrize(
    ("backend", "guided"), [("onnx", False), ("onnx", True), ("aoti", False), ("aoti", True), ("compile", True)]
)  # torch.compile traces and compiles all anew in each
@pytest.mark.parametrize("name", PIPELINES)
def test_run(make: Callable[..., Synthesizer], name: str, backend: str, guided: bool) -> None:
    """A whole group on one backend, in parts of 4 and 2: eager's images within 1 of 255."""
    ours, eager = make(name, backends=(backend,)), make(name)
    if not guided:
        ours, eager = (_unguided(synth) for synth in (ours, eager))
    a, b = (synth.run(Plan(synth.recipe, Request(num_samples=GROUP, seed=1)).unit(0), 1) for synth in (ours, eager))
    off = (a.images.int() - b.images.int()).abs()
    assert float(b.images.float().std()) > 5  # pictures of something
    assert int(off.max()) <= 1
    assert ours.routes.compiled.keys() >= {"unet", "vae"}
    assert ("gradient" in ours.routes.compiled) == guided


def _unguided(synth: Synthesizer) -> Synthesizer:
    recipe = replace(synth.recipe, guidance=GuidanceSpec(scale=0.0))
    own = Synthesizer(synth.model, recipe, None, fuse="off", execution=synth.routes._execution)
    own.memory = synth.memory
    return own
