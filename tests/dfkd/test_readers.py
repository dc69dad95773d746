"""Readers of a set: the same pixels in the same order from each, from any step on, and damage named by key."""

import importlib.util
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from synthkd.dfkd import cached, crops, data_dali, decode, reader_choice
from synthkd.dfkd.feed import Order, Pixels, ReadOptions, Request
from synthkd.dfkd.sets import SetSource, open_set
from synthkd.dfkd.views import Views, ViewSpec, draw_views, pixel_boxes
from synthkd.engine import SynthkdError

Make = Callable[..., Path]
CROPS = ViewSpec(crop=0.2, flip=True)
BOTH = [
    "torch",
    pytest.param("dali", marks=pytest.mark.skipif(not data_dali.dali_available(), reason="DALI is not installed")),
]


def options(reader: str, **more: Any) -> ReadOptions:
    return ReadOptions(**{"reader": reader, "cache": "off", "threads": 1, **more})


def requests(order: Order, first: int, last: int, spec: ViewSpec = CROPS) -> Iterator[Request]:
    """Steps first..last-1, each epoch with views of its own."""
    for step in range(first, last):
        rows, epochs = order.at(step)
        yield Request(rows, draw_views(spec, 3, int(epochs[0]), rows, order.count))


def read(source: SetSource, size: tuple[int, int], how: ReadOptions, asked: Iterator[Request]) -> list[Pixels]:
    reader = source.reader(size, how)
    try:
        return list(reader.read(asked))
    finally:
        reader.close()


def stacked(pixels: list[Pixels]) -> torch.Tensor:
    return torch.cat([p.images for p in pixels])


def worst(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


SHAPES = {"down": ((33, 46), (17, 20)), "up": ((9, 14), (24, 31)), "same": ((12, 15), (12, 15))}


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
@pytest.mark.parametrize("shape", SHAPES)
def test_readers_agree(file_set: Make, tmp_path: Path, shape: str, image_format: str) -> None:
    """With crops and flips; exactly, but for what two JPEG decoders may differ in."""
    pytest.importorskip("nvidia.dali")
    stored, size = SHAPES[shape]
    source, order = open_set(file_set(tmp_path / "set", 22, stored, image_format=image_format)), Order(22, 6, 1)
    spec = ViewSpec(flip=True) if shape == "same" else CROPS
    pair = [read(source, size, options(name), requests(order, 0, 7, spec)) for name in ("torch", "dali")]
    ours, theirs = (stacked(p) for p in pair)
    assert ours.shape == (42, 3, *size)
    assert worst(ours, theirs) <= (2 if image_format == "jpg" else 0)
    assert all(p.images.is_contiguous(memory_format=torch.channels_last) for p in [*pair[0], *pair[1]])
    assert all(p.used.tolist() == list(range(6)) for p in [*pair[0], *pair[1]])


@pytest.mark.parametrize("reader", BOTH)
def test_pixels_are_crops_of_the_file(file_set: Make, tmp_path: Path, reader: str) -> None:
    """Against crop, torch's resize and flip, one by one; several stored sizes in a batch, the last batch short."""
    sizes = (18, 25), (31, 12), (16, 16)
    source, order = open_set(file_set(tmp_path / "set", 10, *sizes)), Order(10, 4, 0)
    asked = [*requests(order, 0, 3), Request(np.array([7]), Views.plain(np.array([7])))]
    got = read(source, (16, 16), options(reader, threads=2), iter(asked))
    for request, pixels in zip(asked, got, strict=True):
        for i, row in enumerate(request.rows):
            stored = decode.decode(source.encoded(int(row)), "")
            top, left, h, w = pixel_boxes(request.views.box[i : i + 1], *stored.shape[:2])[0]
            crop = torch.from_numpy(stored.copy()).permute(2, 0, 1)[None, :, top : top + h, left : left + w].float()
            want = F.interpolate(crop, size=[16, 16], mode="bilinear", antialias=True).round().to(torch.uint8)[0]
            want = want.flip(2) if request.views.flip[i] else want
            assert worst(pixels.images[i], want) <= 1


def test_a_camera_s_orientation_turns_nothing(file_set: Make, tmp_path: Path) -> None:
    """DALI would follow it; Pillow does not."""
    pytest.importorskip("nvidia.dali")
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 3  # upside down
    Image.fromarray(np.arange(24 * 24 * 3, dtype=np.uint32).astype(np.uint8).reshape(24, 24, 3)).save(
        buffer, "JPEG", exif=exif
    )
    changed = {"000000001": buffer.getvalue()}
    source = open_set(file_set(tmp_path / "set", 4, (24, 24), image_format="jpg", changed=changed))
    pair = [read(source, (24, 24), options(name), requests(Order(4, 4, 0), 0, 1)) for name in ("torch", "dali")]
    assert worst(stacked(pair[0]), stacked(pair[1])) <= 2


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_a_file_without_its_end_is_seen(image_format: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((9, 7, 3), np.uint8)).save(buffer, image_format)
    assert decode.stored_size(buffer.getvalue(), "") == (9, 7)
    assert not decode.is_cut_off(buffer.getvalue())
    assert decode.is_cut_off(buffer.getvalue()[:-9])


@pytest.mark.parametrize("reader", BOTH)
def test_a_restart_anywhere_goes_on_alike(file_set: Make, tmp_path: Path, reader: str) -> None:
    source, order = open_set(file_set(tmp_path / "set", 20, (12, 10))), Order(20, 6, 5)
    undisturbed = read(source, (8, 9), options(reader), requests(order, 0, 8))
    open_one = source.reader((8, 9), options(reader))
    part = open_one.read(requests(order, 0, 8))
    next(part)
    part.close()  # type: ignore[attr-defined]
    for step in (1, 4, 7):  # the same reader, its requests that were under way forgotten
        again = list(open_one.read(requests(order, step, 8)))
        assert torch.equal(stacked(again), stacked(undisturbed[step:]))
    open_one.close()


def test_two_ranks_add_up(file_set: Make, tmp_path: Path) -> None:
    source, one = open_set(file_set(tmp_path / "set", 20, (8, 8))), Order(20, 8, 5)
    ranks = [Order(20, 8, 5, rank=r, world=2) for r in (0, 1)]
    whole = read(source, (8, 8), options("torch"), requests(one, 0, 5))
    parts = [read(source, (8, 8), options("torch"), requests(order, 0, 5)) for order in ranks]
    for step in range(5):
        rows = [order.at(step)[0].tolist() for order in ranks]
        assert rows[0] + rows[1] == one.at(step)[0].tolist()
    for step in (0, 1):  # the first epoch: no row twice
        assert not set(ranks[0].at(step)[0]) & set(ranks[1].at(step)[0])
        assert torch.equal(torch.cat([p[step].images for p in parts]), whole[step].images)


def _jpeg(cut: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()[: -cut or None]


DAMAGE: dict[str, dict[str, Any]] = {
    "flipped": {"flipped": ["000000004"]},
    "truncated": {"changed": {"000000004": _jpeg(400)}},
    "empty": {"changed": {"000000004": b""}},
    "no image": {"changed": {"000000004": b"GIF89a" + b"\0" * 40}},
}


@pytest.mark.parametrize("reader", BOTH)
@pytest.mark.parametrize("what", ["flipped", "truncated", "empty", "no image"])
def test_damage_is_named_and_stood_in_for(
    file_set: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, reader: str, what: str
) -> None:
    """Warned of once; the next readable image of the request takes the place, and the reader says which."""
    folder = file_set(tmp_path / "set", 12, (24, 24), image_format="jpg", **DAMAGE[what])
    source, rows = open_set(folder), np.array([3, 4, 5, 4])
    made = source.reader((24, 24), options(reader))
    asked = [Request(rows, Views.plain(rows)), Request(np.arange(3), Views.plain(np.arange(3)))] * 2
    with caplog.at_level(logging.WARNING, "synthkd"):
        got = list(made.read(iter(asked)))
    assert [p.used.tolist() for p in got] == [[0, 2, 2, 0], [0, 1, 2]] * 2
    assert torch.equal(got[0].images[1], got[0].images[2])
    assert torch.equal(got[0].images[3], got[0].images[0])
    assert list(made.damaged) == ["000000004"]
    assert "shard-000000.tar: 000000004.jpg" in made.damaged["000000004"]
    assert len([r for r in caplog.records if "000000004" in r.getMessage()]) == 1
    only = np.array([4])
    with pytest.raises(SynthkdError, match="none of 1 images of a batch can be read"):
        list(made.read(iter([Request(only, Views.plain(only))])))
    made.close()
    with pytest.raises(SynthkdError, match=r"shard-000000\.tar: 000000004\.jpg.*strict"):
        read(source, (24, 24), options(reader, strict=True), iter(asked))


def test_a_pipeline_that_fails_begins_again(
    file_set: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """DALI meets what it cannot decode: found, left out, and nothing else of the stream changes."""
    pytest.importorskip("nvidia.dali")
    bad = _jpeg(0)[:2] + _jpeg(0)[300:]  # ends as it should; its tables are gone
    folder = file_set(tmp_path / "set", 24, (24, 24), image_format="jpg", changed={"000000009": bad})
    monkeypatch.setattr(data_dali, "stored_size", lambda data, where: (24, 24))
    source, order, restarts = open_set(folder), Order(24, 5, 2), []
    restart = data_dali.DaliReader._restart
    monkeypatch.setattr(data_dali.DaliReader, "_restart", lambda self: (restarts.append(1), restart(self)))
    theirs = source.reader((24, 24), options("dali"))
    got, ours = (
        list(theirs.read(requests(order, 0, 9))),
        read(source, (24, 24), options("torch"), requests(order, 0, 9)),
    )
    assert restarts == [1]
    assert "decoded without" not in caplog.text
    assert list(theirs.damaged) == ["000000009"]
    assert [p.used.tolist() for p in got] == [p.used.tolist() for p in ours]
    assert worst(stacked(got), stacked(ours)) <= 2
    theirs.close()


def test_what_dali_alone_cannot_read_is_read_by_hand(
    file_set: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nvidia.dali")
    source, order = open_set(file_set(tmp_path / "set", 12, (10, 11))), Order(12, 4, 0)
    ours = read(source, (10, 11), options("torch"), requests(order, 0, 6))
    calls, wait = [0], data_dali._Decoder.wait

    def failing(self: Any, stream: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise RuntimeError("planted")
        return wait(self, stream)

    monkeypatch.setattr(data_dali._Decoder, "wait", failing)
    theirs = source.reader((10, 11), options("dali"))
    assert torch.equal(stacked(list(theirs.read(requests(order, 0, 6)))), stacked(ours))
    assert not theirs.damaged
    theirs.close()


@pytest.mark.parametrize("reader", BOTH)
@pytest.mark.parametrize("spec", [CROPS, ViewSpec(flip=True)])
def test_cached_is_uncached(file_set: Make, tmp_path: Path, reader: str, spec: ViewSpec) -> None:
    """Over epochs, with a damaged image, one of another size, and a read that was broken off."""
    sizes, damage = [(13, 18)] * 10 + [(20, 9)], {"flipped": ["000000004"]}
    source, order = open_set(file_set(tmp_path / "set", 22, *sizes, **damage)), Order(22, 6, 1)
    how = options(reader, cache="memory", crops=spec.crop < 1)
    plain = read(source, (16, 12), options(reader), requests(order, 0, 12, spec))
    made = source.reader((16, 12), how)
    assert isinstance(made, cached.CachedReader)
    part = made.read(requests(order, 0, 12, spec))
    next(part)
    part.close()  # type: ignore[attr-defined]
    kept = list(made.read(requests(order, 0, 12, spec)))
    assert torch.equal(stacked(kept), stacked(plain))
    assert [p.used.tolist() for p in kept] == [p.used.tolist() for p in plain]
    assert list(made.damaged) == ["000000004"]
    made.close()


def test_each_image_is_decoded_once(file_set: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all epochs, and for two readers of a set."""
    source, order, seen = open_set(file_set(tmp_path / "set", 12, (8, 8))), Order(12, 5, 1), []
    encoded = source.encoded
    read(source, (8, 8), options("torch", cache="memory"), requests(order, 0, 9, ViewSpec(flip=True)))
    monkeypatch.setattr(source, "encoded", lambda row: (seen.append(row), encoded(row))[1])
    read(source, (8, 8), options("torch", cache="memory"), requests(order, 0, 9, ViewSpec(flip=True)))
    assert set(seen) <= {0}  # the first one's size


def test_decoders_share_no_store(file_set: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_set(file_set(tmp_path / "set", 6, (8, 8), image_format="jpg"))
    read(source, (8, 8), options("torch", cache="memory"), requests(Order(6, 3, 0), 0, 2))
    monkeypatch.setattr(decode, "_simplejpeg", lambda: None)
    read(source, (8, 8), options("torch", cache="memory"), requests(Order(6, 3, 0), 0, 2))
    assert len(source.stores) == (2 if importlib.util.find_spec("simplejpeg") else 1)


def test_a_crop_of_what_is_kept_small_is_refused(file_set: Make, tmp_path: Path) -> None:
    source = open_set(file_set(tmp_path / "set", 6, (16, 16)))
    with pytest.raises(SynthkdError, match=r"set ReadOptions\.crops"):
        read(source, (8, 8), options("torch", cache="memory", crops=False), requests(Order(6, 3, 0), 0, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_resizing_by_matrices_is_the_same(shape: str) -> None:
    """What a GPU does to a whole batch, and a CPU to each image, against a float32 resize of each crop.

    The product of matrices differs in float32's rounding alone; the CPU's bytes are rounded between rows and columns
    too, so that many differ, by 1.
    """
    (height, width), size = SHAPES[shape]
    images = torch.randint(
        0, 256, (40, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    boxes = pixel_boxes(draw_views(ViewSpec(crop=0.05), 0, 0, np.arange(40), 40).box, height, width)
    want, bytewise = (torch.empty(40, *size, 3, dtype=torch.uint8) for _ in range(2))
    for i, (top, left, tall, wide) in enumerate(boxes.tolist()):
        crops.put(images[i].numpy(), (top, left, tall, wide), False, bytewise[i].numpy())
        part = images[i, top : top + tall, left : left + wide].permute(2, 0, 1)[None].float()
        exact = torch.nn.functional.interpolate(part, size=list(size), mode="bilinear", antialias=True)
        want[i] = exact.clamp(0, 255).round()[0].permute(1, 2, 0).to(torch.uint8)
    assert worst(bytewise, want) <= 1
    got = crops.by_matrices(images, boxes, size)
    assert worst(got, want) <= 1
    assert ((got != want).float().mean()) < 2e-3


def test_the_cache_takes_a_quarter_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cpu": 4000}
    monkeypatch.setattr(cached, "free_memory", lambda device, workers: free["cpu"] // workers)
    auto = ReadOptions()
    assert cached.cache_place(auto, 3, (10, 10)) == "cpu"
    assert cached.cache_place(auto, 4, (10, 10)) == ""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cached.cache_place(ReadOptions(cache="memory"), 4, (10, 10)) == "cpu"


def test_the_faster_reader_is_measured_once(file_set: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, asked = open_set(file_set(tmp_path / "set", 6, (8, 8))), []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(reader_choice, "dali_available", lambda: True)
    monkeypatch.setattr(
        reader_choice, "_rate", lambda name, *_: (asked.append(name), {"dali": 2.0, "torch": 1.0}[name])[1]
    )
    auto = ReadOptions(cache="off")
    assert reader_choice.fastest(source, (8, 8), auto) == "dali"
    assert reader_choice.fastest(source, (8, 8), auto) == "dali"
    assert sorted(asked) == ["dali", "torch"]
    known = tmp_path / "cache" / "synthkd" / "readers.json"
    assert next(iter(json.loads(known.read_text()).values()))["images_per_second"] == {"dali": 2, "torch": 1}
    known.write_text("{")
    assert reader_choice.fastest(source, (8, 8), auto) == "dali"
    assert len(asked) == 4
    assert reader_choice.open_reader(source, (8, 8), ReadOptions(threads=1)).name == "torch"  # small, and kept
    assert len(asked) == 4


def test_without_dali(file_set: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_set(file_set(tmp_path / "set", 3, (8, 8)))
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    with pytest.raises(SynthkdError, match=r"DALI is not installed: pip install 'synthkd\[dali\]'"):
        source.reader((8, 8), options("dali"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert reader_choice.fastest(source, (8, 8), ReadOptions()) == "torch"
    for wrong in ({"reader": "torhc"}, {"cache": "disk"}):
        with pytest.raises(SynthkdError, match="known:"):
            source.reader((8, 8), options(**{"reader": "torch", **wrong}))


def test_without_simplejpeg(file_set: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, order = open_set(file_set(tmp_path / "set", 6, (21, 10), image_format="jpg")), Order(6, 3, 0)
    fast = read(source, (21, 10), options("torch"), requests(order, 0, 2))
    monkeypatch.setattr(decode, "_simplejpeg", lambda: None)
    assert worst(stacked(read(source, (21, 10), options("torch"), requests(order, 0, 2))), stacked(fast)) <= 2
    assert decode.decoder_name("jpg").startswith("Pillow")
