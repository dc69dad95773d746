"""Benchmarks keep their bookkeeping straight: rows, sizes, resumable parts."""

import json
import subprocess
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
    """A finished part is not run again; a failing one stops no other, is not marked done, and comes last next time."""
    ran: list[str] = []

    def part(name: str, fail: bool = False) -> Callable[[], None]:
        def run() -> None:
            ran.append(name)
            if fail:
                raise RuntimeError(name)

        return run

    state = tmp_path / "done.json"
    first = run_parts({"a": part("a"), "b": part("b", fail=True), "c": part("c")}, state, 9)
    assert first == (["b"], ["b"])
    assert run_parts({name: part(name) for name in "abcd"}, state, 9) == ([], [])
    assert ran == ["a", "b", "c", "d", "b"]
    assert run_parts({"a": part("a"), "e": part("e")}, state, -1) == (["e"], [])


def test_a_part_that_goes_on_has_not_failed_when_its_time_is_over(tmp_path: Path) -> None:
    """It is left for the next call; one that begins anew failed."""

    def late() -> None:
        raise subprocess.TimeoutExpired("python", 570)

    left = run_parts({"evidence: cifar10 seed 0": late, "kernels: x": late}, tmp_path / "done.json", 9)
    assert left == (["evidence: cifar10 seed 0", "kernels: x"], ["kernels: x"])


def test_a_killed_part_comes_last(tmp_path: Path) -> None:
    """What ends the whole process must not end the next one before the others have run."""
    state, ran = tmp_path / "done.json", []

    def die() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_parts({"a": die, "b": lambda: ran.append("b")}, state, 9)
    run_parts({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, state, 9)
    assert ran == ["b", "a"]


def test_short_parts_come_first() -> None:
    """Tests, every op, the decoder both ways, student loop, engine, backends, every op in float16, then the seeds."""
    names, ops = list(gpu.parts()), [suite.name for suite in SUITES]
    short = ["tests: kernels", "tests: runs", *(f"kernels: {op}" for op in ops)]
    short += ["decoder: forward", "decoder: forward+input gradient"]
    short += [*gpu.distill_parts(), *gpu.engine_parts(), *gpu.backends_parts()]
    short += [f"kernels, float16: {op}" for op in ops]
    assert names[: len(short)] == short
    later = [name for name in names[len(short) :] if name not in gpu.scale_parts()]
    assert all("seed" in name for name in later)


@pytest.mark.parametrize("passed", [True, False])
def test_a_kernel_part_appends_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], passed: bool
) -> None:
    """A failed check is told, and its row kept."""
    row = {"case": "a", "dtype": "float32", "direction": "forward", "percent_of_copy": 80.0, "failed": {},
           "check": {"passed": passed, "reason": "output 0"}}  # fmt: skip
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
