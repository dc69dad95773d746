"""What TensorRT's ONNX parser takes, by its own list; needs neither TensorRT nor onnx."""

import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from synthkd.export.errors import ExportError
from synthkd.export.spec import OPSETS
from synthkd.export.tensorrt import numbers

FLOAT, BFLOAT16 = 1, 16  # of onnx's TensorProto.DataType
INT = 2  # of onnx's AttributeProto.AttributeType
# What a node may have, where the parser's list says more than the operator's name: attribute -> values, the first being
# the default; how many outputs and inputs; and inputs whose value must be in the file.
ATTRIBUTES: dict[str, dict[str, tuple[Any, ...]]] = {
    "Attention": {"softcap": (0.0,), "qk_matmul_output_mode": (0,)},
    "AveragePool": {"dilations": ((), (1, 1), (1, 1, 1))},
    "MaxPool": {"dilations": ((), (1, 1), (1, 1, 1))},
    "Resize": {
        "mode": ("nearest", "linear"),
        "coordinate_transformation_mode": (
            "half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners",
        ),
        "nearest_mode": ("round_prefer_floor", "floor", "ceil", "round_prefer_ceil"),
        "keep_aspect_ratio_policy": ("stretch",),
        "antialias": (0,),
    },
    "ScatterND": {"reduction": ("none",)},
    "TopK": {"sorted": (1,)},
}  # fmt: skip
OUTPUTS = {"Attention": 1, "LayerNormalization": 1, "MaxPool": 1}
INPUTS = {"Attention": 4}
REDUCTIONS = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"
CONSTANT = {f"Reduce{name}": 1 for name in REDUCTIONS.split()}  # operator -> which input: the axes


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


def check_nodes(model: Any) -> None:
    """Raise ExportError for the first node that the parser's list excludes although it has the operator.

    model: an onnx ModelProto. Subgraphs and functions are not looked into; sizes are not looked at.
    """
    graph = model.graph
    known = {tensor.name for tensor in graph.initializer}
    known |= {name for node in graph.node if node.op_type == "Constant" for name in node.output}
    for node in graph.node:
        why = _excluded(node, known)
        if why:
            raise ExportError(f"TensorRT's parser takes no {node.op_type} like node {node.name!r}: {why}")


def _excluded(node: Any, known: set[str]) -> str:
    """What a node has that the list says it must not have; known: values that stand in the file."""
    given = {attribute.name: _value(attribute) for attribute in node.attribute}
    for name, values in ATTRIBUTES.get(node.op_type, {}).items():
        if given.get(name, values[0]) not in values:
            return f"{name} is {given[name]!r}; expected {' or '.join(str(value) for value in values)}"
    for side, names, most in (("outputs", node.output, OUTPUTS), ("inputs", node.input, INPUTS)):
        used = max((i for i, name in enumerate(names, 1) if name), default=0)
        if used > most.get(node.op_type, used):
            return f"it has {used} {side}; expected at most {most[node.op_type]}"
    place = CONSTANT.get(node.op_type, len(node.input))
    if place < len(node.input) and node.input[place] and node.input[place] not in known:
        return "its axes are computed; expected constants"
    return ""


def _value(attribute: Any) -> Any:
    """A number, a text or a tuple of integers, by the number of the attribute's type."""
    kinds: dict[int, Callable[[], Any]] = {
        1: lambda: attribute.f,
        INT: lambda: attribute.i,
        3: lambda: attribute.s.decode(),
        7: lambda: tuple(attribute.ints),
    }
    return kinds.get(attribute.type, lambda: None)()


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
