"""One denoiser evaluation is what diffusers' own pipeline feeds its scheduler, for every family; refusals by name."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.engine import GuidanceSpec, Recipe, Request, Synthesizer, SynthkdError, models
from synthkd.engine.models import load_model, load_tiny_decoder, weights_digest, wrap_pipeline
from synthkd.engine.priors import decode_dtype, guidance_embedding

PROMPTS = ["cat", "dog", "cat"]
Folders = Mapping[str, Path]
Make = Callable[..., Recipe]


def refused(make: Callable[[], object], message: str) -> str:
    """A SynthkdError of one line."""
    with pytest.raises(SynthkdError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def first_step(pipe: Any, monkeypatch: pytest.MonkeyPatch, prompts: list[str], **call: Any) -> tuple[Tensor, Any, Any]:
    """What a pipeline hands to its scheduler's first step: denoiser output after guidance, timestep, latents."""
    seen: list[Any] = []
    inner = pipe.scheduler.step

    def spy(out: Tensor, t: Any, z: Tensor, **kwargs: Any) -> Any:
        seen.append((out.clone(), t, z.clone()))
        return inner(out, t, z, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", spy)
    pipe(prompts, num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="pt", **call)
    out, t, z = seen[0]
    return out[: len(prompts)], t, z[: len(prompts)]


def ours(pipe: Any, t: Any, z: Tensor, scale: float, negative: str, size: tuple[int, int]) -> Tensor:
    """The same through the wrapper, classifier-free guidance by hand."""
    prior = wrap_pipeline(pipe)
    told, told_not = prior.conditions(PROMPTS, negative, scale, size)
    assert all(x.shape[0] == len(PROMPTS) for c in (told, told_not or {}) for x in c.values())
    with torch.no_grad():
        cond, uncond = prior.denoise(z, torch.as_tensor(t), told, told_not)
    return cond if uncond is None else uncond + scale * (cond - uncond)


@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
@pytest.mark.parametrize("negative", ["", "bird"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_conditions_of_text_models(
    pipelines: Mapping[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    scale: float,
    negative: str,
    size: tuple[int, int],
) -> None:
    pipe = pipelines[name]
    told = {"negative_prompt": [negative] * len(PROMPTS)} if negative else {}
    height, width = size
    theirs, t, z = first_step(pipe, monkeypatch, PROMPTS, guidance_scale=scale, height=height, width=width, **told)
    assert z.shape[1:] == wrap_pipeline(pipe).latent_shape(*size) == (4, height // 2, width // 2)
    assert theirs.std() > 0.01
    assert (ours(pipe, t, z, scale, negative, size) - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("zeros", [True, False])
def test_an_empty_negative_prompt_of_sdxl(
    pipelines: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch, zeros: bool
) -> None:
    """Zeros or the encoded empty text, as the pipeline's config says."""
    pipe = pipelines["sdxl"]
    before = dict(pipe.config)
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    theirs, t, z = first_step(pipe, monkeypatch, PROMPTS, guidance_scale=4.0, height=16, width=16)
    mine = ours(pipe, t, z, 4.0, "", (16, 16))
    told = wrap_pipeline(pipe).conditions(PROMPTS, "", 4.0, (16, 16))[1]
    pipe.register_to_config(force_zeros_for_empty_prompt=before["force_zeros_for_empty_prompt"])
    assert (mine - theirs).abs().max() <= 1e-5
    assert told is not None
    assert bool((told["encoder_hidden_states"] == 0).all()) is bool((told["text_embeds"] == 0).all()) is zeros


def test_sdxl_is_told_the_size(pipelines: Mapping[str, Any]) -> None:
    cond, uncond = wrap_pipeline(pipelines["sdxl"]).conditions(["cat"], "", 2.0, (16, 24))
    assert cond["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]]
    assert uncond is not None
    assert torch.equal(uncond["time_ids"], cond["time_ids"])


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_conditions_of_a_class_conditional_model(
    pipelines: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    pipe = pipelines["dit"]
    numbers = pipe.get_label_ids(PROMPTS)
    theirs, t, z = first_step(pipe, monkeypatch, numbers, guidance_scale=scale)
    mine = ours(pipe, t, z, scale, "", (16, 16))
    assert mine.shape == z.shape == (3, 4, 8, 8)
    assert theirs.std() > 0.01
    assert (mine - theirs).abs().max() <= 1e-5


def test_the_null_class_is_the_one_after_the_last(build: Any) -> None:
    prior = wrap_pipeline(build.dit(classes=10))
    _, uncond = prior.conditions(["cat", "9"], "", 2.0, (16, 16))
    assert uncond is not None
    assert uncond["class_labels"].tolist() == [10, 10]
    out = prior.denoise(torch.zeros(2, 4, 8, 8), torch.tensor(5), *prior.conditions(["cat", "9"], "", 2.0, (16, 16)))
    assert [x is not None and x.shape == (2, 4, 8, 8) for x in out] == [True, True]


@pytest.mark.parametrize("scale", [1.0, 8.5])
def test_an_embedded_guidance_scale(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    """LatentConsistencyModelPipeline: no unconditional call, the scale goes in with the timestep."""
    pipe = build.lcm(tmp_path / "lcm")
    theirs, t, z = first_step(pipe, monkeypatch, PROMPTS, guidance_scale=scale, height=16, width=24)
    assert (ours(pipe, t, z, scale, "", (16, 24)) - theirs).abs().max() <= 1e-5
    assert wrap_pipeline(pipe).conditions(PROMPTS, "", scale, (16, 24))[1] is None


def test_a_distilled_unet_in_a_plain_pipeline(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build.sd(tmp_path / "sd", time_cond_proj_dim=11)
    theirs, t, z = first_step(pipe, monkeypatch, PROMPTS, guidance_scale=6.0, height=16, width=16)
    assert (ours(pipe, t, z, 6.0, "", (16, 16)) - theirs).abs().max() <= 1e-5
    other = ours(pipe, t, z, 3.0, "", (16, 16))
    assert (other - theirs).abs().max() > 1e-4


@pytest.mark.parametrize("width", [10, 11, 256])
@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5, 8.123])
def test_the_guidance_embedding_is_that_of_diffusers(pipeline: Any, width: int, scale: float) -> None:
    theirs = pipeline.get_guidance_scale_embedding(torch.tensor([scale - 1.0]), embedding_dim=width)
    assert torch.equal(guidance_embedding(scale, width), theirs)


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "dit"])
def test_a_saved_pipeline_draws_what_the_live_one_draws(
    pipelines: Mapping[str, Any], pipeline_folders: Folders, recipe: Make, name: str
) -> None:
    """Up to the memory layout's rounding, and one digest."""
    wanted = recipe(prompts=("{class}",))
    live = Synthesizer.from_pipeline(pipelines[name], wanted)
    loaded = Synthesizer.from_pretrained(str(pipeline_folders[name]), wanted, device="cpu")
    a, b = (next(iter(s.stream(Request(num_samples=6)))) for s in (live, loaded))
    assert a.images.float().std() > 1
    assert (a.images.int() - b.images.int()).abs().max() <= 1
    assert live.identity(0)["model_sha256"] == loaded.identity(0)["model_sha256"]
    modules = list(loaded.model.modules())
    assert len(modules) == {"sd1": 3, "sd2": 3, "sdxl": 4, "dit": 2}[name]
    assert not any(p.requires_grad or m.training for m in modules for p in m.parameters())


def test_a_consistency_model_loads_from_a_folder(build: Any, tmp_path: Path) -> None:
    build.lcm(tmp_path / "lcm").save_pretrained(tmp_path / "saved")
    prior = load_model(str(tmp_path / "saved"), device="cpu", dtype=torch.float32)
    assert prior.conditions(["cat"], "", 8.0, (16, 16))[0]["timestep_cond"].shape == (1, 10)


def test_an_sdxl_base_says_once_that_no_refiner_is_used(
    pipeline_folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="synthkd"):
        load_model(str(pipeline_folders["sdxl"]), device="cpu", dtype=torch.float32)
        load_model(str(pipeline_folders["sd2"]), device="cpu", dtype=torch.float32)
    assert [r.getMessage().endswith("a refiner is never used") for r in caplog.records] == [True]


def test_an_sdxl_autoencoder_decodes_in_float32(build: Any, pipeline_folders: Folders, tmp_path: Path) -> None:
    """force_upcast in half precision: a folder's is loaded in float32, a live one is copied and not touched."""
    loaded = load_model(str(pipeline_folders["sdxl"]), device="cpu", dtype=torch.bfloat16)
    dtypes = [next(m.parameters()).dtype for m in loaded.modules()]
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]
    pipe = build.sdxl(tmp_path / "half", dtype=torch.bfloat16)
    z = torch.randn(2, 4, 8, 8, dtype=torch.bfloat16)
    prior = wrap_pipeline(pipe)
    assert prior.decoder(z).dtype == loaded.decoder(z).dtype == torch.float32
    assert prior.decoder.module is not pipe.vae
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.bfloat16}
    modest = wrap_pipeline(build.sdxl(tmp_path / "modest", dtype=torch.bfloat16, force_upcast=False))
    assert modest.decoder(z).dtype == torch.bfloat16
    assert decode_dtype(pipe, torch.float16) == decode_dtype(pipe, torch.float32) == torch.float32
    assert decode_dtype(pipe, torch.float64) == torch.float64


def test_standardised_latents_of_sdxl(build: Any, tmp_path: Path) -> None:
    """latents_mean and latents_std of the VAE's config, as diffusers decodes them."""
    pipe = build.sdxl(tmp_path / "x", latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[0.5, 1.5, 2.0, 0.7])
    plain = build.sdxl(tmp_path / "y")
    call: dict[str, Any] = {"num_inference_steps": 1, "height": 16, "width": 16, "guidance_scale": 1.0}
    z = pipe("cat", generator=torch.Generator().manual_seed(0), output_type="latent", **call).images
    image = pipe("cat", generator=torch.Generator().manual_seed(0), output_type="pt", **call).images
    with torch.no_grad():
        assert (wrap_pipeline(pipe).decoder(z).clamp(0, 1) - image).abs().max() <= 1e-5
        assert (wrap_pipeline(plain).decoder(z).clamp(0, 1) - image).abs().max() > 1e-3


@pytest.mark.parametrize(("prompt", "number"), [("cat", 0), (" CAT ", 0), ("fowl", 2), ("Bird, Fowl", 2), ("7", 7)])
def test_names_of_a_class(pipelines: Mapping[str, Any], prompt: str, number: int) -> None:
    cond, _ = wrap_pipeline(pipelines["dit"]).conditions([prompt], "", 1.0, (16, 16))
    assert cond["class_labels"].tolist() == [number]


def test_a_label_of_two_classes(build: Any, pipelines: Mapping[str, Any]) -> None:
    """ImageNet has two cranes: the exact spelling may decide, the lower case does not."""
    prior = wrap_pipeline(pipelines["dit"])
    assert prior.conditions(["Crane"], "", 1.0, (16, 16))[0]["class_labels"].tolist() == [4]
    refused(lambda: prior.conditions(["CRANE"], "", 1.0, (16, 16)), r"'CRANE' is the label of classes \[3, 4\]")
    bare = build.dit()
    bare.register_to_config(id2label=None)
    assert wrap_pipeline(bare).conditions(["fowl"], "", 1.0, (16, 16))[0]["class_labels"].tolist() == [2]


@pytest.mark.parametrize("where", ["live", "folder"])
def test_an_unknown_class(
    pipelines: Mapping[str, Any], pipeline_folders: Folders, recipe: Make, where: str
) -> None:
    """Refused at once, not when the class's group comes, with the nearest labels and what to do."""
    wanted = recipe(classes=("cat", "dog", "cheeta"), prompts=("{class}",))
    message = refused(
        lambda: (
            Synthesizer.from_pipeline(pipelines["dit"], wanted)
            if where == "live"
            else Synthesizer.from_pretrained(str(pipeline_folders["dit"]), wanted, device="cpu")
        ),
        r"prompt 'cheeta' is no class of this model; nearest: 'cheetah', '\w+', '[\w, ]+'; set prompts = \[\"\{class\}\"\]",
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
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, "text_encoder": ["transformers", "T5"]}))
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
        ("sd1", {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, "is flow matching"),
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


def test_a_hub_id_that_is_not_there() -> None:
    """The index alone is asked for first."""
    refused(lambda: load_model("nobody/nothing", device="cpu", dtype=torch.float32), "'nobody/nothing': cannot be loaded")


def swapped(pipe: Any, monkeypatch: pytest.MonkeyPatch, part: str, value: Any) -> Any:
    """The pipeline with another part, until the test ends."""
    monkeypatch.setattr(pipe, part, value)
    return pipe


def test_live_pipelines_that_do_not_fit(
    pipelines: Mapping[str, Any], build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, VQModel

    for scheduler in (FlowMatchEulerDiscreteScheduler(), DPMSolverMultistepScheduler(use_flow_sigmas=True)):
        with monkeypatch.context() as patch:
            refused(lambda p=swapped(pipelines["sd1"], patch, "scheduler", scheduler): wrap_pipeline(p), "flow matching")
    cases = [
        ("sdxl", "text_encoder_2", None, "no second text encoder"),
        ("sdxl", "text_encoder", None, "the refiner alone"),
        ("dit", "vae", None, "no vae"),
        ("sd1", "vae", VQModel(), "vae is a VQModel; expected AutoencoderKL or AutoencoderTiny"),
        ("sd1", "vae", build.autoencoder(latent_channels=8), "vae has 8 latent channels, unet takes 4"),
        ("sd1", "vae", build.tiny_autoencoder(latent_channels=16), "vae has 16 latent channels, unet takes 4"),
    ]
    for family, part, value, message in cases:
        with monkeypatch.context() as patch:
            refused(lambda p=swapped(pipelines[family], patch, part, value): wrap_pipeline(p), message)
    with monkeypatch.context() as patch:
        patch.setattr(pipelines["sd1"].unet, "_hf_hook", object(), raising=False)
        refused(lambda: wrap_pipeline(pipelines["sd1"]), "unet is offloaded; call remove_all_hooks")


def test_a_tiny_autoencoder_as_the_pipelines_own(
    build: Any, tmp_path: Path, recipe: Make, guide: Callable[..., Any]
) -> None:
    """Live and from a folder: decodes as diffusers does, and guidance looks through it."""
    pipe = build.sd(tmp_path / "sd")
    pipe.vae = build.tiny_autoencoder(scaling_factor=0.8).eval()
    call: dict[str, Any] = {"num_inference_steps": 2, "height": 16, "width": 16}
    z, image = (
        pipe("cat", generator=torch.Generator().manual_seed(0), output_type=kind, **call).images
        for kind in ("latent", "pt")
    )
    prior = wrap_pipeline(pipe)
    with torch.no_grad():
        assert (prior.decoder(z).clamp(0, 1) - image).abs().max() <= 1e-5
    pipe.save_pretrained(tmp_path / "saved")
    guided = recipe(steps=6, guidance=GuidanceSpec(scale=0.3))
    synth = Synthesizer.from_pretrained(str(tmp_path / "saved"), guided, guidance=guide(), device="cpu")
    batch = next(iter(synth.stream(Request(num_samples=6))))
    assert sum(batch.curves["ce"][-1]) < sum(batch.curves["ce"][0])
    assert synth.identity(0)["model_sha256"] == Synthesizer.from_pipeline(pipe, recipe()).identity(0)["model_sha256"]


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


def test_a_digest_sees_every_text_encoder(pipelines: Mapping[str, Any]) -> None:
    pipe = pipelines["sdxl"]
    before = weights_digest(wrap_pipeline(pipe).modules())
    bias = pipe.text_encoder_2.text_model.final_layer_norm.bias
    with torch.no_grad():
        bias += 1
        assert weights_digest(wrap_pipeline(pipe).modules()) != before
        bias -= 1
    assert weights_digest(wrap_pipeline(pipe).modules()) == before
