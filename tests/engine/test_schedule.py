"""Coefficient tables against diffusers' own DDIMScheduler."""

from typing import Any

import pytest
import torch

from synthkd.engine.errors import SynthkdError
from synthkd.engine.schedule import schedule_identity, solver_tables

CPU = torch.device("cpu")
SPACINGS = ("leading", "trailing", "linspace")
BETAS: dict[str, dict[str, float]] = {
    "linear": {"beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {},
}


def _scheduler(**config: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(**{"clip_sample": False, **config})


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", BETAS)
def test_tables_are_those_of_diffusers(kind: str, spacing: str, to_one: bool) -> None:
    offset = 1 if spacing == "leading" else 0
    theirs = _scheduler(
        beta_schedule=kind, timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=to_one, **BETAS[kind]
    )
    for steps in (1, 2, 7, 10, 20, 33, 50, 250):
        theirs.set_timesteps(steps)
        ours = solver_tables(dict(theirs.config), steps, CPU, torch.float64)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
        before = [t - 1000 // steps for t in theirs.timesteps.tolist()]
        bar = theirs.alphas_cumprod.double()
        bar_next = torch.stack([bar[t] if t >= 0 else theirs.final_alpha_cumprod.double() for t in before])
        for ours_bar, ours_rest, want in (
            (ours.rows.alpha, ours.rows.sigma, bar[theirs.timesteps]),
            (ours.rows.to_x0, ours.rows.to_eps, bar_next),
        ):
            torch.testing.assert_close(ours_bar.square(), want, rtol=2e-4, atol=1e-6)  # theirs is a float32 product
            torch.testing.assert_close(ours_rest.square(), 1 - want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_agree_for_every_step_count(spacing: str) -> None:
    for total in (1000, 77):
        theirs = _scheduler(timestep_spacing=spacing, num_train_timesteps=total)
        for steps in range(2, total + 1, 1 if total < 100 else 3):
            theirs.set_timesteps(steps)
            ours = solver_tables(dict(theirs.config), steps, CPU, torch.float32)
            want = theirs.timesteps.tolist()[:steps]  # numpy.arange may give diffusers one more than was asked for
            assert ours.timesteps.tolist() == want, (total, steps)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_one_step_is_the_step_of_diffusers(kind: str) -> None:
    from synthkd.kernels import guided_step, predict_x0

    theirs = _scheduler(beta_schedule="scaled_linear", set_alpha_to_one=False, prediction_type=kind)
    theirs.set_timesteps(10)
    ours = solver_tables(dict(theirs.config), 10, CPU, torch.float32)
    z, out = torch.randn(2, 3, 4, 5, 9, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(theirs.timesteps):
        want = theirs.step(out, t, z, eta=0.0).prev_sample
        x0 = predict_x0(z, out, None, 1.0, *ours.at(i)[:2], ours.prediction_type)
        got, _ = guided_step(z, x0, *ours.at(i)[:4])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)  # near t = 0 float32 cancels in (z - alpha x0) / sigma


def test_given_betas_are_taken_as_they_are() -> None:
    betas = torch.linspace(0.01, 0.3, 20).tolist()
    theirs = _scheduler(trained_betas=betas, num_train_timesteps=20)
    theirs.set_timesteps(5)
    ours = solver_tables(dict(theirs.config), 5, CPU, torch.float32)
    torch.testing.assert_close(ours.rows.alpha.square(), theirs.alphas_cumprod[theirs.timesteps])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tables_are_float32_at_least(dtype: torch.dtype) -> None:
    assert solver_tables(dict(_scheduler().config), 10, CPU, dtype).rows.alpha.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "steps", "message"),
    [
        ({"clip_sample": True}, 10, "clip_sample is on"),
        ({"thresholding": True}, 10, "thresholding is on"),
        ({"rescale_betas_zero_snr": True}, 10, "rescale_betas_zero_snr is on with prediction_type 'epsilon'"),
        ({"prediction_type": "flow_prediction"}, 10, "prediction_type 'flow_prediction' is not supported"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 10, "flow matching, which is not supported yet"),
        ({}, 1001, "steps is 1001; the scheduler was trained with 1000"),
        ({"steps_offset": 1}, 1000, "steps is 1000"),
        ({"timestep_spacing": "trailling"}, 10, "did you mean 'trailing'"),
        ({"beta_schedule": "linaer"}, 10, "did you mean 'linear'"),
    ],
)
def test_what_the_loop_cannot_do_is_refused_in_one_line(config: dict[str, Any], steps: int, message: str) -> None:
    base = {"num_train_timesteps": 1000, "beta_schedule": "linear"}
    with pytest.raises(SynthkdError, match=message) as caught:
        solver_tables({**base, **config}, steps, CPU, torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"beta_end": 0.02}, {"timestep_spacing": "trailing"}, {"steps_offset": 0}])
def test_identity_follows_the_schedule(change: dict[str, Any]) -> None:
    """Another schedule is another identity; the diffusers version that wrote the config is not."""
    base = {
        "num_train_timesteps": 100, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.01, "steps_offset": 1,
    }  # fmt: skip
    assert schedule_identity(base) == schedule_identity({**base, "_diffusers_version": "9", "clip_sample": False})
    assert schedule_identity(base) != schedule_identity({**base, **change})
