"""A callable with its example inputs -> flat tensors in and out -> a graph of plain operators."""

import functools
import hashlib
import operator
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_map, tree_unflatten

from synthkd.export.errors import ExportError
from synthkd.export.spec import TensorSpec
from synthkd.export.structure import structure_of

_PLAIN = ("aten", "prims", "sym_size", "profiler")


@dataclass
class Call:
    """A function with its flat example: tensors alone, whatever lists, dicts and tuples its arguments are.

    batched: per tensor, whether dimension 0 is the batch; `structure` of the result is known once the function has run.
    """

    function: Callable[..., Any]
    modules: tuple[nn.Module, ...]
    tensors: list[Tensor]
    batched: list[bool]
    names: list[str]
    spec: TreeSpec
    others: dict[int, Any] = field(default_factory=dict)
    structure: Any = None

    def flat(self, args: Sequence[Any]) -> list[Tensor]:
        """The tensors of a call's arguments; raises ExportError where they are not built like the example's."""
        leaves, spec = tree_flatten(tuple(args))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        others = {i: x for i, x in enumerate(leaves) if not isinstance(x, Tensor)}
        if spec == self.spec and len(tensors) == len(self.tensors) and others != self.others:
            raise ExportError(f"a call with {others} beside its tensors, by place; built for {self.others}")
        if spec != self.spec or len(tensors) != len(self.tensors):
            raise ExportError(f"a call with {len(tensors)} tensors, {spec}; built for {len(self.tensors)}, {self.spec}")
        return tensors

    def identity(self) -> dict[str, Any]:
        """What beside tensors and networks decides a result: nesting, values of other kinds, and the code itself."""
        others = {str(i): repr(x) for i, x in self.others.items()}
        return {"nesting": str(self.spec), "values": others, "code": code_of(self.function)}

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The function on flat tensors, its result flat too."""
        rest = iter(tensors)
        count = len(self.tensors) + len(self.others)
        leaves = [self.others[i] if i in self.others else next(rest) for i in range(count)]
        out: list[Tensor] = []
        self.structure = structure_of(self.function(*tree_unflatten(leaves, self.spec)), out)
        return tuple(out)

    def at(self, batch: int) -> list[Tensor]:
        """The example at another batch: its first samples, or the last one over and over."""
        return [resized(x, batch) if batched else x for x, batched in zip(self.tensors, self.batched, strict=True)]

    @property
    def batch(self) -> int:
        """Of the example; 1 where nothing has one. Raises ExportError where the tensors disagree."""
        found = {name: len(x) for name, x, b in zip(self.names, self.tensors, self.batched, strict=True) if b}
        if len(set(found.values())) > 1:
            raise ExportError(f"example inputs disagree about the batch: {found}")
        return next(iter(found.values()), 1)

    def inputs(self) -> tuple[TensorSpec, ...]:
        """What goes in."""
        rows = zip(self.names, self.tensors, self.batched, strict=True)
        return tuple(TensorSpec(name, tuple(x.shape), x.dtype, batched) for name, x, batched in rows)


def code_of(function: Any) -> str:
    """SHA-256 over the code of a function, method, partial or callable object; what it closes over is not seen."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, nn.Module):
        function = type(function).forward
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    named = f"{getattr(function, '__module__', '')} {getattr(function, '__qualname__', type(function).__qualname__)}"
    return hashlib.sha256(repr((named, _code(code))).encode()).hexdigest()


def _code(code: Any) -> Any:
    """Bytes and constants of a code object and of those inside it; a set's order hangs on the process."""
    if not isinstance(code, types.CodeType):
        return sorted(map(repr, code)) if isinstance(code, frozenset) else repr(code)
    return code.co_code, code.co_names, [_code(c) for c in code.co_consts if c is not code.co_name]


def resized(x: Tensor, batch: int) -> Tensor:
    """The first `batch` samples of x [B,...], its last one repeated where there are fewer."""
    if len(x) >= batch:
        return x[:batch]
    return torch.cat([x, x[-1:].expand(batch - len(x), *x.shape[1:])])


def call_of(
    function: Callable[..., Any],
    args: Sequence[Any],
    modules: Iterable[nn.Module] | None = None,
    batched: Sequence[bool] | None = None,
) -> Call:
    """See `build` for the arguments. Raises ExportError for an example without a tensor, or with another count."""
    args = tuple(args)
    flags = [True] * len(args) if batched is None else list(batched)
    if len(flags) != len(args):
        raise ExportError(f"batched has {len(flags)} entries for {len(args)} arguments; expected one for each")
    spread = [tree_map(lambda _, on=on: on, arg) for arg, on in zip(args, flags, strict=True)]
    pairs, spec = tree_flatten_with_path(args)
    marks = tree_flatten(tuple(spread))[0]
    rows = [(path, x, mark) for (path, x), mark in zip(pairs, marks, strict=True) if isinstance(x, Tensor)]
    if not rows:
        raise ExportError("example inputs hold no tensor")
    own = (function,) if isinstance(function, nn.Module) else ()
    return Call(
        function=function,
        modules=tuple(modules) if modules is not None else own,
        tensors=[x.detach() for _, x, _ in rows],
        batched=[mark and x.dim() > 0 for _, x, mark in rows],
        names=_distinct([_name(path) for path, _, _ in rows]),
        spec=spec,
        others={i: x for i, (_, x) in enumerate(pairs) if not isinstance(x, Tensor)},
    )


def _name(path: Any) -> str:
    """A tensor's place among the arguments as a word: [0]['a'] -> in0_a."""
    text = keystr(path).replace("']", "").replace("]", "").replace("'", "")
    return "in" + "".join(c if c.isalnum() else "_" for c in text).lstrip("_")


def _distinct(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]


class Flat(nn.Module):
    """A Call as a module of flat tensors, for tracers."""

    def __init__(self, call: Call) -> None:
        """Its networks are children, so that their weights are weights of the graph."""
        super().__init__()
        self.networks = nn.ModuleList(call.modules)
        self._run = call.run

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        """See `Call.run`."""
        return self._run(*flat)


def dynamic_dims(call: Call, dynamic: bool) -> dict[str, Any]:
    """torch.export's dynamic_shapes of `Flat`."""
    return {"flat": tuple({0: Dim.DYNAMIC} if dynamic and batched else None for batched in call.batched)}


def exported(call: Call, dynamic: bool) -> ExportedProgram:
    """The graph of a forward pass, whole operators (attention, norms) kept; dynamic: of any batch.

    Raises ExportError, one line, where the function cannot be traced.
    """
    example = call.at(max(call.batch, 2)) if dynamic else call.tensors  # a batch of one would be built in for good
    module = Flat(call)
    try:
        with torch.no_grad():
            return torch.export.export(
                module, tuple(example), dynamic_shapes=dynamic_dims(call, dynamic), strict=False
            )
    except Exception as error:  # tracers raise anything
        raise ExportError(f"the function cannot be traced ({first_line(error)})") from error


def foreign_operators(program: ExportedProgram) -> list[str]:
    """Operators of a graph that are no plain ones of torch: a custom op, say, which no other runtime has."""
    found = set()
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        name = str(node.target)
        space = name.partition(".")[0]
        if isinstance(node.target, torch._ops.OpOverload) and space not in _PLAIN:
            found.add(name)
    return sorted(found)


def check_plain(program: ExportedProgram) -> None:
    """Raise ExportError for operators that no other runtime has."""
    foreign = foreign_operators(program)
    if foreign:
        raise ExportError(f"the graph holds {foreign[0]}, which no other runtime has; trace it with reference ops")


def first_line(error: BaseException) -> str:
    """What went wrong, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
