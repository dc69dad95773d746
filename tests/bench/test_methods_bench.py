"""docs/methods.md says what the rows say, and rows are of one budget."""

import json
from pathlib import Path

import pytest

from synthkd.bench import methods
from synthkd.dfkd.presets import load_preset
from synthkd.engine import SynthkdError


@pytest.mark.skipif(not methods.PAGE.exists(), reason="the documentation is not installed with the package")
def test_the_page_holds_the_table() -> None:
    """Stale? `python -m synthkd.bench.methods`."""
    text = methods.PAGE.read_text()
    assert methods.page(text, methods.recorded()) == text


def test_newest_rows_of_a_cpu_make_the_table(tmp_path: Path) -> None:
    """One line per method, best first; a seed's later row takes the place of an earlier one; a GPU's is left out."""
    row = {
        "preset": "digits", "method": "a", "seed": 0, "teacher_accuracy": 99.0, "student_accuracy": 50.0,
        "agreement": 90.0, "num_images": 1200, "seconds": 10.0, "cpu_seconds": 8.0, "peak_mb": 700.0,
        "device": "cpu: AVX2",
    }  # fmt: skip
    rows = [
        row, {**row, "student_accuracy": 80.0}, {**row, "seed": 1, "student_accuracy": 90.0, "seconds": 20.0},
        {**row, "student_accuracy": 1.0, "device": "cuda: a GPU"}, {**row, "method": "b", "student_accuracy": 95.0},
    ]  # fmt: skip
    path = tmp_path / "methods.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    lines = methods.table(methods.recorded(path)).splitlines()
    assert lines[2].startswith("| digits | b | 99.0 | **95.0** (one seed) |")
    assert lines[3] == "| digits | a | 99.0 | **85.0** (80.0 to 90.0, 2 seeds) | 90.0 | 1,200 | 15 | 8 | 700 |"
    assert len(lines) == 4


def test_a_record_is_of_the_presets_budget(tmp_path: Path) -> None:
    """Fewer steps are for trying things out."""
    with pytest.raises(SynthkdError, match="--record"):
        methods.measure_methods(load_preset("digits"), ["pool"], [0], tmp_path, steps=3, record=True)
