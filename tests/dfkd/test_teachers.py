"""Cards: every kind of `arch`, what is refused, and that each refusal is one line."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from synthkd.dfkd.nets import build_net
from synthkd.dfkd.teachers import load_teacher, read_card
from synthkd.engine.errors import SynthkdError

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a card of three classes; fields by name, None leaves one out."""

    def make(arch: str, net: nn.Module | None = None, args: dict[str, Any] | None = None, **fields: Any) -> str:
        if net is not None:
            save_file(net.state_dict(), tmp_path / "w.safetensors")
        card = {
            "arch": arch,
            "weights": "w.safetensors",
            "input_size": [32, 32],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "classes": ["a", "b", "c"],
        } | fields
        lines = [f"{name} = {json.dumps(value)}" for name, value in card.items() if value is not None]
        lines += ["[arch_args]", *(f"{name} = {json.dumps(value)}" for name, value in (args or {}).items())]
        (tmp_path / "card.toml").write_text("\n".join(lines))
        return str(tmp_path / "card.toml")

    return make


def refused(card: str, message: str, **options: Any) -> None:
    """One line, exit code 2."""
    with pytest.raises(SynthkdError, match=message) as caught:
        load_teacher(card, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("arch", ["resnet20", "wrn16_2", "vgg8", "resnet18"])
def test_built_in_networks_by_name(write: Write, arch: str) -> None:
    """The same logits as the network the weights came from."""
    net = build_net(arch, 3, {}).eval()
    teacher, x = load_teacher(write(arch, net)), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(teacher(x), net((x - 0.5) / 0.25))


def test_weights_without_batch_counters(write: Write, tmp_path: Path) -> None:
    """Files older than BatchNorm's counter of batches load."""
    state = {n: v for n, v in build_net("resnet8", 3, {}).state_dict().items() if "num_batches" not in n}
    save_file(state, tmp_path / "w.safetensors")
    assert load_teacher(write("resnet8")).has_statistics


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": [123.7, 116.3, 103.5]}, r"mean is \[123.7, 116.3, 103.5\]; expected values for images in \[0,1\]"),
        ({"std": [58.4, 57.1, 57.4]}, r"std is \[58.4, 57.1, 57.4\]; expected values for images in \[0,1\]"),
        ({"weights": None}, "field 'weights' is missing"),
        ({"weights": "nowhere.safetensors"}, "weights '.*nowhere.safetensors' not found"),
        ({"weights": 3}, "weights is 3; expected a file name"),
        ({"moments": "nowhere.safetensors"}, "moments '.*nowhere.safetensors' not found"),
        ({"moments": [1]}, r"moments is \[1\]; expected a file name"),
        ({"allow_code": True}, "unknown field 'allow_code'"),
        ({"weights": ""}, "weights '.*' not found"),
        ({"classes": [1, 2]}, r"classes is \[1, 2\]; expected at least two distinct class names \(texts\)"),
        ({"classes": [["a"], ["b"]]}, r"classes is .*; expected at least two distinct class names \(texts\)"),
        ({"classes": ["a", "b", "a"]}, r"classes is .*; expected at least two distinct class names \(texts\)"),
        ({"classes": "abc"}, "classes is 'abc'; expected at least two distinct class names"),
        ({"input_size": [32.0, 32.0]}, r"input_size is \[32.0, 32.0\]; expected .*, whole numbers >= 1"),
        ({"input_size": [True, 32]}, r"input_size is \[True, 32\]; expected .*, whole numbers >= 1"),
        ({"input_size": [10**30, 32]}, r"input_size is \[1000.*; expected .*, whole numbers >= 1"),
        ({"input_size": [2**30, 2**30]}, "does not take 3x1073741824x1073741824 images"),
        ({"std": [True, 0.2, 0.2]}, r"std is \[True, 0.2, 0.2\]; expected three numbers above 0"),
        ({"about": 3}, "about is 3; expected a table"),
    ],
)
def test_wrong_fields(write: Write, fields: dict[str, Any], message: str) -> None:
    """Each is named, with what was expected."""
    refused(write("resnet8", build_net("resnet8", 3, {}), **fields), message)


@pytest.mark.parametrize(("name", "expected"), [("mean", "three numbers"), ("std", "three numbers above 0")])
def test_numbers_that_are_none(write: Write, name: str, expected: str) -> None:
    """TOML knows nan and inf, which json.dumps writes as NaN."""
    card = Path(write("resnet8", build_net("resnet8", 3, {})))
    for value in ("nan", "inf"):
        old = {"mean": "mean = [0.5", "std": "std = [0.25"}[name]
        text = card.read_text()
        card.write_text(text.replace(old, f"{name} = [{value}"))
        refused(str(card), rf"{name} is \[{value}, .*\]; expected {expected}")
        card.write_text(text)


@pytest.mark.parametrize(
    ("arch", "args"),
    [
        ("resnet", {"in_channels": -1}),
        ("resnet", {"widths": [10**30], "blocks": [1]}),
        ("plain_cnn", {"widths": [-8]}),
        ("plain_cnn", {"widths": []}),
        ("plain_cnn", {"widths": [8, 4]}),
        ("wrn", {"depth": 10, "width": 10**14}),
        ("vgg8", {"in_channels": 0.5}),
    ],
)
def test_arch_args_that_do_not_fit(write: Write, arch: str, args: dict[str, Any]) -> None:
    """Whatever torch raises while it builds."""
    refused(write(arch, nn.Linear(1, 1), args), f"arch '{arch}': arch_args do not fit: ")


def test_moments_may_be_left_unread(write: Write, tmp_path: Path) -> None:
    """For the command that makes the file."""
    card = write("plain_cnn", build_net("plain_cnn", 3, {"widths": [8]}), {"widths": [8]}, moments="later.safetensors")
    assert load_teacher(card, moments=False).moments is None
    (tmp_path / "later.safetensors").write_bytes(b"{}")
    refused(card, "moments .*later.safetensors: cannot be read")


def test_an_unknown_arch(write: Write) -> None:
    """The nearest name, all names, and the other kinds."""
    refused(
        write("resnet21", nn.Linear(1, 1)), "arch 'resnet21' is unknown; did you mean 'resnet2?.*transformers:FOLDER"
    )


MODULE = """
from torch import nn

def make(num_classes, width):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(width, num_classes))

def broken(num_classes):
    raise ValueError("no such luck")

def text(num_classes):
    return "net"

def pair(num_classes):
    class Pair(nn.Linear):
        def forward(self, x):
            return x, x
    return Pair(3, num_classes)
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module on the Python path."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "users_nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.delitem(sys.modules, "users_nets", raising=False)
    return "users_nets"


def test_own_code_only_where_allowed(write: Write, code: str) -> None:
    """Refused before anything is imported; allowed, it is called with the number of classes and arch_args."""
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)
    ).eval()
    card = write(f"{code}:make", net, {"width": 5})
    refused(card, "arch 'users_nets:make' would import and run code; pass --allow-code")
    assert code not in sys.modules
    teacher, x = load_teacher(card, allow_code=True), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(teacher(x), net((x - 0.5) / 0.25))


@pytest.mark.parametrize(
    ("what", "args", "message"),
    [
        ("users_nets:nothing", {}, "cannot be imported: .*nothing"),
        ("users_nots:make", {}, "cannot be imported: No module named 'users_nots'"),
        (":make", {}, "cannot be imported"),
        ("users_nets:make", {"depth": 3}, "arch_args do not fit: .*depth"),
        ("users_nets:broken", {}, "arch_args do not fit: no such luck"),
        ("users_nets:text", {}, "gave a str; expected a torch.nn.Module"),
        ("users_nets:pair", {}, r"returns tuple; expected logits \(1, 3\)"),
    ],
)
@pytest.mark.usefixtures("code")
def test_own_code_that_does_not_work(write: Write, what: str, args: dict[str, Any], message: str) -> None:
    """One line each."""
    refused(write(what, nn.Linear(3, 3), args), message, allow_code=True)


def test_code_is_not_looked_for_beside_the_card(write: Write, tmp_path: Path) -> None:
    """The card's folder is not on the Python path."""
    (tmp_path / "beside_the_card.py").write_text(MODULE)
    refused(write("beside_the_card:make", nn.Linear(3, 3)), "No module named 'beside_the_card'", allow_code=True)


def test_card_of_an_embedded_default() -> None:
    """Reads as before, and says where it lies."""
    from synthkd.dfkd.teachers import card_path

    card = read_card(card_path("embedded:digits"))
    assert card.weights == card.folder / "teacher.safetensors"
    assert card.moments is None


@pytest.mark.parametrize(("library", "name"), [("timm", "resnet18"), ("torchvision", "resnet18")])
def test_a_library_that_is_not_there(write: Write, monkeypatch: pytest.MonkeyPatch, library: str, name: str) -> None:
    """Says which extra brings it."""
    monkeypatch.setitem(sys.modules, library, None)
    card = write(f"{library}:{name}", nn.Linear(1, 1))
    refused(card, rf"cannot import {library} .*: pip install 'synthkd\[{library}\]'")


def test_timm(write: Write) -> None:
    """A BatchNorm subclass is tapped; hub names, unknown names and arguments that load weights are refused."""
    timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))  # type: ignore[arg-type]
    net = timm.create_model("mobilenetv3_small_050", num_classes=3).eval()
    teacher, x = load_teacher(write("timm:mobilenetv3_small_050", net)), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(teacher(x), net((x - 0.5) / 0.25))
    assert len(teacher.look(x).taps) == 34
    refused(write("timm:resnet19"), "arch 'timm:resnet19' is unknown to timm; did you mean 'resnet")
    refused(write("timm:hf-hub:some/model"), "unknown to timm")
    for name in ("checkpoint_path", "pretrained", "pretrained_cfg", "num_classes"):
        refused(write("timm:resnet18", args={name: "x"}), f"arch_args may not hold '{name}'")


def test_torchvision(write: Write) -> None:
    """Classifiers only, without weights."""
    tv = pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))  # type: ignore[arg-type]
    net = tv.models.resnet18(num_classes=3).eval()
    teacher, x = load_teacher(write("torchvision:resnet18", net)), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(teacher(x), net((x - 0.5) / 0.25))
    refused(write("torchvision:fasterrcnn_resnet50_fpn"), "unknown to torchvision")
    refused(write("torchvision:resnet18", args={"weights": "DEFAULT"}), "arch_args may not hold 'weights'")
