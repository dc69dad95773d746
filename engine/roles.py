"""The parts of a guided run that can have a backend of their own, each as a function with an example of its inputs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from synthkd.engine.augment import Look
from synthkd.engine.config import Recipe
from synthkd.engine.decoders import Decoder, latent_layout
from synthkd.engine.errors import SynthkdError, suggest
from synthkd.engine.guidance import GroupGuidance, Guidance, GuidanceStep, guidance_gradient
from synthkd.engine.latent_model import Conditioning, LatentModel
from synthkd.engine.memory import MemoryPlan
from synthkd.engine.parted import PartedGradient
from synthkd.engine.schedule import Tables
from synthkd.export import BACKENDS
from synthkd.export.artifacts import state_of

ROLES = ("text_encoder", "unet", "vae", "teacher", "gradient")


@dataclass(frozen=True, kw_only=True)
class RoleCall:
    """One function of a role. name: of its artifact and its route; the rest as in `export.build`.

    run: of a role of several functions, (those by name, compiled; given; arguments) -> the result of the whole.
    """

    name: str
    function: Callable[..., Any]
    modules: tuple[nn.Module, ...]
    inputs: tuple[Any, ...]
    batched: tuple[bool, ...] | None = None
    dynamic: bool = True
    most: int = 0
    gradient: bool = False
    traced: bool = False
    identity: Mapping[str, Any] = field(default_factory=dict)
    run: Callable[..., Any] | None = None


@runtime_checkable
class RoutedModel(LatentModel, Protocol):
    """A prior whose text encoders and denoiser can be replaced by callables."""

    def text_calls(self) -> Sequence[RoleCall]:
        """Its text encoders, none for a class-conditional one; each is called with one prompt at a time."""
        ...

    def denoiser_call(self, cond: Conditioning, z: Tensor, t: Tensor) -> RoleCall:
        """One evaluation of the denoiser at z [B,C,h,w], timestep t and conditions [B,...]."""
        ...

    def routed(self, routes: Mapping[str, Callable[..., Any]]) -> AbstractContextManager[None]:
        """Within it the functions of `text_calls` and `denoiser_call` are these, by name."""
        ...


@runtime_checkable
class ReplaceableModel(LatentModel, Protocol):
    """A prior whose denoiser can be replaced by another module of the same calls; it is the first of `modules`."""

    def replaced(self, denoiser: nn.Module) -> AbstractContextManager[None]:
        """Within it this one is called."""
        ...


@runtime_checkable
class PortableGuidance(GroupGuidance, Protocol):
    """A guidance whose gradient outlives a change of its student: what may change is an input of the graph."""

    def given(self) -> dict[str, Any]:
        """Tensors, in dicts and tuples, that a graph of the gradient must take as inputs."""
        ...

    def using(self, given: dict[str, Any]) -> AbstractContextManager[None]:
        """Within it `look` and `judge` take these instead of their own."""
        ...

    def constant(self) -> Sequence[nn.Module]:
        """Networks whose weights are part of a graph."""
        ...


def parse_backends(entries: Sequence[str]) -> dict[str, str]:
    """`role=name`, or `name` for every role; later entries win. Roles of `eager` are left out.

    Raises SynthkdError for an unknown role or backend.
    """
    found: dict[str, str] = {}
    for entry in entries:
        role, given, name = entry.rpartition("=")
        if given and role not in ROLES:
            raise SynthkdError(f"backend {entry!r}: role {role!r}; {suggest(role, ROLES)}")
        if name not in BACKENDS:
            raise SynthkdError(f"backend {entry!r}: backend {name!r}; {suggest(name, BACKENDS)}")
        found |= dict.fromkeys((role,) if given else ROLES, name)
    return {role: found[role] for role in ROLES if found.get(role, "eager") != "eager"}


@dataclass(frozen=True)
class Parts:
    """What a Synthesizer is made of, as far as roles are made from it."""

    model: LatentModel
    recipe: Recipe
    tables: Tables
    guidance: Guidance | None
    look: Decoder
    memory: MemoryPlan

    def latents(self, batch: int) -> Tensor:
        """Standard normal latents [B,C,h,w], the same ones every time."""
        shape = (batch, *self.model.latent_shape(self.recipe.height, self.recipe.width))
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return drawn.to(device=self.model.device, dtype=self.model.dtype)

    def images(self, batch: int) -> Tensor:
        """Finished images [B,3,H,W], float32 in [0,1], grey."""
        size = self.recipe.height, self.recipe.width
        return torch.full((batch, 3, *size), 0.5, device=self.model.device)


def calls_of(role: str, parts: Parts) -> list[RoleCall]:
    """The functions of a role; raises SynthkdError where this run has none that could be replaced."""
    return _MAKERS[role](parts)


def _routed(parts: Parts, role: str) -> RoutedModel:
    if not isinstance(parts.model, RoutedModel):
        name = type(parts.model).__name__
        raise SynthkdError(f"backend: this prior ({name}) has no {role} that can be replaced; use {role}=eager")
    return parts.model


def _text(parts: Parts) -> list[RoleCall]:
    return list(_routed(parts, "text_encoder").text_calls())


def _unet(parts: Parts) -> list[RoleCall]:
    """At the batch of most calls; `most` is the doubled batch of classifier-free guidance."""
    recipe, model = parts.recipe, _routed(parts, "unet")
    prompt = recipe.prompts[0].replace("{class}", recipe.word(recipe.drawn_classes[0]))
    size = (recipe.height, recipe.width)
    cond, uncond = model.conditions((prompt,), recipe.negative_prompt, recipe.guidance_scale, size)
    calls = [recipe.cfg_active(i) and uncond is not None for i in range(recipe.steps)]
    part = parts.memory.denoise
    batch = 2 * part if 2 * sum(calls) >= len(calls) else part
    told = {name: x[:1].expand(batch, *x.shape[1:]).contiguous() for name, x in cond.items()}
    made = model.denoiser_call(told, parts.latents(batch), parts.tables.timesteps[0])
    return [_with(made, most=2 * part if any(calls) else part)]


def _with(call: RoleCall, **changes: Any) -> RoleCall:
    return RoleCall(**{**call.__dict__, **changes})


def _vae(parts: Parts) -> list[RoleCall]:
    decoder, batch = parts.model.decoder, parts.memory.decode
    return [
        RoleCall(
            name="vae",
            function=decoder,
            modules=(decoder.module,),
            inputs=(parts.latents(batch),),
            most=batch,
            identity=decoder.settings,
        )
    ]


def _networks(guidance: Guidance) -> tuple[nn.Module, ...]:
    return tuple(guidance.constant() if isinstance(guidance, PortableGuidance) else guidance.modules())


def _teacher(parts: Parts) -> list[RoleCall]:
    """What is noted beside each finished image."""
    guidance, batch = parts.guidance, parts.recipe.group_size
    if guidance is None:
        return []
    return [
        RoleCall(
            name="teacher",
            function=guidance.annotate,
            modules=_networks(guidance),
            inputs=(parts.images(batch),),
            most=batch,
            identity=guidance.describe(),
        )
    ]


def gradient_function(guidance: Guidance, look: Decoder) -> Callable[..., GuidanceStep]:
    """(x0, targets, looks, memory, given) -> GuidanceStep: what `sampler.one_call` does with autograd."""

    def gradient(x0: Tensor, targets: Tensor, looks: Any, memory: Any, given: dict[str, Any]) -> GuidanceStep:
        zero = torch.zeros_like(x0).requires_grad_()
        with torch.enable_grad(), ExitStack() as stack:
            if isinstance(guidance, PortableGuidance):
                stack.enter_context(guidance.using(given))
            return guidance_gradient(guidance, look, x0 + zero, zero, targets, looks, memory)

    return gradient


def given_of(guidance: Guidance | None) -> dict[str, Any]:
    """What a graph of the gradient takes beside latents, targets, looks and memory."""
    return guidance.given() if isinstance(guidance, PortableGuidance) else {}


def _gradient(parts: Parts) -> list[RoleCall]:
    """Of a whole group, or of the parts that memory holds: its loss knows all samples, so nothing is filled up."""
    guidance, recipe = parts.guidance, parts.recipe
    if guidance is None or recipe.guidance.scale == 0:
        return []
    if recipe.guidance.gradient != "x0":
        raise SynthkdError("backend: guidance.gradient 'unet' goes through the denoiser; use gradient=eager, or 'x0'")
    if parts.memory.checkpoint:
        raise SynthkdError(
            "backend: one image's gradient does not fit the memory without a checkpointed decoder, which no graph has; "
            "take a smaller guidance.decoder, or gradient=eager"
        )
    batch = recipe.group_size
    device = parts.model.device
    targets = torch.zeros(batch, len(recipe.classes), device=device)
    targets[torch.arange(batch), torch.arange(batch) % len(recipe.classes)] = 1
    still = Look(torch.zeros(batch, 2, device=device), torch.zeros(batch, dtype=torch.bool, device=device))
    memory = guidance.begin() if isinstance(guidance, GroupGuidance) else None
    views, given = (still,) * (recipe.guidance.looks - 1), given_of(guidance)
    inputs = (parts.latents(batch), targets, views, memory, given)
    modules = (parts.look.module, *_networks(guidance))
    others = [m for m in guidance.modules() if all(m is not kept for kept in _networks(guidance))]  # a student
    built = [str(m) for m in others]
    identity = {"decoder": parts.look.settings, "guidance": guidance.describe(), "others": [built, state_of(others)]}
    if parts.memory.guide < batch and isinstance(guidance, GroupGuidance):
        return _parted(guidance, parts, inputs, modules, identity)
    return [
        RoleCall(
            name="gradient",
            function=gradient_function(guidance, parts.look),
            modules=modules,
            inputs=inputs,
            batched=(True, True, True, False, False),
            dynamic=False,
            gradient=True,
            identity=identity,
        )
    ]


def _parted(
    guidance: GroupGuidance, parts: Parts, inputs: tuple[Any, ...], modules: tuple[nn.Module, ...],
    identity: Mapping[str, Any],
) -> list[RoleCall]:  # fmt: skip
    """Three functions and more, each of a fixed batch."""

    def using(given: Any) -> AbstractContextManager[None]:
        return guidance.using(given) if isinstance(guidance, PortableGuidance) else nullcontext()

    whole = PartedGradient(guidance, parts.look, len(inputs[0]), parts.memory.guide, using)
    return [
        RoleCall(
            name=f"gradient-{piece.name}",
            function=piece.function,
            modules=modules,
            inputs=piece.inputs,
            batched=(False,) * len(piece.inputs),
            dynamic=False,
            gradient=piece.gradient,
            identity={**identity, "group": len(inputs[0]), "part": parts.memory.guide},
            run=whole,
        )
        for piece in whole.pieces(*inputs)
    ]


_MAKERS: Mapping[str, Callable[[Parts], list[RoleCall]]] = {
    "text_encoder": _text,
    "unet": _unet,
    "vae": _vae,
    "teacher": _teacher,
    "gradient": _gradient,
}


def native_size(model: LatentModel) -> tuple[int, int] | None:
    """Height and width in pixels that a prior was trained for, as its denoiser's config has it; None if it does not."""
    side = getattr(getattr(next(iter(model.modules())), "config", None), "sample_size", None)
    if side is None:
        return None
    high, wide = (side, side) if isinstance(side, int) else side
    factor = latent_layout(model.decoder.module)[1]
    return high * factor, wide * factor


@contextmanager
def routed_by(model: LatentModel, routes: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """A prior whose text encoders and denoiser are `routes`, inside; nothing for one that takes none."""
    if not routes or not isinstance(model, RoutedModel):
        yield
        return
    with model.routed(routes):
        yield
