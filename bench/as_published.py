"""The baseline to beat: DiffDFKD (arXiv 2504.00870) as its authors intend it, over a Synthesizer's prior and tables.

Written from the description of the method, made correct where the published code is not. Per denoiser call:

1. one pass at z_t that keeps a graph -> x0 -> full VAE -> clamp -> alpha L_bn + beta L_cls;
2. the gradient through VAE and denoiser, z_t <- z_t - 1.0 grad, neither scaled nor normalised; then Latent CutMix;
3. a second pass at the new z_t, and DDIM's step from it.

Every call is guided, whatever `recipe.guidance` says. Classifier-free guidance follows `recipe.cfg_active`, for
comparisons at the same interval; the authors have it at every call, which is the recipe's default.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from synthkd.engine import Batch, Synthesizer, SynthkdError, WorkUnit
from synthkd.engine.clock import StageClock
from synthkd.engine.guidance import HALF_LOSS_SCALE, frozen
from synthkd.engine.latent_model import Prompted
from synthkd.engine.sampler import Steering
from synthkd.engine.schedule import Coefficients
from synthkd.kernels import guided_step, predict_x0, to_uint8
from synthkd.kernels.guided_step.reference import gather_source


class AsPublished:
    """Draws groups of a Synthesizer's recipe in the published way, from the same ids, noise, prompts and boxes.

    The authors' batch is one image, ours a group, so that L_bn is a distance of group statistics. Of the group's loss,
    a mean over its B images, the gradient at one image is a B-th of what it is alone. The loss is therefore taken times
    B: the class gradient of each image is then exactly that of a batch of one, and the statistics' pull on it is of the
    size that it has there, as an image has a B-th part in the group's moments. The method's own step of 1.0 keeps its
    meaning, and so does alpha : beta.
    """

    def __init__(self, synth: Synthesizer, weight: float = 1.0) -> None:
        """weight: of the gradient, 1.0 as published.

        Raises SynthkdError for a solver other than DDIM, and for a Synthesizer without a guidance.
        """
        if synth.guidance is None or synth.recipe.sampler != "ddim":
            raise SynthkdError(f"as-published: sampler is {synth.recipe.sampler!r}; expected 'ddim', and a guidance")
        self.synth, self.weight, self.recipe = synth, weight, synth.recipe
        self._loss, self._tables = synth.guidance, synth._tables

    def run(self, unit: WorkUnit, seed: int) -> Batch:
        """Draw one group; unlike the Synthesizer's, one that is not finite is not drawn again."""
        clock = StageClock(self.synth.model.device)
        with self._ready():
            z, denoise, steer = self.prepared(unit, seed, clock)
            z = self.latents(z, denoise, steer, clock)
            with torch.no_grad(), clock("decode"):
                pixels = to_uint8(self.synth.model.decoder(z))
        targets = steer.targets[-1]
        return Batch(
            group=unit.group,
            round=unit.round,
            attempt=0,
            ids=tuple(unit.ids),
            prompts=self.synth.prompts(unit, seed),
            images=pixels,
            labels=targets.argmax(dim=1),
            targets=targets,
            seconds=clock.totals(),
        ).first(unit.kept)

    def prepared(self, unit: WorkUnit, seed: int, clock: StageClock) -> tuple[Tensor, Prompted, Steering]:
        """What a group starts from: noise [B,C,h,w], the denoiser with its prompts, targets and boxes of every call."""
        with clock("encode"):
            denoise = Prompted(self.synth.model, *self.synth._conditions(self.synth.prompts(unit, seed)))
        return self.synth.initial_latents(unit.ids, seed), denoise, self.synth._steering(unit, seed, 0)

    def latents(self, z: Tensor, denoise: Prompted, steer: Steering, clock: StageClock) -> Tensor:
        """Final latents [B,C,h,w] from standard normal noise; nothing waits for the device."""
        z = z * self._tables.start
        for i in range(self.recipe.steps):
            z = self._call(i, z, denoise, steer, clock)
        return z

    def _call(self, i: int, z: Tensor, denoise: Prompted, steer: Steering, clock: StageClock) -> Tensor:
        """Denoiser call i: z_t [B,C,h,w] -> z_{t-1}."""
        c, map_ = self._tables.at(i), steer.maps[i]
        z = z - self.weight * self.gradient(i, z, denoise, steer, clock).to(z.dtype)
        z = z if map_ is None else gather_source(z, map_)
        with torch.no_grad(), clock("denoise"):
            x0 = self._clean(i, z, denoise, c)
            return guided_step(
                z, x0, c.alpha, c.sigma, c.to_x0, c.to_eps, noise=steer.noise[i], to_noise=c.to_noise
            )[0]  # fmt: skip

    def gradient(self, i: int, z: Tensor, denoise: Prompted, steer: Steering, clock: StageClock) -> Tensor:
        """Gradient of B L(clamp(decode(x0(z_t)))) in z_t [B,C,h,w], through decoder and denoiser, float32 for half."""
        leaf, scale = z.detach().requires_grad_(), HALF_LOSS_SCALE if z.dtype == torch.float16 else 1.0
        with torch.enable_grad():
            with clock("denoise"):
                x0 = self._clean(i, leaf, denoise, self._tables.at(i))
            with clock("guide"):
                images = self.synth.model.decoder(x0).clamp(0.0, 1.0)
                loss = self._loss(images, steer.targets[i])[0]
                (grad,) = torch.autograd.grad(loss * scale, leaf)
        return grad.to(torch.promote_types(z.dtype, torch.float32)) * (len(z) / scale)

    def _clean(self, i: int, z: Tensor, denoise: Prompted, c: Coefficients) -> Tensor:
        """x0 by one denoiser pass, which has its unconditional half inside the recipe's interval."""
        recipe, kind = self.recipe, self._tables.prediction_type
        cond, uncond = denoise(z, self._tables.timesteps[i], recipe.cfg_active(i))
        return predict_x0(z, cond, uncond, recipe.guidance_scale, c.alpha, c.sigma, kind, recipe.guidance_rescale)

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Networks frozen, as while the Synthesizer draws; none is fused: the baseline runs stock modules."""
        with ExitStack() as stack:
            stack.enter_context(frozen(self.synth.model.modules()))
            stack.enter_context(frozen(self._loss.modules()))
            yield
