"""PACS presets: a run across the gap on stand-ins, what is said of missing files, and the pack where it is at hand."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthkd.bench.cifar_pack import check_sums
from synthkd.bench.fit_teacher import TeacherFit, TeacherSpec, load_training_set
from synthkd.bench.pacs_pack import read_domain
from synthkd.dfkd.fit_prior import PriorFit
from synthkd.dfkd.nets import build_net, count_parameters
from synthkd.dfkd.presets import load_preset
from synthkd.dfkd.prior_data import load_captioned
from synthkd.dfkd.prior_spec import PriorSpec
from synthkd.engine.errors import SynthkdError
from synthkd.engine.reading import read_set

ROOT = Path(__file__).resolve().parents[2]
PACK = Path(os.environ.get("SYNTHKD_EVALUATION", ROOT.parent / "shared" / "evaluation"))
CLASSES = ("dog", "house", "person")
COUNTS = {"photo": (1670, 333), "art": (2048, 410), "cartoon": (2344, 469), "sketch": (3929, 786)}
Call = Callable[..., Any]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$SYNTHKD_DATA/pacs of noise, 16x16: pool, sketches and a teacher that has seen them; no prior."""
    folder, draw = tmp_path / "data" / "pacs", np.random.default_rng(0)
    folder.mkdir(parents=True)
    captions = [f"{domain} {name}" for domain in ("photo", "art painting", "cartoon") for name in CLASSES]
    where = [f"pacs/{domain}" for domain in ("photo", "art_painting", "cartoon")]
    for name, more in (
        ("pool", {"captions": captions, "trained_on": where}),
        ("train", {"classes": CLASSES, "trained_on": ["pacs/sketch/train"]}),
        ("test", {"classes": CLASSES, "trained_on": ["pacs/sketch/test"]}),
    ):
        count = len(captions) if name == "pool" else 3
        x = draw.integers(0, 256, (36, 16, 16, 3)).astype(np.uint8)
        np.savez(folder / f"{name}.npz", x=x, y=np.arange(36) % count, **more)
    spec = TeacherSpec(arch_args={"widths": [8, 12], "blocks": [1, 1]}, steps=2, batch_size=12)
    TeacherFit(
        training=load_training_set(folder / "train.npz"), spec=spec, out=folder / "teacher", name="resnet"
    ).execute()
    monkeypatch.setenv("SYNTHKD_DATA", str(folder.parent))
    return folder


def tiny_prior(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prior of the pool that has learned next to nothing."""
    monkeypatch.setattr("synthkd.dfkd.fit_prior.learn_words", lambda *_: 0.0)
    monkeypatch.setattr(PriorFit, "_draw_sheet", lambda fit: (fit.out / "samples.png").write_bytes(b""))
    spec = PriorSpec(
        vae_widths=(16, 16), unet_widths=(16, 16), text_width=16, vae_steps=2, vae_batch_size=4, steps=2, batch_size=4,
        held_out=4,
    )  # fmt: skip
    PriorFit(data=load_captioned(folder / "pool.npz"), spec=spec, out=folder / "prior-small").execute()


def test_a_run_across_the_gap(files: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sets at the teacher's size, of all three domains, and two students scored on the sketches."""
    tiny_prior(files, monkeypatch)
    monkeypatch.setattr("synthkd.dfkd.students.cores", lambda: 1)  # in this process
    words = ("run", "pacs-sketch-small", "--controls", "none", "--num-images", 24, "--steps", 3, "--workers", 1)
    done = call(*words, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["preset"], result["teacher"], result["num_images"]) == ("pacs-sketch-small", "resnet", 24)
    assert result["test_set"] == str(files / "test.npz")
    assert {"teacher_accuracy", "student_accuracy", "unguided_student_accuracy"} < set(result)
    manifest = json.loads((tmp_path / "out" / "shards" / "manifest.json").read_text())
    assert manifest["recipe"]["height"] == 16
    asked = {row["prompt"].removesuffix(f" {row['class']}") for row in told(tmp_path / "out" / "shards")}
    assert asked == {"photo", "art painting", "cartoon"}


def told(folder: Path) -> list[dict[str, Any]]:
    """What a set says of each image."""
    return [sample.meta for sample in read_set(folder)]


@pytest.mark.parametrize("name", ["pacs-sketch", "pacs-sketch-small"])
def test_the_presets(files: Path, name: str) -> None:
    """Half the teacher's widths, its classes in a group, controls; the prior is missed where it is drawn with."""
    preset = load_preset(name)
    assert preset.job.recipe.classes == CLASSES
    assert preset.job.recipe.classes_per_group == len(CLASSES)
    assert preset.distill.arch_args["widths"] == [4, 6]
    sizes = [count_parameters(build_net("resnet", 3, {"widths": w, "blocks": [1, 1]})) for w in ([8, 12], [4, 6])]
    assert sizes[1] < sizes[0]
    assert preset.controls == ("pool", "fastdfkd")
    assert preset.pool == str(files / "pool.npz")
    assert preset.teachers == {"resnet": preset.job.teacher}
    size = "small" if name.endswith("small") else "base"
    with pytest.raises(SynthkdError, match=rf"prior-{size}/pipeline not found; make it with `make prior-pacs SIZE"):
        preset.job.check()


@pytest.mark.parametrize(
    ("gone", "command"), [("pool.npz", "pacs_pack"), ("test.npz", "pacs_pack"), ("teacher/resnet.toml", "fit_teacher")]
)
def test_a_missing_file_is_one_line(files: Path, gone: str, command: str, tmp_path: Path, call: Call) -> None:
    """The file, and the command that makes it."""
    (files / gone).unlink()
    done = call("run", "pacs-sketch-small", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{gone} not found; make it with `python -m synthkd.bench.{command} " in done.stderr


@pytest.mark.skipif(not (PACK / "pacs_sketch.npz").is_file(), reason="needs SYNTHKD_EVALUATION")
def test_the_pack_is_read() -> None:
    """All four domains: sums, counts, classes; every fiftieth image, of which sketches are black lines on white."""
    names = {domain: f"pacs_{domain}.npz" for domain in COUNTS}
    check_sums(PACK, list(names.values()))
    read = {domain: read_domain(PACK, name) for domain, name in names.items()}
    assert {domain: (len(d), int(d.test.sum())) for domain, d in read.items()} == COUNTS
    assert {d.classes for d in read.values()} == {("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")}
    for domain, found in read.items():
        assert np.bincount(found.labels, minlength=7).min() > 0
        x = found.images(32, np.arange(0, len(found), 50))
        colourless = (x == x[..., :1]).all(axis=(1, 2, 3))
        white = np.median(x, axis=(1, 2, 3)) > 250
        assert (colourless & white).mean() > 0.95 if domain == "sketch" else (colourless & white).mean() < 0.3
