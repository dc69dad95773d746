"""PACS out of a small pack of the same format: what is written, and what is refused in one line."""

import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from synthkd.bench.pacs_pack import main
from synthkd.dfkd.prior_data import load_captioned

CLASSES = ("dog", "house", "person")
FILES = {"pacs_photo.npz": 10, "pacs_art.npz": 80, "pacs_cartoon.npz": 150, "pacs_sketch.npz": 220}


def encoded(value: int, size: tuple[int, int] = (24, 24)) -> bytes:
    """A lossless WebP of one grey value, with a black left half."""
    pixels = np.full((size[1], size[0]), value, np.uint8)
    pixels[:, : size[0] // 2] = 0
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", lossless=True)
    return out.getvalue()


def write(path: Path, files: Sequence[bytes], **other: Any) -> None:
    """One domain, five images to a class, the first of each for testing; then the list of sums anew."""
    labels = np.repeat(np.arange(len(CLASSES)), len(files) // len(CLASSES)).astype(np.uint8)
    arrays = {
        "blob": np.frombuffer(b"".join(files), np.uint8),
        "off": np.cumsum([0, *map(len, files)]),
        "y": labels,
        "test": np.arange(len(files)) % 5 == 0,
        "classes": np.array(CLASSES),
    }
    np.savez(path, **(arrays | other))
    found = sorted(p for p in path.parent.glob("*.npz"))
    sums = "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in found)
    (path.parent / "SHA256SUMS").write_text(sums)


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """Four domains of fifteen images, each of a value of its own."""
    folder = tmp_path / "pack"
    folder.mkdir()
    for name, value in FILES.items():
        write(folder / name, [encoded(value + i) for i in range(15)])
    return folder


def test_pool_and_sketches(pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pool holds no sketch and says what it is; sketches are split by the flag; images are resized antialiased."""
    out = tmp_path / "data"
    assert main([str(pack), str(out), "--side", "8"]) == 0
    assert "45 images of other domains, 12 and 3 sketches" in capsys.readouterr().out
    pool = load_captioned(out / "pool.npz")
    assert pool.images.shape == (45, 3, 8, 8)
    assert pool.trained_on == ("pacs/photo", "pacs/art_painting", "pacs/cartoon")
    assert pool.captions[:4] == ("photo dog", "photo house", "photo person", "art painting dog")
    right, left = pool.images[:, :, 4, 6], pool.images[:, :, 4, 1]
    assert right[:, 0].tolist() == [v + i for v in (10, 80, 150) for i in range(15)]
    assert (left == 0).all()
    assert pool.labels.tolist() == [3 * d + k for d in range(3) for k in range(3) for _ in range(5)]
    assert (pool.images[:, :1] == pool.images).all(), "a grey image has three equal channels"
    for name, kept in (("train", [i for i in range(15) if i % 5]), ("test", [0, 5, 10])):
        with np.load(out / f"{name}.npz", allow_pickle=False) as found:
            assert found["x"][:, 4, 6, 0].tolist() == [220 + i for i in kept]
            assert found["y"].tolist() == [i // 5 for i in kept]
            assert found["trained_on"].tolist() == [f"pacs/sketch/{name}"]
            assert found["classes"].tolist() == list(CLASSES)


WHOLE = [encoded(30 + i) for i in range(15)]
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "cut": ({"off": np.arange(16)}, "off does not cut the"),
    "backwards": ({"off": np.array([0, 900, *range(2, 15), sum(map(len, WHOLE))])}, "off does not cut the"),
    "short": ({"y": np.zeros(14, np.uint8)}, r"expected \[N\], \[N\] and \[N\+1\]"),
    "label": ({"y": np.full(15, 3, np.uint8)}, "y is 3..3; there are 3 classes"),
    "names": ({"classes": np.array(["dog", "house", "cat"])}, "classes .*; pacs_sketch.npz has"),
    "floats": ({"y": np.zeros(15)}, "y is float64"),
    "objects": ({"classes": np.array(["dog", 1, None], dtype=object)}, "expected arrays blob"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_domain_is_one_line(case: str, pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though its sum is right."""
    changes, expected = BROKEN[case]
    write(pack / "pacs_art.npz", WHOLE, **changes)
    refused(pack, tmp_path, capsys, expected)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (b"no image, but enough bytes", "image 3: not a readable image"),
        (encoded(9, (24, 20)), "image 3: 24x20 pixels; expected a square of at most"),
        (encoded(9, (1040, 1040)), "image 3: 1040x1040 pixels; expected a square of at most"),
        (encoded(9)[:-20], "image 3: not a readable image"),
    ],
    ids=["none", "oblong", "bomb", "cut"],
)
def test_a_hostile_image_is_one_line(
    image: bytes, expected: str, pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """None, no square, a bomb, cut off; told by its number."""
    write(pack / "pacs_cartoon.npz", [*WHOLE[:3], image, *WHOLE[4:]])
    refused(pack, tmp_path, capsys, expected)


def test_a_file_of_giant_arrays_is_not_unpacked(
    pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is inside is added up before anything is read."""
    monkeypatch.setattr("synthkd.bench.pacs_pack._MOST_BYTES", 1000)
    refused(pack, tmp_path, capsys, "bytes of arrays; at most 1000 are read")


def test_what_is_missing_damaged_or_wrongly_asked_for(
    pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A side out of range, flags that leave a part empty, another file than the listed one, none."""
    assert main([str(pack), str(tmp_path / "data"), "--side", "4"]) == 2
    assert "--side is 4; expected 8 to 512" in capsys.readouterr().err
    write(pack / "pacs_sketch.npz", WHOLE, test=np.ones(15, bool))
    refused(pack, tmp_path, capsys, "test is True for all images")
    (pack / "pacs_photo.npz").write_bytes(b"another")
    refused(pack, tmp_path, capsys, "SHA-256 is not the one")
    (pack / "pacs_photo.npz").unlink()
    refused(pack, tmp_path, capsys, "pacs_photo.npz is missing")


def refused(pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], expected: str) -> None:
    """Exit code 2, one line, and no pool."""
    capsys.readouterr()
    assert main([str(pack), str(tmp_path / "data"), "--side", "8"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("error: ")
    assert re.search(expected, said), said
    assert not (tmp_path / "data" / "test.npz").exists()
