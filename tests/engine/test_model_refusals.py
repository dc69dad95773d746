"""Models that are not served, and inputs that do not fit one, are refused in one line, by name."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from synthkd.engine import GuidanceSpec, Recipe, Synthesizer, SynthkdError, models
from synthkd.engine.models import load_model, load_tiny_decoder, wrap_pipeline

Folders = Mapping[str, Path]
Make = Callable[..., Recipe]


def refused(make: Callable[[], object], message: str) -> str:
    """A SynthkdError of one line."""
    with pytest.raises(SynthkdError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_label_of_two_classes(build: Any, pipelines: Mapping[str, Any]) -> None:
    """ImageNet has two cranes: the exact spelling may decide, the lower case does not."""
    prior = wrap_pipeline(pipelines["dit"])
    assert prior.conditions(["Crane"], "", 1.0, (16, 16))[0]["class_labels"].tolist() == [4]
    refused(lambda: prior.conditions(["CRANE"], "", 1.0, (16, 16)), r"'CRANE' is the label of classes \[3, 4\]")
    bare = build.dit()
    bare.register_to_config(id2label=None)
    assert wrap_pipeline(bare).conditions(["fowl"], "", 1.0, (16, 16))[0]["class_labels"].tolist() == [2]


@pytest.mark.parametrize("where", ["live", "folder"])
def test_an_unknown_class(pipelines: Mapping[str, Any], pipeline_folders: Folders, recipe: Make, where: str) -> None:
    """Refused at once, not when the class's group comes, with the nearest labels and what to do."""
    wanted = recipe(classes=("cat", "dog", "cheeta"), prompts=("{class}",))
    message = refused(
        lambda: (
            Synthesizer.from_pipeline(pipelines["dit"], wanted)
            if where == "live"
            else Synthesizer.from_pretrained(str(pipeline_folders["dit"]), wanted, device="cpu")
        ),
        r"prompt 'cheeta' is no class of this model; nearest: 'cheetah', '\w+', '[\w, ]+'; "
        r"set prompts = \[\"\{class\}\"\]",
    )
    assert "0 to 999" in message
    for prompts in (("a photo of a {class}",), ("{class} 1000",)):
        refused(lambda p=prompts: Synthesizer.from_pipeline(pipelines["dit"], recipe(prompts=p)), "is no class")
    refused(lambda: wrap_pipeline(pipelines["dit"]).check_prompts(["1000"], ""), "'1000' is no class")
    negative = recipe(prompts=("{class}",), negative_prompt="dog")
    refused(lambda: Synthesizer.from_pipeline(pipelines["dit"], negative), "negative_prompt is 'dog'; .* takes none")


@pytest.mark.parametrize(("height", "width", "field"), [(32, 16, "height is 32"), (16, 24, "width is 24")])
def test_a_class_conditional_model_has_one_size(
    pipelines: Mapping[str, Any], recipe: Make, height: int, width: int, field: str
) -> None:
    wanted = recipe(prompts=("{class}",), height=height, width=width)
    refused(lambda: Synthesizer.from_pipeline(pipelines["dit"], wanted), f"{field}; this model draws 16 only")


@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_a_size_that_is_no_multiple(pipelines: Mapping[str, Any], recipe: Make, name: str) -> None:
    refused(lambda: Synthesizer.from_pipeline(pipelines[name], recipe(width=17)), "width is 17; .* multiple of 2")


NOT_YET = [
    "StableDiffusion3Pipeline", "FluxPipeline", "Flux2Pipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline",
    "SanaPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionInpaintPipeline", "KandinskyPipeline",
]  # fmt: skip


@pytest.mark.parametrize("name", NOT_YET)
def test_families_that_are_not_served(tmp_path: Path, name: str) -> None:
    message = rf"{name} is not supported yet.*; expected StableDiffusionPipeline or .* or DiTPipeline"
    refused(lambda: wrap_pipeline(type(name, (), {})()), "model: " + message)
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": name, "text_encoder": ["transformers", "T5"]})
    )
    refused(lambda: load_model(str(tmp_path), device="cpu", dtype=torch.float32), message)


@pytest.fixture
def changed(pipeline_folders: Folders, tmp_path: Path) -> Callable[..., str]:
    """A saved pipeline with some entries of its model_index.json replaced."""

    def make(family: str, **entries: Any) -> str:
        folder = tmp_path / "changed"
        shutil.copytree(pipeline_folders[family], folder)
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, **entries}))
        return str(folder)

    return make


NONE = [None, None]
REFINER = {"text_encoder": NONE, "tokenizer": NONE}


@pytest.mark.parametrize(
    ("family", "entries", "message"),
    [
        ("sdxl", REFINER, "this is the refiner alone"),
        ("sdxl", {**REFINER, "_class_name": "StableDiffusionXLImg2ImgPipeline"}, "this is the refiner alone"),
        ("sdxl", {"text_encoder_2": NONE}, "no second text encoder"),
        ("sdxl", {"text_encoder_2": None}, "no second text encoder"),
        ("sd1", {"unet": NONE}, "no unet; a StableDiffusionPipeline has unet, vae, text_encoder"),
        ("sd1", {"unet": "my_unet"}, "no unet"),
        ("sd1", {"unet": ["my_unet", "Net"]}, "has unet from 'my_unet'; .* is never run"),
        ("sd1", {"_class_name": ["pipeline", "Mine"]}, "is not supported yet"),
        (
            "sd1",
            {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]},
            r"\(flow matching\) is not supported yet",
        ),
        ("sdxl", {"scheduler": ["diffusers", "EDMEulerScheduler"]}, "EDM noise levels"),
    ],
)
def test_an_index_that_does_not_fit(
    changed: Callable[..., str], monkeypatch: pytest.MonkeyPatch, family: str, entries: dict[str, Any], message: str
) -> None:
    """Before diffusers is imported, let alone a weight read."""
    monkeypatch.setattr(models, "_import_diffusers", lambda: pytest.fail("weights would have been read"))
    folder = changed(family, **entries)
    refused(lambda: load_model(folder, device="cpu", dtype=torch.float32), message)


LOST = [
    "unet/diffusion_pytorch_model.safetensors", "vae", "text_encoder_2/config.json", "tokenizer_2", "vae/config.json",
    "scheduler/scheduler_config.json", "text_encoder/model.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("lost", LOST)
def test_a_missing_file(changed: Callable[..., str], monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """The line names what is missing, before weights are read."""
    folder = Path(changed("sdxl"))
    path = folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr(models, "_import_diffusers", lambda: pytest.fail("weights would have been read"))
    message = refused(lambda: load_model(str(folder), device="cpu", dtype=torch.float32), "cannot be loaded: no ")
    part, _, name = lost.partition("/")
    assert f"no {part}/{'*.safetensors' if name.endswith('s') else name}" in message


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_missing_tensor(changed: Callable[..., str], part: str) -> None:
    """It is never drawn at random instead."""
    from safetensors.torch import load_file, save_file

    folder = Path(changed("sd1"))
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    del tensors[sorted(tensors)[len(tensors) // 2]]
    save_file(tensors, path, metadata={"format": "pt"})
    refused(lambda: load_model(str(folder), device="cpu", dtype=torch.float32), f"{part} lacks the tensor ")


def test_a_kernel_named_in_a_config_is_not_fetched(
    changed: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would take it from a hub and run it; here it is as if nothing was named."""
    from transformers import PreTrainedModel

    folder, asked = Path(changed("sd1")), []
    inner = PreTrainedModel.from_pretrained.__func__

    def spy(kind: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["config"]._attn_implementation)
        return inner(kind, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(spy))
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attn_implementation": "somebody/kernel"}))
    load_model(str(folder), device="cpu", dtype=torch.float32)
    assert asked == [None]


def test_a_hub_id_that_is_not_there() -> None:
    """The index alone is asked for first."""
    refused(
        lambda: load_model("nobody/nothing", device="cpu", dtype=torch.float32), "'nobody/nothing': cannot be loaded"
    )


def test_live_pipelines_that_do_not_fit(
    pipelines: Mapping[str, Any], build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, VQModel

    for scheduler in (FlowMatchEulerDiscreteScheduler(), DPMSolverMultistepScheduler(use_flow_sigmas=True)):
        with monkeypatch.context() as patch:
            patch.setattr(pipelines["sd1"], "scheduler", scheduler)
            refused(lambda: wrap_pipeline(pipelines["sd1"]), "flow matching")
    cases = [
        ("sdxl", "text_encoder_2", None, "no second text encoder"),
        ("sdxl", "text_encoder", None, "the refiner alone"),
        ("dit", "vae", None, "no vae"),
        ("sd1", "vae", VQModel(), "vae is a VQModel; expected AutoencoderKL or AutoencoderTiny"),
        ("sd1", "vae", build.autoencoder(latent_channels=8), "vae has 8 latent channels, unet 4"),
        ("sd1", "vae", build.tiny_autoencoder(latent_channels=16), "vae has 16 latent channels, unet 4"),
    ]
    for family, part, value, message in cases:
        with monkeypatch.context() as patch:
            patch.setattr(pipelines[family], part, value)
            refused(lambda name=family: wrap_pipeline(pipelines[name]), message)
    with monkeypatch.context() as patch:
        patch.setattr(pipelines["sd1"].unet, "_hf_hook", object(), raising=False)
        refused(lambda: wrap_pipeline(pipelines["sd1"]), "unet is offloaded; call remove_all_hooks")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 16}, "16 latent channels; this model's vae has 4"),
        ({"decoder_block_out_channels": (8, 8, 8), "encoder_block_out_channels": (8, 8, 8),
          "num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}, "4 pixels per latent; .* vae has 2"),
    ],
)  # fmt: skip
def test_a_tiny_decoder_of_other_latents(
    pipelines: Mapping[str, Any], build: Any, recipe: Make, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    build.tiny_autoencoder(**changes).save_pretrained(tmp_path / "tiny")
    wanted = recipe(guidance=GuidanceSpec(scale=0.0, decoder=f"tiny:{tmp_path / 'tiny'}"))
    refused(lambda: Synthesizer.from_pipeline(pipelines["sd1"], wanted), rf"guidance\.decoder 'tiny:.*': {message}")
    load_tiny_decoder(str(tmp_path / "tiny"), device="cpu", dtype=torch.float32)


class HubError(Exception):
    """What a hub's client raises where there is no network: no OSError, no ValueError."""


@pytest.mark.parametrize("what", ["model", "lora"])
def test_an_unreachable_hub_is_one_line(pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    import diffusers

    def raises(*_: Any, **__: Any) -> None:
        raise HubError("name or service\nnot known")

    if what == "lora":
        pytest.importorskip("peft")
        monkeypatch.setattr(diffusers.StableDiffusionPipeline, "load_lora_weights", raises)
        refused(
            lambda: load_model(str(pipeline_folder), device="cpu", dtype=torch.float32, loras=["some/lora"]),
            "lora 'some/lora': cannot be fused: name or service not known",
        )
        return
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", raises)
    refused(
        lambda: load_model("some/model", device="cpu", dtype=torch.float32),
        "model 'some/model': cannot be loaded: name or service not known",
    )
