"""Guidance inside a stock diffusers pipeline, through its own step callback, for those who keep their loop."""

from functools import wraps
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from synthkd.engine.config import GuidanceSpec
from synthkd.engine.errors import SynthkdError
from synthkd.engine.guidance import GroupGuidance, Guidance, Terms, frozen, guidance_gradient, step_size, step_sizes
from synthkd.engine.priors import wrap_pipeline
from synthkd.engine.schedule import Coefficients, Tables, solver_tables
from synthkd.kernels import predict_x0, sum_of_squares
from synthkd.kernels.guided_step import normalised_direction

_SAMPLERS = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "LCMScheduler": "lcm",
}
_ONLY: dict[str, dict[str, Any]] = {
    "DPMSolverMultistepScheduler": {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
}
_CONSISTENCY = "LatentConsistencyModelPipeline"


class GuidanceCallback:
    """A `callback_on_step_end` that moves each step's clean latent down the gradient of a guidance.

    >>> with GuidanceCallback(pipe, guidance, targets, GuidanceSpec(scale=0.1)) as callback:
    ...     images = pipe(prompts, callback_on_step_end=callback).images

    It does what the engine's loop does (`engine.sampler`, gradient "x0", no Latent CutMix): the step that the
    scheduler took from x0 is corrected to the one it would have taken from x0'. Within the `with` block the
    scheduler's `step` is observed, since a callback alone is not told the denoiser's output; the block leaves the
    pipeline as it was. `log` holds each guided step's terms.
    """

    def __init__(self, pipe: Any, guidance: Guidance, targets: Tensor, spec: GuidanceSpec) -> None:
        """pipe: a Stable-Diffusion-type pipeline; targets: class shares [B,K] of the images it will draw, in order.

        Raises SynthkdError for a scheduler without a table here, or a spec that a callback cannot follow.
        """
        name = type(pipe.scheduler).__name__
        if name not in _SAMPLERS:
            raise SynthkdError(
                f"callback: scheduler {name} is not supported; expected {', '.join(_SAMPLERS)}, for instance "
                "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"
            )
        config = pipe.scheduler.config
        for field, only in _ONLY.get(name, {}).items():
            if config.get(field, only) != only:
                raise SynthkdError(
                    f"callback: {name} with {field} {config[field]!r} is not supported; expected {only!r}"
                )
        if spec.gradient != "x0" or spec.looks != 1 or spec.decoder not in ("auto", "vae"):
            raise SynthkdError("callback: expected guidance.gradient 'x0', looks 1 and decoder 'vae'")
        self._model, self._pipe, self._sampler = wrap_pipeline(pipe), pipe, _SAMPLERS[name]
        solver_tables(config, 2, self._model.device, self._model.dtype, sampler=self._sampler)  # refuses what it cannot
        self._guidance, self._targets, self._spec = guidance, targets, spec
        self._scheduler: Any = None
        self._seen: tuple[Tensor, Tensor] | None = None
        self._made: tuple[Tensor, Tables] | None = None
        self._memory: Any = None
        self.log: list[Terms] = []

    def __enter__(self) -> "GuidanceCallback":
        """Observe the scheduler's steps."""
        self._scheduler = self._pipe.scheduler
        inner = self._scheduler.step

        @wraps(inner)  # pipelines read off its signature whether it takes eta and a generator
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._seen = model_output, sample
            return inner(model_output, timestep, sample, *args, **kwargs)

        for network in self._guidance.modules():
            network.to(self._model.device)
        self._scheduler.step = step
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        """Stop observing."""
        del self._scheduler.step
        self._seen = None

    def __call__(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Called by the pipeline after each step; returns its `latents` [B,C,h,w] as the guided step has them.

        Raises SynthkdError outside the `with` block, for targets that are not one per image, and for timesteps that
        are not the scheduler's own.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            raise SynthkdError("callback: use it inside its `with` block, which observes the scheduler")
        calls, latents = len(pipe.scheduler.timesteps), tensors["latents"]
        if not self._spec.active(index, calls):
            return {}
        if len(self._targets) != len(latents):
            raise SynthkdError(f"callback: {len(self._targets)} targets for {len(latents)} images; expected one each")
        tables = self._tables(calls)
        c, (out, sample) = tables.at(index), seen
        levels = self._sampler == "euler"  # whose latents are x0 + level eps, not of unit variance
        z = sample * c.alpha.to(sample.dtype) if levels else sample
        x0 = predict_x0(z, out, None, 1.0, c.alpha, c.sigma, tables.prediction_type)
        shift = self._shift(x0, step_sizes(self._spec, tables.rows.sigma)[index])
        if tables.multistep:
            history = pipe.scheduler.model_outputs
            history[-1] = (history[-1].to(shift.dtype) - shift).to(history[-1].dtype)
        moved = self._share(c, levels) * shift
        return {name: (x.to(moved.dtype) - moved).to(x.dtype) for name, x in self._moving(tensors, index, calls)}

    def _moving(self, tensors: dict[str, Any], index: int, calls: int) -> list[tuple[str, Tensor]]:
        """The latents, and after the last call of LatentConsistencyModelPipeline the `denoised` that it decodes."""
        if type(self._pipe).__name__ != _CONSISTENCY or index + 1 < calls:
            return [("latents", tensors["latents"])]
        if "denoised" not in tensors:
            raise SynthkdError(
                f"callback: {_CONSISTENCY} decodes `denoised`; call it with "
                "callback_on_step_end_tensor_inputs=['latents', 'denoised']"
            )
        return [("latents", tensors["latents"]), ("denoised", tensors["denoised"])]

    def _tables(self, calls: int) -> Tables:
        """Made and compared once a run: a run sets the scheduler's timesteps anew."""
        model, theirs = self._model, self._pipe.scheduler.timesteps
        if self._made is None or self._made[0] is not theirs:
            tables = solver_tables(model.scheduler_config, calls, model.device, model.dtype, sampler=self._sampler)
            if not torch.equal(tables.timesteps.double(), theirs.to(model.device).double()):
                raise SynthkdError(
                    "callback: the pipeline was called with timesteps or sigmas of its own; leave them out"
                )
            self._made = theirs, tables
            self._memory = self._guidance.begin() if isinstance(self._guidance, GroupGuidance) else None
        return self._made[1]

    def _shift(self, x0: Tensor, planned: Tensor) -> Tensor:
        """step g / rms(g), what x0' falls below x0, [B,C,h,w]."""
        spec, loss_of = self._spec, self._guidance
        with torch.enable_grad(), frozen([self._model.decoder.module, *loss_of.modules()]):
            leaf = x0.detach().requires_grad_()
            targets = self._targets.to(x0.device)
            grad, loss, terms, self._memory = guidance_gradient(
                loss_of, self._model.decoder, leaf, leaf, targets, (), self._memory
            )
        self.log.append(terms)
        sumsq = sum_of_squares(grad)
        step = step_size(spec, planned, loss, sumsq, grad[0].numel())
        return step.view(-1, 1, 1, 1) * normalised_direction(grad, sumsq)

    def _share(self, c: Coefficients, levels: bool) -> Tensor:
        """How far the next latent follows a shift of x0; see `kernels.guided_step`."""
        back = c.to_eps * c.alpha / c.sigma if self._spec.rederive_eps else torch.zeros_like(c.to_x0)
        return (c.to_x0 - back) / c.to_x0 if levels else c.to_x0 - back + c.to_history
