"""`synthkd bench distill`: what is compared with what, and rows whose quality fields tell a planted error."""

import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("sklearn", reason="the digits preset names scikit-learn's digits")

from synthkd.bench import distill_cases, distill_stages, gpu, record
from synthkd.bench.cli import app
from synthkd.bench.distill import interleave, measure_distill, rows_of
from synthkd.bench.distill_cases import Pair, ResNet50
from synthkd.bench.distill_stages import Setting
from synthkd.bench.distill_variants import DistillBench, Entry
from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.loader import Loader
from synthkd.dfkd.objective import Objective
from synthkd.engine import SynthkdError

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"device": CPU, "rounds": 1, "images": 24, "batch_size": 8, "workers": 0}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One student of a few channels, and rounds of three steps."""

    def training(name: str, **changes: Any) -> DistillSpec:
        return DistillSpec(arch="resnet", arch_args={"widths": [4], "blocks": [1]}, **changes)

    for module in (distill_cases, distill_stages):
        monkeypatch.setattr(module, "training", training)
    monkeypatch.setattr(distill_stages, "STUDENTS", {32: (("digits", False),), 224: ()})
    monkeypatch.setattr(distill_stages, "PAIRS", (Pair("resnet20", "digits", 32, bar=1.5),))
    monkeypatch.setattr(distill_stages, "_LEAST", 0.0)


def measured(**changes: Any) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows by variant and size, of which every one is whole."""
    rows = list(measure_distill(DistillBench(**{**SMALL, **changes})))
    for row in rows:
        json.dumps(row, allow_nan=False)
        assert row.keys() >= {"kind", "stage", "case", "commit", "machine", "date", "batch_size", "bar", "bar_reached"}
        if not row["skipped"] and not row["failed"]:
            assert 0 < row["q1"] <= row["images_per_second"] <= row["q3"]
    return {(row["variant"], row["size"]): row for row in rows}


def test_readers_are_compared_with_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """At both sizes, pixels, keys and labels; what is not installed says so."""
    monkeypatch.setattr(distill_stages, "dali_available", lambda: False)
    rows = measured(stages=("read",), variants=("torch", "dali", "cached"))
    assert list(rows) == [(n, s) for s in (32, 224) for n in ("pil-dataloader", "torch", "dali", "cached")]
    for (name, size), row in rows.items():
        assert (row["stored"], row["crop"]) == {32: (32, 1.0), 224: (256, 0.25)}[size]
        if name == "dali":
            assert row["skipped"].endswith("pip install 'synthkd[dali]'")
            assert row["images_per_second"] is row["times_reference"] is row["bar_reached"] is None
            continue
        assert row["same_keys"] is row["same_labels"] is True
        assert row["compared_images"] == 24
        assert row["max_pixel_difference"] <= (0.01 if size == 32 or name == "pil-dataloader" else 2)
    assert rows["pil-dataloader", 32]["times_reference"] == 1
    assert rows["dali", 224]["bar"] is None


@pytest.mark.parametrize(("part", "same"), [("order", False), ("sight", True)])
def test_another_order_or_view_shows(monkeypatch: pytest.MonkeyPatch, part: str, same: bool) -> None:
    """Planted: other rows have other keys and pixels, other flips other pixels alone."""

    def planted(source: Any, reader: Any, order: Any, sight: Any, device: Any) -> Loader:
        if part == "order":
            return Loader(source, reader, replace(order, seed=1), sight, device)
        return Loader(source, reader, order, replace(sight, seed=1), device)

    monkeypatch.setattr(distill_stages, "Loader", planted)
    row = measured(stages=("read",), sizes=(32,), variants=("torch",))["torch", 32]
    assert row["same_keys"] is row["same_labels"] is same
    assert row["max_pixel_difference"] > 50


def test_steps_are_compared_with_a_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loss after five steps in float32; another loss shows, and what does not compile fails alone."""
    rows = measured(stages=("step",), variants=("eager", "bfloat16"))
    assert [name for name, _ in rows] == ["plain-eager", "eager", "bfloat16"]
    assert rows["eager", 32]["loss_relative"] < 1e-5 < rows["bfloat16", 32]["loss_relative"] < 0.05
    assert [row["dtype"] for row in rows.values()] == ["float32", "float32", "bfloat16"]
    assert [row["bar"] for row in rows.values()] == [None, 1.3, None]

    def breaks(*words: Any, **given: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", breaks)
    monkeypatch.setattr(distill_stages, "Objective", lambda s, t, spec: Objective(s, t, replace(spec, kl=2.0)))
    rows = measured(stages=("step",), variants=("eager", "compiled"))
    assert rows["eager", 32]["loss_relative"] > 0.1
    assert rows["compiled", 32]["failed"] == "RuntimeError: no compiler"
    assert rows["compiled", 32]["images_per_second"] is None


def test_trainings_with_and_without_the_teacher() -> None:
    """The same student but for the rounding of stored labels, whose making and size are told."""
    rows = measured(stages=("end-to-end",), steps=6)
    plain, stored = rows["teacher-in-the-loop", 32], rows["stored-labels", 32]
    assert len(rows) == 2
    assert stored["labelled"] == 2 * stored["views"] * 11 == 44  # 22 images are trained on
    assert stored["labels_megabytes"] > 0 < stored["labels_seconds"]
    assert "labels_seconds" not in plain
    assert stored["bar"] == 1.5
    assert stored["loss_relative"] < 1e-2
    assert stored["loss"] != plain["loss"]
    assert abs(stored["agreement"] - plain["agreement"]) <= 50
    assert stored["data_wait"] >= 0 == plain["loss_relative"]


def test_a_bar_is_for_the_fastest_default() -> None:
    """Ratios of medians; the fastest of what a user gets without asking; a failed one has no rate."""
    rates = {"plain": [10.0, 30.0, 20.0], "eager": [22.0, 40.0, 30.0], "compiled": [25.0, 24.0, 26.0], "other": [99.0]}
    entries = {name: Entry(run=lambda: 1.0, rates=list(found)) for name, found in rates.items()}
    setting = Setting("step", "small", 32, 3, lambda tell: None, {}, 1.3, ("eager", "compiled"))  # type: ignore[arg-type,return-value]
    rows = {row["variant"]: row for row in rows_of(DistillBench(device=CPU), setting, entries)}
    assert [row["times_reference"] for row in rows.values()] == [1, 1.5, 1.25, 4.95]
    assert [row["bar_reached"] for row in rows.values()] == [None, True, None, None]
    entries["eager"].failed = "broken"
    rows = {row["variant"]: row for row in rows_of(DistillBench(device=CPU), setting, entries)}
    assert rows["eager"]["images_per_second"] is None
    assert rows["compiled"]["bar_reached"] is False
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        if len(order) == 4:
            raise MemoryError("out of memory")
        return 1.0

    found = {"a": Entry(run=lambda: run("a")), "b": Entry(run=lambda: run("b")), "c": Entry(skipped="not here")}
    interleave(found, 3, "x", lambda line: None)
    assert "".join(order) == "ababa"
    assert found["b"].failed == "MemoryError: out of memory"
    assert statistics.fmean(found["a"].rates) == 1


def test_the_command_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words that do not exist, variants of another stage, and what only a GPU measures; exit code 1 where one fails."""
    wrong = {
        ("--stage", "reed"): "--stage 'reed': did you mean 'read'", ("--size", "64"): "known: 224, 32",
        ("--stage", "step", "--variant", "dali"): "known: bfloat16", ("--format", "gif"): "known: jpg",
        ("--student", "resnet21"): "did you mean 'resnet20'",
        ("--stage", "step", "--size", "224"): "nothing to measure",
    }  # fmt: skip
    for words, said in wrong.items():
        with pytest.raises(SynthkdError, match=said) as error:
            CliRunner().invoke(app, ["distill", *words, "--device", "cpu"], catch_exceptions=False)
        assert error.value.exit_code == 2
        assert "\n" not in str(error.value)
    words = ["distill", "--stage", "step", "--variant", "eager", "--rounds", "1", "--batch-size", "8"]
    words += ["--device", "cpu"]
    result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [row["variant"] for row in rows] == ["plain-eager", "eager"]
    monkeypatch.setattr(distill_stages, "Objective", lambda *words: nn.Module().missing)
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout


def test_gpu_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage and size on a GPU, each row appended, and time waited told against its bar."""
    asked: list[DistillBench] = []

    def measure(spec: DistillBench, tell: Any) -> Iterator[dict[str, Any]]:
        asked.append(spec)
        row = {"case": "a", "variant": "v", "images_per_second": 5.0, "times_reference": 2.0, "reference": "r"}
        yield row | {"bar": 1.5, "bar_reached": True, "skipped": None, "failed": None, "data_wait": 3.5}

    monkeypatch.setattr(gpu, "measure_distill", measure)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    parts = gpu.distill_parts()
    for part in parts.values():
        part()
    assert len((tmp_path / "distill.jsonl").read_text().splitlines()) == len(parts)
    assert {(s.stages[0], s.sizes[0]) for s in asked} == {
        (stage, size) for stage in ("read", "step", "end-to-end") for size in (32, 224)
    }
    assert "waits 3.5 % of the time, bar 3.0: NOT kept" in capsys.readouterr().out


def test_resnet50_is_the_published_one() -> None:
    """25.6 million parameters with 1000 classes (arXiv 1512.03385, table 1), 32 times smaller maps at the end."""
    with torch.device("meta"):
        net = ResNet50(1000)
        maps = net.features(torch.zeros(1, 3, 224, 160))
    assert sum(p.numel() for p in net.parameters()) == 25_557_032
    assert maps.shape == (1, 2048, 7, 5)
