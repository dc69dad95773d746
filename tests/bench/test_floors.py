"""docs/kernels.md says what the cases say."""

import json
from pathlib import Path

import pytest

from synthkd.bench import floors


@pytest.mark.skipif(not floors.PAGE.exists(), reason="the documentation is not installed with the package")
def test_the_page_holds_the_table() -> None:
    """Stale? `python -m synthkd.bench.floors`."""
    text = floors.PAGE.read_text()
    assert floors.page(text, floors.measured()) == text


def test_a_measured_row_is_told(tmp_path: Path) -> None:
    """Only a GPU's row in bfloat16 that has a speed; the newest one."""
    row = {"op": "to_uint8", "case": "512 x 32", "direction": "forward", "dtype": "bfloat16", "machine": "a GPU"}
    old = row | {"speed": {"kernel": {"median": 99.0}}, "percent_of_copy": 10.0}
    new = row | {"speed": {"kernel": {"median": 25.0}}, "percent_of_copy": 45.5}
    others = [row | {"speed": None}, new | {"dtype": "float32"}, row | {"speed": {"reference": {"median": 1.0}}}]
    path = tmp_path / "kernels.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (old, new, *others)))
    text = floors.table(floors.measured(path))
    assert "| to_uint8 | 512 x 32 | forward | 75.5 | 17.6 | 25 us, 45.5 % of a copy (a GPU) |" in text
    assert text.count(floors.NOT_YET) == len(text.splitlines()) - 3
