"""`synthkd bench kernels`: whole rows, no speed without a passed check, and wrong names in one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from synthkd.bench import kernels, record
from synthkd.bench.cli import app
from synthkd.bench.timing import Stopwatch, copy_ceiling, quartiles
from synthkd.kernels.case import Case, Maker, Suite, Tolerance

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="rows of a machine without a GPU")


def _square(x: Tensor) -> Tensor:
    return x * x


SMALL = Suite(
    name="square",
    op=_square,
    reference=_square,
    cases=(
        Case(
            name="small",
            arguments=lambda m: {"x": m.randn(3, 5)},
            differentiable=("x",),
            traffic=lambda size: (2 * 15 * size, 3 * 15 * size),
            measured="cpu",
        ),
        Case(name="only a test", arguments=lambda m: {"x": m.randn(1, 1)}),
        Case(name="large", arguments=lambda m: {"x": m.randn(1, 1)}, measured="gpu"),
    ),
    tolerances={torch.float32: Tolerance(rtol=1e-6, atol=1e-6, reason="one rounding")},
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small op in place of all, and no long copies."""
    monkeypatch.setattr(kernels, "SUITES", (SMALL,))
    monkeypatch.setattr(kernels, "copy_ceiling", lambda device: 10.0)


def _run(*words: str) -> Any:
    return CliRunner().invoke(app, ["kernels", "--device", "cpu", *words])


@pytest.mark.usefixtures("small")
def test_rows_are_whole() -> None:
    done = _run("--repeats", "3", "--json")
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["op"], row["case"], row["direction"]) for row in rows] == [
        ("square", "small", "forward"),
        ("square", "small", "forward+backward"),
    ]
    assert [row["bytes"] for row in rows] == [120, 300]
    for row in rows:
        assert row["check"] == {"passed": True, "worst": row["check"]["worst"], "where": row["check"]["where"],
                                "reason": None}  # fmt: skip
        assert row["check"]["worst"] <= 1
        speed = row["speed"]["reference"]
        assert 0 < speed["q1"] <= speed["median"] <= speed["q3"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / speed["median"] / 1e3, abs=0.006)
        assert row["percent_of_copy"] == pytest.approx(10 * row["bytes"] / speed["median"] / 1e3, abs=0.06)
        assert row["copy_gb_per_s"] == 10.0
        assert row["launches"] == 0  # plain torch on a CPU
        assert row["warm_up_seconds"].keys() == row["speed"].keys() == {"reference"}
        assert row["failed"] == {}
        assert row["times_faster_than"] is None
        assert {"date", "commit", "machine", "torch", "dtype", "device"} <= row.keys()


def _wrong(x: Tensor) -> Tensor:
    return x * x + 1


def _raising(x: Tensor) -> Tensor:
    raise RuntimeError("does not\nlaunch")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("op", "reason"), [(_wrong, "output 0"), (_raising, "does not launch")])
@pytest.mark.parametrize("form", [["--json"], []])
def test_a_failed_check_has_no_speed(monkeypatch: pytest.MonkeyPatch, op: Any, reason: str, form: list[str]) -> None:
    monkeypatch.setattr(kernels, "SUITES", (replace(SMALL, op=op),))
    monkeypatch.setenv("COLUMNS", "200")
    done = _run("--repeats", "2", *form)
    assert done.exit_code == 1
    assert reason in done.stdout
    if form:
        rows = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in done.stdout.splitlines()]
        assert len(rows) == 2
        assert all(row["speed"] is None and row["gb_per_s"] is None for row in rows)
    else:
        assert "FAILED" in done.stdout
        assert "reference" not in done.stdout  # no column of times


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--op", "sqare"), "--op 'sqare': did you mean 'square'? known: square"),
        (("--dtype", "float8"), "--dtype 'float8': did you mean 'float32'? known: float32"),
    ],
)
def test_unknown_names_are_one_line(words: tuple[str, str], message: str) -> None:
    error = _run(*words).exception
    assert str(error) == message
    assert error.exit_code == 2


@pytest.mark.usefixtures("small")
def test_rows_are_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    done = _run("--repeats", "1", "--record")
    assert "reference" in done.stdout
    assert [json.loads(line)["op"] for line in (tmp_path / "kernels.jsonl").read_text().splitlines()] == ["square"] * 2


def test_every_op_is_measured_on_both_machines() -> None:
    for device in (CPU, torch.device("cuda")):
        assert {work.suite.name for work in kernels.workloads(device)} == {suite.name for suite in kernels.SUITES}


def test_one_round_runs_each_contender_once() -> None:
    order: list[str] = []
    found = Stopwatch(CPU).rounds({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert order == ["a", "b"] * 3
    assert found.keys() == {"a", "b"}


def test_quartiles_and_ceiling() -> None:
    assert (quartiles([4.0]).median, quartiles([1.0, 2.0, 3.0, 4.0, 5.0]).q1) == (4.0, 2.0)
    assert copy_ceiling(CPU, repeats=1) > 0


def test_stock_contenders_take_the_arguments_they_name() -> None:
    x = Maker(CPU, torch.float32).randn(2, 4, 3, 3)
    known = {"x": x, "weight": torch.ones(4), "bias": torch.zeros(4), "num_groups": 2, "eps": 1e-6}
    suite = replace(SMALL, name="group_norm_silu")
    found = kernels.contenders(suite, known, CPU)
    assert found["stock"](**known).shape == x.shape
    assert "stock" not in kernels.contenders(suite, {**known, "other": x}, CPU)
