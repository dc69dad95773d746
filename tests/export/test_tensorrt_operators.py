"""What TensorRT's ONNX parser takes, by its own list, and what is done about bfloat16 Resizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.export import tensorrt_operators
from synthkd.export.errors import ExportError
from synthkd.export.onnx import prepare_for_tensorrt


def test_operators_by_version() -> None:
    """Whole attention from 10.14 on; an operator of another domain never; the message says what to do."""
    used = {"Conv", "Attention", "GroupNormalization", "Resize", "Gelu", "com.microsoft::Gelu", "Col2Im"}
    found = tensorrt_operators.unsupported_operators(used, "10.13.3")
    assert found == ["Attention", "Col2Im", "com.microsoft::Gelu"]
    assert tensorrt_operators.unsupported_operators(used, "11.4.0.106") == ["Col2Im", "com.microsoft::Gelu"]
    assert [tensorrt_operators.opset_for(v) for v in ("10.9", "10.13.3", "10.14.1", "11.4")] == [21, 21, 23, 23]
    with pytest.raises(ExportError, match=r"10.13 does not know Attention \(since 10.14\); export with opset 21$"):
        tensorrt_operators.check_operators(["Attention", "Conv"], "10.13")
    tensorrt_operators.check_operators(["Attention", "Conv"], "10.14")


def test_nodes_the_parser_excludes() -> None:
    """By attribute, number of outputs and inputs, and computed axes; defaults and constants pass."""
    make = pytest.importorskip("onnx").helper.make_node
    helper = pytest.importorskip("onnx").helper
    make = helper.make_node

    def refused(*nodes: Any) -> str:
        graph = helper.make_graph(list(nodes), "g", [], [], [helper.make_tensor("axes", 7, [1], [1])])
        try:
            tensorrt_operators.check_nodes(helper.make_model(graph))
        except ExportError as error:
            return str(error)
        return ""

    assert refused(make("Resize", ["x", "", "s"], ["y"]), make("Attention", ["q", "k", "v", "m"], ["y"])) == ""
    assert refused(make("ReduceMean", ["x", "axes"], ["y"]), make("ReduceSum", ["x"], ["y"])) == ""
    assert "antialias is 1; expected 0" in refused(make("Resize", ["x", "", "s"], ["y"], antialias=1))
    assert "mode is 'cubic'; expected nearest or linear" in refused(make("Resize", ["x"], ["y"], mode="cubic"))
    assert "it has 4 outputs; expected at most 1" in refused(make("Attention", ["q", "k", "v"], ["y", "", "", "w"]))
    assert "it has 6 inputs" in refused(make("Attention", ["q", "k", "v", "", "a", "b"], ["y"]))
    assert "like node 'n': its axes are computed" in refused(make("ReduceMean", ["x", "computed"], ["y"], name="n"))


def test_bfloat16_resize_is_done_in_float32(tmp_path: Path) -> None:
    """Casts around it and around nothing else; onnxruntime, which has no bfloat16 Resize either, then runs it."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")

    class Upsample(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.interpolate(x.bfloat16(), scale_factor=2.0).float()

    given = torch.randn(1, 2, 3, 5)
    program = torch.onnx.export(Upsample().eval(), (given,), dynamo=True, opset_version=21, verbose=False)
    assert program is not None
    program.save(tmp_path / "model.onnx")
    prepare_for_tensorrt(tmp_path, "10.9")
    model = onnx.load(tmp_path / "model.onnx")
    assert [node.op_type for node in model.graph.node] == ["Cast", "Cast", "Resize", "Cast", "Cast"]
    onnx.checker.check_model(model, full_check=True)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    assert torch.equal(torch.from_numpy(found), Upsample()(given))
    assert tensorrt_operators.cast_around_resize(model) == 0
