"""Statistics of the inputs of a network's norm layers, beside those that its training data had."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from synthkd.engine.errors import SynthkdError, suggest
from synthkd.kernels import BatchNormStats, batchnorm_stats, merge_stats

_BATCHNORM = nn.modules.batchnorm._BatchNorm
_INSTANCENORM = nn.modules.instancenorm._InstanceNorm
_STATLESS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _INSTANCENORM, _BATCHNORM)
_FORMAT = "synthkd moments 1"

Seen = Callable[[str, nn.Module, BatchNormStats], None]


class Tap(NamedTuple):
    """Statistics of one norm layer's input beside those of the training data, [C] each."""

    name: str
    stats: BatchNormStats
    running_mean: Tensor
    running_var: Tensor


class Notes(NamedTuple):
    """What one pass showed, in forward order: taps of BatchNorm layers, of stored moments, and features."""

    bn: list[Tap]
    stored: list[Tap]
    features: list[Tensor]


class Moments(nn.Module):
    """Stored input means and variances [C] by layer name; they follow the network's device and dtype."""

    def __init__(self, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """values: layer name -> (mean, variance)."""
        super().__init__()
        self.names = tuple(values)
        for i, (mean, var) in enumerate(values.values()):
            self.register_buffer(f"mean{i}", mean, persistent=False)
            self.register_buffer(f"var{i}", var, persistent=False)

    def __contains__(self, name: str) -> bool:
        """Whether there are moments of a layer."""
        return name in self.names

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] of a layer's input."""
        i = self.names.index(name)
        return self.get_buffer(f"mean{i}"), self.get_buffer(f"var{i}")

    def digest(self) -> str:
        """SHA-256 over names and values."""
        found = hashlib.sha256()
        for name in sorted(self.names):
            found.update(name.encode())
            for value in self.of(name):
                found.update(value.detach().cpu().float().contiguous().numpy().tobytes())
        return found.hexdigest()


def batchnorm_layers(net: nn.Module) -> dict[str, nn.Module]:
    """BatchNorm layers of any kind, subclasses too, that have running statistics, by name."""
    return {
        name: layer
        for name, layer in net.named_modules()
        if isinstance(layer, _BATCHNORM) and layer.running_mean is not None and not is_lazy(layer.running_mean)
    }


def statless_layers(net: nn.Module) -> dict[str, nn.Module]:
    """Norm layers that keep no statistics of their inputs, by name."""
    return {
        name: layer
        for name, layer in net.named_modules()
        if isinstance(layer, _STATLESS) and getattr(layer, "running_mean", None) is None
    }


def channels(layer: nn.Module) -> int:
    """Number of channels C of a norm layer's input."""
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return int(layer.normalized_shape[0])
    return int(layer.num_features)  # type: ignore[arg-type]


def _channel_axis(layer: nn.Module, x: Tensor) -> int:
    """1 for norms over images; for LayerNorm the first axis it normalises, the last one as a rule."""
    if not isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        return 1
    axis, count = x.dim() - len(layer.normalized_shape), channels(layer)
    # A LayerNorm2d turns [B,C,H,W] round inside; only its name or `data_format` says so where W is C too.
    first = getattr(layer, "data_format", "") == "channels_first" or type(layer).__name__.endswith("2d")
    if x.dim() == 4 and x.shape[1] == count and (first or x.shape[axis] != count):
        return 1
    return axis


def _statistics(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchNormStats:
    """Statistics of what a norm layer is called with."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    near: Any = getattr(layer, "running_mean", None)
    return batchnorm_stats(x.movedim(_channel_axis(layer, x), 1), near)


@contextlib.contextmanager
def watch(layers: Mapping[str, nn.Module], seen: Seen) -> Iterator[None]:
    """`seen(name, layer, statistics)` at every use of a layer, in forward order; no hook is left behind."""

    def hook(name: str) -> Any:
        return lambda layer, args, kwargs: seen(name, layer, _statistics(layer, args, kwargs))

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Taps:
    """Hooks on a network's norm layers and on its last linear layer, put on once for many passes.

    on: whether they are. They note nothing outside of `reading`, and what `reading` returns is all that is left of a
    pass: so one graph can hold a pass with its taps (torch.compile traces no hook that is put on inside it, and none
    that keeps a tensor).
    """

    def __init__(self, net: nn.Module, moments: Moments | None, last: nn.Module | None) -> None:
        """last: the layer whose input is noted as features."""
        known = {name: net.get_submodule(name) for name in (moments.names if moments is not None else ())}
        self.on, self._moments = False, moments
        self._notes: Notes | None = None
        self._hooks: list[tuple[nn.Module, Any]] = []
        self._hooks += [(m, partial(self._own, n)) for n, m in batchnorm_layers(net).items()]
        self._hooks += [(m, partial(self._stored, n)) for n, m in known.items()]
        if last is not None:
            self._hooks.append((last, self._features))

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Within it the hooks are on; afterwards none is left. Nothing where they are on already."""
        if self.on:
            yield
            return
        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer, hook in self._hooks]
        self.on = True
        try:
            yield
        finally:
            self.on = False
            for handle in handles:
                handle.remove()

    def reading(self, forward: Callable[[], Tensor]) -> tuple[Tensor, Notes]:
        """What a pass returns, and what the hooks, which must be on, note in it."""
        notes = Notes([], [], [])
        self._notes = notes
        try:
            return forward(), notes
        finally:
            self._notes = None

    def _own(self, name: str, layer: Any, args: Any, kwargs: Any) -> None:
        if self._notes is not None:
            stats = _statistics(layer, args, kwargs)
            buffers: Any = layer
            self._notes.bn.append(Tap(name, stats, buffers.running_mean, buffers.running_var))

    def _stored(self, name: str, layer: Any, args: Any, kwargs: Any) -> None:
        if self._notes is not None and self._moments is not None:
            self._notes.stored.append(Tap(name, _statistics(layer, args, kwargs), *self._moments.of(name)))

    def _features(self, layer: Any, args: Any, kwargs: Any) -> None:
        if self._notes is not None:
            self._notes.features.append(args[0] if args else next(iter(kwargs.values())))


def merged_taps(parts: Sequence[list[Tap]]) -> list[Tap]:
    """Taps of a group from those of its runs, exactly (see `kernels.merge_stats`)."""
    return [taps[0]._replace(stats=reduce(merge_stats, [t.stats for t in taps])) for taps in zip(*parts, strict=True)]


Memory = dict[str, tuple[Tensor, Tensor]]


def averaged(taps: list[Tap], memory: Memory | None, momentum: float) -> tuple[list[Tap], Memory | None]:
    """Taps whose means and variances are momentum parts of memory, the rest the group's; and the new memory.

    memory: layer name -> (mean, variance), [C] each; None: the taps as they are. A layer that a pass uses more than
    once has no memory of its own: then SynthkdError.
    """
    if memory is None:
        return taps, memory
    if len({t.name for t in taps}) < len(taps):
        raise SynthkdError("guidance: bn_momentum needs a teacher that uses each BatchNorm layer once; set it to 0")

    def mixed(now: Tensor, before: Tensor) -> Tensor:
        return torch.lerp(now, before.to(now), momentum)

    after = {
        t.name: (mixed(t.stats.mean, memory[t.name][0]), mixed(t.stats.var, memory[t.name][1])) for t in taps
    }
    made = [t._replace(stats=BatchNormStats(1, *after[t.name])) for t in taps]
    return made, {**memory, **after}


@torch.no_grad()
def measure_moments(net: nn.Module, batches: Iterable[Tensor]) -> dict[str, BatchNormStats]:
    """Input statistics of every norm layer that keeps none, over batches of normalised images [B,3,H,W].

    Batches are merged exactly (Chan, Golub and LeVeque 1979) in float64: their order and size do not matter. Uses of
    one layer are pooled. Raises SynthkdError where the network has no such layer.
    """
    layers = statless_layers(net)
    if not layers:
        raise SynthkdError("teacher: it has no norm layer without statistics of its own, so there is nothing to store")
    total: dict[str, BatchNormStats] = {}

    def add(name: str, layer: nn.Module, stats: BatchNormStats) -> None:
        exact = BatchNormStats(stats.count, stats.mean.double(), stats.m2.double())
        total[name] = merge_stats(total[name], exact) if name in total else exact

    with watch(layers, add):
        for batch in batches:
            net(batch)
    return total


def write_moments(path: Path, stats: Mapping[str, BatchNormStats], images: int) -> None:
    """A safetensors file of `NAME.mean` and `NAME.var` (biased), float32 [C]; images: how many were seen."""
    tensors = {}
    for name, value in stats.items():
        tensors[f"{name}.mean"], tensors[f"{name}.var"] = value.mean, value.var
    flat = {name: value.float().cpu().contiguous() for name, value in tensors.items()}
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_bytes(save(flat, {"format": _FORMAT, "images": json.dumps(images)}))
    fresh.replace(path)


def read_moments(path: Path, net: nn.Module) -> Moments:
    """The file that `write_moments` wrote, checked against the network's layers.

    Raises SynthkdError for an unreadable file, a name that is no norm layer without statistics, a mean without its
    variance, a wrong shape, and values that are not finite or a variance below 0.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise SynthkdError(f"moments {path}: cannot be read as safetensors ({reason})") from error
    layers, values = statless_layers(net), {}
    for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        if name not in layers:
            hint = suggest(name, layers) if layers else "the network has none"
            raise SynthkdError(f"moments {path}: {name!r} is no norm layer without statistics; {hint}")
        values[name] = _pair(path, name, tensors, channels(layers[name]))
    extra = [key for key in tensors if not key.endswith((".mean", ".var"))]
    if extra or not values:
        found = repr(extra[0]) if extra else "no tensor"
        raise SynthkdError(f"moments {path}: found {found}; expected NAME.mean and NAME.var for each layer")
    return Moments(values)


def _pair(path: Path, name: str, tensors: Mapping[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
    for key in (f"{name}.mean", f"{name}.var"):
        if key not in tensors:
            raise SynthkdError(f"moments {path}: {key!r} is missing; expected NAME.mean and NAME.var for each layer")
        value = tensors[key]
        if tuple(value.shape) != (count,) or not value.is_floating_point():
            found = f"{value.dtype} {tuple(value.shape)}"
            raise SynthkdError(f"moments {path}: {key!r} is {found}; expected floats ({count},)")
        if not bool(value.isfinite().all()) or (key.endswith(".var") and bool((value < 0).any())):
            raise SynthkdError(f"moments {path}: {key!r} holds impossible values; expected finite, variances >= 0")
    return tensors[f"{name}.mean"].float(), tensors[f"{name}.var"].float()
