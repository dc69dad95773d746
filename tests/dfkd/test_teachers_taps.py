"""Taps of norm layers of every kind, and moments stored for those that keep none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from synthkd.dfkd.losses import bn_distance
from synthkd.dfkd.taps import Moments, batchnorm_layers, measure_moments, read_moments, statless_layers, write_moments
from synthkd.dfkd.teachers import Teacher
from synthkd.engine.errors import SynthkdError
from synthkd.kernels import BatchNormStats


def wrap(net: nn.Module, moments: Moments | None = None) -> Teacher:
    """As a teacher of two classes, images as they are."""
    return Teacher(net, mean=[0.0] * 3, std=[1.0] * 3, input_size=(6, 6), classes="ab", moments=moments)


class OwnNorm(nn.BatchNorm2d):
    """A subclass whose forward does not call the parent's."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalised and activated."""
        assert self.running_mean is not None
        assert self.running_var is not None
        shape = (1, -1, 1, 1)
        return torch.relu((input - self.running_mean.view(shape)) / (self.running_var.view(shape) + self.eps).sqrt())


def body(norm: nn.Module) -> nn.Sequential:
    """Convolution, the norm, a linear layer."""
    return nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, OwnNorm])
def test_kinds_of_batchnorm(norm: type[nn.BatchNorm2d]) -> None:
    """Each gives a tap of its input beside its running statistics, on a CPU, in eval mode."""
    torch.manual_seed(0)
    layer = norm(4)
    assert layer.running_mean is not None
    layer.running_mean.uniform_(-1, 1)
    teacher, images = wrap(body(layer)), torch.rand(5, 3, 6, 6)
    logits, taps, *_ = teacher.look(images)
    x = teacher.net[0](images)  # type: ignore[index]
    assert logits.shape == (5, 2)
    assert [t.name for t in taps] == ["1"]
    torch.testing.assert_close(taps[0].stats.mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(taps[0].stats.var, x.var((0, 2, 3), correction=0))
    assert torch.equal(taps[0].running_mean, layer.running_mean)


def test_layers_without_statistics_are_passed_over() -> None:
    """track_running_stats=False, and a lazy layer that has not seen its input."""
    net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3), nn.LazyBatchNorm2d())
    assert list(batchnorm_layers(net)) == ["1"]
    assert list(statless_layers(net)) == ["0"]


class Twice(nn.Module):
    """One layer used twice, and one on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.flat, self.fc = nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits."""
        x = self.bn(input=self.conv(self.bn(x)))
        logits: Tensor = self.fc(self.flat(x.mean((2, 3))))
        return logits


def test_a_layer_used_twice_and_vectors() -> None:
    """A tap per use, in forward order; a keyword input is seen too; [B,C] is its own channel statistics."""
    teacher, images = wrap(Twice()), torch.rand(7, 3, 6, 6, requires_grad=True)
    seen = teacher.look(images)
    assert [t.name for t in seen.taps] == ["bn", "bn", "flat"]
    torch.testing.assert_close(seen.taps[0].stats.mean, images.mean((0, 2, 3)))
    assert seen.taps[2].stats.count == 7
    assert torch.autograd.grad(bn_distance(seen.taps), images)[0].isfinite().all()
    assert seen.features is not None
    assert seen.features.shape == (7, 3)
    assert not any(m._forward_pre_hooks for m in teacher.modules())


class LayerNorm2d(nn.LayerNorm):
    """Channels first outside, last inside."""

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> the same."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Tokens(nn.Module):
    """GroupNorm, a LayerNorm2d on square images of as many pixels as channels, and LayerNorm on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.group, self.image = nn.Conv2d(3, 6, 1), nn.GroupNorm(2, 6), LayerNorm2d(6)
        self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits."""
        x = self.image(self.group(self.conv(x)))
        logits: Tensor = self.fc(self.norm(x.flatten(2).mT).mean(1))
        return logits


def inputs_of(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What each norm layer is given, channels last: [N,C]."""
    seen: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda m, i, o, n=name: seen.update({n: i[0]}))
        for name, layer in net.named_modules()
        if name in ("group", "image", "norm")
    ]
    with torch.no_grad():
        net(images)
    for handle in handles:
        handle.remove()
    return {n: (x.movedim(1, -1) if x.dim() == 4 else x).reshape(-1, 6) for n, x in seen.items()}


@pytest.fixture
def stored(tmp_path: Path) -> tuple[nn.Module, Tensor, Path]:
    """A network, images, and the file of its moments over uneven batches of them."""
    torch.manual_seed(0)
    net, images = Tokens().eval(), torch.randn(11, 3, 6, 6)
    write_moments(tmp_path / "m.safetensors", measure_moments(net, images.split([3, 7, 1])), len(images))
    return net, images, tmp_path / "m.safetensors"


def test_moments_are_what_batchnorm_would_have_stored(stored: tuple[nn.Module, Tensor, Path]) -> None:
    """Per channel over batch and places: BatchNorm's own running statistics of the same input, variance biased."""
    net, images, path = stored
    moments = read_moments(path, net)
    assert set(moments.names) == {"group", "image", "norm"}
    for name, x in inputs_of(net, images).items():
        bn = nn.BatchNorm1d(6, momentum=None)  # the cumulative average of one batch: that batch's statistics
        bn(x)
        assert bn.running_mean is not None
        assert bn.running_var is not None
        mean, var = moments.of(name)
        torch.testing.assert_close(mean, bn.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var, bn.running_var * (len(x) - 1) / len(x), rtol=1e-5, atol=1e-6)


def test_distance_of_stored_moments(stored: tuple[nn.Module, Tensor, Path]) -> None:
    """Zero on the images they were taken from, above zero on others; the moments follow the teacher's dtype."""
    net, images, path = stored
    teacher = wrap(net, read_moments(path, net))
    assert teacher.has_statistics
    assert not wrap(net).has_statistics
    seen = teacher.look(images)
    assert [t.name for t in seen.stored] == ["group", "image", "norm"]
    assert seen.taps == []
    assert bn_distance(seen.stored) < 1e-4
    assert bn_distance(teacher.look(images * 2).stored) > 0.1
    assert teacher.double().look(images).stored[0].running_mean.dtype == torch.float64
    assert not [name for name in teacher.state_dict() if "moments" in name]


def drop(name: str) -> Any:
    """The file without a tensor."""
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (drop("norm.var"), "'norm.var' is missing"),
        (drop("norm.mean"), "'norm.mean' is missing"),
        (lambda s: s.update({"nrom.mean": torch.zeros(6)}), "'nrom' is no norm layer .* did you mean 'norm'"),
        (lambda s: s.update({"norm.mean": torch.zeros(5)}), r"is torch.float32 \(5,\); expected floats \(6,\)"),
        (lambda s: s.update({"norm.var": torch.full((6,), -1.0)}), "'norm.var' holds impossible values"),
        (lambda s: s.update({"norm.mean": torch.full((6,), float("nan"))}), "'norm.mean' holds impossible values"),
        (lambda s: s.update({"norm.std": torch.zeros(6)}), "found 'norm.std'; expected NAME.mean and NAME.var"),
        (lambda s: s.clear(), "found no tensor"),
    ],
)  # fmt: skip
def test_wrong_moments(stored: tuple[nn.Module, Tensor, Path], change: Any, part: str) -> None:
    """One line each, naming the tensor."""
    net, _, path = stored
    state = load_file(path)
    change(state)
    save_file(state, path)
    with pytest.raises(SynthkdError, match=part) as caught:
        read_moments(path, net)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_and_a_network_without_such_layers(stored: tuple[nn.Module, Tensor, Path]) -> None:
    """Cut short; and nothing to store or to compare."""
    net, images, path = stored
    with pytest.raises(SynthkdError, match="the network has none"):
        read_moments(path, Twice())
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(SynthkdError, match="cannot be read as safetensors"):
        read_moments(path, net)
    with pytest.raises(SynthkdError, match="no norm layer without statistics"):
        measure_moments(Twice().eval(), [images])


def test_batches_are_merged_exactly() -> None:
    """Far from zero too, whatever the split."""
    torch.manual_seed(3)
    net, images = Tokens().eval().double(), torch.randn(12, 3, 6, 6, dtype=torch.float64) + 1e4
    whole: dict[str, BatchNormStats] = measure_moments(net, [images])
    for name, found in measure_moments(net, images.split([1, 4, 7])).items():
        torch.testing.assert_close(found.mean, whole[name].mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.var, whole[name].var, rtol=1e-8, atol=1e-10)
