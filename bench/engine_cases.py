"""What the engine's benchmark draws: the embedded model, and published architectures with random weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthkd.bench.as_published import AsPublished
from synthkd.bench.flops import Drawer
from synthkd.dfkd.methods.diffdfkd import TeacherGuidance
from synthkd.dfkd.presets import Preset, unguided
from synthkd.dfkd.teachers import Teacher
from synthkd.engine import GuidanceSpec, Recipe, Synthesizer, SynthkdError
from synthkd.engine.decoders import Decoder, PooledDecoder
from synthkd.engine.errors import suggest
from synthkd.engine.fitted import FittedDecoder, FittedNet, shape_for
from synthkd.engine.latent_model import LatentModel
from synthkd.engine.models import random_tiny_decoder
from synthkd.engine.random_models import random_prior

EMBEDDED = "embedded"
ALL_CFG = ", all CFG"  # ends the name of a variant with classifier-free guidance at every call
# Guidance at its full cost: the VAE at every call, at the scale that was chosen for that (docs/log.md).
FULL_COST: Mapping[str, Any] = {"decoder": "vae", "start": 0.0, "stop": 1.0, "every": 1, "scale": 0.7}
TEACHER_SIZE = (224, 224)
_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class Case:
    """Images of height x width from a published architecture.

    group: images that are drawn at once; published: the same of the as-published method, which keeps the activations of
    denoiser and VAE for its gradient. bars: images per second that are aimed at on one H200, by variant.
    """

    architecture: str
    height: int
    width: int
    group: int
    published: int
    bars: Mapping[str, float]


CASES: Mapping[str, Case] = {
    "sd15-256": Case(architecture="sd15", height=256, width=256, group=64, published=16, bars={}),
    "sd15-512": Case(
        architecture="sd15", height=512, width=512, group=32, published=4, bars={"plain": 13.0, "guided": 9.0}
    ),
    "sdxl-512": Case(architecture="sdxl", height=512, width=512, group=32, published=4, bars={}),
    "sdxl-1024": Case(architecture="sdxl", height=1024, width=1024, group=8, published=1, bars={"plain": 1.9}),
}
# What guidance looks through in each variant of these cases; None: not guided.
DECODERS: Mapping[str, str | None] = {
    "plain": None,
    "guided": "fitted",
    "tiny": "tiny",
    "pooled:2": "pooled:2",
    "vae": "vae",
    "as-published": "vae",
    "as-published, compiled": "vae",
}


def case_names() -> tuple[str, ...]:
    """All cases."""
    return (EMBEDDED, *CASES)


def find_case(name: str) -> Case:
    """By name; raises SynthkdError with the known ones."""
    if name not in CASES:
        raise SynthkdError(f"--case {name!r}: {suggest(name, case_names())}")
    return CASES[name]


def pick(found: Mapping[str, object], asked: list[str]) -> list[str]:
    """Names in their order, of those that are asked for, or all; raises SynthkdError for an unknown one."""
    for name in asked:
        if name not in found:
            raise SynthkdError(f"--variant {name!r}: {suggest(name, found)}")
    return [name for name in found if not asked or name in asked]


@dataclass(frozen=True)
class Entrant:
    """A preset as one variant draws it."""

    preset: Preset
    published: bool = False

    def build(self) -> Drawer:
        """Load its networks."""
        synth = self.preset.job.build()
        return AsPublished(synth) if self.published else synth


def embedded_variants(preset: Preset) -> dict[str, Entrant]:
    """By name: without guidance, as the preset is, with guidance at its full cost, as published; and all with CFG at
    every call, where the preset has it in a part of the run."""
    whole = replace(preset.job.recipe.guidance, **FULL_COST)
    found = {
        "plain": Entrant(replace(preset, job=unguided(preset.job))),
        "guided": Entrant(preset),
        "full-cost": Entrant(recipe_with(preset, guidance=whole)),
        "as-published": Entrant(preset, published=True),
    }
    if (preset.job.recipe.cfg_start, preset.job.recipe.cfg_stop) != (0.0, 1.0):
        for name in ("plain", "guided", "as-published"):
            entrant = found[name]
            found[name + ALL_CFG] = replace(entrant, preset=recipe_with(entrant.preset, cfg_start=0.0, cfg_stop=1.0))
    return found


def recipe_with(preset: Preset, **changes: Any) -> Preset:
    """The preset with other fields in its recipe."""
    return replace(preset, job=replace(preset.job, recipe=replace(preset.job.recipe, **changes)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with BatchNorm and a shortcut (arXiv 1512.03385, fig. 5 right)."""

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        """4 width channels come out."""
        super().__init__()
        sizes = ((c_in, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in sizes)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != 4 * width:
            conv = nn.Conv2d(c_in, 4 * width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        """x [B,c_in,H,W] -> [B,4 width,H/stride,W/stride]."""
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            y = F.relu(y) if i < 2 else y
        return F.relu(y + self.shortcut(x))


def resnet50(classes: int = _CLASSES) -> nn.Module:
    """ResNet-50 (arXiv 1512.03385, table 1) with random weights: 25.6 M parameters, 0.0082 TFLOP at 224 pixels."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    c_in = 64
    for stage, (width, blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)):
        for block in range(blocks):
            layers.append(Bottleneck(c_in, width, 2 if stage and not block else 1))
            c_in = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, classes))


def random_guidance(classes: tuple[str, ...]) -> TeacherGuidance:
    """DiffDFKD's loss by a ResNet-50 of random weights, as large as the teachers of such priors; on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = resnet50(len(classes))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return TeacherGuidance(Teacher(net, mean=mean, std=std, input_size=TEACHER_SIZE, classes=classes))


def random_recipe(case: Case, variant: str, dtype: torch.dtype, group: int | None = None) -> Recipe:
    """The default recipe at a case's size, CFG 5 and 20 calls of DDIM, for one variant."""
    published = variant.startswith("as-published")
    decoder = DECODERS[variant] or "vae"
    spec = GuidanceSpec(scale=0.0 if DECODERS[variant] is None else GuidanceSpec().scale)
    return Recipe(
        classes=tuple(f"class {i}" for i in range(_CLASSES)),
        height=case.height,
        width=case.width,
        guidance=replace(spec, decoder="vae" if decoder in ("fitted", "tiny") else decoder),
        classes_per_group=group or (case.published if published else case.group),
        samples_per_class=1,
        dtype=str(dtype).removeprefix("torch."),
    )


def look_through(kind: str | None, prior: LatentModel, case: Case) -> Decoder | None:
    """What a variant's guidance looks through, with random weights; None: the prior's own."""
    if kind == "fitted":
        latent = prior.latent_shape(case.height, case.width)
        shape = shape_for(latent, case.height // latent[1], TEACHER_SIZE)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = FittedNet(shape)
        return FittedDecoder(net.eval().requires_grad_(False).to(prior.device, prior.dtype))
    if kind == "tiny":
        return random_tiny_decoder(device=prior.device, dtype=prior.dtype)
    if kind is not None and kind.startswith("pooled:"):
        return PooledDecoder(prior.decoder, int(kind.removeprefix("pooled:")))
    return None


def random_drawer(
    case: Case, variant: str, prior: LatentModel, guidance: TeacherGuidance, group: int | None = None
) -> Drawer:
    """A variant over a random prior, whose device and dtype it takes."""
    recipe = random_recipe(case, variant, prior.dtype, group)
    guided = recipe.guidance.scale > 0
    decoder = look_through(DECODERS[variant], prior, case)
    if variant.startswith("as-published"):
        return AsPublished(Synthesizer(prior, recipe, guidance, compile="off", micro_batch=recipe.group_size))
    return Synthesizer(prior, recipe, guidance if guided else None, decoder)


def random_builders(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Drawer]]:
    """By variant: makes its drawer. They share one prior, but for the compiled baseline, whose networks are changed."""
    prior = random_prior(case.architecture, device=device, dtype=dtype)
    names = [name for name in DECODERS if "compiled" not in name or device.type == "cuda"]
    guidance = random_guidance(random_recipe(case, "plain", dtype).classes)

    def make(name: str) -> Drawer:
        if "compiled" not in name:
            return random_drawer(case, name, prior, guidance)
        own = random_prior(case.architecture, device=device, dtype=dtype)
        for network in own.modules():
            getattr(network, "decoder", network).compile()
        return random_drawer(case, name, own, guidance)

    return {name: partial(make, name) for name in names}
