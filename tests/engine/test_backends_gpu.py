"""Backends on a GPU: every one that is installed, in half precision, against eager."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch

from synthkd.dfkd.methods.diffdfkd import TeacherGuidance
from synthkd.engine import Execution, GuidanceSpec, Plan, Recipe, Request, Synthesizer
from synthkd.engine.config import DTYPES
from synthkd.export import Options, available, fp8
from synthkd.export.onnx import pick_provider

pytestmark = pytest.mark.gpu
ROLES = {"networks": ("text_encoder", "unet", "vae", "teacher"), "gradient": ("gradient",)}
# Largest share of the reference's size that a backend may be off by, as `export.making` allows.
ALLOWED = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 1e-1}


@pytest.fixture(autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path_factory.getbasetemp() / "artifacts-home"
    monkeypatch.setenv("SYNTHKD_ARTIFACTS", str(home / "store"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))


def refused(backend: str) -> str:
    """Why a backend cannot be tested here."""
    if why_not := available()[backend]:
        return why_not
    if backend == "onnx":
        try:
            pick_provider(Options(), torch.device("cuda"))
        except Exception as error:
            return str(error)
    return ""


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d in ALLOWED])
@pytest.mark.parametrize("roles", ROLES)
@pytest.mark.parametrize("backend", ["compile", "aoti", "onnx", "tensorrt"])
def test_roles_on_a_gpu(
    backend: str, roles: str, dtype: str, pipelines: Mapping[str, Any], recipe: Callable[..., Recipe],
    guide: Callable[..., TeacherGuidance],
) -> None:  # fmt: skip
    """The manifest's own comparison is within its bounds, and a guided group at a small scale is eager's."""
    if why := refused(backend):
        pytest.skip(why)
    if (backend, dtype) == ("onnx", "bfloat16"):
        pytest.skip("onnxruntime's CUDA provider has no bfloat16 convolution")
    pipe = deepcopy(pipelines["sd1"]).to("cuda", getattr(torch, dtype))
    wanted = recipe(guidance=GuidanceSpec(scale=0.05), dtype=dtype)
    entries = tuple(f"{role}={backend}" for role in ROLES[roles])
    synth = Synthesizer.from_pipeline(
        pipe, wanted, guidance=guide(), compile="off", execution=Execution(backends=entries)
    )
    unit = Plan(wanted, Request(num_samples=6)).unit(0)
    eager = Synthesizer.from_pipeline(pipe, wanted, guidance=guide(), compile="off")
    found = fp8.quality(eager.run(unit, 0).images, synth.run(unit, 0).images)
    assert found["psnr"] > (40 if dtype == "float32" else 25), found
    for name, compiled in synth.routes.compiled.items():
        if compiled.manifest is None:  # compile leaves nothing behind
            continue
        for row in compiled.manifest.verified.values():
            assert row["relative"] <= ALLOWED[dtype], (name, row)


def test_a_recorded_run(pipelines: Mapping[str, Any], recipe: Callable[..., Recipe]) -> None:
    """A CUDA graph of TensorRT or onnxruntime, for a fixed batch: the same images as without one."""
    backend = next((b for b in ("tensorrt", "onnx") if not refused(b)), "")
    if not backend:
        pytest.skip("; ".join(refused(b) for b in ("tensorrt", "onnx")))
    pipe, wanted = deepcopy(pipelines["sd1"]).to("cuda"), recipe()
    found = []
    for record in (False, True):
        execution = Execution(
            backends=(f"unet={backend}", f"vae={backend}"), fixed_batch=True, options=Options(cuda_graph=record)
        )
        synth = Synthesizer.from_pipeline(pipe, wanted, compile="off", execution=execution)
        unit = Plan(wanted, Request(num_samples=6)).unit(0)
        found.append([synth.run(unit, 0).images for _ in range(2)][-1])
    assert int((found[0].int() - found[1].int()).abs().max()) <= 1


@pytest.mark.parametrize("attention", ["cudnn", "flash", "xformers"])
def test_attention_on_a_gpu(attention: str, pipelines: Mapping[str, Any], recipe: Callable[..., Recipe]) -> None:
    """float16 images of torch's own choice within 8 of 255."""
    if attention == "xformers":
        pytest.importorskip("xformers")
    pipe, wanted = deepcopy(pipelines["sd1"]).to("cuda", torch.float16), recipe(dtype="float16")
    unit = Plan(wanted, Request(num_samples=6)).unit(0)
    images = []
    for choice in ("sdpa", attention):
        synth = Synthesizer.from_pipeline(pipe, wanted, compile="off", execution=Execution(attention=choice))
        images.append(synth.run(unit, 0).images)
    assert int((images[0].int() - images[1].int()).abs().max()) <= 8


def test_fp8_on_a_gpu(
    pipelines: Mapping[str, Any], recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real fp8 products against their emulation: the same rounding, another order of sums."""
    if torch.cuda.get_device_capability() < fp8.CAPABILITY:
        pytest.skip("no fp8 on this GPU")
    real = fp8.quantized
    monkeypatch.setattr(fp8, "quantized", lambda unet, **how: real(unet, smallest=16, **how))
    pipe, wanted = deepcopy(pipelines["sd1"]).to("cuda", torch.bfloat16), recipe(dtype="bfloat16")
    unit = Plan(wanted, Request(num_samples=6)).unit(0)
    images = []
    for choice in ("fp8", "fp8-emulated"):
        synth = Synthesizer.from_pipeline(pipe, wanted, compile="off", execution=Execution(quantize=choice))
        images.append(synth.run(unit, 0).images)
    assert fp8.quality(images[1], images[0])["psnr"] > 30
