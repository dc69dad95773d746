"""Published CIFAR-10 teachers on the real test images, where the evaluation pack is at hand."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from synthkd.dfkd.data import LabelledImages
from synthkd.dfkd.evaluate import evaluate
from synthkd.dfkd.teachers import load_teacher

ROOT = Path(__file__).resolve().parents[2]
PACK = Path(os.environ.get("SYNTHKD_EVALUATION", ROOT.parent / "shared" / "evaluation"))
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

pytestmark = pytest.mark.skipif(not (PACK / "cifar10_test.npz").is_file(), reason="needs SYNTHKD_EVALUATION")


@pytest.fixture(scope="module")
def cifar10() -> LabelledImages:
    """The 10,000 test images, read by the pack's own module."""
    spec = importlib.util.spec_from_file_location("medx", PACK / "medx.py")
    assert spec is not None
    assert spec.loader is not None
    medx: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(medx)
    x, meta = medx.load(PACK / "cifar10_test.npz")
    return LabelledImages(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(meta["y"]).long(), CLASSES)


def card(folder: Path, depth: int) -> Path:
    """A card for one of the pack's networks."""
    weights = PACK / f"cifar10_resnet{depth}_akamaster.safetensors"
    path = folder / "teacher.toml"
    path.write_text(
        f'arch = "resnet{depth}"\nweights = "{weights.resolve()}"\ninput_size = [32, 32]\n'
        f"mean = [0.485, 0.456, 0.406]\nstd = [0.229, 0.224, 0.225]\nclasses = {list(CLASSES)!r}\n"
    )
    return path


def accuracy(depth: int, data: LabelledImages, folder: Path) -> float:
    """Percent right."""
    return evaluate(load_teacher(str(card(folder, depth))), data).accuracy


@pytest.mark.slow
def test_resnet20(cifar10: LabelledImages, tmp_path: Path) -> None:
    """As published."""
    assert len(cifar10) == 10_000
    assert accuracy(20, cifar10, tmp_path) == pytest.approx(91.73, abs=0.02)


@pytest.mark.slow
def test_resnet56(cifar10: LabelledImages, tmp_path: Path) -> None:
    """As published."""
    assert accuracy(56, cifar10, tmp_path) == pytest.approx(93.39, abs=0.02)
