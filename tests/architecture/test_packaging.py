"""The namespace layout: what is listed, what the wheel holds, and what a bare import must not find."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from synthkd.dfkd.methods.base import method_names
from synthkd.dfkd.presets import preset_names

ROOT = Path(__file__).resolve().parents[2]
TOP = ("bench", "dfkd", "engine", "export", "kernels")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_packages_list_is_the_tree() -> None:
    """Every folder with an __init__.py is listed, and nothing else."""
    found = {
        "synthkd." + str(init.parent.relative_to(ROOT)).replace("/", ".")
        for top in TOP
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_top_package_is_typed() -> None:
    """py.typed lies in each portion of the namespace and is packaged."""
    for top in TOP:
        assert (ROOT / top / "py.typed").exists()
        assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][f"synthkd.{top}"]


@pytest.mark.parametrize("name", TOP)
def test_bare_names_are_not_ours(name: str, tmp_path: Path) -> None:
    """`import kernels` from anywhere but the repository does not find this project."""
    code = f"import importlib.util as u; s = u.find_spec({name!r}); print(s.origin if s else None)"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(ROOT) not in found.stdout


def test_no_package_init_at_the_namespace() -> None:
    """synthkd itself is a PEP 420 namespace: another distribution may add a portion."""
    spec = importlib.util.find_spec("synthkd")
    assert spec is not None
    assert spec.origin is None


@pytest.mark.slow
def test_wheel_installs_and_imports_alone(tmp_path: Path) -> None:
    """The wheel imports without the repository and without any extra, and finds its embedded default."""
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.split("\n"):
        if name and (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    wheel = next(tmp_path.glob("synthkd-*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    libraries = str(Path(importlib.util.find_spec("torch").origin).parents[1])  # type: ignore[union-attr, arg-type]
    code = (
        "import sys; sys.modules.update(dict.fromkeys("
        "['diffusers', 'transformers', 'sklearn', 'datasets', 'webdataset', 'matplotlib', 'pandas', 'scipy']))\n"
        "import synthkd.engine, synthkd.kernels, synthkd.export, synthkd.dfkd, synthkd.bench.cli as cli\n"
        "from synthkd.engine.assets import embedded_path\n"
        "print(cli.__file__, (embedded_path('digits') / 'pipeline' / 'model_index.json').is_file())"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path / 'site'}:{libraries}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "site/synthkd/bench/cli.py"), "True"]
    assert not any((tmp_path / "site/synthkd").rglob("results/*.jsonl"))


def test_entry_points_are_installed() -> None:
    """Subcommands are found through entry points; presets and methods of our own without any."""
    assert {e.name for e in importlib.metadata.entry_points(group="synthkd.commands")} == {"bench"}
    assert {"digits", "segments", "cifar10"} <= set(preset_names())
    assert "mosaickd" in method_names()
