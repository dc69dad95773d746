"""Artifacts: whole or not there, found by what they depend on, refused with the reason."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from synthkd.export import Compiled, ExportError, Options, aoti, artifacts, build, load, making
from synthkd.export.artifacts import Slot, default_store, differences, read_manifest, weights_sha256

pytest.importorskip("onnxruntime", reason="part of the onnx extra")

X = torch.linspace(-1, 1, 24).view(2, 12)


@pytest.fixture(autouse=True)
def own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user with a home of their own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def linear(seed: int = 0, width: int = 3) -> nn.Module:
    """A small module."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, width), nn.BatchNorm1d(width)).eval().requires_grad_(False)


def made(store: Path, **changes: Any) -> tuple[Compiled, bool]:
    """A small artifact, and whether it was built now."""
    said: list[str] = []
    module, x = changes.pop("module", None) or linear(), changes.pop("x", X)
    compiled = build(module, (x,), store=store, say=said.append, **changes)
    return compiled, any(line.startswith("building") for line in said)


def folders(store: Path) -> list[Path]:
    """Artifacts in a store."""
    return sorted(p for p in store.iterdir() if p.name.startswith("module-"))


def test_reused_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, a buffer, the batch, dtypes, shapes, options, identity, versions, the processor: each makes another."""
    store = tmp_path / "store"
    assert made(store)[1]
    assert not made(store)[1]
    moved = linear()
    moved.get_buffer("1.running_mean").add_(1)
    others: list[dict[str, Any]] = [
        {"module": linear(1)},
        {"module": moved},
        {"module": linear().double(), "x": X.double()},
        {"x": X[:1]},
        {"most": 9},
        {"dynamic": False},
        {"options": Options(opset=21)},
        {"identity": {"scale": 2.0}},
    ]
    for changes in others:
        assert made(store, **changes)[1], changes
        assert not made(store, **changes)[1], changes
    keys = {read_manifest(folder)[0].key for folder in folders(store)}  # type: ignore[union-attr]
    assert len(keys) == len(others) + 1
    with monkeypatch.context() as patch:
        real = artifacts.importlib.metadata.version  # type: ignore[attr-defined]
        newer = lambda name: "99.0" if name == "onnxscript" else real(name)  # noqa: E731
        patch.setattr(artifacts.importlib.metadata, "version", newer)  # type: ignore[attr-defined]
        assert made(store)[1]
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
        assert made(store)[1]
    assert not made(store)[1]


def test_why_it_is_built_anew(tmp_path: Path) -> None:
    said: list[str] = []
    build(linear(), (X,), store=tmp_path, name="net", say=said.append)
    build(linear(), (X,), store=tmp_path, name="net", options=Options(opset=21), say=said.append)
    lines = [line for line in said if line.startswith("building")]
    assert lines == ["building net for onnx", "building net for onnx (options.opset: 23 -> 21)"]
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c: 2 -> 3", "d: null -> 4"]


def test_damage_is_seen_and_mended(tmp_path: Path) -> None:
    """A flipped byte, a missing file, a manifest that cannot be read or says something else: built again."""

    def flip(folder: Path) -> None:
        data = bytearray((folder / "model.onnx").read_bytes())
        data[len(data) // 2] ^= 1
        (folder / "model.onnx").write_bytes(data)

    def other_parts(folder: Path) -> None:
        told = json.loads((folder / "manifest.json").read_text())
        told["parts"]["weights"] = "0" * 64
        (folder / "manifest.json").write_text(json.dumps(told))

    hurts: list[Callable[[Path], object]] = [
        flip,
        other_parts,
        lambda folder: (folder / "model.onnx").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
        lambda folder: (folder / "manifest.json").write_text("{}"),
    ]
    for hurt in hurts:
        made(tmp_path)
        hurt(folders(tmp_path)[0])
        compiled, fresh = made(tmp_path)
        assert fresh
        torch.testing.assert_close(compiled(X), linear()(X))
        assert len(folders(tmp_path)) == 1


def test_odd_neighbours(tmp_path: Path) -> None:
    """A copy of an artifact under another name, one with an odd manifest: neither is in the way of a build."""
    made(tmp_path)
    (folder,) = folders(tmp_path)
    shutil.copytree(folder, tmp_path / f"{folder.name}.bak")
    odd = tmp_path / "module-onnx-odd"
    shutil.copytree(folder, odd)
    (odd / "manifest.json").write_text(json.dumps({**json.loads((odd / "manifest.json").read_text()), "parts": None}))
    shutil.rmtree(folder)
    assert made(tmp_path)[1]
    assert made(tmp_path, most=7)[1]


def test_a_store_that_can_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was built before is used; a build says what is wrong."""
    made(tmp_path)
    monkeypatch.setattr(Path, "mkdir", lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert not made(tmp_path)[1]
    with pytest.raises(ExportError, match="cannot be written"):
        made(tmp_path, most=7)


UNET = """
import sys
from diffusers import UNet2DConditionModel
from synthkd.export.artifacts import described, state_of
from synthkd.export.graph import code_of
unet = UNet2DConditionModel.from_pretrained(sys.argv[1], subfolder="unet")
print(described([str(unet), state_of([unet]), code_of(UNet2DConditionModel.forward)]))
"""


def test_a_key_is_the_same_in_another_process(pipeline_folder: Path, tmp_path: Path) -> None:
    """With another order of sets, and from another place: a library's notes about itself are in no key."""
    shutil.copytree(pipeline_folder, tmp_path / "moved")
    found = set()
    for seed, place in (("1", pipeline_folder), ("2", tmp_path / "moved")):
        words = [sys.executable, "-c", UNET, str(place)]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed})
        found.add(done.stdout)
        assert done.returncode == 0, done.stderr
    assert len(found) == 1


def test_a_manifest_names_no_file_outside(tmp_path: Path) -> None:
    made(tmp_path)
    (folder,) = folders(tmp_path)
    told = json.loads((folder / "manifest.json").read_text())
    for name in ("../model.onnx", "/etc/hostname"):
        told["files"] = {name: {"bytes": 1, "sha256": ""}}
        (folder / "manifest.json").write_text(json.dumps(told))
        assert "outside" in read_manifest(folder)[1]


STAGES = ["trace", "convert", "load", "compare", "manifest", "disk", "rename"]


@contextmanager
def killed_at(stage: str) -> Iterator[None]:
    """This process is killed where the build enters a stage."""

    def die(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    real = making.Build._stage

    def stage_of(self: making.Build, name: str) -> Any:
        return die() if name == stage else real(self, name)

    making.Build._stage = stage_of  # type: ignore[method-assign]
    if stage == "manifest":
        making.write_manifest = die
    if stage == "disk":
        artifacts._to_disk = die
    if stage == "rename":
        Path.rename = die  # type: ignore[method-assign,assignment]
    yield


def _build_and_die(store: Path, stage: str) -> None:
    with killed_at(stage):
        made(store)


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_leaves_no_half_artifact(stage: str, tmp_path: Path) -> None:
    """SIGKILL in every stage: nothing is found afterwards, the next build sweeps what was left and makes it whole."""
    process = multiprocessing.get_context("fork").Process(target=_build_and_die, args=(tmp_path, stage))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert folders(tmp_path) == []
    compiled, fresh = made(tmp_path)
    assert fresh
    assert len(folders(tmp_path)) == 1
    assert not list(tmp_path.glob(".building-*"))
    torch.testing.assert_close(compiled(X), linear()(X))


def test_an_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "write_manifest", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made(tmp_path)
    assert folders(tmp_path) == []
    assert not list(tmp_path.glob(".building-*"))


def _slow(store: Path) -> None:
    """The stage takes a moment, so that the other process comes in between."""
    import time

    real = making.Build._stage

    def stage_of(self: making.Build, name: str) -> Any:
        time.sleep(0.3)
        (store / "stages").open("a").write(f"{name}\n")
        return real(self, name)

    making.Build._stage = stage_of  # type: ignore[method-assign]
    made(store)


def test_two_at_once_build_once(tmp_path: Path) -> None:
    """The second one waits for the lock and loads what the first has built."""
    both = [multiprocessing.get_context("fork").Process(target=_slow, args=(tmp_path,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "stages").read_text().split() == STAGES[:4]


class _Doubling:
    """A stand-in for a compiler of machine code."""

    @staticmethod
    def compile_program(program: Any, folder: Path) -> None:
        (folder / "model.pt2").write_bytes(b"machine code")

    @staticmethod
    def load(folder: Path) -> Callable[[list[Tensor]], list[Tensor]]:
        assert (folder / "model.pt2").read_bytes() == b"machine code"
        return lambda tensors: [linear()(tensors[0])]


def test_machine_code_of_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """aoti and tensorrt: only what this user made is loaded, unless it is trusted; onnx holds no code."""
    monkeypatch.setattr(making, "aoti", _Doubling)
    monkeypatch.setattr(aoti, "unavailable", lambda: "")
    assert made(tmp_path / "store", backend="aoti")[1]
    assert made(tmp_path / "store")[1]
    assert not made(tmp_path / "store", backend="aoti")[1]
    key = tmp_path / "config" / "synthkd" / "artifacts.key"
    assert key.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "somebody else"))
    assert not made(tmp_path / "store")[1]
    with pytest.raises(ExportError, match="this user has not made it") as error:
        made(tmp_path / "store", backend="aoti")
    assert "--trust-artifacts" in str(error.value)
    assert not made(tmp_path / "store", backend="aoti", trust=True)[1]


def test_load_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the weights; refused with the reason where it does not fit."""
    made(tmp_path)
    (folder,) = folders(tmp_path)
    compiled = load(folder, nn.Identity(), (X,))
    torch.testing.assert_close(compiled(X), linear()(X))
    with pytest.raises(ExportError, match=r"takes .*float32.*the example has .*float64"):
        load(folder, nn.Identity(), (X.double(),))
    with pytest.raises(ExportError, match=r"no manifest\.json in it"):
        load(tmp_path, nn.Identity(), (X,))
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ANOTHER")
        with pytest.raises(ExportError, match=r"made for something else \(processor: .* -> .*ANOTHER\)"):
            load(folder, nn.Identity(), (X,))
    (folder / "model.onnx").write_bytes(b"")
    with pytest.raises(ExportError, match=r"model\.onnx is missing or damaged"):
        load(folder, nn.Identity(), (X,))


def test_where_they_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYNTHKD_ARTIFACTS", str(tmp_path / "mine"))
    assert default_store() == tmp_path / "mine"
    monkeypatch.delenv("SYNTHKD_ARTIFACTS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_store() == tmp_path / "cache" / "synthkd" / "artifacts"
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"), Slot(tmp_path / "file" / "x", "n", "onnx", {}).locked():
        pass


def test_the_key_sees_an_adapters_scale(tmp_path: Path) -> None:
    """Or any other plain attribute: no tensor of the network changes with it."""

    class Adapted(nn.Linear):
        scaling: dict[str, float]

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scaling["default"]

    torch.manual_seed(0)
    module = Adapted(12, 3).requires_grad_(False)
    module.scaling = {"default": 1.0}
    one = made(tmp_path, module=module)[0](X)
    module.scaling = {"default": 0.5}
    other, fresh = made(tmp_path, module=module)
    assert fresh
    torch.testing.assert_close(other(X), one / 2)


def test_weights_digest_sees_every_tensor() -> None:
    """Non-persistent buffers too, which no state_dict has."""
    module = linear()
    module.register_buffer("hidden", torch.zeros(2), persistent=False)
    before = weights_sha256([module])
    module.get_buffer("hidden").add_(1)
    assert weights_sha256([module]) != before
