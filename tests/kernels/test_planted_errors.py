"""The cases can fail: one sign or one index wrong in a kernel, and some case of its op does not pass."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from synthkd.kernels.case import check
from synthkd.kernels.suites import SUITES

# op: (what its kernel says, what it says wrongly), each found once
PLANTED: dict[str, list[tuple[str, str]]] = {
    "guided_step": [
        ("moved = clean - shift", "moved = clean + shift"),
        ("- a * (moved if REDERIVE else clean)", "+ a * (moved if REDERIVE else clean)"),
        ("(moved if REDERIVE else clean)", "(clean if REDERIVE else moved)"),
        ("* (moved - past)", "* (moved + past)"),
        ("tl.load(before + at, mask", "tl.load(before + sample * stride_n + place, mask"),
        ("at = source[None, :] * stride_n + place", "at = sample * stride_n + place"),
        ("tl.load(sumsq + source,", "tl.load(sumsq + sample + 0 * source,"),
        ("tl.load(step + source,", "tl.load(step + sample + 0 * source,"),
        ("src_map + sample * positions + p", "src_map + p"),
        ("tl.store(kept + here, moved", "tl.store(kept + here, clean"),
        ("c = chunk * BC + tl.arange(0, BC)", "c = tl.arange(0, BC)"),
        ("tl.where(total > 0.0, size", "tl.where(total < 0.0, size"),
    ],
    "kd_loss": [
        ("return q, p, p * (log_p - log_q)", "return q, p, p * (log_p + log_q)"),
        ("log_q = (s - most_s) * inverse - log_s", "log_q = (s - most_s) * inverse + log_s"),
        ("xt = tl.load(t + start + at,", "xt = tl.load(t + at,"),
        ("tl.store(grad + start + at, temperature * (q - p)", "tl.store(grad + start + at, temperature * (q + p)"),
        ("tl.store(grad + start + k + lane, temperature * (q - p)", "tl.store(grad + start + k + lane, p - q"),
        ("sum_t = sum_t * tl.exp((best_t - new_t) * inverse) +", "sum_t = sum_t +"),
        ("at, g * u, mask", "at, -g * u, mask"),
    ],
    "predict_x0": [
        ("eps = base + scale * (eps - base)", "eps = base - scale * (eps - base)"),
        ("x0 = (zt - s * eps) / a", "x0 = (zt + s * eps) / a"),
        ("x0 = a * zt - s * eps", "x0 = a * zt + s * eps"),
        ("dz, deps = g / a, -s / a * g", "dz, deps = g / a, s / a * g"),
        ("dz, deps = a * g, -s * g", "dz, deps = a * g, s * g"),
        ("(1.0 - scale) * deps", "(1.0 + scale) * deps"),
        ("at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)\n    inside = at < n\n    eps",
         "at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)\n    inside = at < n - 1\n    eps"),
    ],
    "sum_of_squares": [
        ("total += value * value", "total -= value * value"),
        ("x + sample * n + at", "x + sample + at"),
        ("mask=at < n, other", "mask=at <= n, other"),
        ("partial + sample * parts + at", "partial + at"),
    ],
    "to_uint8": [
        ("at = to % C * (each // C) + to // C", "at = to"),
        ("start = sample.to(tl.int64) * each", "start = sample.to(tl.int64) * (each - 1)"),
        ("y + 8388608.0", "y + 0.3 + 8388608.0"),
        ("tl.where(x > 0.0, x, 0.0)", "tl.where(x > 0.0, -x, 0.0)"),
        ("inside = to < each", "inside = to < each - 1"),
    ],
}  # fmt: skip


def spoiled(module: ModuleType, right: str, wrong: str, folder: Path) -> ModuleType:
    """A copy of a kernel's module with one piece of its text replaced."""
    text = Path(str(module.__file__)).read_text()
    assert text.count(right) == 1, f"{right!r} is there {text.count(right)} times"
    path = folder / "kernel.py"  # a file: Triton reads a kernel's source again
    path.write_text(text.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("spoiled_kernel", path)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize(("op", "right", "wrong"), [(op, *pair) for op, pairs in PLANTED.items() for pair in pairs])
def test_a_planted_error_is_caught(
    op: str, right: str, wrong: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = importlib.import_module(f"synthkd.kernels.{op}")
    kernel = importlib.import_module(f"synthkd.kernels.{op}.kernel")
    monkeypatch.setattr(package, "kernel", spoiled(kernel, right, wrong, tmp_path))
    suite = next(s for s in SUITES if s.name == op)
    cases = [case for case in suite.cases if not case.measured]
    assert not all(check(suite, case, device, torch.float32).passed for case in cases)


def test_every_op_has_planted_errors() -> None:
    """An op without one here could pass its cases whatever it does."""
    assert set(PLANTED) == {suite.name for suite in SUITES}
