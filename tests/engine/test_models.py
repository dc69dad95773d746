"""One denoiser evaluation is what diffusers' own pipeline feeds its scheduler, for every family; so are images."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.engine import GuidanceSpec, Recipe, Request, Synthesizer, models
from synthkd.engine.embeddings import guidance_embedding
from synthkd.engine.models import load_model, weights_digest, wrap_pipeline
from synthkd.engine.precision import decode_dtype

PROMPTS = ["cat", "dog", "cat"]
Folders = Mapping[str, Path]
Make = Callable[..., Recipe]


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
def test_an_embedded_guidance_scale(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
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


@pytest.mark.parametrize("name", ["sd1", "sdxl", "dit"])
def test_a_model_without_a_local_index(pipeline_folders: Folders, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The way of a hub id: diffusers finds the index, the class and its checks are the same."""
    where = str(pipeline_folders[name])
    local = load_model(where, device="cpu", dtype=torch.float32)
    monkeypatch.setattr(models, "_local_index", lambda where: None)
    remote = load_model(where, device="cpu", dtype=torch.float32)
    assert type(remote) is type(local)
    assert weights_digest(remote.modules()) == weights_digest(local.modules())


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


def test_a_digest_sees_every_text_encoder(pipelines: Mapping[str, Any]) -> None:
    pipe = pipelines["sdxl"]
    before = weights_digest(wrap_pipeline(pipe).modules())
    bias = pipe.text_encoder_2.text_model.final_layer_norm.bias
    with torch.no_grad():
        bias += 1
        assert weights_digest(wrap_pipeline(pipe).modules()) != before
        bias -= 1
    assert weights_digest(wrap_pipeline(pipe).modules()) == before
