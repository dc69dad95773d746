"""The plain things that everybody writes, which `synthkd bench distill` compares with: a loader, an eager step."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from synthkd.bench.distill_cases import MEAN, STD
from synthkd.dfkd.distill_spec import DistillSpec, learning_rate
from synthkd.dfkd.feed import Request
from synthkd.dfkd.teachers import Teacher
from synthkd.dfkd.views import pixel_boxes


class Member(NamedTuple):
    """Where an image lies: shard, offset and size in bytes; its key and label."""

    path: str
    offset: int
    size: int
    key: str
    label: int


def members(folder: Path) -> list[Member]:
    """The images of a set by key, as tarfile finds them."""
    found: dict[str, Member] = {}
    labels: dict[str, int] = {}
    for path in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, kind = info.name.partition(".")
                if kind == "json":
                    file = tar.extractfile(info)
                    assert file is not None
                    labels[key] = json.loads(file.read())["label"]
                else:
                    found[key] = Member(str(path), info.offset_data, info.size, key, -1)
    return [found[key]._replace(label=labels[key]) for key in sorted(found)]


class PillowImages(Dataset[tuple[Tensor, int]]):
    """One image after the other: read, decode, crop, resize, mirror, to a tensor, normalise.

    Crops and flips are those of a request, so that all readers make the same pictures.
    """

    def __init__(self, images: list[Member], request: Request, stored: int, size: int) -> None:
        """request: rows and views of a round; stored: a side of the files."""
        self.images = [images[row] for row in request.rows.tolist()]
        self.boxes = pixel_boxes(request.views.box, stored, stored).tolist()
        self.flips = request.views.flip.tolist()
        self.stored, self.size = stored, size
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))

    def __len__(self) -> int:
        """Images of a round."""
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        """float32 [3,size,size], normalised, and the label."""
        member = self.images[position]
        with open(member.path, "rb") as file:  # noqa: PTH123
            file.seek(member.offset)
            image: Image.Image = Image.open(io.BytesIO(file.read(member.size))).convert("RGB")
        top, left, height, width = self.boxes[position]
        if (height, width) != (self.stored, self.stored):
            image = image.crop((left, top, left + width, top + height))
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        if self.flips[position]:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        return (pixels - self.mean) / self.std, member.label


def pillow_loader(images: PillowImages, batch_size: int, workers: int, cuda: bool) -> DataLoader[tuple[Tensor, int]]:
    """torch's DataLoader over it, in order, with processes that stay; spawned, since DALI's threads survive no fork."""
    more: dict[str, Any] = {"persistent_workers": True, "multiprocessing_context": "spawn"} if workers else {}
    return DataLoader(images, batch_size, num_workers=workers, pin_memory=cuda, **more)


class PlainStep:
    """A training step as it stands in tutorials: eager, float32, NCHW, AdamW with its defaults, `loss.item()`.

    The affine augmentation and the loss are those of the loop that this project had before.
    """

    def __init__(self, student: Teacher, spec: DistillSpec) -> None:
        """student: its `net` is trained, in train mode."""
        self.student, self.spec = student, spec
        self.net = student.net.requires_grad_(True).train()
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay)

    def run(self, images: Tensor, turns: Tensor, wanted: Tensor, step: int) -> float:
        """Take a step; its loss. images: [B,3,H,W], float32 in [0,1]; turns: [B,4], see `Views`; wanted: [B,K]."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.spec, step)
        said = self.net(self.student.preprocess(self._affine(images, turns)))
        loss = self._loss(said, wanted)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.item()

    def _loss(self, said: Tensor, wanted: Tensor) -> Tensor:
        """T^2 KL(teacher || student) at temperature T (arXiv 1503.02531, sec. 2)."""
        t = self.spec.temperature
        return F.kl_div(F.log_softmax(said / t, 1), F.softmax(wanted / t, 1), reduction="batchmean") * t**2

    def _affine(self, x: Tensor, parameters: Tensor) -> Tensor:
        angle, scale, down, right = parameters.to(x.device).unbind(1)
        c, s = torch.cos(angle) / scale, torch.sin(angle) / scale
        theta = torch.stack([torch.stack([c, -s, right], 1), torch.stack([s, c, down], 1)], 1)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
