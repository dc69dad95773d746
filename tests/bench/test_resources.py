"""Kernels compile ahead of time without spilling, and the committed table is of these sources."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from synthkd.bench import resources
from synthkd.kernels.suites import SUITES

pytest.importorskip("triton", reason="Triton runs on Linux only")

ALL = """
import json, torch
from synthkd.bench.resources import builds, faults, table
from synthkd.kernels.suites import SUITES
print(json.dumps([(row, faults(row)) for row in table(builds(SUITES, [torch.bfloat16]), [90])]))
"""

SPILLING = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from spilling import kernel
from synthkd.bench.resources import build_of, faults, resources
from synthkd.kernels.launch import Launch

x = torch.empty(0)
row = resources(build_of(Launch(kernel, (1,), (x, x), {"N": 128}, {"num_warps": 1})), 90)
print(json.dumps([(row, faults(row))]))
"""

KERNEL = '''
import triton
import triton.language as tl


@triton.jit
def kernel(x, out, N: tl.constexpr):
    """Holds N x N values in the registers of one warp."""
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    values = tl.load(x + at)
    total = tl.sum(values, 0)
    tl.store(out + at, values - total[None, :])
'''


def _compiled(code: str, *words: str) -> list[tuple[dict[str, Any], list[str]]]:
    """What a process that does not interpret kernels prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_compiles_and_none_spills() -> None:
    found = _compiled(ALL)
    assert {(row["op"], row["kernel"]) for row, _ in found} == resources.all_kernels()
    for row, faults in found:
        assert not faults, (row["op"], row["kernel"], row["constexprs"], faults)


def test_a_kernel_that_spills_is_reported(tmp_path: Path) -> None:
    (tmp_path / "spilling.py").write_text(KERNEL)
    ((row, faults),) = _compiled(SPILLING, str(tmp_path))
    assert row["spill_stores"] > 0
    assert any("spilled" in fault for fault in faults)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spill_loads": 4}, "spilled"),
        ({"shared_bytes": 232449}, "shared memory"),
        ({"registers": 255, "num_warps": 16}, "registers a block"),
    ],
)
def test_faults(change: dict[str, int], fault: str) -> None:
    row = {"spill_stores": 0, "spill_loads": 0, "shared_bytes": 232448, "registers": 128, "num_warps": 16}
    assert resources.faults(row) == []
    assert fault in resources.faults({**row, **change})[0]


def test_the_committed_table_is_of_these_sources() -> None:
    """Every kernel on every architecture, hashes equal, nothing spilled."""
    rows = [json.loads(line) for line in resources.TABLE.read_text().splitlines()]
    covered = defaultdict(set)
    for row in rows:
        current = resources.source_hash(row["module"])
        assert row["source_sha256"] == current, f"{row['op']} has changed: run {resources.COMMAND}"
        assert resources.faults(row) == []
        covered[row["op"], row["kernel"]].add(row["arch"])
    wanted = {f"sm_{arch}" for arch in resources.ARCHITECTURES}
    for op, name in sorted(resources.all_kernels()):
        assert covered[op, name] == wanted, f"{op}: {name} is not in the table: run {resources.COMMAND}"


def test_helpers_are_no_kernels(tmp_path: Path) -> None:
    (tmp_path / "kernel.py").write_text(
        "@triton.jit\ndef _add(a, b):\n    return a + b\n\n@triton.jit\ndef _sum(x):\n    tl.reduce(x, 0, _add)\n"
        "\ndef forward(x):\n    launch(_sum, (1,), x)\n"
    )
    assert resources.kernels_in(tmp_path / "kernel.py") == {"_sum"}


def test_gpu_cases_are_recorded_without_their_memory() -> None:
    """Fake tensors: the launches of the largest case, forward and backward, allocate nothing."""
    suite = next(s for s in SUITES if s.name == "kd_loss")
    case = next(c for c in suite.cases if c.measured == "gpu")
    launches = resources.launches_of(suite, case, torch.bfloat16)
    assert [x.kernel.fn.__name__ for x in launches] == ["_whole", "_scaled"]
    build = resources.build_of(launches[0])
    assert dict(build.signature)["s"] == "*bf16"
    assert "s" in build.aligned


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["resources"])
    assert resources.main() == 2
    error = capsys.readouterr().err
    assert "unset it" in error
    assert error.count("\n") == 1
