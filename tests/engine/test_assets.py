"""The embedded default is whole: checksums, size, and the code path of Stable Diffusion 1.5."""

import hashlib
import json
from pathlib import Path

from synthkd.engine.assets import embedded_path

FOLDER = embedded_path("digits")
ASSETS = FOLDER.parent


def test_checksums() -> None:
    """Every file of SHA256SUMS is there and as it was."""
    rows = [line.split("  ") for line in (ASSETS / "SHA256SUMS").read_text().splitlines()]
    assert len(rows) > 10
    for digest, name in rows:
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest, name


def test_size() -> None:
    """At most 13 MiB, scripts included."""
    files = [p for p in ASSETS.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= 13 * 2**20


def test_it_is_a_complete_pipeline_folder() -> None:
    """All parts of a StableDiffusionPipeline, weights as safetensors, and no path of the machine that made it."""
    index = json.loads((FOLDER / "pipeline/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    for part in ("scheduler", "text_encoder", "tokenizer", "unet", "vae"):
        assert any((FOLDER / "pipeline" / part).iterdir())
    assert not [p for p in FOLDER.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    for path in FOLDER.rglob("*.json"):
        assert str(Path.home()) not in path.read_text()


def test_split_is_disjoint_and_whole() -> None:
    """1,000 training and 797 test digits, every one of the 1,797 once."""
    split = json.loads((FOLDER / "digits_split.json").read_text())
    assert (len(split["train"]), len(split["test"])) == (1000, 797)
    assert sorted(split["train"] + split["test"]) == list(range(1797))
