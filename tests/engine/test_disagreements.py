"""Where prior, recipe, teacher and machine do not fit together: one line, and what to change."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.engine import GuidanceSpec, Recipe, Request, Synthesizer, SynthkdError
from synthkd.engine.priors import StableDiffusion


def refused(work: Callable[[], object], *parts: str) -> None:
    """One line that holds every part."""
    with pytest.raises(SynthkdError) as caught:
        work()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("family", "declared", "found"), [("sd1", "v_prediction", "epsilon"), ("sd2", "epsilon", "v_prediction")]
)
def test_another_prediction_type_than_declared(
    pipelines: Mapping[str, Any], recipe: Callable[..., Recipe], family: str, declared: str, found: str
) -> None:
    """An SD 2 checkpoint saved with SD 1's scheduler draws noise; a recipe that says what it expects notices."""
    pipe = pipelines[family]
    refused(
        lambda: Synthesizer.from_pipeline(pipe, recipe(prediction_type=declared)),
        f"prediction_type is '{declared}'; the prior's scheduler says '{found}'",
    )
    Synthesizer.from_pipeline(pipe, recipe(prediction_type=found))
    Synthesizer.from_pipeline(pipe, recipe())


def test_zero_terminal_signal_needs_another_prediction(
    pipeline: Any, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DDIMScheduler

    made = DDIMScheduler.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    monkeypatch.setattr(pipeline, "scheduler", made)
    refused(lambda: Synthesizer.from_pipeline(pipeline, recipe()), "rescale_betas_zero_snr is on", "v_prediction")


@pytest.mark.parametrize(("height", "width", "name"), [(17, 16, "height is 17"), (16, 21, "width is 21")])
def test_a_size_the_prior_cannot_draw(
    pipeline: Any, recipe: Callable[..., Recipe], height: int, width: int, name: str
) -> None:
    refused(lambda: Synthesizer.from_pipeline(pipeline, recipe(height=height, width=width)), name, "a multiple of 2")


def test_more_steps_than_the_schedule_has(pipeline: Any, recipe: Callable[..., Recipe]) -> None:
    refused(lambda: Synthesizer.from_pipeline(pipeline, recipe(steps=1001)), "steps is 1001", "1000 at most")


def test_a_class_that_a_class_conditional_prior_does_not_have(
    pipelines: Mapping[str, Any], recipe: Callable[..., Recipe]
) -> None:
    """Also of a prior that is handed over as it is; a class that is left out does not matter."""
    wanted = recipe(classes=("cat", "dog", "zebra"), prompts=("{class}",))
    refused(lambda: Synthesizer.from_pipeline(pipelines["dit"], wanted), "'zebra' is no class of this model")
    left_out = recipe(
        classes=("cat", "dog", "zebra"), prompts=("{class}",), class_weights=(1, 1, 0), classes_per_group=2
    )
    Synthesizer.from_pipeline(pipelines["dit"], left_out)
    named = recipe(classes=("cat", "dog", "zebra"), prompts=("{class}",), class_words=("cat", "dog", "fowl"))
    Synthesizer.from_pipeline(pipelines["dit"], named)


def test_half_precision_on_a_cpu(pipeline_folder: Path, recipe: Callable[..., Recipe]) -> None:
    refused(
        lambda: Synthesizer.from_pretrained(str(pipeline_folder), recipe(dtype="float16"), device="cpu"),
        "'float16' on a CPU", "'float32' or 'bfloat16', or a GPU",
    )  # fmt: skip


class Full(StableDiffusion):
    """A prior whose memory does not suffice."""

    error: Exception = torch.OutOfMemoryError("CUDA out of memory")

    def denoise(self, z: Tensor, *args: Any) -> Any:
        """Never gets there."""
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
)
def test_no_memory_says_what_to_lower(pipeline: Any, recipe: Callable[..., Recipe], error: Exception) -> None:
    model = Full(pipeline)
    model.error = error
    synth = Synthesizer(model, recipe())
    refused(
        lambda: next(iter(synth.stream(Request(num_samples=6)))),
        "6 images of 16x16", "lower classes_per_group or samples_per_class", "bfloat16",
    )  # fmt: skip


def test_another_runtime_error_is_not_taken_for_it(pipeline: Any, recipe: Callable[..., Recipe]) -> None:
    model = Full(pipeline)
    model.error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        next(iter(Synthesizer(model, recipe()).stream(Request(num_samples=6))))


def test_guidance_that_nobody_brought(pipeline: Any, recipe: Callable[..., Recipe]) -> None:
    refused(
        lambda: Synthesizer.from_pipeline(pipeline, recipe(guidance=GuidanceSpec(scale=0.1))),
        "guidance.scale is above 0, but no guidance was given",
    )
