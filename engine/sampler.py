"""THE loop: a few-step solver with a guidance loss on the predicted clean latent and Latent CutMix.

Symbols: z noisy latent, x0 clean latent, z = alpha x0 + sigma eps; the solver's coefficients are those of
`schedule.Tables`; B samples of a group, C channels, H x W latent positions, n denoiser calls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from synthkd.engine.clock import StageClock
from synthkd.engine.config import GuidanceSpec
from synthkd.engine.guidance import Guidance, Look, Terms, guidance_gradient, step_size
from synthkd.engine.schedule import Tables
from synthkd.kernels import guided_step, predict_x0, sum_of_squares

Denoiser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Steering:
    """What steers a group: the loss, what it looks through, when; and, made before the loop, what each call needs.

    sizes: [n] of `guidance.step_sizes`; targets: [B,K] per call; maps: source map [B,H,W] or None; noise: fresh noise
    [B,C,H,W] or None; looks: the augmented views that the loss sees beside the plain image.
    """

    loss: Guidance | None
    decode: Callable[[Tensor], Tensor]
    spec: GuidanceSpec
    sizes: Tensor
    targets: Sequence[Tensor]
    maps: Sequence[Tensor | None]
    noise: Sequence[Tensor | None]
    looks: Sequence[Sequence[Look]]


def sample(
    z: Tensor,
    denoise: Denoiser,
    tables: Tables,
    guidance: tuple[float, float],
    steer: Steering,
    clock: StageClock,
) -> tuple[Tensor, list[Terms]]:
    """Draw a group: z [B,C,H,W] is standard normal noise; returns the final latent and each guided call's terms.

    guidance: classifier-free guidance_scale and guidance_rescale. The solver's eps comes from the unshifted x0
    unless `spec.rederive_eps` (kernels.guided_step). Under `gradient="unet"` the direction is the gradient with
    respect to z, and the step is taken on x0 all the same, so that both modes make steps of one size. No call waits
    for the device.
    """
    spec, n, log, before = steer.spec, tables.timesteps.shape[0], [], None
    z = z if tables.start == 1.0 else z * tables.start
    for i in range(n):
        c, t, guided = tables.at(i), tables.timesteps[i], steer.loss is not None and spec.active(i, n)
        with torch.set_grad_enabled(guided and spec.gradient == "unet"), clock("denoise"):
            z = z.detach().requires_grad_(torch.is_grad_enabled())
            cond, uncond = denoise(z, t)
            x0 = predict_x0(z, cond, uncond, guidance[0], c.alpha, c.sigma, tables.prediction_type, guidance[1])
        grad, sumsq, step = None, None, None
        if guided and steer.loss is not None:
            with torch.enable_grad(), clock("guide"):
                leaf = z if spec.gradient == "unet" else x0.requires_grad_()
                grad, loss, terms = guidance_gradient(
                    steer.loss, steer.decode, x0, leaf, steer.targets[i], steer.looks[i]
                )
            sumsq = sum_of_squares(grad)
            step = step_size(spec, steer.sizes[i], loss, sumsq, grad[0].numel())
            log.append(terms)
        with torch.no_grad():
            z, before = guided_step(
                z, x0, c.alpha, c.sigma, c.to_x0, c.to_eps, noise=steer.noise[i], to_noise=c.to_noise,
                before=before, to_history=c.to_history, grad=grad, sumsq=sumsq, step=step,
                src_map=steer.maps[i], rederive_eps=spec.rederive_eps, keep=tables.multistep,
            )  # fmt: skip
    return z.detach(), log
