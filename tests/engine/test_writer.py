"""Writing beside the drawing: the same bytes on any number of threads, fixed memory, errors heard, no thread left."""

import contextlib
import errno
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from synthkd.engine import Batch, SynthkdError, WorkUnit, write_shards
from synthkd.engine.batch import Preview
from synthkd.engine.encoders import Encoder, check_encoder, encoder_for, encoder_of
from synthkd.engine.encoding import Draft, encode_group
from synthkd.engine.index import read_environments
from synthkd.engine.pinned import PinnedRing
from synthkd.engine.reading import decode_image
from synthkd.engine.rows import all_group_rows
from synthkd.engine.verify import verify_set
from synthkd.engine.writer import RUNS, WriteSummary, Writing, note_run

GROUPS = 6
Change = Callable[[int, Batch], Batch]


class Watched:
    """A stream that tells `seen` the number of each group before it is handed out, and may change it."""

    def __init__(self, inner: Any, seen: Callable[[int], object]) -> None:
        self._inner, self._seen = inner, seen
        self.plan, self.identity, self.environment = inner.plan, inner.identity, inner.environment
        self.alive: list[weakref.ref[Tensor]] = []

    def draw(self, units: Iterable[WorkUnit]) -> Iterator[Batch]:
        """The groups with pixels of their own, so that it shows how long they live."""
        for number, batch in enumerate(self._inner.draw(units)):
            self._seen(number)
            pixels = batch.images.clone(memory_format=torch.channels_last)
            self.alive.append(weakref.ref(pixels))
            yield replace(batch, images=pixels)
            del pixels

    def living(self) -> int:
        """Groups whose pixels are in memory."""
        return sum(ref() is not None for ref in self.alive)


@pytest.fixture
def stream(canned: Callable[..., Any]) -> Any:
    """Six groups in three shards."""
    return canned(6 * GROUPS, groups_per_shard=2)


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """Whatever a test does to a writer, its threads end."""
    yield
    assert not [t.name for t in threading.enumerate() if t.name.startswith("synthkd-")]


def _tars(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("shard-*.tar"))}


def _agrees(stream: Any, folder: Path, whole: Path) -> None:
    """Finish a set and compare it with the undisturbed one."""
    write_shards(stream, folder)
    assert _tars(folder) == _tars(whole)
    assert verify_set(folder).problems == ()


@pytest.fixture
def whole(stream: Any, tmp_path: Path) -> Path:
    """The set that the plain way would write: one group after another, encoded and appended in this thread."""
    from synthkd.engine.index import claim_folder
    from synthkd.engine.shards import ShardFolder

    folder = tmp_path / "whole"
    claim_folder(folder, stream.identity, 6 * GROUPS, {})
    state = ShardFolder(folder, stream.plan, None)
    for batch in stream.draw(list(state.pending())):
        state.append(encode_group(batch, stream.identity, stream.environment))
    return folder


@pytest.mark.parametrize("ring", [1, 3])
@pytest.mark.parametrize("threads", [1, 4])
def test_threads_and_ring_leave_the_bytes_alone(
    stream: Any, whole: Path, tmp_path: Path, threads: int, ring: int
) -> None:
    done: list[int] = []
    how = Writing(threads=threads, ring=ring)
    summary = write_shards(stream, tmp_path / "set", writing=how, on_batch=done.append)
    assert (summary.drawn, summary.present, summary.stopped, done) == (36, 36, False, [6] * GROUPS)
    assert _tars(tmp_path / "set") == _tars(whole)
    ours, plain = ([replace(row, seconds={}) for row in all_group_rows(folder)] for folder in (tmp_path / "set", whole))
    assert ours == plain


def test_encoders_may_end_in_any_order(
    stream: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first part of every group waits until its last is encoded."""
    inner, last = Draft.encode, [threading.Event() for _ in range(GROUPS)]

    def encode(self: Draft, samples: range, encoder: Encoder) -> list[tuple[str, bytes]]:
        if samples.start == 0:
            assert last[self.batch.group].wait(10)
        files = inner(self, samples, encoder)
        if samples.stop == 6:
            last[self.batch.group].set()
        return files

    monkeypatch.setattr(Draft, "encode", encode)
    write_shards(stream, tmp_path / "set", writing=Writing(threads=4, ring=2))
    assert _tars(tmp_path / "set") == _tars(whole)


@pytest.mark.parametrize("ring", [1, 3])
def test_a_slow_disk_makes_the_drawing_wait(
    stream: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ring: int
) -> None:
    """While the disk stands still, so many groups are drawn as the ring has slots, and one that waits for a slot."""
    go, early, sync = threading.Event(), list[int](), os.fsync

    def fsync(descriptor: int) -> None:
        if threading.current_thread().name == "synthkd-appender":
            assert go.wait(10)
        sync(descriptor)

    def seen(number: int) -> None:
        assert watched.living() <= ring + 1
        if number == ring:
            threading.Timer(0.05, go.set).start()
        elif number > ring and not go.is_set():
            early.append(number)

    monkeypatch.setattr(os, "fsync", fsync)
    watched = Watched(stream, seen)
    summary = write_shards(watched, tmp_path, writing=Writing(ring=ring))
    assert early == []
    assert summary.present == 36
    assert 0.02 < summary.stalled <= summary.seconds
    assert summary.stall_percent > 0
    assert summary.images_per_second == 36 / summary.seconds


@pytest.mark.parametrize("at", ["fsync", "encode", "told"])
def test_an_error_beside_the_drawing_stops_it(
    stream: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    failed, drawn, calls = threading.Event(), list[int](), list[str]()

    def fail(*_: Any) -> Any:
        calls.append(at)
        failed.set()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def seen(number: int) -> None:
        drawn.append(number)
        if number == 2:
            assert failed.wait(10)
            time.sleep(0.03)  # until the thread has passed its error on

    sync = os.fsync
    with monkeypatch.context() as patch:
        if at == "fsync":
            beside = "synthkd-appender"
            patch.setattr(os, "fsync", lambda d: fail() if threading.current_thread().name == beside else sync(d))
        elif at == "encode":
            patch.setattr(Draft, "encode", fail)
        told = fail if at == "told" else lambda _: None
        with pytest.raises(SynthkdError, match="no space left; every finished group is safe"):
            write_shards(Watched(stream, seen), tmp_path / "set", on_batch=told)
    assert len(drawn) <= 4  # of six
    assert calls == [at] or at == "encode"  # nothing is appended after it
    _agrees(stream, tmp_path / "set", whole)


def test_an_error_in_the_last_group_is_heard(stream: Any, tmp_path: Path) -> None:
    done: list[int] = []

    def told(new: int) -> None:
        done.append(new)
        if len(done) == GROUPS:
            raise OSError(errno.EROFS, "")

    with pytest.raises(SynthkdError, match="read-only file system"):
        write_shards(stream, tmp_path, on_batch=told)


def test_a_safe_group_is_let_go(stream: Any, tmp_path: Path) -> None:
    """Before the next one is drawn, where the disk is fast enough."""

    def seen(_: int) -> None:
        until = time.monotonic() + 2
        while watched.living() and time.monotonic() < until:
            time.sleep(0.001)
        assert watched.living() == 0

    watched = Watched(stream, seen)
    write_shards(watched, tmp_path)


@pytest.mark.parametrize(("error", "safe"), [(ValueError, 3), (KeyboardInterrupt, 0)])
def test_an_error_in_the_drawing(
    stream: Any, whole: Path, tmp_path: Path, error: type[BaseException], safe: int
) -> None:
    """Groups that were drawn are finished first; after an interrupt only the one that is being appended."""

    def seen(number: int) -> None:
        if number == 3:
            raise error

    done: list[int] = []
    with pytest.raises(error):
        write_shards(Watched(stream, seen), tmp_path / "set", on_batch=done.append)
    assert len(done) >= safe
    rest = write_shards(stream, tmp_path / "set")
    assert rest.drawn == 36 - sum(done)
    _agrees(stream, tmp_path / "set", whole)


def test_an_interrupt_leaves_what_is_not_being_appended(stream: Any, whole: Path, tmp_path: Path) -> None:
    """The first group is being told of when the interrupt comes; those behind it are drawn again later."""
    told, go, done = threading.Event(), threading.Event(), list[int]()

    def on_batch(new: int) -> None:
        done.append(new)
        told.set()
        assert go.wait(10)

    def seen(number: int) -> None:
        if number == 3:
            assert told.wait(10)
            threading.Timer(0.03, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(Watched(stream, seen), tmp_path / "set", on_batch=on_batch)
    assert done == [6]
    _agrees(stream, tmp_path / "set", whole)


def test_a_stop_writes_what_was_drawn(stream: Any, tmp_path: Path) -> None:
    asked = iter([False, False, True])
    summary = write_shards(stream, tmp_path, should_stop=lambda: next(asked))
    assert (summary.drawn, summary.present, summary.stopped) == (18, 18, True)


def test_a_stop_during_the_last_wait_is_heard(stream: Any, tmp_path: Path) -> None:
    """All groups were drawn and no stop was asked for; it comes before the first of them is safe."""
    asked, last, stop = list[int](), threading.Event(), threading.Event()

    def should_stop() -> bool:
        asked.append(1)
        if len(asked) == GROUPS:
            last.set()
        return stop.is_set()

    def on_batch(_: int) -> None:
        assert last.wait(10)  # the ring holds all groups, so that the drawing goes on meanwhile
        stop.set()

    assert write_shards(stream, tmp_path, on_batch=on_batch, should_stop=should_stop, writing=Writing(ring=6)).stopped
    assert len(asked) == GROUPS + 1


def test_nothing_left_to_draw(stream: Any, tmp_path: Path) -> None:
    """No stop is asked for, no figure made up."""
    write_shards(stream, tmp_path)
    summary = write_shards(stream, tmp_path, should_stop=lambda: pytest.fail("asked"))
    assert (summary.drawn, summary.present, summary.seconds, summary.images_per_second) == (0, 36, 0.0, 0.0)


def _line(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / RUNS).read_text().splitlines()[-1]))


def test_a_run_leaves_its_figures(stream: Any, tmp_path: Path) -> None:
    first = write_shards(stream, tmp_path, shards=[0])
    both = first.then(write_shards(stream, tmp_path, shards=[1, 2]))
    assert (both.drawn, both.present) == (36, 36)
    note_run(tmp_path, first)
    (tmp_path / RUNS).write_bytes((tmp_path / RUNS).read_bytes() + b'{"torn')
    note_run(tmp_path, both, Writing(encoder="pillow"))
    note_run(tmp_path, WriteSummary(0, 36, False))  # nothing drawn, nothing said
    assert len((tmp_path / RUNS).read_text().splitlines()) == 3
    line = _line(tmp_path)
    assert (line["drawn"], line["present"], line["encoder"]) == (36, 36, "pillow")
    assert list(read_environments(tmp_path)) == [line["environment"]]
    assert line["peak_memory"] > 10**7
    assert line["bytes"] > 0
    assert verify_set(tmp_path).problems == ()


@pytest.mark.parametrize(
    ("name", "image_format", "device", "said"),
    [
        ("pilow", "png", "cpu", "did you mean 'pillow'"),
        ("simplejpeg", "png", "cpu", "writes JPEG, image_format is 'png'"),
        ("nvjpeg", "webp", "cuda", "writes JPEG, image_format is 'webp'"),
        ("nvjpeg", "jpg", "cpu", "encodes on a GPU, device is 'cpu'"),
    ],
)
def test_an_encoder_that_cannot_be_had(name: str, image_format: str, device: str, said: str) -> None:
    with pytest.raises(SynthkdError, match=said):
        encoder_for(name, image_format, device)


def test_nvjpeg_takes_what_is_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision would encode other pixels by libjpeg; those of several processes come through host memory."""
    io = SimpleNamespace(encode_jpeg=lambda planes, quality: [torch.zeros(3, dtype=torch.uint8) for _ in planes])
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(io=io))
    monkeypatch.setitem(sys.modules, "torchvision.io", io)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.26.0")
    encoder = encoder_for("nvjpeg", "jpg", "cuda")
    with pytest.raises(SynthkdError, match="pixels are on cpu, not on a GPU"):
        encoder(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "jpg", 95)
    check_encoder("nvjpeg", "jpg")
    check_encoder("nvjpeg", "jpg", "cuda")
    with pytest.raises(SynthkdError, match="groups of 2 workers come through host memory; use --workers 1"):
        check_encoder("nvjpeg", "jpg", "cuda", 2)


@pytest.mark.parametrize(("field", "value"), [("threads", 0), ("threads", 257), ("ring", 0)])
def test_settings_out_of_range(field: str, value: int) -> None:
    with pytest.raises(SynthkdError, match=f"{value}; expected|{value}: expected"):
        Writing(**{field: value})


def test_another_encoder_is_named_in_the_rows(canned: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("simplejpeg")
    stream = canned(6, image_format="jpg")
    for name in ("pillow", "simplejpeg"):
        write_shards(stream, tmp_path / name, writing=Writing(encoder=name))
    (plain,), (fast,) = (list(read_environments(tmp_path / n).values()) for n in ("pillow", "simplejpeg"))
    assert fast == {**plain, "encoder": fast["encoder"]}
    assert "encoder" not in plain
    assert fast["encoder"].startswith("simplejpeg ")
    assert verify_set(tmp_path / "simplejpeg").problems == ()
    assert encoder_of(fast, "jpg", "cpu").name == fast["encoder"]
    assert encoder_of(plain, "jpg", "cpu").name == ""
    assert encoder_of({"encoder": "nvjpeg 0.26.0"}, "jpg", "cpu").name == ""
    pixels = next(iter(stream.draw([stream.plan.unit(0)]))).images.permute(0, 2, 3, 1)
    a, b = (
        torch.from_numpy(decode_image(encoder_of(detail, "jpg", "cpu")(pixels, "jpg", 95)[0], "here").copy()).float()
        for detail in (plain, fast)
    )
    assert (a - b).abs().mean() < 3


class FakeCuda:
    """Streams whose copies arrive when an event is waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def Stream(self, device: Any) -> Any:  # noqa: N802
        """Of the ring."""
        return SimpleNamespace(wait_stream=lambda other: self.log.append(f"wait {other}"))

    def current_stream(self, device: Any) -> str:
        """Of the drawing."""
        return "drawing"

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        """What is inside is queued there."""
        self.log.append("begin")
        yield
        self.log.append("end")

    def Event(self, blocking: bool) -> Any:  # noqa: N802
        """Of a copy."""
        return SimpleNamespace(
            record=lambda stream: self.log.append("record"), synchronize=lambda: self.log.append("synchronize")
        )


def _batch(side: int, seed: int = 0, kept: int = 4) -> Batch:
    """Random pixels in channels_last memory, a preview, notes of several types and shapes."""
    rng = torch.Generator().manual_seed(seed)

    def pixels() -> Tensor:
        made = torch.randint(0, 256, (4, 3, side, side), generator=rng, dtype=torch.uint8)
        return made.contiguous(memory_format=torch.channels_last)

    targets, notes = torch.rand(4, 3, generator=rng), {"logits": torch.rand(4, 3, generator=rng).bfloat16()}
    notes["one"] = torch.rand(4, 1, 1, 1, generator=rng)
    notes["every other"] = torch.rand(4, 6, generator=rng)[:, ::2]
    batch = Batch(
        group=0, round=0, attempt=0, ids=(0, 1, 2, 3), prompts=("",) * 4, images=pixels(),
        labels=targets.argmax(dim=1), targets=targets, notes=notes,
        previews=(Preview(0.5, pixels(), targets.flip(1), {"logits": targets}),),
    )  # fmt: skip
    return batch.first(kept)


def _same(a: Batch, b: Batch) -> None:
    for x, y in ((a, b), (a.previews[0], b.previews[0])):
        assert torch.equal(x.images, y.images)
        assert torch.equal(x.targets, y.targets)
        assert x.images.is_contiguous(memory_format=torch.channels_last)
        assert x.notes.keys() == y.notes.keys()
        assert all(torch.equal(x.notes[n], y.notes[n]) for n in y.notes)
    assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("side", [3, 16])
def test_the_ring_copies_every_tensor_once(side: int) -> None:
    """With streams that only note what is asked of them; the buffer serves group after group."""
    cuda, buffers = FakeCuda(), set[int]()
    ring = PinnedRing(1, cuda=cuda, pin=False)
    for seed, kept in ((0, 4), (1, 4), (2, 3)):
        source = _batch(side, seed, kept)
        held = ring._copied(source)
        assert held._source is source
        assert cuda.log[-4:] == ["wait drawing", "begin", "record", "end"]
        batch = held.batch()
        assert cuda.log[-1] == "synchronize"
        assert held._source is None  # what was copied may go
        _same(batch, source)
        buffers.add(batch.images.untyped_storage().data_ptr())
        assert batch.targets.untyped_storage().data_ptr() in buffers
        held.release()
    assert len(buffers) == 1


def test_the_ring_leaves_pixels_for_an_encoder_on_the_device() -> None:
    source = _batch(16)
    batch = PinnedRing(1, images=False, cuda=FakeCuda(), pin=False)._copied(source).batch()
    assert batch.images is source.images
    assert batch.previews[0].images is source.previews[0].images
    assert batch.targets is not source.targets
    _same(batch, source)


def test_a_batch_on_the_host_is_not_copied() -> None:
    source = _batch(16)
    assert PinnedRing(1).hold(source).batch() is source
