"""What TensorRT's ONNX parser takes, by its own list; needs neither TensorRT nor onnx."""

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from synthkd.export.errors import ExportError
from synthkd.export.spec import OPSETS
from synthkd.export.tensorrt import numbers

FLOAT, BFLOAT16 = 1, 16  # of onnx's TensorProto.DataType
INT = 2  # of onnx's AttributeProto.AttributeType


@cache
def documented() -> dict[str, Any]:
    """The parser's list: `operators` (name -> dtypes), `restrictions`, `since` (versions), and its own `version`."""
    text = Path(__file__).with_name("tensorrt_operators.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def unsupported_operators(operators: Iterable[str], version: str) -> list[str]:
    """Those that the parser of a TensorRT version does not take, sorted; an operator of onnx's own domain is its name.

    A version later than the list's may take more, so that there the answer is a warning rather than a verdict.
    """
    table, have = documented(), numbers(version)
    return sorted(
        name
        for name in set(operators)
        if name not in table["operators"] or numbers(table["since"].get(name, "0.0")) > have
    )


def opset_for(version: str) -> int:
    """The latest opset we write that a version's parser takes: 23 keeps attention whole, 21 is without it."""
    return OPSETS[0] if unsupported_operators(["Attention"], version) else OPSETS[-1]


def check_operators(operators: Iterable[str], version: str) -> None:
    """Raise ExportError, in one line with what to do, for operators that the parser of a TensorRT version lacks."""
    refused = unsupported_operators(operators, version)
    if refused:
        since = documented()["since"]
        told = ", ".join(f"{name} (since {since[name]})" if name in since else name for name in refused)
        newer = [name for name in refused if name in since and name != "GroupNormalization"]
        hint = "; export with opset 21" if newer else ""
        raise ExportError(f"the ONNX parser of TensorRT {version} does not know {told}{hint}")


def cast_around_resize(model: Any) -> int:
    """Do every Resize of a bfloat16 tensor in float32, between two Casts; in place; returns how many there were.

    model: an onnx ModelProto that tells its values' dtypes (`value_info`), as torch's exporter writes it. The nearest
    neighbour stays exact; a linear one is rounded once, at the end.
    """
    graph = model.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    dtypes = {value.name: value.type.tensor_type.elem_type for value in values}
    nodes, found = [], 0
    for node in graph.node:
        low = node.op_type == "Resize" and BFLOAT16 in (dtypes.get(node.input[0]), dtypes.get(node.output[0]))
        nodes += _in_float32(node) if low else [node]
        found += low
    if found:
        del graph.node[:]
        graph.node.extend(nodes)
    return found


def _in_float32(node: Any) -> list[Any]:
    """Cast, the node, Cast: the same names outside."""
    inner = type(node)()
    inner.CopyFrom(node)
    inner.input[0], inner.output[0] = f"{node.output[0]}_in_float32", f"{node.output[0]}_float32"
    before = _cast(type(node)(), node.input[0], inner.input[0], FLOAT)
    return [before, inner, _cast(type(node)(), inner.output[0], node.output[0], BFLOAT16)]


def _cast(node: Any, given: str, made: str, dtype: int) -> Any:
    node.op_type, node.name = "Cast", f"cast_to_{made}"
    node.input.append(given)
    node.output.append(made)
    node.attribute.add(name="to", i=dtype, type=INT)
    return node
