"""What the engine cannot do is refused in one line, before weights are read wherever that is possible."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from synthkd.engine import GuidanceSpec, Recipe, Synthesizer, SynthkdError, models
from synthkd.engine.models import load_model, load_tiny_decoder

Make = Callable[..., Recipe]


def _refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(SynthkdError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing diffusers, the first step of reading weights, fails the test."""

    def fail() -> Any:
        raise AssertionError("weights would have been read")

    monkeypatch.setattr(models, "_import_diffusers", fail)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("where", ["nothing-here", "a/b/c", "./x"])
def test_a_missing_folder(recipe: Make, tmp_path: Path, where: str) -> None:
    reference = str(tmp_path / where) if where == "nothing-here" else where
    _refused(lambda: Synthesizer.from_pretrained(reference, recipe()), r"no model_index\.json there")


@pytest.mark.usefixtures("no_weights")
def test_an_empty_folder(recipe: Make, tmp_path: Path) -> None:
    _refused(lambda: Synthesizer.from_pretrained(str(tmp_path), recipe()), r"no model_index\.json there")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"_class_name": "FluxPipeline"}), "FluxPipeline is not supported yet"),
        (json.dumps({"_class_name": "EvilPipeline"}), "expected StableDiffusionPipeline"),
        (json.dumps({}), "None is not supported yet"),
        ("{", "not readable JSON"),
        ("[1]", "not readable JSON"),
    ],
)
def test_an_unsupported_pipeline(recipe: Make, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model_index.json").write_text(text)
    _refused(lambda: Synthesizer.from_pretrained(str(tmp_path), recipe(), device="cpu"), message)


def test_a_live_pipeline_of_another_class(recipe: Make) -> None:
    class StableDiffusion3Pipeline:
        pass

    _refused(
        lambda: Synthesizer.from_pipeline(StableDiffusion3Pipeline(), recipe()),
        r"StableDiffusion3Pipeline is not supported yet \(flow matching\); expected StableDiffusionPipeline",
    )


@pytest.mark.usefixtures("no_weights")
def test_half_precision_on_a_cpu(recipe: Make, pipeline_folder: Path) -> None:
    _refused(
        lambda: Synthesizer.from_pretrained(str(pipeline_folder), recipe(dtype="float16"), device="cpu"),
        "dtype is 'float16' on a CPU; expected 'float32' or 'bfloat16'",
    )


@pytest.mark.usefixtures("no_weights")
def test_an_unknown_embedded_model(recipe: Make) -> None:
    _refused(lambda: Synthesizer.from_pretrained("embedded:digit", recipe()), "did you mean 'digits'")


def test_pickled_weights_are_not_read(recipe: Make, pipeline: Any, tmp_path: Path) -> None:
    """A folder with .bin files alone: safetensors or nothing."""
    pipeline.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert [p.suffix for p in (tmp_path / "pickled/unet").glob("diffusion*")] == [".bin"]
    _refused(lambda: Synthesizer.from_pretrained(str(tmp_path / "pickled"), recipe()), "cannot be loaded")


def test_damaged_weights(recipe: Make, pipeline: Any, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "damaged")
    (weights,) = (tmp_path / "damaged/unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    _refused(lambda: Synthesizer.from_pretrained(str(tmp_path / "damaged"), recipe()), "cannot be loaded")


def test_a_decoder_that_is_none(tmp_path: Path) -> None:
    _refused(
        lambda: load_tiny_decoder(str(tmp_path / "none"), device="cpu", dtype=torch.float32),
        r"guidance\.decoder 'tiny:.*none': cannot be loaded",
    )


def test_a_scale_without_a_guidance(recipe: Make, pipeline: Any) -> None:
    _refused(
        lambda: Synthesizer.from_pipeline(pipeline, recipe(guidance=GuidanceSpec(scale=0.1))),
        r"guidance\.scale is above 0, but no guidance was given",
    )


@pytest.mark.parametrize(("field", "value"), [("height", 17), ("width", 15)])
def test_a_size_the_autoencoder_cannot_make(recipe: Make, pipeline: Any, field: str, value: int) -> None:
    _refused(
        lambda: Synthesizer.from_pipeline(pipeline, recipe(**{field: value})),
        f"{field} is {value}; this model needs a multiple of 2",
    )


def test_more_steps_than_the_scheduler_has(recipe: Make, pipeline: Any) -> None:
    _refused(lambda: Synthesizer.from_pipeline(pipeline, recipe(steps=1001)), "steps is 1001; .* 1000 at most")


@pytest.mark.parametrize("name", ["clip_sample", "thresholding", "rescale_betas_zero_snr"])
def test_a_scheduler_that_clips(recipe: Make, pipeline: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from diffusers import DDIMScheduler

    monkeypatch.setattr(pipeline, "scheduler", DDIMScheduler.from_config(pipeline.scheduler.config, **{name: True}))
    _refused(lambda: Synthesizer.from_pipeline(pipeline, recipe()), f"{name} is on")


def test_a_loaded_folder_draws_what_the_pipeline_draws(recipe: Make, pipeline: Any, pipeline_folder: Path) -> None:
    from synthkd.engine import Request

    live = Synthesizer.from_pipeline(pipeline, recipe())
    loaded = Synthesizer.from_pretrained(str(pipeline_folder), recipe(), device="cpu")
    a, b = (next(iter(s.stream(Request(num_samples=6)))) for s in (live, loaded))
    assert torch.equal(a.images, b.images)
    assert live.identity(0)["model_sha256"] == loaded.identity(0)["model_sha256"]
    model = load_model(str(pipeline_folder), device="cpu", dtype=torch.float32)
    assert not any(p.requires_grad for m in model.modules() for p in m.parameters())
