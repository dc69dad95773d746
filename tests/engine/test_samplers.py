"""Every sampler is diffusers' own: tables call by call, whole runs, few-step schedules, fresh noise, zero signal."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from synthkd.engine import Recipe, SynthkdError
from synthkd.engine.schedule import alphas_cumprod, schedule_identity, solver_tables
from synthkd.kernels import guided_step, predict_x0

CPU = torch.device("cpu")
CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}
BASE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def their_scheduler(sampler: str, **config: Any) -> Any:
    """diffusers' scheduler of a sampler, without pixel-space clipping."""
    import diffusers

    clip = {"clip_sample": False} if sampler in ("ddim", "lcm") else {}
    return getattr(diffusers, CLASSES[sampler])(**{**BASE, **clip, **config})


def denoiser(z: Tensor, t: Tensor) -> Tensor:
    """A bounded, nonlinear stand-in that depends on the position and the timestep."""
    place = torch.arange(z[0].numel(), dtype=z.dtype).view_as(z[0]) / z[0].numel()
    return torch.tanh(z * (0.4 + place) + 0.3 * torch.sin(t.to(z.dtype) / 90) - 0.2 * place)


class Noise:
    """Fresh noise by call, handed to diffusers' schedulers in the order in which they ask."""

    def __init__(self, shape: tuple[int, ...], calls: int) -> None:
        g = torch.Generator().manual_seed(7)
        self.rows, self.asked = torch.randn(calls, *shape, generator=g, dtype=torch.float64), 0

    def __call__(self, *_: Any, **__: Any) -> Tensor:
        self.asked += 1
        return self.rows[self.asked - 1]


def theirs(scheduler: Any, z: Tensor, steps: int, monkeypatch: pytest.MonkeyPatch, eta: float = 0.0) -> Tensor:
    """The final latent of diffusers' loop over the stand-in denoiser, in float64."""
    import sys

    noise = Noise(tuple(z.shape), steps)
    monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", noise)
    scheduler.set_timesteps(steps)
    x = z * float(scheduler.init_noise_sigma)
    extra = {"eta": eta} if "DDIM" in type(scheduler).__name__ else {}
    for t in scheduler.timesteps:
        out = denoiser(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, return_dict=False, **extra)[0].double()
    return x


def ours(config: dict[str, Any], sampler: str, z: Tensor, steps: int, eta: float = 0.0) -> Tensor:
    """The same from our tables and kernels."""
    tables = solver_tables(config, steps, CPU, torch.float64, sampler=sampler, eta=eta)
    noise, before, x = Noise(tuple(z.shape), steps), None, z * tables.start
    for i in range(steps):
        c = tables.at(i)
        x0 = predict_x0(x, denoiser(x, tables.timesteps[i]), None, 1.0, c.alpha, c.sigma, tables.prediction_type)
        fresh = noise() if tables.noisy[i] else None
        x, before = guided_step(
            x, x0, *c[:4], noise=fresh, to_noise=c.to_noise, before=before, to_history=c.to_history,
            keep=tables.multistep,
        )  # fmt: skip
    return x


@pytest.fixture
def z() -> Tensor:
    """Noise of an odd, non-square shape."""
    return torch.randn(2, 3, 5, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def compare(
    sampler: str,
    config: dict[str, Any],
    z: Tensor,
    steps: int,
    mp: pytest.MonkeyPatch,
    eta: float = 0,
    tolerance: float = 1e-4,
) -> None:
    """Both loops end in the same latent, and the loop moves it at all."""
    scheduler = their_scheduler(sampler, **config)
    want = theirs(scheduler, z, steps, mp, eta)
    got = ours(dict(scheduler.config), sampler, z, steps, eta)
    assert torch.isfinite(want).all()
    assert (want - z).abs().max() > 0.1
    assert (got - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [2, 4, 10, 20])
@pytest.mark.parametrize("sampler", CLASSES)
def test_a_run_ends_where_diffusers_ends(
    sampler: str, steps: int, prediction: str, z: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (sampler, prediction) == ("euler_ancestral", "sample"):
        pytest.skip("diffusers has no such combination to compare with")
    config = {"prediction_type": prediction, "steps_offset": 1} if sampler != "lcm" else {"prediction_type": prediction}
    compare(sampler, config, z, steps, monkeypatch)


@pytest.mark.parametrize("steps", [3, 16])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral", "dpmpp_2m"])
def test_every_spacing(sampler: str, spacing: str, steps: int, z: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(sampler, {"timestep_spacing": spacing}, z, steps, monkeypatch)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral"])
def test_turbo_schedules(sampler: str, steps: int, z: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """One to four calls from the very last timestep on, as SD-Turbo and SDXL-Turbo want them."""
    compare(sampler, {"timestep_spacing": "trailing"}, z, steps, monkeypatch)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
def test_consistency_steps(steps: int, z: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    compare("lcm", {"prediction_type": "v_prediction"}, z, steps, monkeypatch)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_karras_levels(sampler: str, steps: int, final: str, z: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(sampler, {"use_karras_sigmas": True, "final_sigmas_type": final}, z, steps, monkeypatch)


@pytest.mark.parametrize("change", [{"euler_at_final": True}, {"lower_order_final": False}])
@pytest.mark.parametrize("steps", [8, 20])
def test_how_the_second_order_ends(
    change: dict[str, bool], steps: int, z: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare("dpmpp_2m", {"final_sigmas_type": "sigma_min", **change}, z, steps, monkeypatch)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("steps", [4, 10])
def test_ddim_with_fresh_noise(eta: float, steps: int, z: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    compare("ddim", {}, z, steps, monkeypatch, eta)
    assert not torch.equal(ours({**BASE, "num_train_timesteps": 1000}, "ddim", z, steps, eta),
                           ours({**BASE, "num_train_timesteps": 1000}, "ddim", z, steps))  # fmt: skip


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "karras"])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral", "dpmpp_2m"])
def test_the_cosine_schedule(sampler: str, spacing: str, z: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last level is far above the other schedules', and only zero terminal SNR may cap it.

    diffusers steps in float32 in Euler's scale, where latents reach 2e4 here: 1e-3 is its own rounding.
    """
    if spacing == "karras" and sampler != "euler":
        pytest.skip("not offered, or diffusers itself fails on equal timesteps")
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    own = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    compare(sampler, config | own, z, 6, monkeypatch, tolerance=3e-3)


@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_zero_terminal_signal(sampler: str, steps: int, z: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no signal left at the last timestep a v-prediction still says where to go (arXiv 2305.08891)."""
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    bar = alphas_cumprod({**BASE, "num_train_timesteps": 1000, **config})
    assert bar[-1] == 0.0
    assert bar[0] == pytest.approx(1 - BASE["beta_start"])  # type: ignore[operator]
    compare(sampler, config, z, steps, monkeypatch)


def test_more_consistency_steps_than_trained_are_refused() -> None:
    with pytest.raises(SynthkdError, match="steps is 51; sampler 'lcm' has 50 at most"):
        solver_tables({**BASE, "num_train_timesteps": 1000}, 51, CPU, torch.float32, sampler="lcm")


@pytest.mark.parametrize("flag", ["use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas"])
def test_levels_that_are_not_built_are_refused(flag: str) -> None:
    config = {**BASE, "num_train_timesteps": 1000, flag: True}
    with pytest.raises(SynthkdError, match=f"{flag} is on"):
        solver_tables(config, 5, CPU, torch.float32, sampler="euler")
    solver_tables(config, 5, CPU, torch.float32, sampler="ddim")


def test_identity_names_what_the_tables_come_from() -> None:
    base = {**BASE, "num_train_timesteps": 1000}
    for change in ({"use_karras_sigmas": True}, {"rescale_betas_zero_snr": True}, {"original_inference_steps": 40}):
        assert schedule_identity({**base, **change}) != schedule_identity(base)
    assert schedule_identity({**base, "use_karras_sigmas": False, "final_sigmas_type": "zero"}) == schedule_identity(
        base
    )


def test_the_spacing_of_a_recipe_replaces_the_priors() -> None:
    base = {**BASE, "num_train_timesteps": 1000, "timestep_spacing": "leading"}
    tables = solver_tables(base, 4, CPU, torch.float32, spacing="trailing")
    assert tables.timesteps.tolist() == [999, 749, 499, 249]
    karras = solver_tables(base, 4, CPU, torch.float32, sampler="dpmpp_2m", spacing="karras")
    assert (
        karras.timesteps.tolist() != solver_tables(base, 4, CPU, torch.float32, sampler="dpmpp_2m").timesteps.tolist()
    )


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_guidance_rescale_is_that_of_diffusers(share: float) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    g = torch.Generator().manual_seed(0)
    z, cond, uncond = torch.randn(3, 2, 4, 5, 9, generator=g, dtype=torch.float64)
    alpha, sigma = torch.tensor(0.6).double(), torch.tensor(0.8).double()
    out = rescale_noise_cfg(uncond + 7.5 * (cond - uncond), cond, guidance_rescale=share)
    want = predict_x0(z, out, None, 1.0, alpha, sigma, "v_prediction")
    got = predict_x0(z, cond, uncond, 7.5, alpha, sigma, "v_prediction", share)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampler": "dpmpp_2m", "steps": 1}, "steps is 1; expected at least 2 with sampler 'dpmpp_2m'"),
        ({"sampler": "euler", "eta": 0.5}, "eta is 0.5; expected 0 with sampler 'euler'"),
        ({"sampler": "ddim", "spacing": "karras"}, "spacing is 'karras'; expected another one"),
        ({"sampler": "lcm", "spacing": "trailing"}, "spacing is 'trailing'; expected 'model'"),
        ({"sampler": "dpm2m"}, "did you mean 'dpmpp_2m'"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5"),
        ({"eta": -0.1}, "eta is -0.1"),
    ],
)
def test_a_recipe_that_no_sampler_can_follow(
    recipe: Callable[..., Recipe], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(SynthkdError, match=message) as caught:
        recipe(**fields)
    assert "\n" not in str(caught.value)


def test_float_timesteps_stay_floats() -> None:
    config = {**BASE, "num_train_timesteps": 1000, "timestep_spacing": "linspace"}
    tables = solver_tables(config, 7, CPU, torch.float32, sampler="euler")
    assert tables.timesteps.dtype == torch.float32
    assert not np.all(tables.timesteps.numpy() == np.round(tables.timesteps.numpy()))
    assert solver_tables(config, 7, CPU, torch.float32, sampler="dpmpp_2m").timesteps.dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "sampler", "steps", "message"),
    [
        ({"beta_schedule": None}, "ddim", 4, "no beta_schedule"),
        ({"num_train_timesteps": None}, "ddim", 4, "no num_train_timesteps"),
        ({"trained_betas": [0.1, 0.2]}, "ddim", 4, "2 trained_betas for 1000 num_train_timesteps"),
        ({}, "dpmpp_2m", 1000, "steps is 1000; the prior's schedule has no so many steps"),
        ({"num_train_timesteps": 20}, "lcm", 21, "steps is 21"),
        ({"interpolation_type": "log_linear"}, "euler", 4, "interpolation_type 'log_linear' is not supported"),
        ({"timestep_type": "continuous"}, "euler", 4, "timestep_type 'continuous' is not supported"),
        ({"lambda_min_clipped": -5.1}, "dpmpp_2m", 4, "lambda_min_clipped is not supported"),
    ],
)
def test_odd_configs_are_one_line(changes: dict[str, Any], sampler: str, steps: int, message: str) -> None:
    config = {**BASE, "num_train_timesteps": 1000, **changes}
    with pytest.raises(SynthkdError, match=message) as caught:
        solver_tables(config, steps, CPU, torch.float32, sampler=sampler)
    assert "\n" not in str(caught.value)


def test_a_null_is_a_value_left_out() -> None:
    base = {**BASE, "num_train_timesteps": 1000}
    nulls = {"steps_offset": None, "original_inference_steps": None, "timestep_spacing": None, "trained_betas": None}
    for sampler in CLASSES:
        ours, want = (solver_tables(c, 4, CPU, torch.float32, sampler=sampler) for c in ({**base, **nulls}, base))
        assert torch.equal(ours.timesteps, want.timesteps)


def test_a_consistency_grid_of_few_timesteps() -> None:
    tables = solver_tables({**BASE, "num_train_timesteps": 20}, 20, CPU, torch.float32, sampler="lcm")
    assert tables.timesteps.tolist() == list(range(19, -1, -1))
