"""Benchmarks keep their bookkeeping straight: rows, sizes, resumable parts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synthkd.bench import digits, gpu, record
from synthkd.bench.gpu import run_parts
from synthkd.kernels.suites import SUITES


def test_row_names_commit_and_machine() -> None:
    """A row says where it comes from, and holds no host name."""
    import platform

    row = record.stamped({"a": 1})
    assert set(row) == {"a", "commit", "machine", "date"}
    assert platform.node() not in row["machine"]


def test_rows_are_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One JSON line each, behind what is there."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    record.append_row("x", {"n": 1})
    path = record.append_row("x", {"n": 2})
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [1, 2]


def test_parts_resume(tmp_path: Path) -> None:
    """A finished part is not run again, and a failing one is not marked done."""
    ran: list[str] = []

    def part(name: str, fail: bool = False) -> Callable[[], None]:
        def run() -> None:
            ran.append(name)
            if fail:
                raise RuntimeError(name)

        return run

    state = tmp_path / "done.json"
    with pytest.raises(RuntimeError):
        run_parts({"a": part("a"), "b": part("b", fail=True)}, state, 9)
    assert run_parts({"a": part("a"), "b": part("b")}, state, 9) == []
    assert ran == ["a", "b", "b"]
    assert run_parts({"a": part("a"), "c": part("c")}, state, -1) == ["c"]


def test_short_parts_come_first() -> None:
    """Every op, then the decoder both ways, then the seeds of the long suites."""
    names = list(gpu.parts())
    assert names[: len(SUITES)] == [f"kernels: {suite.name}" for suite in SUITES]
    assert names[len(SUITES) : len(SUITES) + 2] == ["decoder: forward", "decoder: forward+input gradient"]
    assert all("seed" in name for name in names[len(SUITES) + 2 :])


@pytest.mark.parametrize("passed", [True, False])
def test_a_kernel_part_appends_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], passed: bool
) -> None:
    """A failed check is told, and its row kept."""
    row = {"case": "a", "dtype": "float32", "check": {"passed": passed, "reason": "output 0"}}
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "measure", lambda todo, device: iter([row, row]))
    gpu.kernels_part(SUITES[0].name)
    assert len((tmp_path / "kernels.jsonl").read_text().splitlines()) == 2
    assert ("FAILED: output 0" in capsys.readouterr().out) is not passed


def test_smaller_sets_are_scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One row per seed with accuracy at each size for the guided run and its control, only below the full size."""
    asked: list[tuple[str, int]] = []

    class FakeRun:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def execute(self) -> dict[str, Any]:
            return {
                "num_images": 500, "student_accuracy": 95.0, "unguided_student_accuracy": 20.0, "confusion": {},
                "classes": [], "versions": {}, "seed": 1,
            }  # fmt: skip

    def score(preset: Any, seed: int, out: Path, sizes: list[int]) -> dict[tuple[str, int], float]:
        asked.extend((name, size) for size in sizes for name in ("guided", "unguided"))
        return dict.fromkeys(asked, 50.0)

    monkeypatch.setattr(digits, "Run", FakeRun)
    monkeypatch.setattr(digits, "_at_sizes", score)
    row = digits.run_seed(None, 1, tmp_path, None)  # type: ignore[arg-type]
    assert asked == [("guided", 250), ("unguided", 250)]
    assert row["accuracy_at"] == {"guided": {"500": 95.0, "250": 50.0}, "unguided": {"500": 20.0, "250": 50.0}}
    assert "confusion" not in row


def test_a_resumed_run_is_not_recorded(tmp_path: Path) -> None:
    """Times of a run that went on from an earlier one are no measurement."""
    from typer.testing import CliRunner

    from synthkd.bench.cli import app

    (tmp_path / "seed-0").mkdir()
    done = CliRunner().invoke(app, ["digits", "--out", str(tmp_path), "--record"])
    assert "holds an earlier run" in str(done.exception)
