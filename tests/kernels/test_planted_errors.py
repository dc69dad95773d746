"""The cases can fail: one sign or one index wrong in a kernel, and some case of its op does not pass."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from synthkd.kernels.case import check
from synthkd.kernels.suites import SUITES

FOLDER = {"add_group_norm_silu": "group_norm_silu"}
# op: (what its kernel, or moments.py, says, what it says wrongly), each found once
PLANTED: dict[str, list[tuple[str, str]]] = {
    "add_group_norm_silu": [
        ("rounded = (v + r)", "rounded = (v - r)"),
        ("dx += tl.load(grad_total", "dx -= tl.load(grad_total"),
        ("tl.store(total + at, rounded", "tl.store(total + at, r"),
    ],
    "batchnorm_stats": [
        ("v = v - near[None, :]", "v = v + near[None, :]"),
        ("centre += tl.load(shift + g", "centre -= tl.load(shift + g"),
        ("a + b * (v - m)", "a + b * (v + m)"),
        ("to_mean + at, mask", "to_mean + tl.arange(0, BC), mask"),
        ("tl.load(to_m2 + at, mask=in_c).to(tl.float32) * 2.0", "tl.load(to_m2 + at, mask=in_c).to(tl.float32)"),
        ("two += d * d", "two -= d * d"),
        ("found += valid.to(tl.float32)", "found += BS"),
        ("tl.store(mean + to, first + off", "tl.store(mean + to, first - off"),
        ("row = sample * runs + e // d", "row = sample * runs + 0 * e"),
        ("sample = (run * STEPS + k) // blocks", "sample = (run * STEPS) // blocks"),
    ],
    "group_norm_silu": [
        ("u = (v - m) * r * w + b", "u = (v - m) * r * w - b"),
        ("tl.store(out + base + local, u / (1.0 + tl.exp(-u))", "tl.store(out + base + local, u / (1.0 + tl.exp(u))"),
        ("return g * gate * (1.0 + u * (1.0 - gate))", "return g * gate * (1.0 - u * (1.0 - gate))"),
        ("two += du * xhat", "two += du * v"),
        ("- level - xhat * slope", "- level + xhat * slope"),
        ("- level - xhat * slope", "- xhat * slope"),
        ("part = ((sample * runs + row) * c)[:, None]", "part = (row * c)[:, None]"),
        ("g = sample * groups + at // d", "g = sample * groups + 0 * at"),
        ("g = (run // runs) * groups + at // d", "g = at // d"),
        ("spread / total + eps", "spread / total - eps"),
        ("+ (g * d)[None, :]", "+ g[None, :]"),
        ("s0.to(tl.int64) * stride_s + c0", "s0.to(tl.int64) + c0"),
    ],
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
    "upsample2x_conv3x3": [
        ("both += tl.load(bias", "both -= tl.load(bias"),
        ("at = ((y + 1) // 2) * (w + 1) + j", "at = (y // 2) * (w + 1) + j"),
        ("size + at + 1, mask", "size + at, mask"),
        ("y = 2 * a - p", "y = 2 * a + p"),
        ("tl.store(first + b + 1, odd", "tl.store(first + b, odd"),
        ("tl.store(zeroth + w, nothing", "tl.store(zeroth, nothing"),
        ("v += tl.load(bias", "v -= tl.load(bias"),
        ("* (w + 1) + (x + 1) // 2", "* (w + 1) + x // 2"),
        ("y, x = 2 * a - phase // 2,", "y, x = 2 * a + phase // 2,"),
        ("(y < 2 * h) & (x >= 0) & (x < 2 * w)", "(y < 2 * h) & (x < 2 * w)"),
    ],
}  # fmt: skip


def spoiled(path: Path, right: str, wrong: str, folder: Path) -> ModuleType:
    """A copy of a module with one piece of its text replaced."""
    copied = folder / path.name  # a file: Triton reads a kernel's source again
    copied.write_text(path.read_text().replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"spoiled_{path.stem}", copied)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def package_of(op: str) -> Any:
    """The package that holds an op's kernel."""
    return importlib.import_module(f"synthkd.kernels.{FOLDER.get(op, op)}")


def shorten(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the statistics' programs take runs of many tiles."""
    if hasattr(kernel, "partial_moments"):
        monkeypatch.setitem(kernel.partial_moments.__globals__, "PROGRAMS", 1)


def plant(op: str, right: str, wrong: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a wrong copy of the op's kernel in its place, or a right one over wrong helpers."""
    package = package_of(op)
    path = Path(str(package.__file__)).with_name("kernel.py")
    shared = path.parents[1] / "moments.py"
    homes = [p for p in (path, shared) if right in p.read_text()]
    assert len(homes) == 1, f"{right!r} is in {homes}"
    assert homes[0].read_text().count(right) == 1, f"{right!r} is there more than once"
    kernel = spoiled(path, right, wrong, folder)
    if homes == [shared]:
        helpers = spoiled(shared, right, wrong, folder)
        for name in set(vars(helpers)) & set(vars(kernel)) - {n for n in vars(kernel) if n.startswith("__")}:
            setattr(kernel, name, getattr(helpers, name))
    monkeypatch.setattr(package, "kernel", kernel)


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.skipif(torch.cuda.is_available(), reason="minutes of compiling, and a wrong index may end the process")
@pytest.mark.parametrize(("op", "right", "wrong"), [(op, *pair) for op, pairs in PLANTED.items() for pair in pairs])
def test_a_planted_error_is_caught(
    op: str, right: str, wrong: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importlib.import_module(f"synthkd.kernels.{FOLDER.get(op, op)}.kernel")
    plant(op, right, wrong, tmp_path, monkeypatch)
    suite = next(s for s in SUITES if s.name == op)
    cases = [case for case in suite.cases if not case.measured]
    if all(check(suite, case, device, torch.float32).passed for case in cases):
        shorten(package_of(op).kernel, monkeypatch)  # runs of many tiles, which small cases have not by themselves
        assert not all(check(suite, case, device, torch.float32).passed for case in cases)


def test_every_op_has_planted_errors() -> None:
    """An op without one here could pass its cases whatever it does."""
    assert set(PLANTED) == {suite.name for suite in SUITES}
