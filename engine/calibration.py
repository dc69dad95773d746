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
from synthkd.engine.guidance import Guidance, frozen, guidance_gradient
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
    """A prior that keeps the clean latent that each of its calls predicts."""

    def __init__(self, model: LatentModel, recipe: Recipe, tables: Tables) -> None:
        self._model, self._recipe, self._tables = model, recipe, tables
        self.latents: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def denoise(
        self, z: Tensor, t: Tensor, cond: Conditioning, uncond: Conditioning | None
    ) -> tuple[Tensor, Tensor | None]:
        found, other = self._model.denoise(z, t, cond, uncond)
        c, recipe = self._tables.at(len(self.latents) % self._recipe.steps), self._recipe
        with torch.no_grad():
            x0 = predict_x0(
                z.detach(), found.detach(), None if other is None else other.detach(), recipe.guidance_scale,
                c.alpha, c.sigma, self._tables.prediction_type, recipe.guidance_rescale,
            )  # fmt: skip
        self.latents.append(x0)
        return found, other


def record(
    model: LatentModel, recipe: Recipe, guidance: Guidance | None, decoder: Decoder | None, seed: int, group: int
) -> Trajectory:
    """Draw a group, as of a set without rounds and previews, and keep what its run went through.

    A function of (recipe, seed, group). Raises NonFiniteError where the group is not finite after all attempts.
    """
    recipe = replace(recipe, rounds=1, groups_per_round=0, previews=())
    tables = solver_tables(
        model.scheduler_config, recipe.steps, model.device, model.dtype,
        sampler=recipe.sampler, eta=recipe.eta, spacing=recipe.spacing,
    )  # fmt: skip
    recorded = _Recorded(model, recipe, tables)
    synth = Synthesizer(cast(LatentModel, recorded), recipe, guidance, decoder, "off")
    unit = Plan(recipe, Request(num_samples=(group + 1) * recipe.group_size, seed=seed)).unit(group)
    batch = synth.run(unit, seed)
    targets = synth._steering(unit, seed, batch.attempt).targets[: recipe.steps]
    return Trajectory(torch.stack(recorded.latents[-recipe.steps :]), torch.stack(list(targets)))


def gradient_of(guidance: Guidance, decoder: Decoder, x0: Tensor, targets: Tensor) -> Tensor:
    """Gradient of the guidance with respect to the clean latent x0 [B,C,h,w] through a decoder, targets [B,K]."""
    leaf = x0.detach().clone().requires_grad_()
    with torch.enable_grad(), frozen([decoder.module]), frozen(guidance.modules()):
        return guidance_gradient(guidance, decoder, leaf, leaf, targets)[0]


def cosines(guidance: Guidance, pair: Sequence[Decoder], x0: Tensor, targets: Tensor) -> Tensor:
    """Cosine [B] between the gradients through two decoders, per sample; 0 where one is zero or not finite."""
    one, other = (gradient_of(guidance, decoder, x0, targets).float().flatten(1) for decoder in pair)
    return F.cosine_similarity(one, other, dim=1).nan_to_num(0.0, 0.0, 0.0)


def calibrate(synthesizer: Synthesizer, cheap: Decoder, full: Decoder, seed: int) -> Calibration:
    """Draw one group beside the set, guided through `cheap`, and compare the gradients at each of its guided calls.

    A function of (recipe, seed, weights); no image of the set depends on it but through what is chosen. `cheap` is
    chosen where the mean cosine reaches `recipe.guidance.min_cosine`; a group that is not finite chooses the VAE.
    """
    recipe, guidance = synthesizer.recipe, synthesizer.guidance
    assert guidance is not None, "nothing to compare without a guidance"
    threshold, found = recipe.guidance.min_cosine, []
    try:
        run = record(synthesizer.model, recipe, guidance, cheap, own_seed(seed, "calibration"), 0)
    except NonFiniteError:
        return Calibration((), 0.0, threshold, "vae")
    for call in range(recipe.steps):
        if recipe.guidance.active(call, recipe.steps):
            found.append(float(cosines(guidance, (cheap, full), run.latents[call], run.targets[call]).mean()))
    rounded = tuple(round(c, 4) for c in found)
    mean = round(sum(found) / len(found), 4)
    return Calibration(rounded, mean, threshold, "cheap" if mean >= threshold else "vae")
