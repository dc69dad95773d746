"""Dense networks through cards, the training loop, methods, scores and files."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from synthkd.dfkd.cached import MemorySource
from synthkd.dfkd.data import LabelledImages
from synthkd.dfkd.dense import DenseImages
from synthkd.dfkd.dense_task import LETTERS, digit_scenes, letter_scenes, load_dense_set
from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.evaluate import evaluate_dense, named
from synthkd.dfkd.method_run import MethodRun
from synthkd.dfkd.nets import build_net
from synthkd.dfkd.pools import open_images
from synthkd.dfkd.presets import Preset
from synthkd.dfkd.presets_dense import segments
from synthkd.dfkd.ship import export_student, load_shipped
from synthkd.dfkd.student import Hooks, Student, distill, fresh_student, save_student
from synthkd.dfkd.teachers import Teacher, load_teacher, teacher_digest
from synthkd.dfkd.train_options import TrainOptions
from synthkd.engine.errors import SynthkdError

Killed = Callable[[Callable[[], object]], bool]
Call = Callable[..., Any]
NAMES = ("ground", "a", "b")
SMALL = {"widths": [4, 4, 6], "blocks": [1, 1, 1], "pyramid": 6, "rates": [1], "low_level": 3}
SPEC = DistillSpec(
    arch="deeplab", arch_args=SMALL, steps=40, batch_size=8, warmup_steps=5, ema=0.9, flip=True, crop=0.7
)
CARD = """task = "segmentation"
arch = "deeplab"
weights = "w.safetensors"
input_size = [19, 25]
mean = [0.4, 0.4, 0.4]
std = [0.3, 0.3, 0.3]
classes = ["ground", "a", "b"]
[arch_args]
widths = [4, 4, 6]
blocks = [1, 1, 1]
pyramid = 6
rates = [1]
low_level = 3
"""


def guide(size: tuple[int, int] = (19, 25)) -> Teacher:
    """A random dense network, of sides that nothing divides."""
    torch.manual_seed(1)
    net = build_net("deeplab", 3, SMALL)
    for _ in range(3):
        net.train()(torch.randn(8, 3, *size))
    with torch.no_grad():
        net.get_parameter("head.weight").mul_(20)
    return Teacher(net, mean=[0.4] * 3, std=[0.3] * 3, input_size=size, classes=NAMES, task="segmentation")


def pictures(count: int = 40) -> LabelledImages:
    """Smooth random images, 19x25."""
    coarse = torch.rand(count, 3, 4, 5, generator=torch.Generator().manual_seed(3))
    pixels = torch.nn.functional.interpolate(coarse, size=(19, 25), mode="bicubic").clamp(0, 1)
    return LabelledImages(pixels.mul(255).to(torch.uint8), torch.zeros(count, dtype=torch.long), NAMES)


def taught(spec: DistillSpec = SPEC, **options: Any) -> Student:
    """A student of the random network."""
    return distill(pictures(), guide(), spec, **options)


@pytest.fixture
def card(tmp_path: Path) -> Path:
    """A card beside its weights."""
    save_file(guide().net.state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "card.toml").write_text(CARD)
    return tmp_path / "card.toml"


def test_a_card_round_trip(card: Path, tmp_path: Path) -> None:
    """Loaded, distilled, saved, loaded: the same outputs; the task is part of who a teacher is."""
    teacher = load_teacher(str(card))
    assert teacher.dense
    x = torch.rand(2, 3, 33, 21)
    assert torch.equal(teacher(x), guide()(x))
    assert teacher(x).shape == (2, 3, 10, 13)
    student = taught(replace(SPEC, steps=2))
    again = load_teacher(str(save_student(student, SPEC, tmp_path / "student", {})))
    assert again.dense
    assert torch.equal(again(x), student.net(x))
    other = guide()
    other.task = "classification"
    assert teacher_digest(other) != teacher_digest(teacher)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"segmentation"', '"segmenting"', "task is 'segmenting'; expected 'classification' or 'segmentation'"),
        ('task = "segmentation"', "", r"returns \(1, 3, 10, 13\); expected logits \(1, 3\), one per class"),
        ('["ground", "a", "b"]', '["ground", "a"]', "3 outputs, the card names 2 classes"),
        ("blocks = [1, 1, 1]", "blocks = [1, 1]", "equally many, three or more"),
    ],
)
def test_cards_that_do_not_fit(card: Path, old: str, new: str, message: str) -> None:
    """One line each."""
    card.write_text(CARD.replace(old, new))
    with pytest.raises(SynthkdError, match=message) as caught:
        load_teacher(str(card))
    assert "\n" not in str(caught.value)


def test_settings_that_do_not_fit() -> None:
    """A classifier as the student, losses of classifiers, the hard loss without label maps or with blends."""
    for change, message in (
        ({"arch": "resnet", "arch_args": {}}, r"returns \(1, 3\); expected logits \(1, 3, h, w\)"),
        ({"cam": 1.0}, "cam and grad_cam are of classifiers"),
        ({"hard": 0.5}, "these images have no label maps; set it to 0"),
        ({"hard": 0.5, "mix": 0.5}, "label maps cannot be blended"),
    ):
        with pytest.raises(SynthkdError, match=message):
            taught(replace(SPEC, **change))
    with pytest.raises(SynthkdError, match="diffusion prior is guided by classifiers"):
        segments().job.check()
    classifier = Teacher(build_net("resnet", 3, {}), mean=[0.4] * 3, std=[0.3] * 3, input_size=(9, 7), classes=NAMES)
    with pytest.raises(SynthkdError, match=r"expected logits \(1, 3\), one per class of the teacher"):
        fresh_student(classifier, SPEC)


def test_a_student_comes_to_agree_pixel_by_pixel(tmp_path: Path) -> None:
    """More pixels than the commonest class has; the agreement is that of the images' pixels, not of the logits'."""
    found = taught(replace(SPEC, steps=150))
    held = pictures().images[36:]
    wanted = named(guide(), held)
    assert wanted.shape == (4, 19, 25)
    share = torch.bincount(wanted.flatten().long()).max() / wanted.numel()
    assert found.agreement > 100 * float(share) + 5
    assert found.agreement == pytest.approx(100 * float((named(found.net, held) == wanted).double().mean()), abs=1e-3)
    assert found.agreement > taught(replace(SPEC, steps=1)).agreement


def test_label_maps_are_learned_from() -> None:
    """The hard loss, where a set has them, cropped and mirrored in step; features of dense networks too."""
    images = pictures()
    masks = (images.images[:, 0] > 128).long()
    data = DenseImages(images.images, masks, NAMES)
    start = evaluate_dense(fresh_student(guide(), SPEC), data).accuracy
    found = distill(data, guide(), replace(SPEC, kl=0.0, hard=1.0, features=0.01, steps=120, select="last"))
    assert evaluate_dense(found.net, data).accuracy > max(75, start)


def test_killed_anywhere_the_student_is_the_same(tmp_path: Path, killed: Killed) -> None:
    """SIGKILL after step 26, parts of batches and running mean on: bit-equal to the undisturbed run."""
    spec = replace(SPEC, accumulate=2)
    how = TrainOptions(checkpoint_seconds=0.0)
    whole = taught(spec, options=how).net.net.state_dict()

    def kill(step: int) -> None:
        if step == 26:
            os.kill(os.getpid(), signal.SIGKILL)

    assert killed(lambda: taught(spec, options=how, folder=tmp_path, hooks=Hooks(on_step=kill)))
    begun: list[int] = []
    again = taught(spec, options=how, folder=tmp_path, hooks=Hooks(on_step=begun.append)).net.net.state_dict()
    assert begun[0] == 25
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def tiny(card: Path, data: Path) -> Preset:
    """A preset of the card that is scored on an .npz."""
    preset = segments()
    job = replace(preset.job, teacher=str(card), recipe=replace(preset.job.recipe, classes=NAMES, classes_per_group=3))
    return replace(preset, job=job, distill=replace(SPEC, steps=6), test_set=str(data), num_images=12)


@pytest.mark.parametrize("method", ["pool", "mosaickd"])
def test_a_method_is_scored_by_its_label_maps(card: Path, tmp_path: Path, method: str, call: Call) -> None:
    """Through MethodRun and `synthkd evaluate`: mIoU of both, as `evaluate_dense` has it."""
    images, teacher = pictures(24), guide()
    masks = named(teacher, images.images).long()
    masks[:, :4] = 255  # ignored
    data = DenseImages(images.images, masks, NAMES)
    np.savez(tmp_path / "test.npz", x=images.images.permute(0, 2, 3, 1).numpy(), y=masks.numpy())
    np.savez(tmp_path / "pool.npz", x=images.images.flip(3).permute(0, 2, 3, 1).numpy())
    options = {"widths": [4, 4, 4], "patch_width": 4} if method == "mosaickd" else {}
    result = MethodRun(
        preset=tiny(card, tmp_path / "test.npz"), method=method, out=tmp_path / "run", pool=str(tmp_path / "pool.npz"),
        options=options,
    ).execute()  # fmt: skip
    assert result["teacher_miou"] == result["teacher_accuracy"] == 100
    student = load_teacher(str(tmp_path / "run" / "student.toml"))
    assert result["student_miou"] == pytest.approx(evaluate_dense(student, data).mean_iou, abs=0.01)
    assert 0 < result["student_miou"] < 100
    found = call("evaluate", tmp_path / "run" / "student.toml", "--data", tmp_path / "test.npz")
    assert found.returncode == 0
    assert f"mIoU {result['student_miou']:.2f} %" in found.stdout


def test_it_ships(tmp_path: Path) -> None:
    """One file, whose label maps are eager's; a shipped network is scored like any."""
    teacher = guide()
    shipped = load_shipped(export_student(teacher, tmp_path / "s.onnx", "onnx"))
    assert shipped.dense
    images = pictures(3).images
    torch.testing.assert_close(shipped(images), teacher(images.float() / 255), rtol=1e-4, atol=1e-4)


def test_transformers_deeplab_is_looked_through(tmp_path: Path) -> None:
    """MobileNetV2 with its DeepLabV3+ head: logits of its own size, taps of its BatchNorm layers, a gradient."""
    import transformers

    torch.manual_seed(0)
    config = transformers.MobileNetV2Config(
        num_labels=3, depth_multiplier=0.1, min_depth=4, depth_divisible_by=4, output_stride=8
    )
    net = transformers.MobileNetV2ForSemanticSegmentation(config).train()
    net.mobilenet_v2.conv_stem.first_conv.convolution.weight.data.mul_(30)  # its own start is next to nothing
    for _ in range(20):
        net(torch.randn(8, 3, 41, 57))
    net.eval()
    net.save_pretrained(tmp_path / "net")
    head, _, _ = CARD.partition("[arch_args]")
    text = head.replace('"deeplab"', '"transformers:net"').replace('weights = "w.safetensors"\n', "")
    (tmp_path / "card.toml").write_text(text.replace("[19, 25]", "[41, 57]"))
    teacher = load_teacher(str(tmp_path / "card.toml"))
    x = torch.rand(2, 3, 41, 57, requires_grad=True)
    seen = teacher.look(x)
    torch.testing.assert_close(seen.logits, net((x - 0.4) / 0.3).logits)
    assert seen.logits.dim() == 4
    assert seen.logits.shape[1] == 3
    assert len(seen.taps) > 10
    assert seen.features is None
    seen.logits.square().mean().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    spec = replace(SPEC, steps=3, select="last")
    assert distill(pictures(16), teacher, spec).net.dense
    (tmp_path / "card.toml").write_text(text.replace('"segmentation"', '"classification"'))
    with pytest.raises(SynthkdError, match=r"its weights lack|returns"):
        load_teacher(str(tmp_path / "card.toml"))


def test_the_task_is_what_it_says() -> None:
    """Every label is there, glyphs are lighter than their ground, the pool has no digit, and all is a function."""
    test = digit_scenes("test")
    counts = torch.bincount(test.masks.flatten(), minlength=11)
    assert (counts > 0).all()
    assert counts[0] > counts.sum() / 2
    light = test.images.float().mean(1)
    assert light[test.masks > 0].mean() > light[test.masks == 0].mean() + 80
    pool = open_images("segments:pool")
    assert isinstance(pool, MemorySource)
    assert torch.equal(pool.data.images, letter_scenes())
    assert not set(LETTERS) & set("0123456789OoIlSsZBGgq")
    alone: Tensor = digit_scenes.__wrapped__("test").images
    assert torch.equal(alone, test.images)


def test_the_embedded_teacher() -> None:
    """It reads the test scenes, and as the README says."""
    score = evaluate_dense(load_teacher("embedded:segments"), digit_scenes("test"))
    assert score.mean_iou > 80
    with pytest.raises(SynthkdError, match="has 11 classes, the network 3"):
        load_dense_set("segments:test", NAMES)
    with pytest.raises(SynthkdError, match="'segments:tst': did you mean 'test'"):
        load_dense_set("segments:tst", NAMES)
