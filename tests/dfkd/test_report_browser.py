"""The report in a real browser: it loads offline, without a word on the console, at both widths and in the dark."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from synthkd.dfkd.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr", "--v=0"),
]

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium binary on PATH")]


def _neighbour(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a synthetic run."""
    return write_report(_neighbour("test_report").make_run(tmp_path_factory.mktemp("run")))


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Load a page in headless Chromium with a fresh profile."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_every_section_is_rendered_and_the_console_stays_silent(page: Path, tmp_path: Path) -> None:
    done = browse(page, tmp_path, "--dump-dom")
    found = re.findall(r'<section id="(\w+)"', done.stdout)
    assert found == ["summary", "images", "guidance", "distillation", "balance", "confidence", "classes",
                     "confusion", "throughput", "provenance"]  # fmt: skip
    assert "CONSOLE" not in done.stderr


def test_the_console_check_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "loud.html"
    page.write_text("<script>console.error('heard')</script>")
    assert "CONSOLE" in browse(page, tmp_path / "profile", "--dump-dom").stderr


def test_nothing_outside_the_file_is_asked_for(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"""(?:src|href|action|srcset|poster)\s*=\s*["']([^"']*)""", text)
    assert targets
    assert all(t.startswith(("data:", "#")) for t in targets)
    assert not re.search(r"url\(|@import|<script|<iframe|<object|<embed|https?:", text)


@pytest.mark.parametrize("width", [1200, 500])
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_drawn_at_both_widths_and_in_both_schemes(page: Path, tmp_path: Path, width: int, dark: bool) -> None:
    shot = tmp_path / "shot.png"
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    browse(page, tmp_path / "profile", *scheme, f"--window-size={width},900", f"--screenshot={shot}")
    with Image.open(shot) as image:
        pixels = image.convert("L")
        assert pixels.width == width
        corner, shades = pixels.getpixel((2, 2)), pixels.getextrema()
    assert isinstance(corner, (int, float))
    assert (corner < 60) == dark
    assert shades[0] != shades[1]
