"""`synthkd bench backends`: what is compared with what, and rows that keep their bookkeeping straight."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("diffusers", reason="priors are diffusers' own")
pytest.importorskip("sklearn", reason="the embedded case reads scikit-learn's digits")

from synthkd.bench import backend_runs, backends, cli_backends
from synthkd.bench.backend_runs import BEST, DIFFUSERS, NUDGED, apart, measure_backends, summary
from synthkd.bench.backends import EAGER, VARIANTS, BackendSpec, Contender, fastest, ratio, rounds
from synthkd.bench.cli import app
from synthkd.dfkd.presets import Preset, load_preset
from synthkd.engine import CutMixSpec, SynthkdError
from synthkd.engine import backends as routes
from synthkd.engine.roles import ROLES
from synthkd.export import ExportError, Manifest
from synthkd.export import build as build_backend

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small() -> Preset:
    """The embedded preset at 2 calls, the second guided, in groups of 2; CFG at the second alone."""
    preset = load_preset("digits")
    spec = replace(preset.job.recipe.guidance, start=0.5, decoder="vae")
    changes: dict[str, Any] = {"classes_per_group": 2, "samples_per_class": 1, "cutmix": CutMixSpec()}
    recipe = replace(preset.job.recipe, steps=2, guidance=spec, **changes)
    return replace(preset, job=replace(preset.job, recipe=recipe))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Builds that take no time: eager, with the manifest of something built; the names of what was."""
    built: list[str] = []

    def build(function: Any, inputs: Any, **given: Any) -> Any:
        built.append(given["name"])
        made = build_backend(function, inputs, **{**given, "backend": "eager"})
        parts: dict[str, Any] = {"parts": {}, "signature": {}, "structure": None}
        made.manifest = Manifest(
            name=given["name"], backend="onnx", key="", seconds={"trace": 1.5, "convert": 2.0},
            files={"model.onnx": {"bytes": 7}}, **parts,
        )  # fmt: skip
        return made

    monkeypatch.setattr(routes, "build", build)
    return built


def test_every_role_and_both_runs_have_rows(
    small: Preset, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All columns; a backend that computes the same has no difference, and neither has diffusers' own loop."""
    monkeypatch.setattr(backends, "_LEAST", 0.0)
    rows = list(measure_backends(BackendSpec(case="embedded", device=CPU, backends=("onnx",), rounds=2), small))
    last = rows.pop()
    by_role = {role: [r["backend"] for r in rows if r["role"] == role] for role in ROLES}
    assert by_role == {role: [EAGER, "onnx"] for role in ROLES}
    assert all(quick.count(role) >= 2 for role in ROLES)  # built, then found again for its seconds of loading
    runs = {(r["run"], r["backend"]): r for r in rows if r["role"] == "run"}
    assert {name for run, name in runs if run == "plain"} - {BEST} == {EAGER, "onnx", *DIFFUSERS}
    assert {name for run, name in runs if run == "guided"} - {BEST} == {EAGER, "onnx", NUDGED}
    for row in rows:
        assert row["failed"] is row["skipped"] is None
        json.dumps(row, allow_nan=False)
        if row["backend"] != NUDGED:
            seconds = row["seconds"]
            assert row["images_per_second"] == pytest.approx(row["batch"] / seconds["median"], rel=1e-3)
            assert seconds["min"] <= seconds["q1"] <= seconds["median"] <= seconds["q3"] <= seconds["max"]
        assert row["max_abs_diff"] <= (1 if row["backend"] in DIFFUSERS else 255 if row["backend"] == NUDGED else 0)
        if row["role"] != "run":
            told = (3.5, 7) if row["backend"] == "onnx" else (None, None)
            assert (row["build_seconds"], row["bytes"]) == told
            assert (row["load_seconds"] is None) == (row["backend"] == EAGER)
    batches = {role: next(r["batch"] for r in rows if r["role"] == role) for role in ROLES}
    assert batches == {"text_encoder": 1, "unet": 4, "vae": 2, "teacher": 2, "gradient": 2}
    assert runs["guided", NUDGED]["images_per_second"] is None
    assert last["eager_by_diffusers"].keys() == set(DIFFUSERS)
    assert last["reached"]["plain images within 1 of 255"] is True


def test_a_real_backend_is_compared_and_loaded_again(small: Preset, tmp_path: Path) -> None:
    """The teacher in ONNX: a difference of rounding, an artifact on disk, and the second run builds nothing."""
    pytest.importorskip("onnxruntime")
    spec = BackendSpec(
        case="embedded", device=CPU, roles=("teacher",), backends=("onnx",), rounds=1, artifacts=str(tmp_path)
    )
    first, again = (next(r for r in measure_backends(spec, small) if r.get("backend") == "onnx") for _ in range(2))
    assert 0 < first["relative"] < 1e-4
    assert first["psnr"] > 80
    assert first["bytes"] == sum(f.stat().st_size for f in tmp_path.rglob("model.onnx*"))
    assert again["build_seconds"] == first["build_seconds"] > 0


def test_what_is_not_there_is_skipped_and_what_breaks_fails(
    small: Preset, monkeypatch: pytest.MonkeyPatch, quick: list[str]
) -> None:
    """Each has a row with its reason, and the others are measured; nothing is loaded where nothing is there."""

    def breaks(*arguments: Any, **given: Any) -> Any:
        raise ExportError("onnx: the graph cannot be written")

    monkeypatch.setattr(routes, "build", breaks)
    spec = BackendSpec(case="embedded", device=CPU, roles=("unet",), rounds=1)
    asked = replace(spec, backends=("onnx", "tensorrt", "flash", "fp8"))
    rows = {r["backend"]: r for r in measure_backends(asked, small) if r["kind"] == "backends"}
    assert rows[EAGER]["images_per_second"] > 0
    assert "the graph cannot be written" in rows["onnx"]["failed"]
    assert [rows[n]["failed"] for n in ("tensorrt", "flash", "fp8")] == [None] * 3
    assert "TensorRT" in rows["tensorrt"]["skipped"]
    assert "needs a CUDA GPU" in rows["flash"]["skipped"]
    assert "8.9" in rows["fp8"]["skipped"]

    def missing() -> None:
        raise ExportError("onnx: onnxruntime is not installed; pip install 'synthkd[onnx]'")

    monkeypatch.setattr(backends.onnx, "check_installed", missing)
    monkeypatch.setattr(backend_runs, "base_of", breaks)
    rows = {r["role"]: r for r in measure_backends(replace(spec, roles=("vae", "run"), backends=("onnx",)), small)}
    assert list(rows) == ["vae", "run"]
    assert all(row["skipped"].endswith("'synthkd[onnx]'") for row in rows.values())


def test_rounds_are_interleaved_and_ratios_paired() -> None:
    """One that fails in a later round drops out; a ratio is the median of the rounds' own."""
    order: list[str] = []

    def fails() -> None:
        order.append("b")
        if order.count("b") > 1:
            raise MemoryError("out of memory")

    found = {"a": Contender(call=lambda: order.append("a")), "b": Contender(call=fails)}
    found["c"] = Contender(call=lambda: order.append("c"), number=2)
    found["d"] = Contender(call=lambda: order.append("d"), timed=False)
    rounds(found, CPU, 3)
    assert "".join(order) == "abcc" + "abcc" + "acc"
    assert found["b"].failed == "MemoryError: out of memory"
    assert [len(entry.spent) for entry in found.values()] == [3, 1, 3, 0]
    slow, fast = (Contender(call=print, spent=times) for times in ([2.0, 30.0, 8.0], [1.0, 10.0, 8.0]))
    assert ratio(slow, fast) == 2.0
    assert ratio(found["b"], fast) is ratio(slow, Contender(skipped="no")) is None


def test_the_best_mix_takes_no_other_arithmetic() -> None:
    """fp8 or another attention may be fastest; the mix is of backends that compute what eager does."""
    times = {EAGER: 4.0, "onnx": 3.0, "aoti": 5.0, "flash": 2.0, "fp8": 1.0, "onnx-tensorrt": 1.5}
    found = {name: Contender(call=print, spent=[seconds]) for name, seconds in times.items()}
    assert fastest(found) == "onnx"
    found["onnx"].failed = "broken"
    assert fastest(found) == EAGER


def test_apart() -> None:
    """Four values, off by 0, 1, 2 and 5: half by more than 1; the mean square is 7.5."""
    wanted = torch.tensor([0, 255, 100, 7], dtype=torch.uint8)
    found = apart(torch.tensor([0, 254, 102, 12], dtype=torch.uint8), wanted)
    assert found == {"max_abs": 5.0, "psnr": 39.38, "off": 0.5}
    assert apart(wanted, wanted) == {"max_abs": 0.0, "psnr": 999.0, "off": 0.0}


def _rows(best: float, theirs: float, off: int) -> list[Mapping[str, Any]]:
    def row(run: str | None, backend: str, times: float | None, role: str = "run", off: int = 0) -> dict[str, Any]:
        return {"case": "embedded", "role": role, "run": run, "backend": backend, "times_eager": times,
                "max_abs_diff": off}  # fmt: skip

    return [
        row(None, EAGER, 1.0, "unet"), row(None, "onnx", 1.3, "unet"), row(None, "fp8", None, "unet"),
        row("plain", EAGER, 1.0), row("plain", BEST, 1.2, off=off), row("plain", DIFFUSERS[0], theirs),
        row("guided", EAGER, 1.0), row("guided", BEST, best, off=90),
    ]  # fmt: skip


def test_the_summary_says_what_is_reached() -> None:
    """Each bar on its own; a guided run's pixels are none."""
    good = summary(_rows(1.4, 1.04, 1))
    assert good is not None
    assert good["roles"] == {"unet": {"backend": "onnx", "times_eager": 1.3}}
    assert good["runs"]["guided"] == {"backend": BEST, "times_eager": 1.4}
    assert list(good["reached"].values()) == [True, True, True]
    bad = summary(_rows(0.98, 1.06, 2))
    assert bad is not None
    assert list(bad["reached"].values()) == [False, False, False]
    assert summary([]) is None


def test_the_command_refuses_and_exits(monkeypatch: pytest.MonkeyPatch, small: Preset, quick: list[str]) -> None:
    """Unknown words, and random weights without a GPU, in one line; exit code 1 where something failed."""
    monkeypatch.setattr(cli_backends, "load_preset", lambda name: small)
    for words, said in {
        ("--role", "unett"): "unet", ("--backend", "onx"): "onnx", ("--case", "sd15"): "sd15-512",
        ("--case", "sdxl-1024", "--device", "cpu"): "needs a CUDA GPU",
    }.items():  # fmt: skip
        with pytest.raises(SynthkdError, match=said) as error:
            CliRunner().invoke(app, ["backends", *words], catch_exceptions=False)
        assert error.value.exit_code == 2
    words = ["backends", "--role", "vae", "--backend", "onnx", "--rounds", "1", "--device", "cpu"]
    result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert result.exit_code == 0
    assert quick == ["vae", "vae"]  # a second start is what is timed as loading
    assert [r["kind"] for r in rows] == ["backends", "backends", "summary"]
    assert rows[0].keys() >= {"commit", "machine", "date", "versions"}
    monkeypatch.setattr(routes, "build", lambda *a, **k: nn.Module().missing)
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 1


def test_variants_are_of_known_backends() -> None:
    """Each is an Execution that the engine takes."""
    for name, variant in VARIANTS.items():
        execution = variant.execution(variant.roles[0], None)
        assert routes.Routes((), execution).key or name == EAGER
