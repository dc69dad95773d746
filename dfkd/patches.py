"""A frozen patch discriminator as a term of the guidance, "locally real, globally legitimate" (arXiv 2110.15094).

Its file holds the network's tensors and, as a JSON note, its shape and how it was fitted (`dfkd/fit_patches.py`).
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synthkd.dfkd.fields import Kind, check_fields, is_whole, whole
from synthkd.dfkd.generators import PATCHES, PatchDiscriminator
from synthkd.dfkd.tensor_files import read_tensors, write_tensors
from synthkd.engine.errors import SynthkdError
from synthkd.engine.fitted import resized
from synthkd.export.artifacts import weights_sha256

FILE, FORMAT = "patches.safetensors", 1
_SHAPE: Mapping[str, Kind] = {
    "patch": Kind(lambda v: is_whole(v) and v in PATCHES, " or ".join(map(str, PATCHES))),
    "width": Kind(lambda v: is_whole(v, 1, 4097), "1 to 4096"),
    "height": whole(16),
    "wide": whole(16),
}


class PatchCritic(nn.Module):
    """A PatchDiscriminator at one size of images, frozen, in eval mode: what it says of an image hangs on it alone."""

    def __init__(self, net: PatchDiscriminator, size: tuple[int, int], width: int) -> None:
        """size: height and width that images are brought to; width: of the network's first layer."""
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.size, self.width = size, width

    def forward(self, images: Tensor) -> Tensor:
        """images [B,3,H,W] in [0,1] -> logits [B,1,h,w] in the network's dtype; above 0: as in real images."""
        x = images.to(next(self.net.parameters()).dtype)
        logits: Tensor = self.net(resized(x, self.size) if tuple(x.shape[-2:]) != self.size else x)
        return logits

    def train(self, mode: bool = True) -> "PatchCritic":
        """It stays in eval mode: batch statistics would make an image's loss hang on its neighbours."""
        return super().train(False)

    @property
    def shape(self) -> dict[str, int]:
        """Plain values that its network is built from."""
        return {"patch": self.net.patch, "width": self.width, "height": self.size[0], "wide": self.size[1]}

    def digest(self) -> str:
        """SHA-256 over tensors and shape."""
        return hashlib.sha256((weights_sha256([self.net]) + json.dumps(self.shape)).encode()).hexdigest()


def save_patches(critic: PatchCritic, folder: Path, about: Mapping[str, Any]) -> Path:
    """Write a critic; about: plain values, how it was fitted. Returns its file."""
    folder.mkdir(parents=True, exist_ok=True)
    note = {"format": FORMAT, "shape": critic.shape, "sha256": critic.digest(), **about}
    write_tensors(folder / FILE, critic.net.state_dict(), note)
    return folder / FILE


def check_patches(folder: str) -> None:
    """Raise SynthkdError where a folder holds no critic; reads no weights beyond their names."""
    _read(folder)


def load_patches(folder: str, device: str | torch.device = "cpu") -> PatchCritic:
    """A critic that `save_patches` wrote, frozen, float32. Raises SynthkdError where it is missing, or not whole."""
    state, note = _read(folder)
    shape = note["shape"]
    with torch.random.fork_rng(devices=[]):  # its first weights are thrown away
        net = PatchDiscriminator(shape["patch"], shape["width"])
    want = net.state_dict()
    for name in sorted(want.keys() | state.keys()):
        ours, theirs = (tuple(side[name].shape) if name in side else "no tensor" for side in (state, want))
        if ours != theirs:
            raise _refusal(folder, f"{name!r} is {ours}; its note's network has {theirs}")
    net.load_state_dict(state)
    critic = PatchCritic(net, (shape["height"], shape["wide"]), shape["width"])
    if critic.digest() != note.get("sha256"):
        raise _refusal(folder, "its tensors do not match the digest in its note (damaged or changed)")
    return critic.to(device)


def _read(folder: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = Path(folder) / FILE
    if not path.is_file():
        raise _refusal(folder, f"no {FILE} there; expected what `synthkd fit-patches` wrote")
    state, note = read_tensors(path)
    shape = note.get("shape")
    if note.get("format") != FORMAT or not isinstance(shape, Mapping) or set(shape) != set(_SHAPE):
        raise _refusal(folder, f"its note is not of format {FORMAT}, which this version reads")
    check_fields(f"patches {folder!r}: shape", shape, _SHAPE, joint=".")
    return state, note


def _refusal(folder: str, why: str) -> SynthkdError:
    return SynthkdError(f"patches {folder!r}: {why}; fit them anew")
