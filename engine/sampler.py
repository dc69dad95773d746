"""THE loop: deterministic DDIM with a guidance loss on the predicted clean latent and Latent CutMix.

Symbols: z noisy latent, x0 clean latent, alpha = sqrt(alphas_cumprod), sigma = sqrt(1 - alphas_cumprod);
B samples of a group, C channels, H x W latent positions, n denoiser calls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from synthkd.engine.clock import StageClock
from synthkd.engine.config import GuidanceSpec
from synthkd.engine.guidance import Guidance, Terms, guidance_gradient, sum_of_squares
from synthkd.engine.schedule import Tables
from synthkd.kernels import guided_step, predict_x0

Denoiser = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Steering:
    """What steers a group: the loss, what it looks through, when; and per call its targets [B,K] and source map."""

    loss: Guidance | None
    look: Callable[[Tensor], Tensor]
    spec: GuidanceSpec
    targets: Sequence[Tensor]
    maps: Sequence[Tensor | None]


def sample(
    z: Tensor, denoise: Denoiser, tables: Tables, guidance_scale: float, steer: Steering, clock: StageClock
) -> tuple[Tensor, list[Terms]]:
    """Draw a group: z [B,C,H,W] is the initial noise; returns the final latent and each call's logged terms.

    The solver's eps comes from the unshifted x0 unless `spec.rederive_eps` (kernels.guided_step). Under
    `gradient="unet"` the direction is the gradient with respect to z, and the step is taken on x0 all the
    same, so that both modes make steps of one size. No call waits for the device.
    """
    spec, n, log = steer.spec, tables.timesteps.shape[0], []
    for i in range(n):
        guided = steer.loss is not None and spec.active(i, n)
        with torch.set_grad_enabled(guided and spec.gradient == "unet"), clock("denoise"):
            z = z.detach().requires_grad_(torch.is_grad_enabled())
            cond, uncond = denoise(z, tables.timesteps[i])
            x0 = predict_x0(z, cond, uncond, guidance_scale, tables.alpha[i], tables.sigma[i], tables.prediction_type)
        grad, sumsq, step = None, None, None
        if guided and steer.loss is not None:
            with torch.enable_grad(), clock("guide"):
                leaf = z if spec.gradient == "unet" else x0.requires_grad_()
                grad, terms = guidance_gradient(steer.loss, steer.look, x0, leaf, steer.targets[i])
            sumsq, step = sum_of_squares(grad), step_size(spec, tables.sigma[i])
            log.append(terms)
        with torch.no_grad():
            z = guided_step(
                z, x0, tables.alpha[i], tables.sigma[i], tables.alpha_next[i], tables.sigma_next[i],
                grad=grad, sumsq=sumsq, step=step, src_map=steer.maps[i], rederive_eps=spec.rederive_eps,
            )  # fmt: skip
    return z.detach(), log


def step_size(spec: GuidanceSpec, sigma: Tensor) -> Tensor:
    """Root-mean-square size of the update of x0 at this call, 0-d."""
    return spec.scale * (sigma if spec.schedule == "sigma" else torch.ones_like(sigma))
