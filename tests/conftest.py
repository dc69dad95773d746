"""Shared: one thread, no hub, and pipelines and teachers small enough to build in a test."""

import importlib.util
import logging
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels run on the CPU then

torch.set_num_threads(1)


def _builders() -> Any:
    """tests/pipelines.py; under --import-mode=importlib no test module can import another."""
    spec = importlib.util.spec_from_file_location("synthkd_test_pipelines", Path(__file__).with_name("pipelines.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILD = _builders()


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """What a command or a worker of this process changes of the log is no other test's."""
    log = logging.getLogger("synthkd")
    level, propagate, handlers = log.level, log.propagate, log.handlers[:]
    yield
    log.setLevel(level)
    log.propagate, log.handlers = propagate, handlers


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, whatever runs kernels runs them there, as a GPU test."""
    for item in items:
        if torch.cuda.is_available() and "kernels_on" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def vouch() -> Callable[[Path, int, Mapping[str, bytes]], None]:
    """`vouch(folder, shard, content)`: other members for a shard, with rows and index that vouch for them."""
    import hashlib
    import json

    from synthkd.engine.encoding import tar_member
    from synthkd.engine.rows import rows_path, shard_name
    from synthkd.engine.shards import file_digest, short_digest

    def make(folder: Path, shard: int, content: Mapping[str, bytes]) -> None:
        path, listed, index = folder / shard_name(shard), rows_path(folder, shard), folder / "index.jsonl"
        path.write_bytes(b"".join(tar_member(n, d) for n, d in content.items()) + b"\0" * 1024)
        groups = [json.loads(line) for line in listed.read_text().splitlines()]
        home = {name: i for i, group in enumerate(groups) for name in group["members"]}
        for i, group in enumerate(groups):
            group["members"] = {n: short_digest(d) for n, d in content.items() if home.get(n, 0) == i}
        listed.write_text("".join(json.dumps(group) + "\n" for group in groups))
        rows = [json.loads(line) for line in index.read_text().splitlines()]
        for row in rows:
            if row["shard"] == shard:
                row |= {"sha256": file_digest(path), "bytes": path.stat().st_size}
                row["rows"] = hashlib.sha256(listed.read_bytes()).hexdigest()
        index.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return make


@pytest.fixture
def device() -> torch.device:
    """A GPU where there is one; else the CPU, where Triton interprets."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def kernels_on() -> Iterator[None]:
    """Ops run their Triton kernels, fresh memory is NaN, so that what a kernel leaves out shows, and no TF32."""
    pytest.importorskip("triton", reason="Triton runs on Linux only")
    from torch.utils import deterministic

    from synthkd.kernels import implementation

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert deterministic.fill_uninitialized_memory
    with implementation("triton"):
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An epsilon-prediction pipeline in float32."""
    return BUILD.sd(tmp_path_factory.mktemp("pipe"))


@pytest.fixture(scope="session")
def pipelines(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """A tiny live pipeline of each family, all drawing 16x16: sd1 (`pipeline` itself), sd2 (v), sdxl, dit."""
    folder = tmp_path_factory.mktemp("families")
    return {"sd1": pipeline, "sd2": BUILD.sd2(folder / "sd2"), "sdxl": BUILD.sdxl(folder / "sdxl"), "dit": BUILD.dit()}


@pytest.fixture(scope="session")
def pipeline_folders(pipelines: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The same, saved."""
    folder = tmp_path_factory.mktemp("saved-families")
    for name, pipe in pipelines.items():
        pipe.save_pretrained(folder / name)
    return {name: folder / name for name in pipelines}


@pytest.fixture(scope="session")
def build() -> Any:
    """The builders of tests/pipelines.py, for a pipeline of one's own to change."""
    return BUILD


@pytest.fixture(scope="session")
def pipeline_folder(pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pipeline, saved."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipeline64(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline in float64, for finite differences."""
    return BUILD.sd(tmp_path_factory.mktemp("pipe64"), dtype=torch.float64)


@pytest.fixture
def recipe() -> Callable[..., Any]:
    """A Recipe for the tiny pipeline, fields overridable."""
    from synthkd.engine import GuidanceSpec, Recipe

    def make(**changes: Any) -> Recipe:
        fields: dict[str, Any] = {
            "classes": ("cat", "dog", "bird"),
            "prompts": ("a photo of a {class}", "a {class}"),
            "height": 16,
            "width": 16,
            "steps": 4,
            "guidance_scale": 3.0,
            "guidance": GuidanceSpec(scale=0.0),
            "classes_per_group": 3,
            "samples_per_class": 2,
            "groups_per_shard": 3,
        }
        return Recipe(**{**fields, **changes})

    return make


@pytest.fixture(scope="session")
def teacher_card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A card with a small random ResNet of three classes, its running statistics moved off their defaults."""
    from safetensors.torch import save_file

    from synthkd.dfkd.nets import build_net

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("teacher")
    args = {"widths": [8, 12], "blocks": [1, 1]}
    net = build_net("resnet", 3, args)
    net.train()
    for _ in range(20):
        net(torch.randn(16, 3, 16, 16) * 0.7 + 0.2)
    save_file(net.state_dict(), folder / "teacher.safetensors")
    (folder / "teacher.toml").write_text(
        'arch = "resnet"\nweights = "teacher.safetensors"\ninput_size = [16, 16]\nmean = [0.5, 0.5, 0.5]\n'
        'std = [0.25, 0.25, 0.25]\nclasses = ["cat", "dog", "bird"]\n[arch_args]\nwidths = [8, 12]\nblocks = [1, 1]\n'
    )
    return folder / "teacher.toml"


@pytest.fixture
def killed() -> Callable[[Callable[[], object]], bool]:
    """Run something in a child process that is to die by SIGKILL; False where it came to its end instead."""

    def run(work: Callable[[], object]) -> bool:
        child = os.fork()
        if child == 0:
            try:
                work()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status == -signal.SIGKILL

    return run
