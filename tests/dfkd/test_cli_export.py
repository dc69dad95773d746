"""`synthkd export`, and `--backend` where sets are drawn: what is built once is found again, by replay too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synthkd.engine.index import read_environments
from synthkd.engine.rows import group_rows, read_index

pytest.importorskip("onnxruntime", reason="part of the onnx extra")

RECIPE = """
classes = ["cat", "dog", "bird"]
height = 16
width = 16
steps = 2
classes_per_group = 3
samples_per_class = 2
groups_per_shard = 2
backends = ["text_encoder=onnx"]
[guidance]
scale = 0.1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, for artifacts and sets."""
    folder = tmp_path_factory.mktemp("exports")
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


@pytest.fixture(autouse=True)
def own_home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place / "config"))
    monkeypatch.delenv("SYNTHKD_ARTIFACTS", raising=False)


def test_export_then_draw_then_replay(
    place: Path, call: Callable[..., Any], pipeline_folder: Path, teacher_card: Path
) -> None:
    """Built once, found again; a set names what drew it, and a replay takes the same."""
    shared = ("--recipe", place / "recipe.toml", "--artifacts", place / "store", "--device", "cpu")
    words = (pipeline_folder, "--teacher", teacher_card, "--role", "vae", "--role", "teacher", "--json", *shared)
    first = call("export", *words)
    assert first.returncode == 0, first.stderr
    rows = [json.loads(line) for line in first.stdout.splitlines()]
    assert [(r["name"], r["backend"], r["built"]) for r in rows] == [("vae", "onnx", True), ("teacher", "onnx", True)]
    assert all(row["relative"] < 1e-5 and row["psnr"] > 100 and row["bytes"] > 0 for row in rows)
    again = [json.loads(line) for line in call("export", *words).stdout.splitlines()]
    assert [row["built"] for row in again] == [False, False]
    assert [row["key"] for row in again] == [row["key"] for row in rows]

    drawn = call(
        "synth", "--model", pipeline_folder, "--teacher", teacher_card, "--out", place / "set", "--num-samples", 12,
        "--backend", "vae=onnx", "--backend", "teacher=onnx", "--workers", 1, *shared,
    )  # fmt: skip
    assert drawn.returncode == 0, drawn.stderr
    assert "building vae" not in drawn.stderr
    row = read_index(place / "set")[0]
    (environment,) = {read_environments(place / "set")[g.environment]["roles"] for g in group_rows(place / "set", row)}
    assert environment == "text_encoder onnx, vae onnx, teacher onnx"
    target = place / "7.png"
    replayed = call("replay", place / "set", "--id", 7, "--out", target, "--artifacts", place / "store")
    assert "identical to the stored image" in replayed.stdout, replayed.stderr
    assert call("verify", place / "set").returncode == 0
    twice = call(
        "synth", "--model", pipeline_folder, "--teacher", teacher_card, "--out", place / "two", "--num-samples", 12,
        "--backend", "vae=onnx", "--backend", "teacher=onnx", "--workers", 2, *shared,
    )  # fmt: skip
    assert twice.returncode == 0, twice.stderr
    assert (place / "two" / row.file).read_bytes() == (place / "set" / row.file).read_bytes()
    grown = call(
        "synth", "--model", pipeline_folder, "--teacher", teacher_card, "--out", place / "set", "--num-samples", 18,
        "--backend", "eager", "--workers", 1, *shared,
    )  # fmt: skip
    assert grown.returncode == 0, grown.stderr  # another backend is another environment, not another set


def test_a_table_for_people(place: Path, call: Callable[..., Any], pipeline_folder: Path) -> None:
    """Without a teacher: text encoder, UNet and VAE at the model's own size; here the VAE alone."""
    shown = call("export", pipeline_folder, "--role", "vae", "--artifacts", place / "store", "--device", "cpu")
    assert shown.returncode == 0, shown.stderr
    assert "vae" in shown.stdout
    assert "against eager" in shown.stdout
    manifests = [json.loads(p.read_text()) for p in (place / "store").glob("vae-*/manifest.json")]
    assert {tuple(m["signature"]["outputs"][0]["shape"][2:]) for m in manifests} >= {(16, 16)}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "export needs a MODEL, or a --preset that brings one"),
        (("MODEL", "--backend", "onx"), "--backend 'onx': did you mean 'onnx'?"),
        (("MODEL", "--backend", "eager"), "--backend 'eager': known: aoti, onnx, tensorrt"),
        (("MODEL", "--role", "vea"), "--role 'vea': did you mean 'vae'?"),
        (("MODEL", "--role", "gradient"), "--role gradient: needs a --teacher"),
        (("MODEL", "--batch", "0"), "--batch is 0"),
        (("MODEL", "--opset", "17"), "--opset is 17"),
        (("MODEL", "--dtype", "float8"), "recipe: dtype is 'float8'"),
        (("MODEL", "--provider", "cuda", "--role", "vae"), "provider 'cuda' with tensors on cpu"),
        (("MODEL", "--backend", "tensorrt", "--role", "vae"), "TensorRT"),
        (("no/such/folder",), "no/such/folder"),
    ],
)
def test_wrong_input(
    words: tuple[str, ...], line: str, place: Path, call: Callable[..., Any], pipeline_folder: Path
) -> None:
    """One line, exit code 2."""
    given = [str(pipeline_folder) if word == "MODEL" else word for word in words]
    done = call("export", *given, "--artifacts", place / "wrong", "--device", "cpu")
    assert done.returncode == 2
    said = [text for text in done.stderr.splitlines() if text.startswith("synthkd:")]
    assert len(said) == 1
    assert line in said[0]
    assert not [p for p in (place / "wrong").glob("*") if p.is_dir()]


def test_wrong_backends_of_a_set(
    place: Path, call: Callable[..., Any], pipeline_folder: Path, teacher_card: Path
) -> None:
    """Before a weight is read."""
    source = ("--model", pipeline_folder, "--teacher", teacher_card, "--recipe", place / "recipe.toml")
    shared = ("synth", "--out", place / "x", *source)
    for words, line in (
        (("--backend", "unet=onxx"), "backend 'onxx'; did you mean 'onnx'"),
        (("--backend", "nuet=onnx"), "role 'nuet'; did you mean 'unet'"),
        (("--attention", "flsh"), "attention 'flsh'"),
        (("--quantize", "int8"), "quantize 'int8'"),
    ):
        done = call(*shared, *words, "--device", "cpu", "--workers", 1)
        assert done.returncode == 2
        assert line in done.stderr
        assert not (place / "x").exists()
