"""Online training: the pool's arithmetic, its bound, and batches that are functions of the seed."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from synthkd.dfkd.distill_spec import DistillSpec
from synthkd.dfkd.online import OnlineImages, PoolSpec, ReplayPool, distill_online
from synthkd.dfkd.teachers import load_teacher
from synthkd.engine import Request
from synthkd.engine.errors import SynthkdError

SPEC = DistillSpec(arch_args={"widths": [4], "blocks": [1]}, steps=30, batch_size=6, warmup_steps=3, flip=True)


def pixels(*values: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One image of one value each, labelled by it."""
    x = torch.tensor(values, dtype=torch.uint8)
    return x.view(-1, 1, 1, 1).expand(-1, 3, 2, 2), x.long()


def test_the_least_surprising_leave_first_and_of_equals_the_oldest() -> None:
    """Capacity four: what is new has the highest priority there is."""
    pool = ReplayPool(PoolSpec(capacity=4), 0)
    pool.add(*pixels(1, 2, 3, 4))
    logits = torch.zeros(3, 2)
    pool.learned(torch.tensor([0, 1, 3]), logits, torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 0.0]]))
    pool.add(*pixels(5))  # 1 has priority 0
    assert sorted(pool.labels.tolist()) == [2, 3, 4, 5]
    assert pool.images[:, 0, 0, 0].tolist() == pool.labels.tolist()
    pool.add(*pixels(6, 7))  # 4 is at KL((.73, .27) || half) = 0.12, 2 at 0.60
    assert sorted(pool.labels.tolist()) == [3, 5, 6, 7]
    pool.add(*pixels(8))  # all are at the top: 3 came first
    assert sorted(pool.labels.tolist()) == [5, 6, 7, 8]
    pool.add(*pixels(*range(20, 40)))
    assert sorted(pool.labels.tolist()) == [36, 37, 38, 39]
    assert len(pool.images) == 4


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0])
def test_draws_follow_the_priorities(exponent: float) -> None:
    """P(i) ~ p_i ** exponent (arXiv 1511.05952, eq. 1), by counting."""
    pool = ReplayPool(PoolSpec(capacity=4, exponent=exponent), 3)
    pool.add(*pixels(0, 1, 2))
    pool.priority[:3] = torch.tensor([0.1, 1.0, 4.0])
    found = torch.cat([pool.draw(500, step) for step in range(20)])
    shares = torch.bincount(found, minlength=3).double() / len(found)
    want = torch.tensor([0.1, 1.0, 4.0]).double() ** exponent
    torch.testing.assert_close(shares, want / want.sum(), atol=0.02, rtol=0)
    assert torch.equal(pool.draw(9, 4), pool.draw(9, 4))


def test_batches_come_while_images_are_drawn(tiny_job: Any) -> None:
    """Groups are drawn evenly over the first part of the training; held-out ones never come up; DataLoaders take it."""
    feed = OnlineImages(tiny_job.build(), Request(num_samples=24, seed=1), SPEC, (16, 16), PoolSpec(capacity=10))
    assert isinstance(feed, IterableDataset)
    assert feed.held().shape == (6, 3, 16, 16)
    held = {x.numpy().tobytes() for x in feed.held()}
    drawn = []
    for step, batch in enumerate(DataLoader(feed, batch_size=None)):
        drawn.append(feed._drawn)
        feed.learned(batch, torch.zeros(6, 3), torch.rand(6, 3, generator=torch.Generator().manual_seed(step)))
        assert batch.images.shape == (6, 3, 16, 16)
        assert not held & {x.numpy().tobytes() for x in batch.images}
    assert drawn == sorted(drawn)
    assert (drawn[0], drawn[-1], len(drawn)) == (2, 4, 30)
    assert feed.pool.size == 10
    assert feed.waited > 0


def test_a_student_is_trained_without_a_set(tiny_job: Any, teacher_card: Any) -> None:
    """Twice the same, bit for bit; another seed is another student."""
    teacher, synth = load_teacher(str(teacher_card)), tiny_job.build()
    request = Request(num_samples=24, seed=1)
    a, b, c = (distill_online(synth, request, teacher, replace(SPEC, seed=seed)) for seed in (0, 0, 1))
    states = [s.net.net.state_dict() for s in (a, b, c)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])
    assert a.log[-1]["step"] == 30
    assert np.isfinite(a.agreement)


def test_what_online_training_cannot_do_is_said(tiny_job: Any) -> None:
    """One line each."""
    synth, request = tiny_job.build(), Request(num_samples=24, seed=1)
    for change in ({"crop": 0.5}, {"mix": 0.5}, {"soft_labels": "stored", "views": 2}):
        with pytest.raises(SynthkdError, match="need a set on disk"):
            OnlineImages(synth, request, replace(SPEC, **change), (16, 16))
    with pytest.raises(SynthkdError, match="one group; draw two or more"):
        OnlineImages(synth, Request(num_samples=6, seed=1), SPEC, (16, 16))
    with pytest.raises(SynthkdError, match="cannot go on"):
        next(OnlineImages(synth, request, SPEC, (16, 16)).batches(3, 5))
    with pytest.raises(SynthkdError, match="capacity 1"):
        PoolSpec(capacity=1)
