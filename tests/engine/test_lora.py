"""A LoRA is fused into the weights on loading: W + weight * B A, seen by the digest and in the images."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.engine import Recipe, Request, Synthesizer, SynthkdError, models
from synthkd.engine.models import load_model, weights_digest, wrap_pipeline

Make = Callable[..., Recipe]
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = {"sd1": "text_encoder", "sdxl": "text_encoder_2"}


def factors(rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of a layer of the unet, 16 to 16."""
    g = torch.Generator().manual_seed(7)
    return {f"unet.{LAYER}": (torch.randn(rank, 16, generator=g), torch.randn(16, rank, generator=g))}


def write(folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], name: str = "pytorch_lora_weights") -> Path:
    """A file in the layout of save_lora_weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{layer}.lora_{x}.weight": m for layer, pair in pairs.items() for x, m in zip("AB", pair, strict=True)}
    save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    return folder / f"{name}.safetensors"


def refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(SynthkdError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.fixture
def peft() -> None:
    """Skips where the extra `lora` is not installed."""
    pytest.importorskip("peft")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write(tmp_path / "lora", factors())


def load(folder: Path, *loras: str) -> Any:
    return load_model(str(folder), device="cpu", dtype=torch.float32, loras=loras)


@pytest.mark.usefixtures("peft")
@pytest.mark.parametrize(("suffix", "weight"), [("", 1.0), ("@0.5", 0.5), ("@-2", -2.0)])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_weights_are_w_plus_weight_b_a(
    pipeline_folders: Mapping[str, Path], lora: Path, family: str, suffix: str, weight: float
) -> None:
    plain, fused = load(pipeline_folders[family]), load(pipeline_folders[family], f"{lora}{suffix}")
    before, after = ({n: p for m in prior.modules() for n, p in m.state_dict().items()} for prior in (plain, fused))
    assert before.keys() == after.keys()
    a, b = factors()[f"unet.{LAYER}"]
    want = before[f"{LAYER}.weight"] + weight * b @ a
    assert (after[f"{LAYER}.weight"] - want).abs().max() <= 1e-5
    assert [n for n in before if not torch.equal(before[n], after[n])] == [f"{LAYER}.weight"]
    assert not any(p.requires_grad or m.training for m in fused.modules() for p in m.parameters())


@pytest.mark.usefixtures("peft")
def test_two_files_and_a_text_encoder(pipeline_folders: Mapping[str, Path], tmp_path: Path) -> None:
    """One after the other, in any part that a file names; a folder stands for the one file in it."""
    layer = "encoder.layers.0.self_attn.q_proj"
    name = f"text_encoder.text_model.{layer}"
    text = {name: factors()[f"unet.{LAYER}"]}
    first, second = write(tmp_path / "one", factors(), "any"), write(tmp_path / "two", {**text, **factors()})
    plain = load(pipeline_folders["sd1"])
    fused = load(pipeline_folders["sd1"], f"{first.parent}@0.5", str(second.parent))
    for part, key, weight in ((0, LAYER, 1.5), (2, layer, 1.0)):
        before, after = (
            next(v for n, v in list(p.modules())[part].state_dict().items() if n.endswith(f"{key}.weight"))
            for p in (plain, fused)
        )
        a, b = factors()[f"unet.{LAYER}"]
        assert (after - before - weight * b @ a).abs().max() <= 1e-5


@pytest.mark.usefixtures("peft")
def test_digest_and_images_change(pipeline_folders: Mapping[str, Path], lora: Path, recipe: Make) -> None:
    folder = str(pipeline_folders["sd1"])
    entries: list[tuple[str, ...]] = [(), (str(lora),), (f"{lora}@0.5",)]
    synths = [Synthesizer.from_pretrained(folder, recipe(), device="cpu", loras=e) for e in entries]
    assert len({s.identity(0)["model_sha256"] for s in synths}) == 3
    images = [next(iter(s.stream(Request(num_samples=6)))).images for s in synths]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])


@pytest.mark.usefixtures("peft")
def test_a_live_pipeline_with_a_lora(build: Any, lora: Path, recipe: Make, tmp_path: Path) -> None:
    """Fused, or loaded and scaled: drawn as it stands, and the digest follows the scale."""
    pipe = build.sd(tmp_path / "sd")
    plain = draw(pipe, recipe())
    pipe.load_lora_weights(str(lora), adapter_name="a")
    digests = []
    for scale in (1.0, 0.5):
        pipe.set_adapters("a", scale)
        digests.append(weights_digest(wrap_pipeline(pipe).modules()))
        loaded = draw(pipe, recipe())
    assert digests[0] != digests[1]
    assert not torch.equal(plain, loaded)
    pipe.fuse_lora()
    assert (draw(pipe, recipe()).int() - loaded.int()).abs().max() <= 1
    pipe.unload_lora_weights()
    assert (draw(pipe, recipe()).int() - loaded.int()).abs().max() <= 1


def draw(pipe: Any, recipe: Recipe) -> Tensor:
    return next(iter(Synthesizer.from_pipeline(pipe, recipe).stream(Request(num_samples=6)))).images


@pytest.mark.usefixtures("peft")
def test_files_that_are_refused(pipeline_folders: Mapping[str, Path], lora: Path, tmp_path: Path) -> None:
    """Before weights are read where the path alone is wrong."""
    sd1 = pipeline_folders["sd1"]
    pickled, both = tmp_path / "x.bin", tmp_path / "both"
    pickled.write_bytes(b"0")
    write(both, factors(), "one")
    write(both, factors(), "two")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(lora.read_bytes()[:50])
    (tmp_path / "empty").mkdir()
    a, b = factors()[f"unet.{LAYER}"]
    wrong = write(tmp_path / "wrong", {f"unet.{LAYER}": (a[:, :5].contiguous(), b)})
    other = write(tmp_path / "other", {"unet.down_blocks.9.to_q": (a, b)})
    nan = write(tmp_path / "nan", {f"unet.{LAYER}": (a * float("nan"), b)})
    cases = [
        (f"{lora}@much", "weight is 'much'; expected PATH or PATH@NUMBER"),
        (f"{lora}@nan", "weight is 'nan'; expected PATH or PATH@NUMBER"),
        (str(tmp_path / "none.safetensors"), "no such file"),
        (str(tmp_path / "none"), "no such file"),
        (str(tmp_path / "empty"), "0 .safetensors files there"),
        (str(pickled), "a pickle is never read"),
        (str(both), "2 .safetensors files there; expected pytorch_lora_weights.safetensors or just one"),
        (str(torn), "cannot be fused"),
        (str(wrong), "cannot be fused"),
        (str(other), "cannot be fused"),
        (str(nan), "cannot be fused"),
    ]
    for entry, message in cases:
        refused(lambda e=entry: load(sd1, e), f"lora '.*{Path(entry).name.partition('@')[0]}.*': {message}")
    refused(lambda: load(pipeline_folders["dit"], str(lora)), "a DiTPipeline takes no LoRA")


def test_without_peft(pipeline_folders: Mapping[str, Path], lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    refused(lambda: load(pipeline_folders["sd1"], str(lora)), r"peft is not installed: pip install 'synthkd\[lora\]'")
    load(pipeline_folders["sd1"])
