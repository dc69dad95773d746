"""Out-of-domain pools: where images come from, what the teacher says of them, and which are chosen."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from synthkd.dfkd.data_dali import dali_available
from synthkd.dfkd.feed import ReadOptions
from synthkd.dfkd.pools import LABELS, highest_entropy, open_images, open_pool
from synthkd.dfkd.student import read_plain
from synthkd.dfkd.teachers import Teacher
from synthkd.engine import SynthkdError

CLASSES = ("a", "b", "c")


class Sums(nn.Module):
    """Logits are channel means: saturated for a constant image of 255 in one channel."""

    def __init__(self, scale: float = 1.0) -> None:
        """scale: of the logits."""
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        """[B,3,H,W] -> [B,3]."""
        return self.scale * x.mean(dim=(2, 3))


def teacher(scale: float = 1.0) -> Teacher:
    """Three classes, 8x6 pixels, a normalisation that is not the identity."""
    return Teacher(Sums(scale), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), input_size=(8, 6), classes=CLASSES)


def pixels(count: int = 7) -> np.ndarray:
    """uint8 [N,8,6,3]."""
    return np.random.default_rng(0).integers(0, 256, (count, 8, 6, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    """A file's bytes."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def as_folder(folder: Path, images: np.ndarray) -> Path:
    """Files in two sub-folders."""
    for i, image in enumerate(images):
        path = folder / f"{i % 2}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    return folder


def as_tars(folder: Path, images: np.ndarray) -> Path:
    """Two WebDataset shards with labels and folders in their names, as GNU tar writes them."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"s-{shard}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for i in range(shard, len(images), 2):
                for suffix, data in (("cls", b"3"), ("png", png(images[i]))):
                    info = tarfile.TarInfo(f"./deep/{'x' * 120}/{i:03d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.mark.parametrize("reader_name", ["torch", "dali"])
@pytest.mark.parametrize("kind", ["folder", "tars", "npz", "grey"])
def test_same_pixels_from_every_kind(kind: str, reader_name: str, tmp_path: Path) -> None:
    """A folder, tars and an .npz of the same images hold the same images, whoever reads them."""
    if reader_name == "dali" and not dali_available():
        pytest.skip("needs DALI")
    images = pixels()
    if kind == "folder":
        where = as_folder(tmp_path / "p", images)
    elif kind == "tars":
        where = as_tars(tmp_path / "p", images)
    else:
        images = np.repeat(images[..., :1], 3, axis=3) if kind == "grey" else images
        where = tmp_path / "p.npz"
        np.savez(where, x=images[..., 0] if kind == "grey" else images)
    source = open_images(str(where))
    reader = source.reader((8, 6), ReadOptions(reader=reader_name, threads=1))
    found = {x.numpy().tobytes() for x in read_plain(reader, np.arange(len(source)))}
    reader.close()
    assert found == {torch.from_numpy(x).permute(2, 0, 1).contiguous().numpy().tobytes() for x in images}


def test_teacher_sees_a_pool_image_as_any_other(tmp_path: Path) -> None:
    """The pool has no normalisation of its own: entropy and class are those of the plain image in [0,1]."""
    images = pixels()
    np.savez(tmp_path / "p.npz", x=images)
    net = teacher(3.0)
    pool = open_pool(str(tmp_path / "p.npz"), net, ReadOptions())
    logits = net(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).double()
    p = logits.softmax(1)
    assert np.allclose(pool.entropy, -(p * p.log()).sum(1), atol=1e-6)
    assert pool.source.labels.tolist() == logits.argmax(1).tolist()
    assert pool.source.classes == CLASSES


def test_selection_is_safe_from_saturated_outputs(tmp_path: Path) -> None:
    """p log p of a probability of exactly 0 is 0, not NaN, and a sure image is chosen last, not first."""
    images = np.zeros((4, 8, 6, 3), np.uint8)
    images[0, ..., 0] = 255  # logits of +-thousands
    images[1:] = 128
    np.savez(tmp_path / "p.npz", x=images)
    pool = open_pool(str(tmp_path / "p.npz"), teacher(1e4), ReadOptions())
    assert np.isfinite(pool.entropy).all()
    assert pool.entropy[0] == 0
    soft = open_pool(str(tmp_path / "p.npz"), teacher(0.01), ReadOptions())
    assert len(soft.selected(3)) == 3
    assert 0 not in highest_entropy(soft.entropy, 3)


def test_not_finite_is_never_chosen() -> None:
    """NaN and infinite entropies are left out, however many images are wanted; ties go to the first."""
    found = np.array([np.nan, 0.5, np.inf, 0.9, 0.5, -np.inf], np.float32)
    assert highest_entropy(found, 2).tolist() == [1, 3]
    assert highest_entropy(found).tolist() == [1, 3, 4]
    assert highest_entropy(found, 99).tolist() == [1, 3, 4]


def test_broken_files_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that cannot be decoded has no entropy, and is told."""
    folder = as_folder(tmp_path / "p", pixels())
    (folder / "0" / "000.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    pool = open_pool(str(folder), teacher(), ReadOptions(reader="torch", threads=1))
    assert int(np.isnan(pool.entropy).sum()) == 1
    assert len(pool.selected()) == 6
    assert "1 of 7 images" in caplog.text


def test_the_word_is_kept_for_this_pool_and_teacher(tmp_path: Path) -> None:
    """A second run reads it; another teacher's, or another pool's, is made anew."""
    np.savez(tmp_path / "p.npz", x=pixels())
    first = open_pool(str(tmp_path / "p.npz"), teacher(2.0), ReadOptions(), keep=tmp_path)
    stamp = (tmp_path / LABELS).stat().st_mtime_ns
    again = open_pool(str(tmp_path / "p.npz"), teacher(2.0), ReadOptions(), keep=tmp_path)
    assert (tmp_path / LABELS).stat().st_mtime_ns == stamp
    assert (again.entropy == first.entropy).all()
    other = open_pool(str(tmp_path / "p.npz"), teacher(9.0), ReadOptions(), keep=tmp_path)
    assert not np.allclose(other.entropy, first.entropy)


def test_embedded_pool() -> None:
    """1,200 letters of 32 pixels, dark on light."""
    source = open_images("embedded:digits/pool")
    assert len(source) == 1200
    reader = source.reader((32, 32), ReadOptions())
    images = read_plain(reader, np.arange(64)).float()
    border, middle = images[:, :, :3].mean(), images[:, :, 12:20, 12:20].mean()
    assert border > middle


@pytest.mark.parametrize("what", ["nothing", "empty", "tar", "npz", "flat", "damaged", "embedded"])
def test_wrong_references_are_one_line(what: str, tmp_path: Path) -> None:
    """Each names what was looked for."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    np.savez(tmp_path / "bad.npz", x=np.zeros((2, 3), np.float32))
    np.savez(tmp_path / "flat.npz", x=np.zeros((5, 0, 0, 3), np.uint8))
    np.savez_compressed(tmp_path / "damaged.npz", x=pixels(400))
    with (tmp_path / "damaged.npz").open("r+b") as f:
        f.seek(3000)
        f.write(b"\xff" * 64)
    found = {
        "nothing": str(tmp_path / "none"), "empty": str(tmp_path / "empty"), "tar": str(tmp_path / "bad.tar"),
        "npz": str(tmp_path / "bad.npz"), "flat": str(tmp_path / "flat.npz"),
        "damaged": str(tmp_path / "damaged.npz"), "embedded": "embedded:digits/pol",
    }  # fmt: skip
    with pytest.raises(SynthkdError, match="pool") as caught:
        open_images(found[what])
    assert "\n" not in str(caught.value)
