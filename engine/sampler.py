"""THE loop: a few-step solver with a guidance loss on the predicted clean latent and Latent CutMix.

Symbols: z noisy latent, x0 clean latent, z = alpha x0 + sigma eps; the solver's coefficients are those of
`schedule.Tables`; B samples of a group, C channels, H x W latent positions, n denoiser calls.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from synthkd.engine.augment import Look
from synthkd.engine.config import GuidanceSpec
from synthkd.engine.guidance import (
    Guidance,
    GuidanceStep,
    Terms,
    chunked_gradient,
    guidance_gradient,
    parts_of,
    step_size,
)
from synthkd.engine.schedule import Coefficients, Tables
from synthkd.kernels import guided_step, predict_x0, sum_of_squares

Denoiser = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
Clock = Callable[[str], AbstractContextManager[Any]]


class Chunks(NamedTuple):
    """Samples at a time through the denoiser, and through decoder and loss with their gradient; 0 for the group."""

    denoise: int = 0
    guide: int = 0


WHOLE = Chunks()


@dataclass(frozen=True)
class Steering:
    """What steers a group: the loss, what it looks through, when; and, made before the loop, what each call needs.

    sizes: [n] of `guidance.step_sizes`; targets: [B,K] per call; maps: source map [B,H,W] or None; noise: fresh noise
    [B,C,H,W] or None; looks: the augmented views that the loss sees beside the plain image; cfg: which calls have
    classifier-free guidance, all where empty; keep: calls whose clean latent is wanted; memory: what the loss starts
    with; chunks: how much of the group is in memory at once; gradient: (x0, targets, looks, memory) -> GuidanceStep, in
    place of autograd; first: the call at which the run begins, above 0 with a latent of that call's noise level.
    """

    loss: Guidance | None
    decode: Callable[[Tensor], Tensor]
    spec: GuidanceSpec
    sizes: Tensor
    targets: Sequence[Tensor]
    maps: Sequence[Tensor | None]
    noise: Sequence[Tensor | None]
    looks: Sequence[Sequence[Look]]
    cfg: Sequence[bool] = ()
    keep: tuple[int, ...] = ()
    memory: Any = None
    chunks: Chunks = WHOLE
    gradient: Callable[..., GuidanceStep] | None = None
    first: int = 0


class Setup(NamedTuple):
    """What is the same at every call of a run."""

    loss: Guidance | None
    decode: Callable[[Tensor], Tensor]
    spec: GuidanceSpec
    guidance_scale: float
    guidance_rescale: float
    prediction_type: str
    keep: bool
    chunks: Chunks
    gradient: Callable[..., GuidanceStep] | None = None


class Call(NamedTuple):
    """What a denoiser call is given beside the state: tensors alone, so that one graph serves all calls of a kind."""

    t: Tensor
    c: Coefficients
    size: Tensor
    targets: Tensor
    src_map: Tensor | None
    noise: Tensor | None
    looks: tuple[Look, ...]


class State(NamedTuple):
    """What a call hands to the next: z [B,C,H,W], a multistep solver's last clean latent, the loss's memory."""

    z: Tensor
    before: Tensor | None
    memory: Any


class Drawn(NamedTuple):
    """The final latent [B,C,H,W], each guided call's terms, and the clean latents x0' at the calls of `steer.keep`."""

    latents: Tensor
    log: list[Terms]
    previews: list[Tensor]


def sample(
    z: Tensor,
    denoise: Denoiser,
    tables: Tables,
    guidance: tuple[float, float],
    steer: Steering,
    clock: Clock,
    advance: Callable[..., tuple[State, Terms, Tensor | None]] | None = None,
) -> Drawn:
    """Draw a group: z [B,C,H,W] is standard normal noise, or the noised latent of call `steer.first`.

    guidance: classifier-free guidance_scale and guidance_rescale; advance: `one_call`, perhaps compiled. The solver's
    eps comes from the unshifted x0 unless `spec.rederive_eps` (kernels.guided_step). Under `gradient="unet"` the
    direction is the gradient with respect to z, and the step is taken on x0 all the same, so that both modes make
    steps of one size. No call waits for the device.
    """
    n, log, previews = tables.timesteps.shape[0], [], []
    keep = tables.multistep or bool(steer.keep)
    setup = Setup(
        steer.loss, steer.decode, steer.spec, *guidance, tables.prediction_type, keep, steer.chunks, steer.gradient
    )
    z = z if steer.first or tables.start == 1.0 else z * tables.start
    zero = torch.zeros_like(z).requires_grad_(steer.gradient is None) if steer.loss is not None else None
    state = State(z, None, steer.memory)
    for i in range(steer.first, n):
        guided, cfg = steer.loss is not None and steer.spec.active(i, n), not steer.cfg or steer.cfg[i]
        call = Call(
            tables.timesteps[i], tables.at(i), steer.sizes[i], steer.targets[i], steer.maps[i], steer.noise[i],
            tuple(steer.looks[i]),
        )  # fmt: skip
        state, terms, x0 = (advance or one_call)(setup, denoise, state, call, zero if guided else None, cfg, clock)
        if guided:
            log.append(terms)
        if i in steer.keep and x0 is not None:
            previews.append(x0)
        if not tables.multistep:
            state = state._replace(before=None)
    return Drawn(state.z, log, previews)


def one_call(
    setup: Setup, denoise: Denoiser, state: State, call: Call, zero: Tensor | None, cfg: bool, clock: Clock
) -> tuple[State, Terms, Tensor | None]:
    """One denoiser call: UNet, CFG, clean latent, decode, loss, gradient, update; a function of tensors.

    zero: zeros [B,C,H,W] that require a gradient, or None where the call is not guided. The gradient is taken with
    respect to them, added to z or to x0: a graph can differentiate its inputs, not what it makes itself. Returns the
    next state, the terms, and the shifted clean latent where `setup.keep`.
    """
    z, c, terms, memory = state.z, call.c, {}, state.memory
    grad, sumsq, step = None, None, None
    through = zero is not None and setup.spec.gradient == "unet"
    with clock("denoise"), torch.set_grad_enabled(through and not setup.chunks.guide):
        x0 = clean_latent(setup, denoise, z + zero if torch.is_grad_enabled() and zero is not None else z, call, cfg)
    if zero is not None and setup.loss is not None:
        with clock("guide"):
            if setup.gradient is not None:
                found = setup.gradient(x0, call.targets, call.looks, memory)
            else:
                found = _gradient(setup, denoise, x0, z, call, zero, cfg, memory)
        grad, terms, memory = found.grad, found.terms, found.memory
        sumsq = sum_of_squares(grad)
        step = step_size(setup.spec, call.size, found.loss, sumsq, grad[0].numel())
    with torch.no_grad():
        z_next, kept = guided_step(
            z, x0, c.alpha, c.sigma, c.to_x0, c.to_eps, noise=call.noise, to_noise=c.to_noise,
            before=state.before, to_history=c.to_history, grad=grad, sumsq=sumsq, step=step,
            src_map=call.src_map, rederive_eps=setup.spec.rederive_eps, keep=setup.keep,
        )  # fmt: skip
    return State(z_next, kept, memory), terms, kept


def clean_latent(setup: Setup, denoise: Denoiser, z: Tensor, call: Call, cfg: bool) -> Tensor:
    """x0 [B,C,H,W] predicted from z; in runs of `chunks.denoise` samples where no gradient goes through."""
    whole = len(z) <= (setup.chunks.denoise or len(z)) or torch.is_grad_enabled()
    if whole:
        return _predicted(setup, denoise, z, call, cfg)
    parts = parts_of(len(z), setup.chunks.denoise)
    return torch.cat([_predicted(setup, part_of(denoise, part), z[part], call, cfg) for part in parts])


def _predicted(setup: Setup, denoise: Denoiser, z: Tensor, call: Call, cfg: bool) -> Tensor:
    cond, uncond = denoise(z, call.t, cfg)
    c, scale, rescale = call.c, setup.guidance_scale, setup.guidance_rescale
    return predict_x0(z, cond, uncond, scale, c.alpha, c.sigma, setup.prediction_type, rescale)


def part_of(denoise: Any, part: slice) -> Denoiser:
    """The denoiser of some of the samples."""
    found: Denoiser = denoise.part(part)
    return found


def _gradient(
    setup: Setup, denoise: Denoiser, x0: Tensor, z: Tensor, call: Call, zero: Tensor, cfg: bool, memory: Any
) -> GuidanceStep:
    loss: Any = setup.loss
    through, chunk = setup.spec.gradient == "unet", setup.chunks.guide
    if not chunk:
        with torch.enable_grad():
            x0 = x0 if through else x0 + zero
            return guidance_gradient(loss, setup.decode, x0, zero, call.targets, call.looks, memory)

    def latent(part: slice, zero: Tensor) -> Tensor:
        if not through:
            return x0[part] + zero
        return _predicted(setup, part_of(denoise, part), z[part] + zero, call, cfg)

    return chunked_gradient(loss, setup.decode, latent, zero, call.targets, call.looks, memory, chunk)
