"""Coefficient tables of the solver, on the device, from a diffusers scheduler config."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthkd.engine.errors import SynthkdError, suggest


@dataclass(frozen=True)
class Tables:
    """Per denoiser call i: timesteps [n] int64; z = alpha x0 + sigma eps now and after the call, [n] each."""

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    alpha_next: Tensor
    sigma_next: Tensor
    prediction_type: str


def betas(config: Mapping[str, Any]) -> Tensor:
    """Forward-process variances, float64 [T] (arXiv 2006.11239, eq. 1; the cosine form: arXiv 2102.09672, eq. 17)."""
    n, kind = int(config["num_train_timesteps"]), str(config["beta_schedule"])
    first, last = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    if kind == "linear":
        return torch.linspace(first, last, n, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(first**0.5, last**0.5, n, dtype=torch.float64).square()
    if kind == "squaredcos_cap_v2":
        t = torch.arange(n + 1, dtype=torch.float64) / n
        bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    raise SynthkdError(
        f"scheduler: beta_schedule {kind!r} is not supported; "
        + suggest(kind, ("linear", "scaled_linear", "squaredcos_cap_v2"))
    )


def timesteps(config: Mapping[str, Any], steps: int) -> Tensor:
    """Timesteps int64 [n], falling, in the three spacings of arXiv 2305.08891, table 2, as diffusers has them."""
    total = int(config["num_train_timesteps"])
    spacing, offset = str(config.get("timestep_spacing", "leading")), int(config.get("steps_offset", 0))
    if steps > total:
        raise SynthkdError(f"recipe: steps is {steps}; the scheduler was trained with {total} at most")
    if spacing == "leading":
        out = torch.arange(steps).flip(0) * (total // steps) + offset
        if int(out[0]) >= total:
            raise SynthkdError(f"recipe: steps is {steps}; with the scheduler's steps_offset {offset} that is too many")
        return out
    if spacing == "trailing":  # numpy, whose ties at .5 are those of diffusers
        return torch.from_numpy(np.arange(total, 0, -total / steps)[:steps].round()).long() - 1
    if spacing == "linspace":
        return torch.from_numpy(np.linspace(0, total - 1, steps).round()).long().flip(0)
    raise SynthkdError(
        f"scheduler: timestep_spacing {spacing!r}; " + suggest(spacing, ("leading", "trailing", "linspace"))
    )


def ddim_tables(config: Mapping[str, Any], steps: int, device: torch.device, dtype: torch.dtype) -> Tables:
    """DDIM with eta = 0 (arXiv 2010.02502, eq. 12) for a scheduler config in diffusers' vocabulary.

    dtype is raised to float32 at least. Raises SynthkdError for settings the loop does not reproduce.
    """
    _refuse_unsupported(config)
    bar = torch.cumprod(1 - betas(config), 0)
    t = timesteps(config, steps)
    final = torch.ones(1, dtype=bar.dtype) if config.get("set_alpha_to_one", True) else bar[:1]
    previous = t - int(config["num_train_timesteps"]) // steps
    bar_now = bar[t]
    bar_next = torch.where(previous >= 0, bar[previous.clamp_min(0)], final)
    kind = torch.promote_types(dtype, torch.float32)

    def put(x: Tensor) -> Tensor:
        return x.to(device=device, dtype=kind)

    return Tables(
        timesteps=t.to(device),
        alpha=put(bar_now.sqrt()),
        sigma=put((1 - bar_now).sqrt()),
        alpha_next=put(bar_next.sqrt()),
        sigma_next=put((1 - bar_next).sqrt()),
        prediction_type=str(config.get("prediction_type", "epsilon")),
    )


def schedule_identity(config: Mapping[str, Any]) -> str:
    """What the tables of any number of steps are made from, as text: equal where the tables are."""
    defaults = {
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "prediction_type": "epsilon",
    }
    chosen = {name: config.get(name, value) for name, value in defaults.items()}
    return json.dumps({"betas": betas(config).tolist(), **chosen}, sort_keys=True)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for name in ("clip_sample", "thresholding", "rescale_betas_zero_snr"):
        if config.get(name):
            raise SynthkdError(f"scheduler: {name} is on; latent priors with it are not supported yet: set it to false")
