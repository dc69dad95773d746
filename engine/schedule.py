"""Coefficient tables of the solvers, on the device, from a scheduler config in diffusers' vocabulary.

Every solver takes one form: with z = alpha x0 + sigma eps at a denoiser call and x0' the (guided) clean latent,

    z_next = to_x0 x0' + to_eps eps + to_history (x0' - x0'_before) + to_noise n,  n ~ N(0, 1).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from synthkd.engine.errors import SynthkdError, suggest

Floats = NDArray[np.float64]
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_SPACINGS = ("leading", "trailing", "linspace")
_SIGMA_DATA = 0.5  # of consistency models, arXiv 2310.04378, section 4.1
_RHO = 7.0  # arXiv 2206.00364, eq. 5


class Coefficients(NamedTuple):
    """One row of the tables, 0-d each; see the module's equation."""

    alpha: Tensor
    sigma: Tensor
    to_x0: Tensor
    to_eps: Tensor
    to_noise: Tensor
    to_history: Tensor


@dataclass(frozen=True)
class Tables:
    """Per denoiser call i of n: timesteps [n] (int64, float32 where a sampler interpolates) and coefficients [n] each.

    noisy: which calls add fresh noise; multistep: whether any call uses the clean latent of the one before;
    start: what the initial standard normal noise is multiplied with.
    """

    timesteps: Tensor
    rows: Coefficients
    noisy: tuple[bool, ...]
    multistep: bool
    start: float
    prediction_type: str

    def at(self, i: int) -> Coefficients:
        """The coefficients of call i."""
        return Coefficients(*(column[i] for column in self.rows))


@dataclass(frozen=True)
class _Columns:
    """The tables in float64 on the host, before they move to a device."""

    t: NDArray[Any]
    alpha: Floats
    sigma: Floats
    to_x0: Floats
    to_eps: Floats
    to_noise: Floats
    to_history: Floats
    start: float = 1.0


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


def alphas_cumprod(config: Mapping[str, Any]) -> Floats:
    """Share of the signal's variance left after each training timestep, float64 [T].

    With `rescale_betas_zero_snr` its root is shifted and scaled so that the last is 0 (arXiv 2305.08891, algorithm 1).
    """
    bar = torch.cumprod(1 - betas(config), 0)
    if config.get("rescale_betas_zero_snr"):
        root = bar.sqrt()
        bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
    return np.asarray(bar.numpy(), dtype=np.float64)


def solver_tables(
    config: Mapping[str, Any],
    steps: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    sampler: str = "ddim",
    eta: float = 0.0,
    spacing: str = "model",
) -> Tables:
    """Tables of a sampler for a prior's scheduler config; dtype is raised to float32 at least.

    spacing: which timesteps are called: the config's own (`model`), `leading`, `trailing`, `linspace` (arXiv
    2305.08891, table 2) or `karras` (arXiv 2206.00364, eq. 5; Euler and DPM-Solver++).
    Raises SynthkdError for settings the loop does not reproduce and for more steps than the schedule has.
    """
    _refuse_unsupported(config, sampler)
    config = _spaced({name: value for name, value in config.items() if value is not None}, spacing)
    total = _total(config)
    if steps > total:
        raise SynthkdError(f"recipe: steps is {steps}; the scheduler was trained with {total} at most")
    make = {"ddim": _ddim, "euler": _euler, "euler_ancestral": _ancestral, "dpmpp_2m": _dpmpp_2m, "lcm": _lcm}
    columns = make[sampler](config, steps)
    if sampler == "ddim" and eta > 0:
        columns = _with_eta(columns, eta)
    return _put(columns, device, torch.promote_types(dtype, torch.float32), prediction_type(config))


def _total(config: Mapping[str, Any]) -> int:
    """Training timesteps; raises SynthkdError for a config that is no noise schedule."""
    for name in ("num_train_timesteps", "beta_schedule"):
        if name not in config:
            raise SynthkdError(f"scheduler: its config has no {name}; expected that of a diffusers scheduler")
    total, given = int(config["num_train_timesteps"]), config.get("trained_betas")
    if given is not None and len(given) != total:
        raise SynthkdError(f"scheduler: {len(given)} trained_betas for {total} num_train_timesteps; expected one each")
    return total


def _put(c: _Columns, device: torch.device, kind: torch.dtype, prediction: str) -> Tables:
    names = ("alpha", "sigma", "to_x0", "to_eps", "to_noise", "to_history")
    falls = bool(np.all(np.diff(c.t) < 0)) and c.t[-1] >= 0
    if not falls or not all(np.isfinite(getattr(c, n)).all() for n in names):
        raise SynthkdError(f"recipe: steps is {len(c.t)}; the prior's schedule has no so many steps for this sampler")
    whole = bool(np.all(c.t == np.round(c.t)))
    return Tables(
        timesteps=torch.from_numpy(c.t.astype(np.int64 if whole else np.float32)).to(device),
        rows=Coefficients(*(torch.from_numpy(getattr(c, n).copy()).to(device=device, dtype=kind) for n in names)),
        noisy=tuple(bool(x) for x in c.to_noise != 0),
        multistep=bool(np.any(c.to_history != 0)),
        start=c.start,
        prediction_type=prediction,
    )


def prediction_type(config: Mapping[str, Any]) -> str:
    """What the denoiser's output is; raises SynthkdError for one that the loop does not know."""
    found = str(config.get("prediction_type", "epsilon"))
    if found not in PREDICTION_TYPES:
        raise SynthkdError(f"scheduler: prediction_type {found!r} is not supported; {suggest(found, PREDICTION_TYPES)}")
    if found == "epsilon" and config.get("rescale_betas_zero_snr"):
        raise SynthkdError(
            "scheduler: rescale_betas_zero_snr is on with prediction_type 'epsilon', which says nothing of x0 where no "
            "signal is left; expected 'v_prediction' or 'sample'"
        )
    return found


def timesteps(config: Mapping[str, Any], steps: int) -> NDArray[Any]:
    """Timesteps [n], falling, in the three spacings of arXiv 2305.08891, table 2, as diffusers has them for DDIM."""
    total = int(config["num_train_timesteps"])
    spacing, offset = str(config.get("timestep_spacing", "leading")), int(config.get("steps_offset", 0))
    if spacing == "leading":
        out: NDArray[Any] = np.arange(steps)[::-1] * (total // steps) + offset
        return _within(out, total, steps, offset)
    if spacing == "trailing":
        return _trailing(total, steps)
    return np.linspace(0, total - 1, steps).round()[::-1].astype(np.int64)


def _within(t: NDArray[Any], total: int, steps: int, offset: int) -> NDArray[Any]:
    if int(t[0]) >= total:
        raise SynthkdError(f"recipe: steps is {steps}; with the scheduler's steps_offset {offset} that is too many")
    return t


def _trailing(total: int, steps: int) -> NDArray[Any]:
    return np.arange(total, 0, -total / steps)[:steps].round().astype(np.int64) - 1


def _ddim(config: Mapping[str, Any], steps: int) -> _Columns:
    """DDIM with eta = 0 (arXiv 2010.02502, eq. 12)."""
    bar, t = alphas_cumprod(config), timesteps(config, steps)
    before = t - int(config["num_train_timesteps"]) // steps
    final = 1.0 if config.get("set_alpha_to_one", True) else bar[0]
    now, after = bar[t], np.where(before >= 0, bar[before.clip(0)], final)
    none = np.zeros(steps)
    return _Columns(t, np.sqrt(now), np.sqrt(1 - now), np.sqrt(after), np.sqrt(1 - after), none, none)


def _with_eta(c: _Columns, eta: float) -> _Columns:
    """Fresh noise of eta times the posterior's standard deviation (arXiv 2010.02502, eq. 16)."""
    now, after = c.alpha**2, c.to_x0**2
    std = eta * np.sqrt((1 - after) / (1 - now) * (1 - now / after))
    return replace(c, to_eps=np.sqrt((1 - after - std**2).clip(0)), to_noise=std)


def _levels(config: Mapping[str, Any], steps: int, sampler: str) -> tuple[NDArray[Any], Floats]:
    """Timesteps [n] and noise levels sigma / alpha [n + 1] of the solvers written in them; the last is final."""
    bar = alphas_cumprod(config)
    if config.get("rescale_betas_zero_snr"):
        bar[-1] = 2.0**-24  # as diffusers: a level, even at no signal
    levels = np.sqrt((1 - bar) / bar)
    t = (_t_dpm if sampler == "dpmpp_2m" else _t_euler)(config, steps)
    own = np.interp(t, np.arange(len(levels)), levels)
    if config.get("use_karras_sigmas"):
        ends = (levels[-1], levels[0]) if sampler == "dpmpp_2m" else (own[0], own[-1])
        high, low = (config.get(n) or end for n, end in zip(("sigma_max", "sigma_min"), ends, strict=True))
        ramp = np.linspace(0, 1, steps)
        own = (high ** (1 / _RHO) + ramp * (low ** (1 / _RHO) - high ** (1 / _RHO))) ** _RHO
        t = np.interp(np.log(own), np.log(levels), np.arange(len(levels)))
        if sampler == "dpmpp_2m":
            t = t.round() if config["beta_schedule"] != "squaredcos_cap_v2" else np.trunc(t)
    final = levels[0] if config.get("final_sigmas_type") == "sigma_min" else 0.0
    return t, np.append(own, final)


def _t_euler(config: Mapping[str, Any], steps: int) -> NDArray[Any]:
    """As DDIM's, but that `linspace` is not rounded."""
    if config.get("timestep_spacing", "leading") == "linspace":
        return np.linspace(0, int(config["num_train_timesteps"]) - 1, steps, dtype=np.float32)[::-1].astype(np.float64)
    return timesteps(config, steps)


def _t_dpm(config: Mapping[str, Any], steps: int) -> NDArray[Any]:
    """As diffusers has them for DPM-Solver: one more point than calls, the last left out."""
    total, spacing = int(config["num_train_timesteps"]), config.get("timestep_spacing", "leading")
    offset = int(config.get("steps_offset", 0))
    if spacing == "trailing":
        return _trailing(total, steps)
    if spacing == "leading":
        out: NDArray[Any] = np.arange(1, steps + 1)[::-1] * (total // (steps + 1)) + offset
        return _within(out, total, steps, offset)
    return np.linspace(0, total - 1, steps + 1).round()[::-1][:-1].astype(np.int64)


def _vp(level: Floats) -> tuple[Floats, Floats]:
    """alpha and sigma of a variance-preserving z at noise levels sigma / alpha."""
    alpha = 1 / np.sqrt(1 + level**2)
    return alpha, level * alpha


def _start(config: Mapping[str, Any], level: Floats) -> float:
    """Euler's initial noise: its first level alone, or as in a latent of unit variance where the spacing is leading."""
    return 1.0 if config.get("timestep_spacing", "leading") == "leading" else float(_vp(level)[1][0])


def _euler(config: Mapping[str, Any], steps: int) -> _Columns:
    """Euler in noise levels (arXiv 2206.00364, algorithm 2 without churn): DDIM's step, other timesteps."""
    t, level = _levels(config, steps, "euler")
    (alpha, sigma), after = _vp(level[:-1]), _vp(level[1:])
    to_x0, to_eps = after[0].copy(), after[1].copy()
    to_x0[-1], to_eps[-1] = 1.0, level[-1]  # the last latent is not brought back to unit variance
    none = np.zeros(steps)
    return _Columns(t, alpha, sigma, to_x0, to_eps, none, none, _start(config, level))


def _ancestral(config: Mapping[str, Any], steps: int) -> _Columns:
    """Euler ancestral: down below the next level, then noise up to it (arXiv 2206.00364, appendix C.2)."""
    t, level = _levels(config, steps, "euler_ancestral")
    now, after = level[:-1], level[1:]
    up = after * np.sqrt(now**2 - after**2) / now
    down = np.sqrt(after**2 - up**2)
    alpha, sigma = _vp(now)
    scale = _vp(after)[0]
    return _Columns(t, alpha, sigma, scale, scale * down, scale * up, np.zeros(steps), _start(config, level))


def _dpmpp_2m(config: Mapping[str, Any], steps: int) -> _Columns:
    """DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2), midpoint form, written as DDIM's step and a difference of x0."""
    t, level = _levels(config, steps, "dpmpp_2m")
    (alpha, sigma), (to_x0, to_eps) = _vp(level[:-1]), _vp(level[1:])
    to_history = np.zeros(steps)
    last_first_order = level[-1] == 0 or (config.get("lower_order_final", True) and steps < 15)
    last_first_order = last_first_order or config.get("euler_at_final", False)
    if len(np.unique(level)) <= steps:
        raise SynthkdError(f"recipe: steps is {steps}; the prior's schedule has no so many steps for this sampler")
    for i in range(1, steps - int(bool(last_first_order))):
        h, h_before = np.log(level[i] / level[i + 1]), np.log(level[i - 1] / level[i])
        to_history[i] = 0.5 * to_x0[i] * -np.expm1(-h) * h / h_before
    return _Columns(t, alpha, sigma, to_x0, to_eps, np.zeros(steps), to_history)


def _lcm(config: Mapping[str, Any], steps: int) -> _Columns:
    """Multistep consistency sampling (arXiv 2310.04378, algorithm 3): the consistency function, then fresh noise."""
    total = int(config["num_train_timesteps"])
    trained = min(total, int(config.get("original_inference_steps") or 50))
    if steps > trained:
        raise SynthkdError(f"recipe: steps is {steps}; sampler 'lcm' has {trained} at most for this model")
    grid = (np.arange(1, trained + 1) * (total // trained) - 1)[::-1]
    t = grid[np.floor(np.linspace(0, trained, num=steps, endpoint=False)).astype(np.int64)]
    bar = alphas_cumprod(config)
    alpha, sigma = np.sqrt(bar[t]), np.sqrt(1 - bar[t])
    scaled = t * float(config.get("timestep_scaling") or 10.0)
    skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
    keep, noise = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    to_x0 = keep * (scaled / np.sqrt(scaled**2 + _SIGMA_DATA**2) + skip * alpha)
    return _Columns(t, alpha, sigma, to_x0, keep * skip * sigma, noise, np.zeros(steps))


def _spaced(config: Mapping[str, Any], spacing: str) -> dict[str, Any]:
    """The config with a recipe's spacing in place of its own."""
    out = dict(config)
    if spacing == "karras":
        out["use_karras_sigmas"] = True
    elif spacing != "model":
        out |= {"timestep_spacing": spacing, "use_karras_sigmas": False}
    found = str(out.get("timestep_spacing", "leading"))
    if found not in _SPACINGS:
        raise SynthkdError(f"scheduler: timestep_spacing {found!r}; {suggest(found, _SPACINGS)}")
    return out


def schedule_identity(config: Mapping[str, Any]) -> str:
    """What the tables of any sampler and number of steps are made from, as text: equal where the tables are."""
    defaults = {
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "prediction_type": "epsilon",
    }
    rare = {
        "rescale_betas_zero_snr": False,
        "use_karras_sigmas": False,
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "euler_at_final": False,
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
        "sigma_min": None,
        "sigma_max": None,
    }
    chosen = {name: config.get(name, value) for name, value in defaults.items()}
    chosen |= {name: config[name] for name, value in rare.items() if config.get(name, value) not in (value, None)}
    return json.dumps({"betas": betas(config).tolist(), **chosen}, sort_keys=True)


def _refuse_unsupported(config: Mapping[str, Any], sampler: str) -> None:
    if str(config.get("_class_name", "")).startswith("Flow"):
        raise SynthkdError(f"scheduler: {config['_class_name']} is flow matching, which is not supported yet")
    off = ["clip_sample", "thresholding"]
    if sampler not in ("ddim", "lcm"):
        off += ["use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas"]
    for name in off:
        if config.get(name):
            raise SynthkdError(f"scheduler: {name} is on; latent priors with it are not supported yet: set it to false")
    levels = sampler not in ("ddim", "lcm")
    for name, only in (("timestep_type", "discrete"), ("interpolation_type", "linear")):
        if levels and config.get(name, only) != only:
            raise SynthkdError(f"scheduler: {name} {config[name]!r} is not supported yet; expected {only!r}")
    if sampler == "dpmpp_2m" and math.isfinite(float(config.get("lambda_min_clipped", -math.inf))):
        raise SynthkdError("scheduler: lambda_min_clipped is not supported yet; expected -inf")
