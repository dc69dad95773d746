"""What changes an image changes the identity of its set, also where every tensor is the same."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from synthkd.dfkd import TeacherGuidance, load_teacher
from synthkd.engine import Recipe
from synthkd.engine.models import load_model
from synthkd.engine.settings import settings_of
from synthkd.engine.synthesizer import Synthesizer


def digest(folder: Path, wanted: Recipe) -> str:
    """The model's part of a set's identity."""
    found: str = Synthesizer.from_pretrained(str(folder), wanted, device="cpu").identity(0)["model_sha256"]
    return found


def edited(folder: Path, target: Path, file: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a pipeline with one config changed."""
    shutil.copytree(folder, target)
    data = json.loads((target / file).read_text())
    change(data)
    (target / file).write_text(json.dumps(data))
    return target


@pytest.mark.parametrize(
    ("family", "file", "change"),
    [
        ("sd1", "vae/config.json", {"scaling_factor": 0.9}),
        ("sd1", "unet/config.json", {"attention_head_dim": 4}),
        ("sd1", "text_encoder/config.json", {"hidden_act": "gelu"}),
        ("sdxl", "model_index.json", {"force_zeros_for_empty_prompt": False}),
        ("sdxl", "vae/config.json", {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}),
        ("dit", "model_index.json", {"id2label": {"0": "dog", "1": "cat", "2": "bird"}}),
    ],
)
def test_a_changed_config_is_another_model(
    pipeline_folders: Mapping[str, Path],
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    family: str,
    file: str,
    change: dict[str, Any],
) -> None:
    wanted, folder = recipe(prompts=("{class}",)), pipeline_folders[family]
    other = edited(folder, tmp_path / "other", file, lambda data: data.update(change))
    assert digest(other, wanted) != digest(folder, wanted)


@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", "text_encoder/config.json"])
def test_what_a_library_notes_of_itself_is_not(
    pipeline_folders: Mapping[str, Path], recipe: Callable[..., Recipe], tmp_path: Path, file: str
) -> None:
    notes = {"_diffusers_version": "9.9", "transformers_version": "9.9", "_name_or_path": "elsewhere"}
    other = edited(pipeline_folders["sd1"], tmp_path / "other", file, lambda data: data.update(notes))
    assert digest(other, recipe()) == digest(pipeline_folders["sd1"], recipe())


def test_a_default_that_is_written_out_is_not(
    pipeline_folders: Mapping[str, Path], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """As the next release of a library would, with a field that this one does not write."""
    folder = pipeline_folders["sd1"]
    assert "dropout" in json.loads((folder / "unet" / "config.json").read_text())
    other = edited(folder, tmp_path / "other", "unet/config.json", lambda data: data.pop("dropout"))
    assert digest(other, recipe()) == digest(folder, recipe())


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "dit"])
def test_live_and_loaded_are_one(
    pipelines: Mapping[str, Any], pipeline_folders: Mapping[str, Path], family: str
) -> None:
    from synthkd.engine.models import wrap_pipeline

    loaded = load_model(str(pipeline_folders[family]), device="cpu", dtype=torch.float32)
    ours, theirs = (json.dumps(p.settings(), sort_keys=True) for p in (wrap_pipeline(pipelines[family]), loaded))
    assert ours == theirs


def test_settings_are_plain_values(pipelines: Mapping[str, Any]) -> None:
    for part in pipelines["sdxl"].components.values():
        assert json.loads(json.dumps(settings_of(part))) == settings_of(part)
    assert settings_of(None) == {}


def test_another_stride_is_another_teacher(teacher_card: Path, tmp_path: Path) -> None:
    """The weights fit both."""
    shutil.copytree(teacher_card.parent, tmp_path / "card")
    other = tmp_path / "card" / teacher_card.name
    other.write_text(other.read_text() + "stem_stride = 2\n")
    ours, theirs = (TeacherGuidance(load_teacher(str(c))).describe()["teacher_sha256"] for c in (teacher_card, other))
    assert ours != theirs
