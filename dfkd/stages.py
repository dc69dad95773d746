"""Feature maps of any classifier at the end of each of its stages, its code untouched."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from synthkd.engine.errors import SynthkdError, suggest

Size = tuple[int, int]


class Output(NamedTuple):
    """One output [B,C,H,W] of a module in a trial pass; use: which call of the module it was, from 0; value: itself."""

    name: str
    use: int
    channels: int
    size: Size
    value: Tensor | None


class Stages:
    """Hooks on the modules whose outputs end a network's stages, put on once for many passes.

    A stage is a run of maps of one spatial size; it ends in the last output of a module before the size changes, as one
    trial pass shows. Outputs inside a module that itself returns another size belong to the next stage, as the first
    layers of a block with a stride do, so they count only where there is nothing else. Maps of one position are pooled
    features and no stage, unless there are no others; what is not shaped like the image is no map ([B,H,W,C]).

    names, channels, sizes: of the stages, in forward order, the deepest last; rectified: whether the network's code
    applies a ReLU to the deepest map before it pools it for a linear layer (wide ResNets do), which `reading` then does
    too; on: whether the hooks are. They note nothing outside of `reading`, and what that returns is all that is left of
    a pass, so that one graph can hold it.
    """

    def __init__(self, net: nn.Module, input_size: Size, names: Sequence[str] | None = None) -> None:
        """net: takes [B,3,H,W] of `input_size`; names: modules to use instead, in forward order.

        Raises SynthkdError for a network without maps (a transformer over tokens), a name it does not have, and a
        module that returns no [B,C,H,W].
        """
        known = dict(net.named_modules())
        for name in names or ():
            if name not in known or not name:
                raise SynthkdError(f"stages: {name!r} is no module of the network; {suggest(name, known)}")
        seen, read = _trial(net, input_size)
        found = _ends(seen, input_size) if names is None else [_last_of(seen, name) for name in names]
        if not found:
            raise SynthkdError(
                "stages: the network has no feature maps [B,C,H,W], which losses on maps need; set their weights "
                "(cam, grad_cam, features) to 0"
            )
        self.on, self._found = False, [output._replace(value=None) for output in found]
        self.rectified = _is_rectified(found[-1].value, read)
        self._modules = {output.name: net.get_submodule(output.name) for output in found}
        # Added to the first map of a network whose weights are frozen, it makes all maps part of a graph.
        self._leaf = torch.zeros((), device=_first(net).device, requires_grad=True)
        self._differentiable = False
        self._notes: dict[str, list[Tensor]] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the modules, the deepest last."""
        return tuple(output.name for output in self._found)

    @property
    def channels(self) -> tuple[int, ...]:
        """C of each map."""
        return tuple(output.channels for output in self._found)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Height and width of each map."""
        return tuple(output.size for output in self._found)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it the hooks are on; afterwards none is left. Nothing where they are on already."""
        if self.on:
            yield
            return
        handles = [m.register_forward_hook(self._hook(name)) for name, m in self._modules.items()]
        self.on = True
        try:
            yield
        finally:
            self.on = False
            for handle in handles:
                handle.remove()

    def reading(self, forward: Callable[[], Tensor], differentiable: bool = False) -> tuple[Tensor, list[Tensor]]:
        """What a pass of the network returns, and its maps [B,C,H,W], their graph kept.

        differentiable: give the maps a graph, from the first one on, where a frozen network's would have none.
        Outside of `attached` the hooks are on for this pass.
        """
        if not self.on:
            with self.attached():
                return self.reading(forward, differentiable)
        notes: dict[str, list[Tensor]] = {name: [] for name in self._modules}
        self._notes, self._differentiable = notes, differentiable
        try:
            logits = forward()
        finally:
            self._notes, self._differentiable = None, False
        maps = [notes[output.name][output.use] for output in self._found]
        return logits, [*maps[:-1], torch.relu(maps[-1]) if self.rectified else maps[-1]]

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def note(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if self._notes is None:
                return output
            first = (name, len(self._notes[name])) == (self._found[0].name, self._found[0].use)
            if self._differentiable and first and not output.requires_grad:
                output = output + self._leaf.to(output.dtype)
            self._notes[name].append(output)
            return output

        return note


def paired(student: Sequence[Any], teacher: Sequence[Any]) -> list[tuple[int, int]]:
    """Stages of two networks that belong together, as (student's, teacher's) index: from the deepest backwards."""
    count = min(len(student), len(teacher))
    return [(len(student) - count + i, len(teacher) - count + i) for i in range(count)]


def _trial(net: nn.Module, input_size: Size) -> tuple[list[Output], list[Tensor]]:
    """Outputs [1,C,H,W] of all modules but the network itself in a pass on noise, and what linear layers read, [1,D].

    The pass changes nothing.
    """
    seen: list[Output] = []
    read: list[Tensor] = []
    tokens = [-1]  # how many maps there were before the last [B,N,C]
    uses: dict[str, int] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            use = uses.get(name, 0)
            uses[name] = use + 1
            if isinstance(output, Tensor) and output.dim() == 4:
                size = (int(output.shape[2]), int(output.shape[3]))
                seen.append(Output(name, use, int(output.shape[1]), size, output))
            if isinstance(output, Tensor) and output.dim() == 3:
                tokens[:] = [len(seen)]
            if isinstance(module, nn.Linear) and args and args[0].dim() == 2:
                read.append(args[0])

        return note

    modes = {module: module.training for module in net.modules()}
    handles = [module.register_forward_hook(hook(name)) for name, module in net.named_modules() if name]
    like = _first(net)
    noise = torch.randn(1, 3, *input_size, generator=torch.Generator().manual_seed(0))
    try:
        net.eval()
        with torch.no_grad():
            net(noise.to(device=like.device, dtype=like.dtype))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return ([] if tokens[0] == len(seen) else seen), read  # maps before tokens alone are their embedding


def _first(net: nn.Module) -> Tensor:
    return next(net.parameters(), torch.zeros(()))


def _is_rectified(last: Tensor | None, read: Sequence[Tensor]) -> bool:
    """Whether a linear layer reads the mean over positions of ReLU(last), and none that of `last`."""

    def pooled(x: Tensor) -> bool:
        mean = x.float().mean(dim=(2, 3))
        return any(v.shape == mean.shape and torch.allclose(v.float(), mean, rtol=1e-2, atol=1e-4) for v in read)

    return last is not None and not pooled(last) and pooled(torch.relu(last))


def _is_like(size: Size, image: Size) -> bool:
    """Whether a map has an image's proportions, but for rounding and convolutions without padding."""
    wanted = size[0] * image[1] / image[0]
    return abs(wanted - size[1]) <= max(2.0, 0.25 * size[1])


def _ends(seen: Sequence[Output], input_size: Size) -> list[Output]:
    """The last output of each size, of those inside the fewest modules of another size."""
    seen = [output for output in seen if _is_like(output.size, input_size)]
    returned: dict[str, set[Size]] = {}
    for output in seen:
        returned.setdefault(output.name, set()).add(output.size)

    def foreign(output: Output) -> int:
        parts = output.name.split(".")
        above = (".".join(parts[:i]) for i in range(1, len(parts)))
        return sum(1 for name in above if name in returned and output.size not in returned[name])

    ends: dict[Size, Output] = {}
    for output in seen:
        before = ends.get(output.size)
        if before is None or foreign(output) <= foreign(before):
            ends[output.size] = output
    order = {(output.name, output.use): i for i, output in enumerate(seen)}
    found = sorted(ends.values(), key=lambda output: order[output.name, output.use])
    return [output for output in found if output.size != (1, 1)] or found


def _last_of(seen: Sequence[Output], name: str) -> Output:
    outputs = [output for output in seen if output.name == name]
    if not outputs:
        raise SynthkdError(f"stages: module {name!r} returns no feature map [B,C,H,W]; name one that does")
    return outputs[-1]
