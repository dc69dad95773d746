"""The gradient of a group that memory holds in parts only, as three functions that need no autograd where they run.

`look`: what the networks show of a part; `judge`: the loss of all that was seen, and its gradient with respect to it;
`pull`: that gradient brought back to a part's latents. One of each per size of a part, and per kind of view.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from synthkd.engine.augment import Look
from synthkd.engine.decoders import Decoder
from synthkd.engine.guidance import (
    GroupGuidance,
    GuidanceStep,
    judged_apart,
    parts_of,
    pulled_back,
    two_passes,
    view_of,
)


@dataclass(frozen=True)
class Shown:
    """How what a part shows is nested: its tensors alone go from graph to graph."""

    spec: TreeSpec
    others: Mapping[int, Any]

    def built(self, tensors: Sequence[Tensor]) -> Any:
        """What was seen, from its tensors in order."""
        rest = iter(tensors)
        count = len(tensors) + len(self.others)
        return tree_unflatten([self.others[i] if i in self.others else next(rest) for i in range(count)], self.spec)


@dataclass(frozen=True)
class Piece:
    """One of the functions, an example of its arguments and which of them have the part's batch."""

    name: str
    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    gradient: bool


class PartedGradient:
    """Makes the pieces for a group, and runs a call on them; neither takes a gradient."""

    def __init__(
        self, guidance: GroupGuidance, decode: Decoder, group: int, chunk: int, using: Callable[[Any], Any]
    ) -> None:
        """using: a context in which the guidance takes what it is given in place of its own."""
        self._guidance, self._decode, self._using = guidance, decode, using
        self._parts = parts_of(group, chunk)
        self._shown: dict[str, Shown] = {}

    def pieces(
        self, x0: Tensor, targets: Tensor, looks: Sequence[Look], memory: Any, given: Any
    ) -> list[Piece]:
        """All functions, with what a whole group gives them; each kind of part is looked at once, without gradient."""
        half = x0.dtype == torch.float16
        made: list[Piece] = []
        for view in (None, *looks[:1]):
            seen: list[list[Tensor]] = []
            for part in self._parts:
                name = self._name(part, view)
                of = None if view is None else view.part(part)
                look = (self._look(name), (x0[part], of, given))
                with torch.no_grad():
                    seen.append(list(look[0](*look[1])))
                if f"look{name}" not in [piece.name for piece in made]:
                    made.append(Piece(f"look{name}", *look, gradient=False))
            names = [self._name(part, view) for part in self._parts]
            judge = self._judge(names, half)
            made.append(Piece(f"judge{names[0]}", judge, (seen, targets, memory), gradient=True))
            for part, name, tensors in zip(self._parts, names, seen, strict=True):
                if f"pull{name}" not in [piece.name for piece in made]:
                    of = None if view is None else view.part(part)
                    shown = self._shown[name].built(tensors)
                    inputs = (x0[part], of, given, _dense(shown, [None] * len(tree_flatten(shown)[0])))
                    made.append(Piece(f"pull{name}", self._pull(), inputs, gradient=True))
        return made

    def _name(self, part: slice, view: Look | None) -> str:
        """Of a kind of part: its size, and whether it is a view."""
        return f"-{part.stop - part.start}" + ("" if view is None else "-view")

    def _look(self, name: str) -> Callable[..., tuple[Tensor, ...]]:
        def look(x0: Tensor, view: Look | None, given: Any) -> tuple[Tensor, ...]:
            with self._using(given):
                leaves, spec = tree_flatten(view_of(self._guidance, self._decode, view)(x0))
            others = {i: x for i, x in enumerate(leaves) if not isinstance(x, Tensor)}
            self._shown.setdefault(name, Shown(spec, others))
            return tuple(x for x in leaves if isinstance(x, Tensor))

        return look

    def _judge(self, names: Sequence[str], half: bool) -> Callable[..., Any]:
        """(tensors of every part, targets, memory) -> loss, terms, memory, the parts' gradients."""

        def judge(seen: Sequence[Sequence[Tensor]], targets: Tensor, memory: Any) -> Any:
            shown = [self._shown[name].built(tensors) for name, tensors in zip(names, seen, strict=True)]
            (loss, terms, after), cotangents = judged_apart(self._guidance, shown, targets, memory, half)
            dense = [_dense(part, row) for part, row in zip(shown, cotangents, strict=True)]
            return loss.detach(), {name: term.detach() for name, term in terms.items()}, after, dense

        return judge

    def _pull(self) -> Callable[..., Tensor]:
        """(x0, view, given, gradients of what was seen) -> the gradient on x0."""

        def pull(x0: Tensor, view: Look | None, given: Any, wanted: Sequence[Tensor | None]) -> Tensor:
            zero = torch.zeros_like(x0).requires_grad_()
            with torch.enable_grad(), self._using(given):
                return pulled_back(view_of(self._guidance, self._decode, view)(x0.detach() + zero), wanted, zero)

        return pull

    def __call__(
        self, run: Mapping[str, Callable[..., Any]], given: Any, x0: Tensor, targets: Tensor, looks: Sequence[Look],
        memory: Any,
    ) -> GuidanceStep:  # fmt: skip
        """A whole group's gradient; run: the pieces by name, compiled."""
        half = x0.dtype == torch.float16

        def judge(shown: list[Any]) -> Any:
            seen = [tensors for _, tensors in shown]
            loss, terms, after, cotangents = run[f"judge{shown[0][0]}"](seen, targets, memory)
            return (loss, terms, after), cotangents

        def look(part: slice, view: Look | None) -> Any:
            name = self._name(part, view)
            return name, list(run[f"look{name}"](x0[part], view, given))

        def pull(part: slice, view: Look | None, wanted: Any) -> Tensor:
            grad: Tensor = run[f"pull{self._name(part, view)}"](x0[part], view, given, wanted)
            return grad

        return two_passes(self._parts, looks, look, judge, pull, half, memory is not None)


def _dense(shown: Any, found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of what a part showed, zeros for floating tensors that have none: the nesting hangs on nothing else."""
    leaves = tree_flatten(shown)[0]
    rows = zip(leaves, found, strict=True)
    return [
        g if g is not None else torch.zeros_like(x) if isinstance(x, Tensor) and x.is_floating_point() else None
        for x, g in rows
    ]
