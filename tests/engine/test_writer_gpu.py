"""The writer's copies on a real GPU: page-locked buffers, a stream of their own, nothing torn, nvJPEG."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from synthkd.engine import Batch, write_shards
from synthkd.engine.batch import Preview
from synthkd.engine.index import read_environments
from synthkd.engine.pinned import PinnedRing
from synthkd.engine.verify import verify_set
from synthkd.engine.writer import Writing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _batch(side: int, seed: int) -> Batch:
    rng = torch.Generator("cuda").manual_seed(seed)
    shape = (8, 3, side, side)
    a, b = (
        torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8, device="cuda").contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    targets = torch.rand(8, 10, generator=rng, device="cuda")
    return Batch(
        group=seed, round=0, attempt=0, ids=tuple(range(8)), prompts=("",) * 8, images=a,
        labels=targets.argmax(dim=1), targets=targets, notes={"logits": targets.half()},
        previews=(Preview(0.5, b, targets),),
    )  # fmt: skip


def test_copies_are_whole_while_the_device_is_busy() -> None:
    """Behind a slow kernel, with slots that serve many groups and sources that die at once."""
    ring, waiting = PinnedRing(3), list[tuple[Any, Batch]]()
    for seed in range(12):
        batch = _batch(256, seed)
        wanted = batch.cpu()
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
        batch = replace(batch, images=batch.images + 1)  # made behind that kernel
        waiting.append((ring.hold(batch), replace(wanted, images=wanted.images + 1)))
        del batch
        torch.empty(2**20, device="cuda").fill_(float(seed))  # would take freed memory over
        if len(waiting) == 3:
            held, wanted = waiting.pop(0)
            got = held.batch()
            assert got.images.is_pinned()
            assert torch.equal(got.images, wanted.images)
            assert torch.equal(got.previews[0].images, wanted.previews[0].images)
            assert torch.equal(got.notes["logits"], wanted.notes["logits"])
            assert torch.equal(got.labels, wanted.labels)
            held.release()


class _OnDevice:
    """A stream of canned groups, as if the GPU had drawn them."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.plan, self.identity = inner, inner.plan, inner.identity
        self.environment = {**inner.environment, "device": f"cuda: {torch.cuda.get_device_name()}"}

    def draw(self, units: Any) -> Any:
        """The groups on the device."""
        for batch in self._inner.draw(units):
            yield replace(
                batch, environment=self.environment, images=batch.images.cuda(), labels=batch.labels.cuda(),
                targets=batch.targets.cuda(), notes={n: x.cuda() for n, x in batch.notes.items()},
                previews=tuple(p.of(torch.Tensor.cuda) for p in batch.previews),
            )  # fmt: skip


@pytest.mark.parametrize("ring", [1, 3])
def test_a_set_has_the_bytes_of_the_host(canned: Callable[..., Any], tmp_path: Path, ring: int) -> None:
    stream = canned(36, groups_per_shard=2)
    write_shards(stream, tmp_path / "host")
    write_shards(_OnDevice(stream), tmp_path / "device", writing=Writing(ring=ring))
    for path in sorted((tmp_path / "host").glob("shard-*.tar")):
        assert (tmp_path / "device" / path.name).read_bytes() == path.read_bytes()


def test_nvjpeg_encodes_on_the_device(canned: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    stream = _OnDevice(canned(36, image_format="jpg"))
    write_shards(stream, tmp_path, writing=Writing(encoder="nvjpeg"))
    (found,) = read_environments(tmp_path).values()
    assert found["encoder"].startswith("nvjpeg ")
    assert verify_set(tmp_path).problems == ()
