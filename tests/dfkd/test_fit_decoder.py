"""Fitting a guidance decoder: it learns, comes out the same again, stops cleanly; and the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from synthkd.dfkd.fit_decoder import FitSpec, Fitted, Source, Stopped, about, fit_decoder
from synthkd.dfkd.teachers import load_teacher
from synthkd.engine import SynthkdError
from synthkd.engine.models import load_model

SPEC = FitSpec(samples=48, steps=60, batch_size=16, hidden=8, blocks=1, seed=3)


@pytest.fixture(scope="session")
def source(tiny_job: Any) -> Source:
    """The tiny pipeline and its teacher, at a size that is not the images' own."""
    teacher = load_teacher(tiny_job.teacher)
    prior = load_model(tiny_job.model, device="cpu", dtype=torch.float32)
    return Source(prior, tiny_job.recipe, (12, 20), tiny_job.guidance(teacher))


@pytest.fixture(scope="session")
def fitted(source: Source) -> Fitted:
    """Fitted once."""
    return fit_decoder(source, SPEC)


def weights(found: Fitted) -> torch.Tensor:
    """All of them."""
    return torch.cat([p.detach().flatten() for p in found.net.parameters()])


def test_it_learns_images_and_gradients(fitted: Fitted, source: Source) -> None:
    first, last = fitted.curve[0], fitted.curve[-1]
    assert [(row["part"], row["step"]) for row in fitted.curve] == [(1, 15), (2, 50), (2, 60)]
    assert last["mse"] < first["mse"]
    assert last["cosine"] > 0.5  # of untrained networks: 0.0
    assert len(fitted.errors["rmse"]) == len(fitted.errors["cosine"]) == 4
    assert max(fitted.errors["rmse"]) < 0.2  # an untrained network has 0.3 and more
    assert fitted.errors["mean_cosine"] > 0.2  # of an untrained network: 0.0
    told = about(source, fitted)
    assert told["spec"]["samples"] == 48
    assert json.loads(json.dumps(told))["fitted_to"]["recipe"]["steps"] == 4


def test_the_same_again_for_a_seed_and_another_for_another(source: Source, fitted: Fitted) -> None:
    torch.manual_seed(99)  # nothing outside counts
    assert torch.equal(weights(fit_decoder(source, SPEC)), weights(fitted))
    other = fit_decoder(source, FitSpec(samples=24, steps=2, batch_size=4, hidden=8, blocks=1, seed=4))
    assert not torch.equal(weights(other), weights(fitted))


def test_without_a_guidance_images_alone_are_fitted(source: Source) -> None:
    spec = FitSpec(samples=24, steps=3, batch_size=8, hidden=8, blocks=1)
    found = fit_decoder(Source(source.model, source.recipe, source.size), spec)
    assert "cosine" not in found.errors
    assert len(found.curve) == 1


@pytest.mark.parametrize("after", [0, 2, 9])
def test_a_stop_is_heeded_among_runs_and_steps(source: Source, after: int) -> None:
    asked = iter(range(100))
    with pytest.raises(Stopped):
        fit_decoder(source, SPEC, should_stop=lambda: next(asked) >= after)


def test_samples_follow_the_latents() -> None:
    assert FitSpec().for_latents((4, 16, 16)).samples == 11_000
    assert FitSpec().for_latents((4, 32, 32)).samples == 3_000
    assert FitSpec(samples=5).for_latents((4, 64, 64)).samples == 5


@pytest.mark.parametrize("field", [{"steps": 0}, {"learning_rate": 0}, {"steered": 1}, {"seed": -1}, {"samples": 1.5}])
def test_a_wrong_setting_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(SynthkdError, match=f"fit-decoder: {next(iter(field))} is"):
        FitSpec(**field)


def test_the_command_writes_what_synth_looks_through(tiny_job: Any, call: Any, tmp_path: Path) -> None:
    fields = tiny_job.recipe.to_dict()
    kept = {n: fields[n] for n in ("height", "width", "steps", "classes_per_group", "samples_per_class", "prompts")}
    lines = [f"{name} = {json.dumps(value)}" for name, value in kept.items()]
    guidance = '[guidance]\nscale = 0.2\nmin_cosine = 0.01\ndecoder = "{}"\n'
    (tmp_path / "fit.toml").write_text("\n".join([*lines, guidance.format("vae")]))
    where = ("--model", tiny_job.model, "--teacher", tiny_job.teacher, "--device", "cpu")
    fit = ("fit-decoder", *where, "--recipe", tmp_path / "fit.toml", "--samples", 24, "--steps", 40)
    done = call(*fit, "--out", tmp_path / "decoder", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.strip().splitlines()[-1])["cosine"]) == 4
    (tmp_path / "synth.toml").write_text("\n".join([*lines, guidance.format(f"fitted:{tmp_path / 'decoder'}")]))
    synth = ("synth", *where, "--recipe", tmp_path / "synth.toml", "--num-samples", 6, "--workers", 1)
    done = call(*synth, "--out", tmp_path / "set")
    assert done.returncode == 0, done.stderr
    assert "guidance looks through a fitted decoder" in done.stderr
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["decoder"]["chosen"] == "fitted"
    done = call("replay", tmp_path / "set", "--id", 3, "--out", tmp_path / "3.png", "--device", "cpu")
    assert "identical" in done.stdout, done.stderr
    (tmp_path / "decoder" / "decoder.json").unlink()
    done = call(*synth, "--out", tmp_path / "other")
    assert done.returncode == 2
    assert "no readable decoder.json there" in done.stderr
