"""Latent CutMix against an oracle in plain loops: maps, labels, partners, boxes, and the gather in the loop."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from synthkd.engine import CutMixSpec, GuidanceSpec, Recipe, Request, Synthesizer, SynthkdError, augment
from synthkd.engine.clock import StageClock
from synthkd.engine.sampler import sample
from synthkd.engine.schedule import Coefficients, Tables
from synthkd.kernels.guided_step import gather_source

H, W = 5, 9
CLASSES = (0, 1, 2, 0, 1, 2, 0, 1)
Grid = list[list[list[int]]]


def _own(count: int) -> Grid:
    return [[[b] * W for _ in range(H)] for b in range(count)]


def _exchange(held: Grid, boxes: list[tuple[int, int, int, int, int]]) -> Grid:
    """Every sample b takes the box (partner, top, bottom, left, right) from what its partner held before."""
    out = [[list(row) for row in sample] for sample in held]
    for b, (partner, top, bottom, left, right) in enumerate(boxes):
        for i in range(top, bottom):
            for j in range(left, right):
                out[b][i][j] = held[partner][i][j]
    return out


def _boxes_of(event: Tensor) -> list[tuple[int, int, int, int, int]]:
    """The boxes of an event map, each checked to be one full rectangle from one other sample."""
    out = []
    for b, grid in enumerate(event.tolist()):
        cells = [(i, j) for i in range(H) for j in range(W) if grid[i][j] != b]
        sources = {grid[i][j] for i, j in cells}
        assert len(sources) <= 1
        if not cells:
            out.append((b, 0, 0, 0, 0))
            continue
        rows, columns = sorted({i for i, _ in cells}), sorted({j for _, j in cells})
        box = (sources.pop(), rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)
        assert len(cells) == (box[2] - box[1]) * (box[4] - box[3])
        out.append(box)
    return out


@pytest.mark.parametrize("seed", range(20))
def test_composed_map_and_labels_are_those_of_copied_pixels(seed: int) -> None:
    """Overlapping boxes of any partners, composed as the engine does and copied pixel by pixel."""
    rng = np.random.default_rng(seed)
    held, composed, b = _own(8), torch.arange(8).view(-1, 1, 1).repeat(1, H, W), 8
    latents = torch.randn(b, 3, H, W)
    moved = latents
    for _ in range(6):
        boxes, event = [], torch.arange(b).view(-1, 1, 1).repeat(1, H, W)
        for k in range(b):
            partner = int(rng.integers(b))
            top, left = int(rng.integers(H)), int(rng.integers(W))
            bottom, right = int(rng.integers(top, H)) + 1, int(rng.integers(left, W)) + 1
            boxes.append((partner, top, bottom, left, right))
            event[k, top:bottom, left:right] = partner
        held, composed = _exchange(held, boxes), augment.compose(composed, event)
        moved = gather_source(moved, event)
    assert composed.tolist() == held
    assert torch.equal(moved, gather_source(latents, composed))
    shares = augment.area_targets(composed, torch.tensor(CLASSES), 3)
    for k in range(b):
        counts = [sum(CLASSES[s] == c for row in held[k] for s in row) / (H * W) for c in range(3)]
        assert shares[k].tolist() == pytest.approx(counts, abs=1e-6)


@pytest.mark.parametrize("scope", ["class", "any"])
def test_partners_are_others_and_boxes_lie_inside(scope: str) -> None:
    spec, areas = CutMixSpec(every=1, scope=scope), []
    for group in range(60):
        partners = augment.partners(CLASSES, spec, 7, group, 3, 0)
        event = augment.event_map(CLASSES, spec, H, W, seed=7, group=group, event=3)
        assert event.shape == (len(CLASSES), H, W)
        assert sorted(partners) == list(range(len(CLASSES)))  # everyone gives once
        for b, (source, top, bottom, left, right) in enumerate(_boxes_of(event)):
            assert partners[b] != b
            assert source in (b, partners[b])
            assert scope == "any" or CLASSES[partners[b]] == CLASSES[b]
            areas.append((bottom - top) * (right - left))
    assert min(areas) == 0
    assert max(areas) > H * W // 2
    if scope == "any":
        assert any(CLASSES[p] != CLASSES[b] for b, p in enumerate(partners))


def test_events_groups_and_attempts_draw_their_own_boxes() -> None:
    spec = CutMixSpec(every=1)

    def draw(**changes: int) -> list[Any]:
        return augment.event_map(CLASSES, spec, H, W, **{"seed": 0, "group": 1, "event": 2, **changes}).tolist()

    drawn = [draw(), draw(seed=1), draw(group=2), draw(event=3), draw(attempt=1)]
    assert drawn[0] == draw()
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.parametrize(
    ("alpha", "mean_box"),
    # A box of side s = sqrt(1 - lambda) round a uniform centre keeps (s - s^2/4)^2 of its area inside;
    # E[1 - lambda] - E[(1 - lambda)^1.5] / 2 + E[(1 - lambda)^2] / 16 with the moments of Beta(alpha, alpha).
    [(1.0, 1 / 2 - 1 / 5 + 1 / 48), (0.5, 1 / 2 - 0.424413 / 2 + 3 / 128)],
)
def test_kept_area_follows_beta(alpha: float, mean_box: float) -> None:
    u = np.random.default_rng(0).random((4000, 66))
    kept = np.array([row[2] if alpha == 1.0 else augment._beta(row[2:], alpha) for row in u])
    variance = 1 / (4 * (2 * alpha + 1))
    assert kept.mean() == pytest.approx(0.5, abs=4 * (variance / len(u)) ** 0.5)
    assert kept.var() == pytest.approx(variance, rel=0.06)
    size = 400
    boxes = [augment.box(row, alpha, size, 2 * size) for row in u]
    assert all(0 <= t <= b <= size and 0 <= left <= r <= 2 * size for t, b, left, r in boxes)
    area = np.array([(b - t) * (r - left) / (2 * size * size) for t, b, left, r in boxes])
    assert area.mean() == pytest.approx(mean_box, abs=0.02)


@pytest.mark.parametrize(("height", "width"), [(5, 9), (8, 8), (64, 33)])
def test_a_box_in_the_middle_has_the_area_that_was_drawn(height: int, width: int) -> None:
    for keep in (0.02, 0.25, 0.5, 0.8, 0.999):
        top, bottom, left, right = augment.box(np.array([0.5, 0.5, keep]), 1.0, height, width)
        share = (1 - keep) ** 0.5
        assert bottom - top == round(height * share)
        assert right - left == round(width * share)


def _synth(pipeline: Any, wanted: Recipe) -> Synthesizer:
    return Synthesizer.from_pipeline(pipeline, wanted)


@pytest.mark.parametrize("scope", ["class", "any"])
def test_the_plan_of_a_group_follows_the_oracle(pipeline: Any, recipe: Callable[..., Recipe], scope: str) -> None:
    """Latents of 5x9: maps, composed labels per call, and no exchange in the last calls."""
    spec = CutMixSpec(every=2, last_clean=3, scope=scope)
    synth = _synth(pipeline, recipe(steps=11, height=2 * H, width=2 * W, cutmix=spec))
    unit = synth.stream(Request(num_samples=6, seed=4)).plan.unit(0)
    steer, held = synth._steering(unit, 4, 0), _own(6)
    assert [m is not None for m in steer.maps] == [False, True] * 4 + [False] * 3
    for i, event in enumerate(steer.maps):
        want = [[sum(unit.classes[s] == c for row in grid for s in row) / (H * W) for c in range(3)] for grid in held]
        torch.testing.assert_close(steer.targets[i], torch.tensor(want), rtol=0, atol=1e-6)
        if event is not None:
            held = _exchange(held, _boxes_of(event))
    if scope == "class":
        assert torch.equal(steer.targets[-1], steer.targets[0])
    else:
        assert not torch.equal(steer.targets[-1], steer.targets[0])


def test_the_loop_moves_latents_as_the_oracle_says(pipeline: Any, recipe: Callable[..., Recipe]) -> None:
    """A denoiser that finds no noise only rescales; what is left of the run is the exchange."""
    synth = _synth(pipeline, recipe(steps=9, height=2 * H, width=2 * W, cutmix=CutMixSpec(every=1, last_clean=2)))
    unit = synth.stream(Request(num_samples=6)).plan.unit(0)
    steer, held = synth._steering(unit, 0, 0), _own(6)
    for event in steer.maps:
        held = held if event is None else _exchange(held, _boxes_of(event))
    one, zero = torch.ones(9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    rows = Coefficients(one, one, one, zero, zero, zero)
    tables = Tables(torch.arange(9), rows, (False,) * 9, False, 1.0, "epsilon")
    ids = torch.arange(6.0, dtype=torch.float64).view(-1, 1, 1, 1).expand(6, 4, H, W)
    off = replace(steer, loss=None, decode=lambda z: z, spec=GuidanceSpec(scale=0.0))
    final, *_ = sample(ids, lambda z, t, cfg: (z * 0, None), tables, (1.0, 0.0), off, StageClock(torch.device("cpu")))
    assert final[:, 0].long().tolist() == held
    assert held != _own(6)


def test_a_lone_sample_is_an_error_not_a_no_op(recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(SynthkdError, match="samples_per_class is 1; expected at least 2"):
        recipe(samples_per_class=1, cutmix=CutMixSpec(every=1))
    with pytest.raises(SynthkdError, match="group size is 1; expected at least 2"):
        recipe(samples_per_class=1, classes_per_group=1, cutmix=CutMixSpec(every=1, scope="any"))
    assert recipe(samples_per_class=1, cutmix=CutMixSpec(every=1, last_clean=2, scope="any")).group_size == 3


@pytest.mark.parametrize(("every", "last", "steps"), [(1, 1, 4), (1, 5, 20), (3, 2, 10), (4, 8, 20), (1, 9, 4)])
def test_exchange_calls(every: int, last: int, steps: int) -> None:
    spec = CutMixSpec(every=every, last_clean=last)
    calls = [i for i in range(steps) if spec.active(i, steps)]
    assert calls == [i for i in range(steps) if (i + 1) % every == 0 and steps - 1 - i >= last]


def test_labels_of_mixed_classes_are_stored_as_shares(
    synthesizer: Callable[..., Synthesizer],
) -> None:
    synth = synthesizer(cutmix=CutMixSpec(every=1, last_clean=1, scope="any"), steps=4)
    batch = next(iter(synth.stream(Request(num_samples=6))))
    torch.testing.assert_close(batch.targets.sum(dim=1), torch.ones(6))
    assert torch.equal(batch.labels, batch.targets.argmax(dim=1))
    assert ((batch.targets > 0).sum(dim=1) > 1).any()
