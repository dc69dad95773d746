"""Does guidance point the same way through a cheap decoder as through the full VAE? One group of its own tells."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from synthkd.engine.config import Recipe, Request
from synthkd.engine.decoders import Decoder
from synthkd.engine.errors import NonFiniteError
from synthkd.engine.guidance import GroupGuidance, Guidance, chunked_gradient, frozen, guidance_gradient
from synthkd.engine.latent_model import Conditioning, LatentModel
from synthkd.engine.plan import Plan
from synthkd.engine.schedule import Tables, solver_tables
from synthkd.engine.synthesizer import Synthesizer
from synthkd.kernels import predict_x0


@dataclass(frozen=True)
class Calibration:
    """cosines: of each guided call, the mean over the group; mean: over the calls; chosen: `cheap` or `vae`."""

    cosines: tuple[float, ...]
    mean: float
    threshold: float
    chosen: str


@dataclass(frozen=True)
class Trajectory:
    """What a group's run went through: clean latents [n,B,C,h,w] and targets [n,B,K] of its n denoiser calls."""

    latents: Tensor
    targets: Tensor


def own_seed(seed: int, purpose: str) -> int:
    """A seed for groups beside a set: their noise, prompts and boxes are none of the set's."""
    digest = hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**63


class _Recorded:
    """A prior that keeps the clean latents that its calls predict, call by call, in runs of samples as they come."""

    def __init__(self, model: LatentModel, recipe: Recipe, tables: Tables) -> None:
        self._model, self._recipe, self._tables = model, recipe, tables
        self._at: float | None = None
        self.calls: list[list[Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(
        self, z: Tensor, t: Tensor, cond: Conditioning, uncond: Conditioning | None
    ) -> tuple[Tensor, Tensor | None]:
        found, other = self._model.denoise(z, t, cond, uncond)
        if float(t) != self._at:
            self._at = float(t)
            self.calls.append([])
        with torch.no_grad():
            self.calls[-1].append(self._predicted(z, found, other))
        return found, other

    def _predicted(self, z: Tensor, cond: Tensor, uncond: Tensor | None) -> Tensor:
        c, recipe = self._tables.at(len(self.calls) - 1), self._recipe
        kind, rescale = self._tables.prediction_type, recipe.guidance_rescale
        return predict_x0(z, cond, uncond, recipe.guidance_scale, c.alpha, c.sigma, kind, rescale)

    def conditions(self, *arguments: Any) -> tuple[Conditioning, Conditioning | None]:
        """Asked for once an attempt at a group, which begins here: what came before is forgotten."""
        self._at, self.calls = None, []
        return self._model.conditions(*arguments)

    def latents(self) -> Tensor:
        """Of the last run, [n,B,C,h,w]; what a call evaluated again, for its gradient, comes after the group."""
        size = self._recipe.group_size
        return torch.stack([torch.cat(parts)[:size] for parts in self.calls])


class Recorder:
    """Draws groups, as of a set without rounds and previews, and keeps what their runs went through.

    decoder: what a guidance looks through, None for what the recipe says.
    """

    def __init__(
        self, model: LatentModel, recipe: Recipe, guidance: Guidance | None = None, decoder: Decoder | None = None
    ) -> None:
        """See `Synthesizer`; nothing is fused or compiled here, nor on another backend: a decision hangs on it."""
        self.recipe = recipe = replace(recipe, rounds=1, groups_per_round=0, previews=(), backends=())
        tables = solver_tables(
            model.scheduler_config, recipe.steps, model.device, model.dtype,
            sampler=recipe.sampler, eta=recipe.eta, spacing=recipe.spacing,
        )  # fmt: skip
        self._recorded = _Recorded(model, recipe, tables)
        part = images_at_once(recipe.group_size, recipe.height, recipe.width)  # not by the free memory: bits hang on it
        split = guidance is None or isinstance(guidance, GroupGuidance)
        self._synth = Synthesizer(
            cast(LatentModel, self._recorded), recipe, guidance, decoder, "off", "off",
            micro_batch=part if split else recipe.group_size,
        )  # fmt: skip

    def __call__(self, seed: int, group: int) -> Trajectory:
        """One group; a function of (recipe, seed, group).

        Raises NonFiniteError where it is not finite after all attempts.
        """
        unit = Plan(self.recipe, Request(num_samples=(group + 1) * self.recipe.group_size, seed=seed)).unit(group)
        batch = self._synth.run(unit, seed)
        targets = self._synth._steering(unit, seed, batch.attempt).targets[: self.recipe.steps]
        return Trajectory(self._recorded.latents(), torch.stack(list(targets)))


def images_at_once(images: int, height: int, width: int) -> int:
    """How many of so many images of a size are decoded at once with their gradient: 2 megapixels, one at the least."""
    return max(1, min(images, 2**21 // (height * width)))


def gradient_of(guidance: Guidance, decoder: Decoder, x0: Tensor, targets: Tensor, chunk: int = 0) -> Tensor:
    """Gradient of the guidance with respect to the clean latent x0 [B,C,h,w] through a decoder, targets [B,K].

    chunk: samples at a time, where the guidance can judge a group from its parts; 0 for all.
    """
    x0, zero = x0.detach(), torch.zeros_like(x0).requires_grad_()
    memory = guidance.begin() if isinstance(guidance, GroupGuidance) else None
    with torch.enable_grad(), frozen([decoder.module]), frozen(guidance.modules()):
        if isinstance(guidance, GroupGuidance) and 0 < chunk < len(x0):
            steps = chunked_gradient(guidance, decoder, lambda p, z: x0[p] + z, zero, targets, (), memory, chunk)
            return steps.grad
        return guidance_gradient(guidance, decoder, x0 + zero, zero, targets, (), memory).grad


def cosines(guidance: Guidance, pair: Sequence[Decoder], x0: Tensor, targets: Tensor, chunk: int = 0) -> Tensor:
    """Cosine [B] between the gradients through two decoders, per sample; 0 where one is zero or not finite."""
    one, other = (gradient_of(guidance, decoder, x0, targets, chunk).float().flatten(1) for decoder in pair)
    return F.cosine_similarity(one, other, dim=1).nan_to_num(0.0, 0.0, 0.0)


def calibrate(synthesizer: Synthesizer, cheap: Decoder, full: Decoder, seed: int) -> Calibration:
    """Draw one group beside the set, guided through `cheap`, and compare the gradients at each of its guided calls.

    A function of (recipe, seed, weights); no image of the set depends on it but through what is chosen. `cheap` is
    chosen where the mean cosine reaches `recipe.guidance.min_cosine`; a group that is not finite chooses the VAE.
    """
    recipe, guidance = synthesizer.recipe, synthesizer.guidance
    assert guidance is not None, "nothing to compare without a guidance"
    threshold, found = recipe.guidance.min_cosine, []
    chunk = images_at_once(recipe.group_size, recipe.height, recipe.width)
    try:
        run = Recorder(synthesizer.model, recipe, guidance, cheap)(own_seed(seed, "calibration"), 0)
    except NonFiniteError:
        return Calibration((), 0.0, threshold, "vae")
    for call in range(recipe.steps):
        if recipe.guidance.active(call, recipe.steps):
            one = cosines(guidance, (cheap, full), run.latents[call], run.targets[call], chunk)
            found.append(float(one.mean()))
    rounded = tuple(round(c, 4) for c in found)
    mean = round(sum(found) / len(found), 4)
    return Calibration(rounded, mean, threshold, "cheap" if mean >= threshold else "vae")
