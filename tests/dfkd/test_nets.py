"""Built-in networks: the published sizes and tensor names, as teachers and as students."""

import pytest
import torch

from synthkd.dfkd.data import LabelledImages
from synthkd.dfkd.nets import ARCHITECTURES, build_net, count_parameters
from synthkd.dfkd.student import DistillSpec, distill
from synthkd.dfkd.teachers import Teacher
from synthkd.engine.errors import SynthkdError

# He et al. 2016, table 6: 0.27, 0.46, 0.66, 0.85 and 1.7 M; Zagoruyko and Komodakis 2016, table 4: 0.6 and 2.2 M for
# 40-1 and 40-2; the exact counts are those of the weights in circulation (10 classes, or 100 where marked).
PARAMETERS = {
    ("resnet20", 10): 269_722,
    ("resnet32", 10): 464_154,
    ("resnet44", 10): 658_586,
    ("resnet56", 10): 853_018,
    ("resnet110", 10): 1_727_962,
    ("wrn16_1", 10): 175_066,
    ("wrn16_2", 100): 703_284,
    ("wrn40_1", 100): 569_780,
    ("wrn40_2", 10): 2_243_546,
    ("wrn40_2", 100): 2_255_156,
    ("vgg8", 100): 3_965_028,
    ("vgg11", 10): 9_231_114,
    ("vgg13", 100): 9_462_180,
    ("vgg16", 10): 14_728_266,
    ("resnet18", 10): 11_173_962,
    ("resnet34", 100): 21_328_292,
}
NAMED = sorted(ARCHITECTURES.keys() - {"resnet", "plain_cnn", "wrn", "deeplab"})


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts(name: tuple[str, int], count: int) -> None:
    """To the last one."""
    arch, classes = name
    assert count_parameters(build_net(arch, classes, {})) == count


@pytest.mark.parametrize("arch", [a for a in NAMED if a != "resnet110"])
def test_logits_of_32_pixels_and_of_other_sizes(arch: str) -> None:
    """[B,K] from 32x32, and from 16x16."""
    net = build_net(arch, 7, {}).eval()
    with torch.no_grad():
        assert net(torch.rand(2, 3, 32, 32)).shape == (2, 7)
        assert net(torch.rand(1, 3, 16, 16)).shape == (1, 7)


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        (
            "resnet20",
            ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer3.2.bn2.running_var", "linear.bias"),
        ),
        (
            "resnet18",
            ("layer2.0.shortcut.0.weight", "layer2.0.shortcut.1.bias", "layer4.1.conv2.weight", "linear.bias"),
        ),
        ("wrn16_2", ("conv1.weight", "block1.layer.0.bn1.weight", "block1.layer.0.convShortcut.weight", "fc.bias")),
        ("wrn16_1", ("block2.layer.1.conv2.weight", "block2.layer.0.convShortcut.weight", "bn1.weight")),
        ("vgg8", ("features.0.weight", "features.1.running_mean", "features.4.weight", "classifier.weight")),
    ],
)
def test_tensor_names(arch: str, names: tuple[str, ...]) -> None:
    """Those of the public layouts."""
    state = build_net(arch, 10, {}).state_dict()
    assert set(names) <= set(state)
    if arch == "wrn16_1":
        assert "block1.layer.0.convShortcut.weight" not in state
    if arch == "resnet20":
        assert not [name for name in state if "shortcut" in name]


def test_the_shortcut_without_weights() -> None:
    """With both convolutions silent the block passes every second pixel on, between new channels of zeros."""
    net = build_net("resnet8", 10, {}).eval()
    block = net.get_submodule("layer2.0")
    for name in ("bn1", "bn2"):
        torch.nn.init.zeros_(block.get_submodule(name).weight)  # type: ignore[arg-type]
    x = torch.rand(2, 16, 8, 8)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


def test_the_general_wide_resnet() -> None:
    """`wrn` with arguments is the named one; a depth that is none is said."""
    assert count_parameters(build_net("wrn", 100, {"depth": 40, "width": 2})) == PARAMETERS["wrn40_2", 100]
    for args in ({"depth": 17, "width": 2}, {"depth": 16}):
        with pytest.raises(SynthkdError, match="arch 'wrn': arch_args do not fit"):
            build_net("wrn", 10, args)


@pytest.mark.parametrize("arch", ["resnet8", "wrn16_1", "vgg8", "resnet18", "resnet"])
def test_students_of_every_family(arch: str) -> None:
    """`DistillSpec(arch=...)` alone is enough."""
    torch.manual_seed(0)
    labels = torch.arange(12) % 2
    data = LabelledImages(torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8), labels, ("a", "b"))
    net = build_net("resnet", 2, {"widths": [4], "blocks": [1]})
    teacher = Teacher(net, mean=[0.5] * 3, std=[0.5] * 3, input_size=(16, 16), classes=("a", "b"))
    student = distill(data, teacher, DistillSpec(arch=arch, steps=1, batch_size=4))
    assert student.net(torch.rand(2, 3, 16, 16)).shape == (2, 2)
