"""A set as a table: the same samples as the streaming reader finds, and as much distrust."""

import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthkd.dfkd.cached import MemorySource
from synthkd.dfkd.data import LabelledImages, load_synthetic
from synthkd.dfkd.decode import decode
from synthkd.dfkd.feed import ReadOptions, Request
from synthkd.dfkd.sets import open_set
from synthkd.dfkd.views import Views
from synthkd.engine import SynthkdError
from synthkd.engine.reading import read_set

Make = Callable[..., Path]


def test_the_table_is_what_the_stream_finds(file_set: Make, tmp_path: Path) -> None:
    folder = file_set(tmp_path / "set", 21, (9, 14))
    source, samples = open_set(folder), list(read_set(folder))
    rows = np.arange(len(source))
    assert source.keys(rows) == tuple(s.key for s in samples)
    assert source.labels.tolist() == [s.meta["label"] for s in samples]
    assert [source.encoded(int(row)) for row in rows] == [s.image for s in samples]
    assert source.classes == ("a", "b", "c")
    assert not source.previews.any()


def test_a_drawn_set_with_previews(build_previews: Path) -> None:
    """Previews are rows of their own, marked, and left out where they are not wanted."""
    for previews in (True, False):
        for limit in (None, 3):
            source, data = (
                open_set(build_previews, limit, previews),
                load_synthetic(build_previews, limit, None, previews),
            )
            marks = np.zeros(len(data), bool) if data.previews is None else data.previews.numpy()
            assert source.labels.tolist() == data.labels.tolist()
            assert source.previews.tolist() == marks.tolist()
            pixels = np.stack([decode(source.encoded(row), "") for row in range(len(source))])
            assert torch.equal(torch.from_numpy(pixels).permute(0, 3, 1, 2), data.images)


@pytest.fixture
def build_previews(file_set: Make, vouch: Callable[..., None], tmp_path: Path) -> Path:
    """Ten samples with a preview each: every other row of a set is made the preview of the one before it."""
    folder = file_set(tmp_path / "previews", 20, (6, 7))
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            held = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
        vouch(folder, int(shard.stem[-6:]), dict(_as_preview(name, data) for name, data in held.items()))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["recipe"]["previews"], manifest["num_samples"] = [0.5], 10
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _as_preview(name: str, data: bytes) -> tuple[str, bytes]:
    number, _, kind = name.partition(".")
    key = f"{int(number) // 2:09d}" + ("-p50" if int(number) % 2 else "")
    if kind == "json" and int(number) % 2:
        data = json.dumps({**json.loads(data), "preview": 0.5}).encode()
    return f"{key}.{kind}", data


def test_limits_and_unfinished_sets_are_those_of_load_synthetic(file_set: Make, tmp_path: Path) -> None:
    folder = file_set(tmp_path / "set", 20, (8, 8))
    assert len(open_set(folder, 11)) == len(load_synthetic(folder, 11)) == 11
    (folder / "shard-000001.tar").unlink()
    lines = []
    for load in (open_set, load_synthetic):
        with pytest.raises(SynthkdError) as caught:
            load(folder)
        lines.append(str(caught.value))
    assert lines[0] == lines[1]
    assert "12 of 20 images are in finished shards" in lines[0]


def test_the_digest_names_the_set(file_set: Make, tmp_path: Path) -> None:
    one, other = file_set(tmp_path / "one", 12, (8, 8)), file_set(tmp_path / "other", 12, (8, 9))
    assert open_set(one).digest == open_set(one, 12).digest
    assert len({open_set(one).digest, open_set(one, 11).digest, open_set(other).digest}) == 3


def _info(name: str, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


_KIND = "is not a plain file of a sample"
HOSTILE = {
    "path traversal": (_info("../../escaped.png"), _KIND),
    "folder": (_info("sub/000000000.png"), _KIND),
    "long path": (_info("f" * 90 + "/" + "0" * 20 + ".png"), _KIND),
    "symbolic link": (_info("000000000.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), _KIND),
    "hard link": (_info("000000000.png", type=tarfile.LNKTYPE, linkname="/etc/passwd"), _KIND),
    "fifo": (_info("000000000.png", type=tarfile.FIFOTYPE), _KIND),
    "control characters": (_info("000000000\n.png"), _KIND),
    "giant": (_info("000000000.png", size=2**30), _KIND),
    "giant in binary": (_info("000000000.png", size=2**40), "not a tar header"),
    "more than there is": (_info("000000000.png", size=2**20), "truncated inside 000000000.png"),
    "not in the index": (_info("000000099.png"), "000000099.png does not match its digest"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_members_are_refused(file_set: Make, tmp_path: Path, what: str) -> None:
    folder = file_set(tmp_path / "set", 3, (8, 8))
    (shard, (info, said)) = folder / "shard-000000.tar", HOSTILE[what]
    how = tarfile.USTAR_FORMAT if what == "long path" else tarfile.GNU_FORMAT
    shard.write_bytes(info.tobuf(how) + b"\0" * 2048)
    with pytest.raises(SynthkdError) as caught:
        open_set(folder)
    assert str(shard) in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0, 10, 700, 1500])
def test_truncated_shards_are_refused(file_set: Make, tmp_path: Path, cut: int) -> None:
    folder = file_set(tmp_path / "set", 3, (8, 8))
    shard = folder / "shard-000000.tar"
    os.truncate(shard, cut)
    with pytest.raises(SynthkdError, match=r"shard-000000\.tar.*run `synthkd verify"):
        open_set(folder)


def test_a_turned_bit_in_a_header_is_seen(file_set: Make, tmp_path: Path) -> None:
    shard = file_set(tmp_path / "set", 3, (8, 8)) / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[512 + 512 * -(-int(data[124:135], 8) // 512) + 140] ^= 1  # the time of the second member
    shard.write_bytes(bytes(data))
    with pytest.raises(
        SynthkdError, match=r"damaged after 000000000\.png \(a tar header does not match its checksum\)"
    ):
        open_set(shard.parent)


@pytest.mark.parametrize("label", ["1", True, -1, 3, None])
def test_labels_are_checked(file_set: Make, vouch: Callable[..., None], tmp_path: Path, label: Any) -> None:
    folder = file_set(tmp_path / "set", 2, (8, 8))
    shard = folder / "shard-000000.tar"
    with tarfile.open(shard) as tar:
        held = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    vouch(folder, int(shard.stem[-6:]), held | {"000000001.json": json.dumps({"label": label}).encode()})
    with pytest.raises(SynthkdError, match=r"000000001\.json: label is .* expected a whole number from 0 to 2"):
        open_set(folder)


def test_random_bytes_in_headers_never_raise_anything_else(file_set: Make, tmp_path: Path) -> None:
    folder, rng = file_set(tmp_path / "set", 4, (8, 8)), random.Random(0)
    shard = folder / "shard-000000.tar"
    clean = shard.read_bytes()
    for _ in range(100):
        data = bytearray(clean)
        header = rng.choice([i for i in range(0, len(clean), 512) if clean[i : i + 5] == b"00000"])
        for _ in range(rng.randrange(1, 4)):
            data[header + rng.randrange(512)] = rng.randrange(256)
        checksum = sum(data[header : header + 148]) + 256 + sum(data[header + 156 : header + 512])
        data[header + 148 : header + 156] = f"{checksum:06o}\0 ".encode()
        shard.write_bytes(bytes(data))
        said = ""
        try:
            open_set(folder)
        except SynthkdError as error:
            said = str(error)
        assert "\n" not in said


def test_few_files_stay_open(file_set: Make, tmp_path: Path) -> None:
    source = open_set(file_set(tmp_path / "set", 60, (4, 4), per_shard=1))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0  # noqa: PTH208
    assert len({source.encoded(row) for row in range(60)}) == 60
    if before:
        assert len(os.listdir("/proc/self/fd")) - before <= 32  # noqa: PTH208


def test_images_in_memory_are_a_source() -> None:
    images = torch.randint(0, 256, (7, 3, 5, 6), dtype=torch.uint8)
    source = MemorySource(LabelledImages(images, torch.arange(7) % 3, ("a", "b", "c")))
    rows = np.array([6, 0, 3])
    views = Views.plain(rows)
    views.flip[1] = True
    (got,) = source.reader((5, 6), ReadOptions()).read([Request(rows, views)])
    want = images[rows].clone()
    want[1] = want[1].flip(2)
    assert torch.equal(got.images, want)
    assert got.images.is_contiguous(memory_format=torch.channels_last)
    assert source.keys(rows) == ("000000006", "000000000", "000000003")
    other = MemorySource(LabelledImages(images.flip(0), torch.arange(7) % 3, ("a", "b", "c")))
    assert other.digest != source.digest
