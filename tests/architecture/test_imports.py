"""Imports go one way, and each heavy dependency is imported in one file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {
    "diffusers": ["engine/models.py"],
    "fsspec": ["engine/stores.py"],
    "transformers": ["dfkd/model_zoo.py", "engine/models.py"],  # classifiers; text encoders
    "sklearn": ["dfkd/data.py"],
    "nvidia": ["dfkd/data_dali.py"],
    "pyarrow": ["engine/table.py"],
    "onnx": ["export/onnx.py"],
    "onnxruntime": ["export/onnx.py"],
    "onnxscript": ["export/onnx.py"],
    "ray": ["bench/soak.py", "engine/ray_runner.py"],
    "simplejpeg": ["dfkd/decode.py", "engine/encoders.py"],  # decodes; encodes
    "tensorrt": ["export/tensorrt.py"],
    "timm": ["dfkd/model_zoo.py"],
    "torchao": ["export/fp8.py"],
    "torchvision": ["dfkd/model_zoo.py", "engine/encoders.py"],  # classifiers; nvJPEG
}
NEVER = ("webdataset", "datasets", "matplotlib", "pandas", "xformers")  # xformers: through diffusers alone


def sources() -> list[Path]:
    """Modules of the packages, without the scripts that build the assets."""
    found = [p for top in ("bench", "dfkd", "engine", "export", "kernels") for p in (ROOT / top).rglob("*.py")]
    return [p for p in found if "assets/build" not in str(p)]


def imported(path: Path) -> set[str]:
    """Top-level names of all modules a file imports, at any depth of it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_import_contracts_hold() -> None:
    """import-linter's contracts of pyproject.toml."""
    pytest.importorskip("importlinter", reason="part of the dev extra; a GPU machine's own Python may lack it")
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("name", "homes"), sorted(HEAVY.items()))
def test_heavy_dependency_has_its_home(name: str, homes: list[str]) -> None:
    """Only one file imports it, or one for each of its uses."""
    assert sorted(str(p.relative_to(ROOT)) for p in sources() if name in imported(p)) == homes


@pytest.mark.parametrize("name", NEVER)
def test_not_needed_at_run_time(name: str) -> None:
    """No module of the packages imports it."""
    assert not [p for p in sources() if name in imported(p)]


def test_kernels_need_torch_alone() -> None:
    """kernels/ is a leaf: torch, and Triton where the kernels are."""
    for path in (p for p in sources() if p.is_relative_to(ROOT / "kernels")):
        foreign = imported(path) - set(sys.stdlib_module_names) - {"torch", "synthkd"}
        assert foreign <= ({"triton"} if path.name in ("kernel.py", "moments.py") else set()), path


def test_no_pickle_and_no_unsafe_load() -> None:
    """Nothing unpickles, evaluates or loads weights without weights_only."""
    for path in sources():
        text = path.read_text()
        assert "pickle.load" not in text, path
        assert "weights_only=False" not in text, path
        assert "eval(" not in text.replace(".eval(", ""), path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
