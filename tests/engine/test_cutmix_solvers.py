"""Latent CutMix between solver calls, orders 1 and 2, on a prior whose denoiser is known exactly.

Latents that are independent Gaussians by position have a denoiser that acts on each position alone, so a run with
exchanges must end in the gathered end of the run without them: whatever the solver carries on has to move along.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from synthkd.engine import GuidanceSpec, sampler
from synthkd.engine.augment import compose
from synthkd.engine.clock import StageClock
from synthkd.engine.sampler import Steering, sample
from synthkd.engine.schedule import Tables, solver_tables
from synthkd.kernels import guided_step
from synthkd.kernels.guided_step import gather_source

CPU = torch.device("cpu")
CONFIG = {
    "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "prediction_type": "sample", "timestep_spacing": "trailing",
}  # fmt: skip
B, C, H, W, STEPS = 4, 3, 5, 9, 8
SPREAD = 0.3 + torch.arange(H * W, dtype=torch.float64).view(H, W) / (H * W)
SAMPLERS = {"ddim": 1, "euler": 1, "euler_ancestral": 1, "lcm": 1, "dpmpp_2m": 2}


def tables(name: str) -> Tables:
    """float64 tables of a sampler."""
    return solver_tables(CONFIG, STEPS, CPU, torch.float64, sampler=name)


def noise(calls: int = 1) -> Tensor:
    """Standard normal [calls,B,C,H,W]."""
    return torch.randn(calls, B, C, H, W, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def source_map(seed: int) -> Tensor:
    """Any source for any position: harder than boxes."""
    return torch.randint(B, (B, H, W), generator=torch.Generator().manual_seed(seed))


def run(name: str, maps: Sequence[Tensor | None], fresh: Tensor | None = None) -> Tensor:
    """The end of our loop under the exact denoiser E[x0 | z] = alpha s^2 / (alpha^2 s^2 + sigma^2) z."""
    t = tables(name)
    level = {int(when): (a, s) for when, a, s in zip(t.timesteps, t.rows.alpha, t.rows.sigma, strict=True)}

    def denoise(z: Tensor, when: Tensor, cfg: bool) -> tuple[Tensor, None]:
        a, s = level[int(when)]
        return a * SPREAD**2 / (a**2 * SPREAD**2 + s**2) * z, None

    rows = noise(STEPS + 1)[1:] if fresh is None else fresh
    blank: list[Tensor | None] = [rows[i] if noisy else None for i, noisy in enumerate(t.noisy)]
    spec, targets = GuidanceSpec(scale=0.0), [torch.zeros(B, 1)] * STEPS
    steer = Steering(None, lambda z: z, spec, torch.zeros(STEPS), targets, maps, blank, [()] * STEPS)
    return sample(noise()[0], denoise, t, (1.0, 0.0), steer, StageClock(CPU))[0]


@pytest.mark.parametrize("call", range(STEPS))
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_an_exchange_after_any_call_is_a_gather_of_the_end(name: str, call: int) -> None:
    moved: list[Tensor | None] = [source_map(call) if i == call else None for i in range(STEPS)]
    want = gather_source(run(name, [None] * STEPS), source_map(call))
    assert (run(name, moved) - want).abs().max() <= 1e-12


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_exchanges_after_all_calls_compose(name: str) -> None:
    maps = [source_map(i) for i in range(STEPS)]
    whole = torch.arange(B).view(-1, 1, 1).expand(B, H, W)
    for event in maps:
        whole = compose(whole, event)
    assert (run(name, maps) - gather_source(run(name, [None] * STEPS), whole)).abs().max() <= 1e-12


@pytest.mark.parametrize("name", ["euler_ancestral", "lcm"])
def test_fresh_noise_after_an_exchange_stays_with_its_sample(name: str) -> None:
    """Noise added before an exchange moves with the latent, noise added later does not: two runs that differ there."""
    call, rows = 3, noise(STEPS + 1)[1:]
    event = source_map(0)
    moved: list[Tensor | None] = [event if i == call else None for i in range(STEPS)]
    late = torch.cat([rows[: call + 1], torch.stack([gather_source(r, event) for r in rows[call + 1 :]])])
    want = gather_source(run(name, [None] * STEPS, rows), event)
    assert (run(name, moved, late) - want).abs().max() <= 1e-12
    assert (run(name, moved, rows) - want).abs().max() > 0.01


def test_a_history_left_behind_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second order needs it: with the clean latents of the call before not gathered, the end is another one."""

    def stale(z: Tensor, x0: Tensor, *args: Tensor, **kwargs: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return guided_step(z, x0, *args, **kwargs)[0], x0  # type: ignore[arg-type]

    moved: list[Tensor | None] = [source_map(2) if i == 2 else None for i in range(STEPS)]
    want = run("dpmpp_2m", moved)
    monkeypatch.setattr(sampler, "guided_step", stale)
    assert (run("dpmpp_2m", moved) - want).abs().max() > 0.01
    assert torch.equal(run("dpmpp_2m", [None] * STEPS), run("dpmpp_2m", [None] * STEPS))


@pytest.mark.parametrize(("name", "order"), SAMPLERS.items())
def test_the_order_of_a_sampler(name: str, order: int) -> None:
    t = tables(name)
    assert t.multistep == (order == 2)
    assert any(t.noisy) == (name in ("euler_ancestral", "lcm"))


def test_the_second_order_is_nearer_the_exact_flow() -> None:
    """On one Gaussian variable, whose flow is known: what the history is for."""
    for steps in (10, 20, 40):
        assert _flow_error("dpmpp_2m", steps) < 0.5 * _flow_error("ddim", steps)


def _flow_error(name: str, steps: int) -> float:
    """Distance from the exact flow before the last call, which jumps to no noise in one first-order step anyway."""
    t = solver_tables(CONFIG, steps, CPU, torch.float64, sampler=name)
    z, before, spread = torch.ones(1, 1, 1, 1, dtype=torch.float64), None, 0.5
    size = (t.rows.alpha**2 * spread**2 + t.rows.sigma**2).sqrt()
    for i in range(steps - 1):
        c = t.at(i)
        x0 = c.alpha * spread**2 / size[i] ** 2 * z
        z, before = guided_step(z, x0, *c[:4], before=before, to_history=c.to_history, keep=True)
    return float((z - size[-1] / size[0]).abs().max())
