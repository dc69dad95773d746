"""Reading a set that somebody else made: hostile tars, images and json end in one line; nothing is written or run."""

import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from synthkd.engine import SynthkdError, write_shards
from synthkd.engine.encoders import encode_image
from synthkd.engine.reading import decode_image, members, read_set

Sets = Callable[..., Any]


@pytest.fixture
def folder(canned: Sets, tmp_path: Path) -> Path:
    """A finished set of 14 images."""
    write_shards(canned(14), tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def replaced(folder: Path, vouch: Callable[..., None]) -> Callable[[str, bytes], None]:
    """Another content for one member, with digests to match: only a look at the content can tell."""

    def make(name: str, data: bytes) -> None:
        vouch(folder, 0, {n: data if n == name else d for n, d in members(folder / "shard-000000.tar")})

    return make


def _png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def test_samples_come_back_in_id_order(folder: Path, stored: Callable[[Path], dict[str, bytes]]) -> None:
    raw, samples = stored(folder), list(read_set(folder))
    assert [s.key for s in samples] == [f"{i:09d}" for i in range(14)]
    for s in samples:
        assert s.pixels.shape == (16, 16, 3)
        assert s.pixels.dtype == np.uint8
        assert s.meta == json.loads(raw[f"{s.key}.json"])
        assert encode_image(s.pixels, "png", 95) == raw[f"{s.key}.png"]
    assert set(samples[0].meta) == {"key", "label", "class", "prompt", "seed", "group", "attempt", "losses"}


def test_prompts_and_labels_belong_together(folder: Path) -> None:
    for s in read_set(folder):
        assert s.meta["class"] == ("cat", "dog", "bird")[s.meta["label"]]
        assert s.meta["prompt"].endswith(s.meta["class"])


def _info(name: str, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


HOSTILE = {
    "path traversal": _info("../../escaped.png"),
    "absolute path": _info("/tmp/synthkd-escaped.png"),
    "folder": _info("sub/000000000.png"),
    "directory": _info("000000000.png", type=tarfile.DIRTYPE),
    "symbolic link": _info("000000000.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": _info("000000000.png", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "device": _info("000000000.png", type=tarfile.CHRTYPE),
    "fifo": _info("000000000.png", type=tarfile.FIFOTYPE),
    "giant": _info("000000000.png", size=2**40),
    "more than there is": _info("000000000.png", size=4096),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_members_are_refused(folder: Path, what: str) -> None:
    shard = folder / "shard-000000.tar"
    before = set(folder.parent.rglob("*"))
    shard.write_bytes(HOSTILE[what].tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(SynthkdError) as caught:
        list(read_set(folder))
    assert "\n" not in str(caught.value)
    assert str(shard) in str(caught.value)
    assert set(folder.parent.rglob("*")) == before
    assert not Path("/tmp/synthkd-escaped.png").exists()


@pytest.mark.parametrize("data", [b"", b"no tar", b"\0" * 10, b"\x1f\x8b" + b"x" * 600, b"PK\x03\x04" + b"y" * 2000])
def test_what_is_no_tar_is_refused(folder: Path, data: bytes) -> None:
    (folder / "shard-000000.tar").write_bytes(data)
    with pytest.raises(SynthkdError, match=r"shard-000000\.tar"):
        list(read_set(folder))


def test_a_chain_of_extended_headers_is_refused(folder: Path) -> None:
    """Each pax header makes tarfile call itself once more."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 12
    link = info.tobuf(tarfile.USTAR_FORMAT) + b"12 a=bcdefg\n".ljust(512, b"\0")
    (folder / "shard-000000.tar").write_bytes(link * 3000)
    with pytest.raises(SynthkdError):
        list(read_set(folder))


def test_random_bytes_in_a_tar_never_raise_anything_else(folder: Path) -> None:
    shard, rng = folder / "shard-000000.tar", random.Random(0)
    clean = shard.read_bytes()
    for _ in range(150):
        data = bytearray(clean)
        header = rng.choice([i for i in range(0, len(clean), 512) if clean[i : i + 5] == b"00000"])
        for _ in range(rng.randrange(1, 4)):
            data[header + rng.randrange(512)] = rng.randrange(256)
        checksum = sum(data[header : header + 148]) + 256 + sum(data[header + 156 : header + 512])
        data[header + 148 : header + 156] = f"{checksum:06o}\0 ".encode()  # a header that its checksum vouches for
        shard.write_bytes(bytes(data))
        said = ""
        try:
            list(read_set(folder))
        except SynthkdError as error:
            said = str(error)
        assert "\n" not in said


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a" + b"\0" * 40,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        _png(60000, 60000),
        _png(9000, 9000),
        _png(8, 8, b"\0" * 10),
        _png(0, 5),
    ],
)
def test_what_is_no_training_image_is_refused(
    folder: Path, replaced: Callable[[str, bytes], None], data: bytes
) -> None:
    """Not an image, another format, a header of giant size, or too few pixels behind it."""
    replaced("000000003.png", data)
    with pytest.raises(SynthkdError, match=r"000000003\.png") as caught:
        [sample.pixels for sample in read_set(folder)]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[1, 2]", b"\xff\xfe", b'"text"', b"[" * 100000])
def test_what_is_no_json_table_is_refused(folder: Path, replaced: Callable[[str, bytes], None], data: bytes) -> None:
    replaced("000000003.json", data)
    with pytest.raises(SynthkdError, match=r"000000003\.json") as caught:
        list(read_set(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_damaged_images_never_raise_anything_else(image_format: str) -> None:
    rng, buffer = random.Random(0), io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, image_format)
    clean = buffer.getvalue()
    for _ in range(300):
        data = bytearray(clean[: rng.randrange(len(clean))] if rng.random() < 0.3 else clean)
        for _ in range(rng.randrange(1, 5)):
            if data:
                data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
        try:
            assert decode_image(bytes(data), "x").dtype == np.uint8
        except SynthkdError:
            continue


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"no manifest\.json there"),
        ("", "not a synthkd manifest"),
        ("[]", "not a synthkd manifest"),
        ('{"format": 1}', "format 1; this version reads 2"),
        ('{"format": 2, "recipe": {}}', "not a synthkd manifest"),
    ],
)
def test_manifests_that_are_none(folder: Path, text: str | None, message: str) -> None:
    (folder / "manifest.json").unlink()
    if text is not None:
        (folder / "manifest.json").write_text(text)
    with pytest.raises(SynthkdError, match=message):
        list(read_set(folder))


def test_a_set_without_a_finished_shard(canned: Sets, tmp_path: Path) -> None:
    write_shards(canned(14), tmp_path, should_stop=lambda: True)
    with pytest.raises(SynthkdError, match="holds no finished shard"):
        list(read_set(tmp_path))
