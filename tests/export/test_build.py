"""`export.build` alone: any module, any batch, and one clear line for what cannot be."""

import builtins
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from synthkd import export
from synthkd.export import ExportError, Options, build, making, onnx
from synthkd.export.graph import call_of, exported, foreign_operators

pytest.importorskip("onnxruntime", reason="part of the onnx extra")


class Out(NamedTuple):
    """A result with everything that a result may have."""

    image: Tensor
    more: dict[str, Any]
    nothing: None


class Net(nn.Module):
    """A convolution, a norm and a condition; odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor, t: Tensor, told: dict[str, Tensor]) -> Out:
        """x [B,3,H,W], t [], told["shift"] [B,8]."""
        y = torch.nn.functional.silu(self.norm(self.conv(x))) + told["shift"][:, :, None, None] * t
        return Out(y, {"mean": y.mean(dim=(1, 2, 3)), "pair": (y.amax(dim=1), y.amin(dim=1))}, None)


def net() -> Net:
    """The same weights every time."""
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


def inputs(batch: int) -> tuple[Any, ...]:
    """Arguments at a batch."""
    g = torch.Generator().manual_seed(batch)
    shift = torch.randn(batch, 8, generator=g)
    return torch.randn(batch, 3, 5, 7, generator=g), torch.tensor(3), {"shift": shift}


@pytest.mark.parametrize("dynamic", [True, False])
def test_every_batch_is_eagers(dynamic: bool, tmp_path: Path) -> None:
    """One alone, fewer, as many, more than it was built for: cut, and filled up where the batch is fixed."""
    compiled = build(net(), inputs(3), batched=(True, False, True), dynamic=dynamic, store=tmp_path)
    for batch in (1, 2, 3, 6, 7, 10):
        found, wanted = compiled(*inputs(batch)), net()(*inputs(batch))
        assert found._fields == wanted._fields
        assert found.nothing is None
        torch.testing.assert_close(found.image, wanted.image)
        torch.testing.assert_close(found.more, wanted.more)
    assert compiled.manifest is not None
    assert set(compiled.manifest.verified) == {"batch 3", "batch 1"}
    assert 0 < compiled.manifest.verified["batch 3"]["relative"] < 1e-5
    assert compiled.manifest.verified["batch 3"]["psnr"] > 100


def test_norms_and_attention_stay_whole(tmp_path: Path) -> None:
    """GroupNormalization from opset 21 on, Attention from 23."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(2, 8)

        def forward(self, x: Tensor) -> Tensor:
            q = self.norm(x).flatten(2).mT[:, None]
            return torch.nn.functional.scaled_dot_product_attention(q, q, q)

    module, example = Attending().eval(), (torch.randn(2, 8, 3, 3),)
    for opset, attention in ((21, 0), (23, 1)):
        made = build(module, example, store=tmp_path, options=Options(opset=opset))
        assert made.manifest is not None
        (folder,) = tmp_path.glob(f"module-*-{made.manifest.key}")
        counts = onnx.operators(folder)
        assert counts["GroupNormalization"] == 1
        assert counts.get("Attention", 0) == attention
        torch.testing.assert_close(made(*example), module(*example))


def test_weights_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A protobuf ends at 2 GiB: from a bound on, weights are external data, which the session finds."""
    monkeypatch.setattr(onnx, "_INLINE", 100)
    compiled = build(net(), inputs(2), batched=(True, False, True), store=tmp_path)
    assert compiled.manifest is not None
    assert set(compiled.manifest.files) == {"model.onnx", "model.onnx.data"}
    torch.testing.assert_close(compiled(*inputs(2)).image, net()(*inputs(2)).image)


def test_live_backends_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)  # inductor has its own tests
    for backend in ("eager", "compile"):
        compiled = build(net(), inputs(2), batched=(True, False, True), backend=backend, store=tmp_path)
        torch.testing.assert_close(compiled(*inputs(4)).more, net()(*inputs(4)).more)
        assert compiled.manifest is None
    assert not list(tmp_path.iterdir())


def test_bfloat16(tmp_path: Path) -> None:
    """It goes through addresses, since numpy has none; onnxruntime's CPU moves it but multiplies none."""

    def moved(x: Tensor) -> Tensor:
        return torch.cat([x, x.flip(1)], dim=1)[:, None].mT

    x = torch.randn(3, 6).bfloat16()
    found = build(moved, (x,), store=tmp_path)(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, moved(x))
    with pytest.raises(ExportError, match="cannot be loaded"):
        build(nn.Linear(6, 4).bfloat16().eval(), (x,), store=tmp_path)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"backend": "onx"}, "backend 'onx': did you mean 'onnx'?"),
        ({"batched": (True,)}, "batched has 1 entries for 3 arguments"),
        ({"example_inputs": (), "batched": ()}, "example inputs hold no tensor"),
        ({"tolerance": 0.0}, "differs from eager by"),
        ({"options": lambda: Options(provider="cuda")}, "provider 'cuda' with tensors on cpu"),
        ({"options": lambda: Options(cuda_graph=True)}, "cuda_graph: a recorded run has one batch"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], line: str, tmp_path: Path) -> None:
    """One line, and nothing is kept."""
    changed = {name: value() if callable(value) else value for name, value in change.items()}
    wanted: dict[str, Any] = {"example_inputs": inputs(2), "batched": (True, False, True), "store": tmp_path, **changed}
    with pytest.raises(ExportError, match=line.replace("?", r"\?")) as error:
        build(net(), wanted.pop("example_inputs"), **wanted)
    assert "\n" not in str(error.value)
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith(".lock")]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (lambda x, t, told: (x.double(), t, told), "in0 is torch.float64"),
        (lambda x, t, told: (x[:, :, :4], t, told), r"built for torch.float32 \['B', 3, 5, 7\]"),
        (lambda x, t, told: (x[:1], t, told), "has a batch of 2, an input before it one of 1"),
        (lambda x, t, told: (x, t), "a call with 2 tensors"),
        (lambda x, t, told: (x, t, {"shift": told["shift"], "more": x}), "a call with 4 tensors"),
    ],
)
def test_wrong_calls(arguments: Callable[..., Any], line: str) -> None:
    compiled = build(net(), inputs(2), batched=(True, False, True), backend="eager")
    with pytest.raises(ExportError, match=line):
        compiled(*arguments(*inputs(2)))


def test_a_result_of_the_whole_batch_is_not_cut() -> None:
    def whole(x: Tensor) -> Tensor:
        return x.mean()

    compiled = build(whole, (torch.randn(2, 3),), backend="eager", most=2)
    with pytest.raises(ExportError, match="belongs to the whole batch"):
        compiled(torch.randn(5, 3))


def test_what_hangs_on_the_batch_is_seen() -> None:
    """Centred samples are not cut or filled up; a batch in another place than dimension 0 is refused."""

    def centred(x: Tensor) -> Tensor:
        return x - x.mean(dim=0)

    compiled = build(centred, (torch.randn(3, 4),), backend="eager", dynamic=False)
    assert not compiled.samples
    with pytest.raises(ExportError, match="belongs to the whole batch"):
        compiled(torch.randn(2, 4))
    for function in (lambda x: x.T * 1, lambda x: x.repeat(2, 1)):
        with pytest.raises(ExportError, match="expected the batch as its dimension 0"):
            build(function, (torch.randn(3, 4),), backend="eager")
    with pytest.raises(ExportError, match="an empty batch"):
        build(lambda x: x * 2, (torch.randn(3, 4),), backend="eager")(torch.randn(0, 4))


def test_other_arguments_and_other_code_are_other_artifacts(tmp_path: Path) -> None:
    """A number, None in another place, another function over the same networks, another nesting of the result."""

    def scaled(x: Tensor, factor: float, shift: Tensor | None, more: Tensor | None) -> Any:
        return x * factor + (shift if shift is not None else 0) - (more if more is not None else 0)

    x = torch.randn(2, 3)
    keys = set()
    for args in ((x, 2.0, x, None), (x, 5.0, x, None), (x, 2.0, None, x)):
        compiled = build(scaled, args, store=tmp_path)
        torch.testing.assert_close(compiled(*args), scaled(*args))
        keys.add(compiled.manifest.key if compiled.manifest else "")
    assert len(keys) == 3
    for wrong in ((x, 7.0, None, x), (x, 2.0, x, None)):
        with pytest.raises(ExportError, match="beside its tensors"):
            compiled(*wrong)
    module = nn.Linear(3, 2).eval()
    functions: list[Callable[[Tensor], Any]] = [lambda x: module(x), lambda x: module(x) + 1, lambda x: (module(x),)]
    for function in functions:
        found = build(function, (x,), modules=(module,), store=tmp_path)(x)
        torch.testing.assert_close(found, function(x))


def test_a_half_precision_network_behind_whole_numbers(tmp_path: Path) -> None:
    """What a build may be off by follows the weights' dtype too: token ids have none."""
    assert making.allowed(call_of(nn.Embedding(4, 3).bfloat16(), (torch.tensor([[1, 2]]),))) == 1e-1
    assert making.allowed(call_of(nn.Embedding(4, 3), (torch.tensor([[1, 2]]),))) == 1e-3


def test_differences_are_not_hidden_by_what_is_not_finite() -> None:
    inf, nan = float("inf"), float("nan")
    same = making.compared([torch.tensor([inf, nan, 1.0])], [torch.tensor([inf, nan, 1.0])])
    assert same["relative"] == 0
    assert making.compared([torch.tensor([inf, 1.0])], [torch.tensor([inf, 2.0])])["relative"] == 0.5
    assert making.compared([torch.tensor([nan, 1.0])], [torch.tensor([3.0, 1.0])])["relative"] == inf


def test_a_function_that_cannot_be_traced(tmp_path: Path) -> None:
    def reads(x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x

    def strange(x: Tensor) -> Any:
        return {"value": 3.0}

    for function, line in ((reads, "cannot be traced"), (strange, "returns a float")):
        with pytest.raises(ExportError, match=line) as error:
            build(function, (torch.randn(2, 3),), store=tmp_path)
        assert "\n" not in str(error.value)


def test_custom_operators_are_found() -> None:
    """A graph with an op that no other runtime has is refused; the reference is plain."""

    @torch.library.custom_op("synthkd_test::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    @twice.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    x = torch.randn(2, 3)
    assert foreign_operators(exported(call_of(lambda x: twice(x) + 1, (x,)), True)) == ["synthkd_test.twice.default"]
    assert foreign_operators(exported(call_of(lambda x: x * 2 + 1, (x,)), True)) == []
    with pytest.raises(ExportError, match=r"synthkd_test\.twice"):
        build(lambda x: twice(x), (x,), backend="onnx")


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line with the extra to install, and one for two packages that overwrite each other."""
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
        return real(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        with pytest.raises(ExportError, match=r"onnxruntime is not installed; pip install 'synthkd\[onnx\]'"):
            build(net(), inputs(2), store=tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    with pytest.raises(ExportError, match="both installed and overwrite each other"):
        build(net(), inputs(2), store=tmp_path)


def test_unknown_options() -> None:
    for change, line in (({"opset": 17}, "opset is 17"), ({"provider": "gpu"}, "'gpu'"), ({"mode": "x"}, "mode 'x'")):
        with pytest.raises(ExportError, match=line):
            Options(**change)  # type: ignore[arg-type]
    assert Options.from_dict(Options(opset=21).to_dict()) == Options(opset=21)
    assert export.BACKENDS[0] == "eager"


def test_aoti_where_torchs_path_has_a_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its linker takes no such path: one line, before anything is traced."""
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "with space" / "torch" / "__init__.py"))
    with pytest.raises(ExportError, match="cannot link where a path has a space"):
        build(net(), inputs(2), backend="aoti", store=tmp_path)
    assert "space" in export.available()["aoti"]
