"""A student as one file: round trips at several batches, what is written beside, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from synthkd.dfkd import ship
from synthkd.dfkd.nets import build_net
from synthkd.dfkd.ship import export_student, load_shipped
from synthkd.dfkd.teachers import Teacher
from synthkd.engine.errors import SynthkdError


@pytest.fixture
def student() -> Teacher:
    """A small student that is not square."""
    torch.manual_seed(0)
    net = build_net("resnet", 3, {"widths": [4, 6], "blocks": [1, 1]})
    return Teacher(net, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), input_size=(6, 10), classes=("a", "b", "ü"))


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_round_trip(kind: str, student: Teacher, tmp_path: Path) -> None:
    """Same logits at batches 1, 2 and 5; the contract is in the file and beside it; nothing else is left."""
    path = tmp_path / "out" / f"student.{kind}"
    assert export_student(student, path, kind) == path
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(["student.json", path.name])
    shipped = load_shipped(path, allow_code=kind == "pt2")
    assert shipped.classes == ("a", "b", "ü")
    assert shipped.input_size == (6, 10)
    assert shipped.about == json.loads(path.with_suffix(".json").read_text())
    for batch in (1, 2, 5):
        images = torch.randint(0, 256, (batch, 3, 6, 10), dtype=torch.uint8)
        with torch.no_grad():
            torch.testing.assert_close(shipped(images), student(images / 255), atol=1e-5, rtol=1e-5)
    assert shipped(torch.zeros(2, 3, 9, 9, dtype=torch.uint8)).shape == (2, 3)
    with pytest.raises(SynthkdError, match=r"torch\.float32; expected torch\.uint8"):
        shipped(torch.zeros(1, 3, 6, 10))


def test_resizing_inside(student: Teacher, tmp_path: Path) -> None:
    """Larger images are made small in the graph as the student makes them."""
    export_student(student, tmp_path / "s.onnx", "onnx", image_size=(13, 17))
    images = torch.randint(0, 256, (3, 3, 13, 17), dtype=torch.uint8)
    found = load_shipped(tmp_path / "s.onnx")(images)
    torch.testing.assert_close(found, student(images / 255), atol=1e-4, rtol=1e-4)


def test_refusals(student: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each; a file that computes something else is not left behind."""
    with pytest.raises(SynthkdError, match="kind 'onx'; did you mean 'onnx'"):
        export_student(student, tmp_path / "s.onx", "onx")
    with pytest.raises(SynthkdError, match=r"does not end in \.pt2"):
        export_student(student, tmp_path / "s.onnx", "pt2")
    (tmp_path / "s.pt2").write_bytes(b"PK")
    with pytest.raises(SynthkdError, match="can run code"):
        load_shipped(tmp_path / "s.pt2")
    with pytest.raises(SynthkdError, match="cannot be read"):
        load_shipped(tmp_path / "s.pt2", allow_code=True)
    (tmp_path / "t.onnx").write_bytes(b"\x08\x00nothing")
    with pytest.raises(SynthkdError, match=r"t\.onnx is no ONNX file"):
        load_shipped(tmp_path / "t.onnx")

    wrong = ship.Shipped(lambda x: torch.zeros(len(x), 3), ship.contract(student, (6, 10)))
    monkeypatch.setattr(ship, "load_shipped", lambda *_, **__: wrong)
    with pytest.raises(SynthkdError, match="differs from the student by"):
        export_student(student, tmp_path / "u.pt2", "pt2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.pt2", "t.onnx"]


def test_files_with_outside_weights_and_without_contract(tmp_path: Path) -> None:
    """Such a file could name any path of the machine."""
    onnx = pytest.importorskip("onnx")
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], b"\0\0\0\0", raw=True)
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in ("x", "y")]
    add = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([add], "g", value[:1], value[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(tmp_path / "plain.onnx"))
    with pytest.raises(SynthkdError, match="says nothing about its input"):
        load_shipped(tmp_path / "plain.onnx")
    inside = model.graph.initializer[0]
    inside.ClearField("raw_data")
    inside.data_location = onnx.TensorProto.EXTERNAL
    entry = inside.external_data.add()
    entry.key, entry.value = "location", "elsewhere"
    (tmp_path / "outside.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "elsewhere").write_bytes(b"\0\0\0\0")
    with pytest.raises(SynthkdError, match="keeps tensor 'w' in another file"):
        load_shipped(tmp_path / "outside.onnx")
