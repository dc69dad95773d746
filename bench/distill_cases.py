"""What `synthkd bench distill` works on: sets of pictures without a model, the sizes they are read at, the networks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.nets import ARCHITECTURES, build_net
from synthkd.dfkd.presets import load_preset
from synthkd.dfkd.teachers import Teacher, load_teacher
from synthkd.engine import Batch, GuidanceSpec, Plan, Recipe, Request, WorkUnit, rng, write_shards
from synthkd.engine.config import fingerprint
from synthkd.engine.environment import environment, versions

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIGITS = "digits"
_SAMPLES_PER_CLASS, _GROUPS_PER_SHARD = 8, 8
_COARSE, _SHAPES = 8, 3  # pixels of a picture to one of its low-pass noise; shapes on a picture
_GRAIN = 4.0  # deviation of the noise of single pixels, of 255


@dataclass(frozen=True)
class Pair:
    """A teacher and a student by name, and the images' size; gpu: too large for a CPU; bar: of stored labels."""

    teacher: str
    student: str
    size: int
    gpu: bool = False
    bar: float | None = None

    @property
    def name(self) -> str:
        """As in a row."""
        return f"{self.teacher} -> {self.student}"


PAIRS = (
    Pair("resnet56", "resnet20", 32, bar=1.5),
    Pair(DIGITS, DIGITS, 32),
    Pair("resnet34", "resnet18", 32, gpu=True),
    Pair("resnet50", "resnet50", 224, gpu=True),
)
# Students whose step is timed, by size, and whether that is for a GPU alone.
STUDENTS: Mapping[int, tuple[tuple[str, bool], ...]] = {
    32: ((DIGITS, False), ("resnet20", False), ("resnet18", True)),
    224: (("resnet50", True),),
}


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut (arXiv 1512.03385, fig. 5 right); the 3x3 one has the stride."""

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        c_out = 4 * width
        steps: list[nn.Module] = []
        for a, b, kernel, s in ((c_in, width, 1, 1), (width, width, 3, stride), (width, c_out, 1, 1)):
            steps += [nn.Conv2d(a, b, kernel, s, kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*steps[:-1])
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet50(nn.Module):
    """ResNet-50 for large images (arXiv 1512.03385, table 1), so that no other package is needed to time one."""

    def __init__(self, num_classes: int, blocks: Sequence[int] = (3, 4, 6, 3)) -> None:
        """blocks: of each stage."""
        super().__init__()
        steps: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
        steps.append(nn.MaxPool2d(3, 2, 1))
        channels = 64
        for stage, count in enumerate(blocks):
            for i in range(count):
                steps.append(_Bottleneck(channels, 64 << stage, 2 if stage and not i else 1))
                channels = 256 << stage
        self.features = nn.Sequential(*steps)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B,3,H,W], normalised -> logits [B,num_classes]."""
        logits: Tensor = self.linear(self.features(x).mean(dim=(2, 3)))
        return logits


def training(name: str, **changes: Any) -> DistillSpec:
    """How a student of STUDENTS or PAIRS is trained: the preset's own, or a built-in network with the defaults."""
    if name == "resnet50":
        ARCHITECTURES.setdefault(name, ResNet50)
    preset = load_preset(DIGITS).distill
    own = {"arch": preset.arch, "arch_args": preset.arch_args} if name == DIGITS else {"arch": name}
    return DistillSpec(**{**own, **changes})


def teacher_for(name: str, size: int, classes: int, device: torch.device) -> Teacher:
    """The embedded digits teacher, or a built-in network with random weights in eval mode."""
    if name == DIGITS:
        return load_teacher("embedded:digits", device)
    torch.manual_seed(0)
    spec = training(name)
    net = build_net(spec.arch, classes, spec.arch_args)
    names = [f"class {i}" for i in range(classes)]
    teacher = Teacher(net, mean=MEAN, std=STD, input_size=(size, size), classes=names).to(device)
    _settle(teacher, size, device)
    return teacher


@torch.no_grad()
def _settle(teacher: Teacher, size: int, device: torch.device) -> None:
    """Make random weights tell pictures apart: BatchNorm's statistics are theirs, logits of mean 0, deviation 3."""
    images = torch.from_numpy(np.stack([picture(0, i, size) for i in range(32)])).permute(0, 3, 1, 2)
    x = images.to(device).float() / 255
    for name, layer in teacher.net.named_modules():
        if name.endswith(("bn2", "body.7")):  # short branches: a deep random network is noise to any student
            layer.get_parameter("weight").fill_(0.1)
    layers = [m for m in teacher.net.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in layers:
        layer.train().momentum = None
    teacher(x)
    for layer in layers:
        layer.eval().momentum = 0.1
    logits, head = teacher(x), teacher.classifier
    assert head is not None
    scale = 3 / logits.std(0).clamp_min(1e-6)
    head.weight.mul_(scale[:, None])
    head.bias.sub_(logits.mean(0)).mul_(scale)


def picture(seed: int, index: int, side: int) -> NDArray[np.uint8]:
    """uint8 [side,side,3]: low-pass noise, a few shapes and some grain; a file of it is as large as a photograph's."""
    coarse = max(2, side // _COARSE)
    u = rng.uniform(seed, index, "picture", 3 * coarse**2 + 8 * _SHAPES + 2).astype(np.float32)
    noise = torch.from_numpy(u[: 3 * coarse**2]).view(1, 3, coarse, coarse) * 255
    out = F.interpolate(noise, size=(side, side), mode="bicubic", align_corners=False)[0].permute(1, 2, 0).numpy()
    place = np.arange(side, dtype=np.float32) / side
    for v in u[3 * coarse**2 : -2].reshape(_SHAPES, 8):
        far = [np.abs(place - center) / (0.05 + 0.3 * reach) for center, reach in (v[:2], v[2:4])]
        rows, columns = far[0][:, None], far[1][None, :]
        inside = rows**2 + columns**2 < 1 if v[4] < 0.5 else np.maximum(rows, columns) < 1
        out[inside] = 0.5 * out[inside] + 127.5 * v[5:8]
    top, left = (u[-2:] * side).astype(int)
    pixels: NDArray[np.uint8] = np.clip(out + _grain(seed, side)[top : top + side, left : left + side], 0, 255)
    return pixels.astype(np.uint8)


@lru_cache(maxsize=2)
def _grain(seed: int, side: int) -> NDArray[np.float32]:
    """float32 [2 side, 2 side, 3], of which each picture has a window."""
    return _GRAIN * rng.normal(seed, side, "grain of pictures", 12 * side**2).reshape(2 * side, 2 * side, 3)


class Pictures:
    """A stream of pictures for `write_shards`: a set without a diffusion model."""

    def __init__(self, count: int, side: int, image_format: str, classes: Sequence[str]) -> None:
        """JPEG and WebP at quality 90."""
        recipe = Recipe(
            classes=tuple(classes), height=side, width=side, guidance=GuidanceSpec(scale=0.0),
            classes_per_group=len(classes), samples_per_class=_SAMPLES_PER_CLASS,
            groups_per_shard=_GROUPS_PER_SHARD, image_format=image_format, image_quality=90,
        )  # fmt: skip
        self.plan = Plan(recipe, Request(num_samples=count))
        self.identity: dict[str, Any] = {
            "fingerprint": fingerprint(recipe, 0, {}), "recipe": recipe.to_dict(), "seed": 0, "guidance": {},
            "model_sha256": "", "versions": versions(),
        }  # fmt: skip
        self.environment = environment(torch.device("cpu"), recipe.group_size)

    def draw(self, units: Iterable[WorkUnit]) -> Iterator[Batch]:
        """The batch of each unit."""
        side, classes = self.plan.recipe.height, self.plan.recipe.classes
        for unit in units:
            images = torch.from_numpy(np.stack([picture(0, i, side) for i in unit.ids])).permute(0, 3, 1, 2)
            labels = torch.tensor(unit.classes)
            batch = Batch(
                group=unit.group, round=0, attempt=0, ids=tuple(unit.ids), prompts=("a picture",) * len(unit.ids),
                images=images, labels=labels, targets=F.one_hot(labels, len(classes)).float(),
            )  # fmt: skip
            yield batch.first(unit.kept)


def write_set(folder: Path, count: int, side: int, image_format: str, classes: Sequence[str]) -> Path:
    """A set of `count` pictures of side x side in `folder`, as `synthkd synth` writes one."""
    write_shards(Pictures(count, side, image_format, classes), folder)
    return folder
