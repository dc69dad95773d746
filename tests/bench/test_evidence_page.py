"""The page of evidence as its rows say; what it keeps of trainings; contact sheets are in test_evidence.py."""

import hashlib
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synthkd.bench import evidence_page, evidence_pictures, record
from synthkd.bench.fit_teacher import TeacherSpec
from synthkd.dfkd.cards import read_card
from synthkd.dfkd.nets import build_net, count_parameters
from synthkd.dfkd.presets import load_preset
from synthkd.dfkd.presets_cifar import WORDS
from synthkd.dfkd.student import card_toml
from synthkd.engine import SynthkdError


def _row(control: str, accuracy: float, **changes: Any) -> dict[str, Any]:
    """As the small preset's rows were before they had parameters and image size."""
    return {
        "preset": "cifar10-small", "size": "small", "teacher": "resnet56", "student": "resnet20", "budget": 2000,
        "steps": 1000, "batch_size": 128, "control": control, "seed": 0, "teacher_accuracy": 93.39, "images": 2000,
        "student_accuracy": accuracy, "hours": 0.5, "gpu_hours": 0.0, "images_per_second": 6.0, "run": "a",
        "device": "cpu: AVX2",
    } | changes  # fmt: skip


def _recorded(folder: Path, rows: list[dict[str, Any]]) -> evidence_page.Found:
    path = folder / "evidence.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return evidence_page.recorded(path)


LARGE = {
    "preset": "cifar10", "size": "base", "device": "cuda: H100", "gpu_hours": 0.5, "run": "b", "budget": 50_000,
    "steps": 40_000, "batch_size": 256,
}  # fmt: skip


def test_the_table(tmp_path: Path) -> None:
    """Arms with spread over seeds, of the newest run of a setting; what has no row was not run."""
    told = {"parameters": {"teacher": 853_018, "student": 269_722}, "image_size": [32, 32], "teacher_sha256": None}
    rows = [
        _row("guided", 99.0, run="old", seed=7), _row("guided", 1.0), _row("guided", 50.0),
        _row("guided", 60.0, seed=1, **told),
        _row("pool", 20.0, images=0, images_per_second=None),
        _row("guided", 90.0, **LARGE), _row("unguided", 85.5, **LARGE), _row("pool", 90.0, **LARGE),
    ]  # fmt: skip
    found = _recorded(tmp_path, rows)
    lines = evidence_page.results_table(found).splitlines()
    small = next(line for line in lines if "cifar10-small" in line)
    assert small == (
        "| cifar10-small | small | resnet56 0.85 M → resnet20 0.27 M | 93.39 | guided "
        "| **55.00** (50.00 to 60.00, 2 seeds) | 2,000 | 1,000 x 128 | 0.50 | 0 | 6.0 |"
    )
    assert next(line for line in lines if "small |" in line and "| pool |" in line).endswith(
        "| 0 | 1,000 x 128 | 0.50 | 0 | – |"
    )
    assert sum("**not run**" in line for line in lines) == 5  # 2 arms of the small preset, 1 of the large, all of PACS
    assert "| pacs-sketch | base | resnet 1.23 M → resnet 0.31 M |  | guided, unguided, pool, fastdfkd |" in str(lines)
    told_of = evidence_page.expectations_table(found).splitlines()
    assert told_of[2] == (
        "| cifar10 | guided: at least 90 % | 90.00 %: reached (one seed) | 55.00 %: **missed** (2 seeds) |"
    )
    assert told_of[3].endswith("above unguided | 4.50 points: **missed** (one seed) | **not run** |")
    assert told_of[4] == (
        "| cifar10 | above distillation on the pool | 0.00 points: **missed** (one seed) "
        "| 30.00 points: reached (one seed) |"  # of seed 0, the only one that has both arms
    )
    assert told_of[5].count("**not run**") == 2


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"budget": 4_000}, "cifar10, other budget"),
        ({"steps": 100}, "cifar10, other budget"),
        ({"student": "resnet8"}, "cifar10, other budget"),
        ({"image_size": [64, 64]}, "cifar10, other budget"),
        ({"device": "cpu: AVX2"}, "cifar10, on a CPU"),
        ({"device": "cpu: AVX2", "steps": 100}, "cifar10, other budget, on a CPU"),
    ],
)
def test_a_run_of_another_budget_is_not_the_preset(tmp_path: Path, changes: dict[str, Any], label: str) -> None:
    """Its rows are shown by that name; the preset stays not run, and no expectation is met."""
    found = _recorded(tmp_path, [_row(arm, value, **LARGE | changes) for arm, value in (("guided", 95), ("pool", 5))])
    lines = evidence_page.results_table(found).splitlines()
    assert lines[2].startswith("| cifar10 | base | resnet56 0.85 M → resnet20 0.27 M |  | guided, unguided, pool")
    assert "**not run**" in lines[2]
    assert lines[3].startswith(f"| {label} | base |")
    assert "**95.00**" in lines[3]
    assert "reached" not in evidence_page.expectations_table(found)


def test_teachers_are_not_taken_together(tmp_path: Path) -> None:
    """Rows of two teachers of one name are two groups, though preset and budget are the same."""
    rows = [_row("guided", value, teacher_sha256=digest) for value, digest in ((40.0, "a"), (60.0, "b"))]
    found = _recorded(tmp_path, rows)
    assert len(found) == 2
    assert "60.00 %: **missed**" in evidence_page.expectations_table(found)


def test_presets_are_what_the_page_takes_them_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Their budgets and students; parameters are those of the networks."""
    monkeypatch.setenv("SYNTHKD_DATA", str(tmp_path))
    for name, own in evidence_page.EXPECTED.items():
        preset = load_preset(_stand_ins(tmp_path, name, own.side))
        spec = preset.distill
        assert (preset.num_images, spec.steps, spec.batch_size) == (own.budget, own.steps, own.batch_size)
        card = read_card(Path(preset.job.teacher))
        assert (Path(preset.job.teacher).stem, spec.arch) == own.names
        nets = [build_net(one.arch, len(card.classes), one.arch_args) for one in (card, spec)]
        assert tuple(map(count_parameters, nets)) == own.parameters
        assert preset.job.recipe.height == own.side


def _stand_ins(root: Path, name: str, side: int) -> str:
    """Files that a preset looks for; its name."""
    cifar = name.startswith("cifar")
    folder, classes = (root / "cifar10", list(WORDS)) if cifar else (root / "pacs", [f"c{i}" for i in range(7)])
    (folder / "teacher").mkdir(parents=True, exist_ok=True)
    args = {} if cifar else dict(TeacherSpec().arch_args)
    for arch in ("resnet20", "resnet56") if cifar else ("resnet",):
        card = {
            "arch": arch, "weights": f"{arch}.safetensors", "input_size": [side, side], "mean": [0.5] * 3,
            "std": [0.5] * 3, "classes": classes, "arch_args": args,
        }  # fmt: skip
        (folder / f"teacher/{arch}.toml").write_text(card_toml(card))
        (folder / f"teacher/{arch}.safetensors").touch()
    for file in ("pool.npz", "test.npz"):
        (folder / file).touch()
    return name


@pytest.mark.skipif(not evidence_page.PAGE.exists(), reason="the documentation is not installed with the package")
def test_the_page_holds_what_the_rows_say() -> None:
    """Stale? `python -m synthkd.bench.evidence --table`."""
    text = evidence_page.PAGE.read_text()
    assert evidence_page.page(text, evidence_page.recorded()) == text


def test_a_prior_is_kept_with_its_curve(
    prior_folder: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thinned log with all looks at held-out images, a chart that is XML, and a line of the page."""
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    pipeline = prior_folder(tmp_path / "prior-small")
    path = evidence_pictures.keep_training(pipeline.parent, "cifar10-small", tmp_path / "images")
    told = json.loads(path.read_text())
    unet = [row for row in told["log"] if row["stage"] == "unet"]
    assert len(unet) < 110
    assert [row["held_out_loss"] for row in unet if "held_out_loss" in row] == [0.3, 0.25]
    assert unet[-1]["step"] == 2000
    assert "captions" not in told
    chart = (tmp_path / "images/evidence-prior-cifar10-small.svg").read_text()
    assert len(ElementTree.fromstring(chart).findall(".//{http://www.w3.org/2000/svg}polyline")) == 3
    (tmp_path / "teacher").mkdir()
    how = {"steps": 3000, "seconds": 720.0, "images_per_second": 275.5}
    taught = {"images": 3143, "parameters": 1_200_000, "test_accuracy": 92.49, "device": "cpu: AVX2", "training": how}
    taught |= {"sha256": {"resnet.safetensors": "0f"}}
    (tmp_path / "teacher/resnet.json").write_text(json.dumps(taught))
    (tmp_path / "teacher/resnet.toml").touch()
    (tmp_path / "teacher/log.jsonl").write_text('{"stage": "resnet", "step": 50, "loss": 1.0}\n')
    kept = evidence_pictures.keep_training(tmp_path / "teacher", "pacs-sketch-small", tmp_path / "images")
    assert json.loads(kept.read_text()) == taught | {"log": [{"stage": "resnet", "step": 50, "loss": 1.0}]}
    lines = evidence_page.trainings_table(path.parent)
    assert "| pacs-sketch-small | 1.2 | 3,143 | 3,000 | 0.20 | cpu: AVX2 | 92.49 | 276 |" in lines
    assert "| cifar10-small | 3.0 | 35,986 | 10, 10 | 1.00 | cpu: AVX2 | 30.5 | 0.2500 | 70 |" in lines
    assert hashlib.sha256(b"weights").hexdigest() in lines
    assert "| cifar10 | **not run** |" in lines
    assert "evidence-prior-cifar10-small.svg" in evidence_page.pictures(tmp_path / "images")
    with pytest.raises(SynthkdError, match="no finished training"):
        evidence_pictures.keep_training(tmp_path, "x", tmp_path / "images")
