"""A network's stages: which modules end them, what a pass returns, and that nothing stays behind."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from synthkd.dfkd.nets import build_net
from synthkd.dfkd.stages import Stages, paired
from synthkd.engine.errors import SynthkdError

LAST_CHANNELS = {"resnet": 64, "resnet20": 64, "wrn16_1": 64, "vgg8": 512, "plain_cnn": 32}


def _net(arch: str) -> nn.Module:
    torch.manual_seed(0)
    return build_net(arch, 10, {"widths": [8, 16, 32]} if arch == "plain_cnn" else {}).eval()


@pytest.mark.parametrize(
    ("arch", "names", "sizes"),
    [
        ("resnet", ("layers.0", "layers.1", "layers.2"), (32, 16, 8)),
        ("resnet20", ("layer1", "layer2", "layer3"), (32, 16, 8)),
        ("wrn16_1", ("block1", "block2", "bn1"), (32, 16, 8)),
        ("vgg8", tuple(f"features.{i}" for i in (2, 6, 10, 14, 18)), (32, 16, 8, 4, 2)),
        ("plain_cnn", ("features.2", "features.6", "features.10", "features"), (32, 16, 8, 4)),
    ],
)
def test_stages_of_built_in_networks(arch: str, names: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    """Each ends before the size changes, has the maps it says, and leaves no hook and no other mode behind."""
    net = _net(arch)
    before = net.state_dict()["conv1.weight"].clone() if arch == "resnet" else None
    stages = Stages(net, (32, 32))
    assert stages.names == names
    assert stages.sizes == tuple((s, s) for s in sizes)
    assert stages.channels[-1] == LAST_CHANNELS[arch]
    x = torch.randn(2, 3, 32, 32)
    logits, maps = stages.reading(lambda: net(x))
    assert torch.equal(logits, net(x))
    assert [tuple(m.shape) for m in maps] == [(2, c, *s) for c, s in zip(stages.channels, stages.sizes, strict=True)]
    assert all(m.requires_grad for m in maps)
    if arch in ("resnet", "resnet20", "wrn16_1"):  # the last map is what the classifier pools
        head = next(m for m in reversed(list(net.modules())) if isinstance(m, nn.Linear))
        torch.testing.assert_close(head(maps[-1].mean(dim=(2, 3))), logits)
    assert not any(module._forward_hooks for module in net.modules())
    if before is not None:
        assert torch.equal(before, net.state_dict()["conv1.weight"])


class Strided(nn.Module):
    """A bottleneck whose first convolution still has the stage before's size, as in torchvision's ResNet-50."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 6, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,4,H,W]"""
        return self.wide(self.narrow(x))


class Reused(nn.Module):
    """One activation for all layers, a stride inside a block, pooling by a module, and not square."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.act = nn.Conv2d(3, 4, 3, padding=1), Strided(), nn.ReLU()
        self.norm, self.pool, self.fc = nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,3,H,W]"""
        x = self.act(self.stem(x))
        return self.fc(self.pool(self.act(self.norm(self.block(x)))).flatten(1))


def test_awkward_network() -> None:
    """The use of a module counts, a block's inside does not, a pooled output is no stage; statistics stay."""
    net = Reused().train()
    stages = Stages(net, (9, 7))
    assert (stages.names, stages.channels, stages.sizes) == (("act", "act"), (4, 6), ((9, 7), (5, 4)))
    assert net.training
    assert net.norm.training
    assert net.norm.num_batches_tracked == 0
    x = torch.randn(2, 3, 9, 7)
    _, (first, last) = stages.reading(lambda: net(x))
    torch.testing.assert_close(first, net.act(net.stem(x)))
    assert last.shape == (2, 6, 5, 4)


class LastChannels(nn.Module):
    """Maps with the channels first outside and last inside, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.mix = nn.Conv2d(3, 9, 2, 2), nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,3,H,W]"""
        return self.mix(self.down(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_channels_last_inside_is_no_map() -> None:
    """[B,H,W,C] does not have the image's proportions."""
    net = nn.Sequential(LastChannels(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 3))
    stages = Stages(net, (6, 8))
    assert (stages.names, stages.channels, stages.sizes) == (("0",), (9,), ((3, 4),))


def test_names_and_refusals() -> None:
    """Modules by name; one line for a name that is none, one without maps, and a network without any."""
    net = _net("resnet")
    assert Stages(net, (16, 24), ("layers.1", "layers.2")).sizes == ((8, 12), (4, 6))
    with pytest.raises(SynthkdError, match=r"'layer\.1' is no module of the network"):
        Stages(net, (32, 32), ("layer.1",))
    with pytest.raises(SynthkdError, match="'fc' returns no feature map"):
        Stages(net, (32, 32), ("fc",))
    tokens = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Flatten(2), nn.LayerNorm(4), nn.Flatten(), nn.Linear(32, 3))
    for net in (nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), tokens):
        with pytest.raises(SynthkdError, match="no feature maps"):
            Stages(net, (4, 4))


def test_pairs_from_the_deepest() -> None:
    """The shallowest stages of the longer network stay alone."""
    assert paired("abcd", "xyz") == [(1, 0), (2, 1), (3, 2)]
    assert paired("a", "xyz") == [(0, 2)]


def test_gradients_of_a_frozen_network_in_one_graph() -> None:
    """Its maps get a graph on demand; a traced pass gives the same, and nothing outlives it."""
    net = _net("resnet").requires_grad_(False)
    stages, x = Stages(net, (8, 12)), torch.randn(2, 3, 8, 12)

    def step(x: Tensor) -> tuple[Any, ...]:
        logits, maps = stages.reading(lambda: net(x), differentiable=True)
        return logits, *maps

    with stages.attached():
        plain = step(x)
        traced = torch.compile(step, backend="eager", fullgraph=True)(x)
    assert torch.equal(plain[0], net(x))
    for a, b in zip(plain, traced, strict=True):
        torch.testing.assert_close(a, b)
    x.requires_grad_(True)
    maps = stages.reading(lambda: net(x))[1]
    wanted = torch.autograd.grad(net.fc(maps[-1].mean(dim=(2, 3))).square().sum(), maps[-1])
    assert torch.equal(wanted[0], torch.autograd.grad(plain[0].square().sum(), plain[-1], retain_graph=True)[0])
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(plain[0].square().sum(), plain[1:]))
    assert not any(m.requires_grad for m in stages.reading(lambda: net(x.detach()))[1])
    assert not stages.on
    assert not any(module._forward_hooks for module in net.modules())
