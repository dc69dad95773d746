"""Classifiers saved by transformers, as teachers of a guided run: one with BatchNorm, one without."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from synthkd.dfkd.methods import TeacherGuidance
from synthkd.dfkd.taps import measure_moments, write_moments
from synthkd.dfkd.teachers import load_teacher
from synthkd.engine import GuidanceSpec, Request, Synthesizer, write_shards
from synthkd.engine.errors import SynthkdError
from synthkd.engine.reading import read_set

CARD = """arch = "transformers:net"
input_size = [16, 16]
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
classes = ["cat", "dog", "bird"]
"""


@pytest.fixture(params=["resnet", "vit"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Path]:
    """Kind, network and card of a tiny model saved beside its card."""
    import transformers

    torch.manual_seed(0)
    net: Any
    if request.param == "resnet":
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3
        )
        net = transformers.ResNetForImageClassification(config).train()
        for _ in range(5):
            net(torch.randn(8, 3, 16, 16))
    else:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        net = transformers.ViTForImageClassification(
            transformers.ViTConfig(image_size=16, patch_size=4, num_labels=3, **sizes)
        )
    net.eval().save_pretrained(tmp_path / "net")
    (tmp_path / "card.toml").write_text(CARD)
    return request.param, net, tmp_path / "card.toml"


def test_logits_are_the_networks(saved: tuple[str, Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder relative to the card, wherever the command is called; a tensor comes out, in float32."""
    _, net, card = saved
    monkeypatch.chdir("/")
    teacher, x = load_teacher(str(card)), torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(teacher(x), net((x - 0.5) / 0.5).logits)
    assert teacher(x).dtype == torch.float32
    torch.testing.assert_close(teacher(x), teacher.net.get_submodule("classifier")(teacher.features(x)))


def test_it_guides_a_run(
    saved: tuple[str, Any, Path], pipeline: Any, recipe: Callable[..., Any], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """End to end on the tiny pipeline: finite, and every active term is logged beside each image."""
    kind, _, card = saved
    guidance = TeacherGuidance(load_teacher(str(card)))
    assert ("no BatchNorm and no stored moments" in caplog.text) == (kind == "vit")
    synth = Synthesizer.from_pipeline(pipeline, recipe(guidance=GuidanceSpec(scale=0.2)), guidance=guidance)
    write_shards(synth.stream(Request(num_samples=6)), tmp_path / "set")
    samples = list(read_set(tmp_path / "set"))
    want = {"bn", "ce"} if kind == "resnet" else {"ce", "entropy", "head"}
    assert len(samples) == 6
    for sample in samples:
        assert set(sample.meta["losses"]) == want
        assert all(torch.tensor(v).isfinite() for v in sample.meta["losses"].values())


def test_stored_moments_guide_too(
    saved: tuple[str, Any, Path], pipeline: Any, recipe: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """With moments the network without BatchNorm has a statistics term, and no warning."""
    kind, _, card = saved
    if kind == "resnet":
        pytest.skip("it has BatchNorm")
    plain = load_teacher(str(card))
    stats = measure_moments(plain.net, [plain.preprocess(torch.rand(32, 3, 16, 16))])
    write_moments(card.with_name("m.safetensors"), stats, 32)
    card.write_text('moments = "m.safetensors"\n' + CARD)
    guidance = TeacherGuidance(load_teacher(str(card)))
    synth = Synthesizer.from_pipeline(pipeline, recipe(guidance=GuidanceSpec(scale=0.2)), guidance=guidance)
    curves = synth.run(synth.stream(Request(num_samples=6)).plan.unit(0), 0).curves
    assert set(curves) == {"moments", "ce"}
    assert curves["moments"][-1] < curves["moments"][0]
    assert "moments_sha256" in guidance.describe()
    assert not caplog.records


def test_the_cards_own_weights(saved: tuple[str, Any, Path]) -> None:
    """The folder then needs its config.json alone; names are those of the folder's file."""
    _, net, card = saved
    (card.parent / "net" / "model.safetensors").rename(card.with_name("w.safetensors"))
    card.write_text('weights = "w.safetensors"\n' + CARD)
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(load_teacher(str(card))(x), net((x - 0.5) / 0.5).logits)


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
@pytest.mark.usefixtures("no_hub")
def test_a_folder_cannot_name_a_kernel_to_fetch(saved: tuple[str, Any, Path], field: str) -> None:
    """transformers would download it and run its code; the library's own attention is used instead."""
    _, net, card = saved
    _edit(**{field: "someone/kernel"})(card.parent)
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(load_teacher(str(card))(x), net((x - 0.5) / 0.5).logits)


def _lose_a_tensor(folder: Path) -> None:
    path = folder / "net" / "model.safetensors"
    state = load_file(path)
    del state[next(n for n in state if n.startswith("classifier") and n.endswith("weight"))]
    save_file(state, path, {"format": "pt"})


def _only_a_pickle(folder: Path) -> None:
    torch.save({}, folder / "net" / "pytorch_model.bin")
    (folder / "net" / "model.safetensors").unlink()


def _edit(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "net" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def _card(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "card.toml").write_text(CARD.replace(old, new)) and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_card("transformers:net", "transformers:nat"), "arch 'transformers:nat': no config.json in '.*nat'"),
        (_card("transformers:net", "transformers:./a/b"), "no config.json in"),
        (_card("transformers:net", "transformers:someone/model"), "'transformers:someone/model': cannot be loaded"),
        (_card('"bird"]', '"bird", "fish"]'), r"config.json has 3 labels \(num_labels\), the card names 4 classes"),
        (_card("[16, 16]", "[2, 2]"), "does not take 3x2x2 images|returns"),
        (_lose_a_tensor, "its weights lack 1 tensors, 'classifier"),
        (_only_a_pickle, "cannot be loaded"),
        (lambda folder: (folder / "net" / "model.safetensors").write_bytes(b"xx") and None, "cannot be loaded"),
        (lambda folder: (folder / "net" / "config.json").write_text("{") and None, "cannot be loaded"),
        (
            _edit(model_type="timm_wrapper", architecture="resnet18", model_args={"checkpoint_path": "x.pth"}),
            "arch_args may not hold 'checkpoint_path'|cannot be loaded",  # the second where timm is not installed
        ),
        (_edit(model_type="nothing", architectures=["Nothing"]), "cannot be loaded"),
        (
            _edit(model_type="own", auto_map={"AutoConfig": "code.Own", "AutoModelForImageClassification": "code.Net"}),
            "cannot be loaded",
        ),
        (
            lambda folder: (folder / "card.toml").write_text(CARD + "[arch_args]\ntrust_remote_code = true\n") and None,
            "arch_args do not fit",
        ),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("no_hub")
def test_what_does_not_fit(saved: tuple[str, Any, Path], damage: Callable[[Path], None], message: str) -> None:
    """One line, no code run, no random weights."""
    kind, _, card = saved
    if "2x2" in message and kind == "resnet":
        pytest.skip("takes any size")
    (card.parent / "net" / "code.py").write_text(f"open({str(card.parent / 'pwned')!r}, 'w')\n")
    damage(card.parent)
    with pytest.raises(SynthkdError, match=message) as caught:
        load_teacher(str(card))
    assert "\n" not in str(caught.value)
    assert not (card.parent / "pwned").exists()


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name is looked up on a network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
