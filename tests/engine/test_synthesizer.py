"""Non-finite groups are redrawn and recorded, never stored; other guidances than the teacher's are served."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from synthkd.engine import GuidanceSpec, NonFiniteError, Request, Synthesizer, rng, write_shards
from synthkd.engine.guidance import Guidance
from synthkd.engine.priors import StableDiffusion
from synthkd.kernels import to_uint8

Stored = Callable[[Path], dict[str, bytes]]
NAN = float("nan")


class Flaky(StableDiffusion):
    """A prior that gives NaN in one sample of the group for its first `bad` denoiser calls after `good` good ones."""

    def __init__(self, pipe: Any, good: int, bad: int, value: float = NAN) -> None:
        super().__init__(pipe)
        self.good, self.bad, self.value, self.calls = good, bad, value, 0

    def denoise(self, z: Tensor, t: Tensor, cond: Tensor, uncond: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out, other = super().denoise(z, t, cond, uncond)
        self.calls += 1
        if self.good < self.calls <= self.good + self.bad:
            out = out.clone()
            out[3, 0, 0, 0] = self.value
        return out, other


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_non_finite_group_is_redrawn_and_says_so(
    pipeline: Any, recipe: Callable[..., Any], stored: Stored, tmp_path: Path, value: float
) -> None:
    """Steps are 4: group 1's first attempt goes bad at its second call."""
    synth = Synthesizer(Flaky(pipeline, good=5, bad=1, value=value), recipe())
    write_shards(synth.stream(Request(num_samples=18)), tmp_path)
    raw = stored(tmp_path)
    attempts = [json.loads(raw[f"{i:09d}.json"])["attempt"] for i in range(18)]
    assert attempts == [0] * 6 + [1] * 6 + [0] * 6
    steady = Synthesizer.from_pipeline(pipeline, recipe())
    unit = steady.stream(Request(num_samples=18)).plan.unit(1)
    want = steady._draw(unit, 0, 1)
    assert want is not None
    again = list(Synthesizer(Flaky(pipeline, good=5, bad=1), recipe()).stream(Request(num_samples=18)))[1]
    assert torch.equal(again.images, want.images)
    assert not torch.equal(again.images, steady.run(unit, 0).images)


def test_after_all_attempts_the_run_stops_and_nothing_of_the_group_is_stored(
    pipeline: Any, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    model = Flaky(pipeline, good=4, bad=10**6)
    synth = Synthesizer(model, recipe(attempts=2))
    with pytest.raises(NonFiniteError, match="group 1 was not finite in 2 attempts; nothing of it") as caught:
        write_shards(synth.stream(Request(num_samples=18)), tmp_path)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert model.calls == 4 + 2 * 4
    (row,) = (json.loads(line) for line in (tmp_path / "shard-000000.tar.journal").read_text().splitlines())
    assert (row["group"], row["kept"]) == (0, 6)
    part = tmp_path / "shard-000000.tar.part"
    assert part.stat().st_size == row["end"]
    assert b"000000006" not in part.read_bytes()
    assert not list(tmp_path.glob("*.tar"))


class Simple:
    """A guidance without a teacher: mean brightness, with faults to order."""

    def __init__(self, fault: str = "", good: int = 10**6) -> None:
        self.fault, self.good, self.calls = fault, good, 0

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        fault = self.fault if self.calls > self.good else ""
        bright = images.mean(dim=(1, 2, 3))
        if fault == "gradient":
            return (bright.sum() * float("inf")), {"bright": bright}
        if fault == "term":
            return bright.sum(), {"bright": bright / 0.0 * 0.0}
        return bright.sum(), {} if self.fault == "no terms" else {"bright": bright}

    def describe(self) -> dict[str, Any]:
        return {"kind": "bright"}

    def annotate(self, images: Tensor) -> dict[str, Tensor]:
        notes = {"note": images[:, 0, 0, 0] * (NAN if self.calls > self.good else 1.0)}
        return notes if self.fault == "note" else {}

    def modules(self) -> Iterable[nn.Module]:
        return ()


def _guided(pipeline: Any, recipe: Callable[..., Any], guidance: Any, **spec: Any) -> Synthesizer:
    wanted = recipe(guidance=GuidanceSpec(**{"scale": 0.3, **spec}), attempts=2)
    return Synthesizer.from_pipeline(pipeline, wanted, guidance=guidance)


@pytest.mark.parametrize("fault", ["gradient", "term", "note"])
def test_a_non_finite_loss_never_reaches_an_image(pipeline: Any, recipe: Callable[..., Any], fault: str) -> None:
    synth = _guided(pipeline, recipe, Simple(fault, good=6))
    with pytest.raises(NonFiniteError, match="group 1"):
        list(synth.stream(Request(num_samples=12)))


@pytest.mark.parametrize("fault", ["", "no terms"])
def test_any_loss_on_images_guides(pipeline: Any, recipe: Callable[..., Any], fault: str) -> None:
    """Mean brightness is lowered by a loss that knows nothing of classes, and logs what it likes."""
    guidance = Simple(fault)
    assert isinstance(guidance, Guidance)
    dark = next(iter(_guided(pipeline, recipe, guidance).stream(Request(num_samples=6))))
    free = next(iter(Synthesizer.from_pipeline(pipeline, recipe()).stream(Request(num_samples=6))))
    assert guidance.calls == 4
    assert dark.images.float().mean() < free.images.float().mean() - 1
    assert set(dark.curves) == (set() if fault else {"bright"})


def test_the_guided_share_of_the_steps(pipeline: Any, recipe: Callable[..., Any]) -> None:
    guidance = Simple()
    batch = next(iter(_guided(pipeline, recipe, guidance, start=0.25, stop=0.75).stream(Request(num_samples=6))))
    assert guidance.calls == 2
    assert len(batch.curves["bright"]) == 2


@pytest.mark.parametrize("kind", ["sigma", "constant"])
def test_the_step_has_the_declared_size(
    pipeline: Any, recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Root mean square of the shift of x0: scale, times sigma_t under the sigma schedule."""
    from synthkd.engine import sampler

    steps: list[float] = []
    inner = sampler.guided_step

    def spy(*args: Any, step: Tensor, **kwargs: Any) -> Tensor:
        steps.append(float(step))
        return inner(*args, step=step, **kwargs)

    monkeypatch.setattr(sampler, "guided_step", spy)
    synth = _guided(pipeline, recipe, Simple(), schedule=kind)
    synth.run(synth.stream(Request(num_samples=6)).plan.unit(0), 0)
    sigma = synth._tables.rows.sigma.tolist()
    assert steps == pytest.approx([0.3 * s if kind == "sigma" else 0.3 for s in sigma])


def test_scale_zero_is_the_unguided_run_bit_for_bit(
    pipeline: Any, recipe: Callable[..., Any], guide: Callable[..., Any]
) -> None:
    with_teacher = Synthesizer.from_pipeline(pipeline, recipe(), guidance=guide())
    without = Synthesizer.from_pipeline(pipeline, recipe())
    a, b = (next(iter(s.stream(Request(num_samples=6)))) for s in (with_teacher, without))
    assert torch.equal(a.images, b.images)
    assert set(a.notes) == {"logits"}  # still read by the teacher


def test_every_id_has_its_own_noise(synthesizer: Callable[..., Synthesizer]) -> None:
    synth = synthesizer()
    z = synth.initial_latents(range(12), 0)
    assert z.shape == (12, 4, 8, 8)
    assert torch.equal(z[4:6], synth.initial_latents([4, 5], 0))
    assert torch.equal(z[7].flatten(), torch.from_numpy(rng.normal(0, 7, "latents", 256)))
    others = [z, synth.initial_latents(range(12), 1), synth.initial_latents(range(12), 0, attempt=1)]
    assert len({tuple(row.tolist()) for x in others for row in x.flatten(1)}) == 36


def test_a_stream_is_lazy_and_can_be_walked_twice(synthesizer: Callable[..., Synthesizer]) -> None:
    stream = synthesizer().stream(Request(num_samples=10**9))
    first = next(iter(stream))
    assert torch.equal(first.images, next(iter(stream)).images)


def test_pixels_are_rounded_and_clamped() -> None:
    levels = torch.arange(256, dtype=torch.float32).view(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    assert torch.equal(to_uint8(levels), (levels * 255).round().to(torch.uint8))
    edges = torch.tensor([-0.2, 1.3, 0.5 / 255, 1.5 / 255]).view(1, 1, 2, 2)
    assert to_uint8(edges).flatten().tolist() == [0, 255, 0, 2]  # ties go to the even level


def test_each_sample_has_its_own_curve_cut_with_the_batch(synthesizer: Callable[..., Synthesizer]) -> None:
    synth = synthesizer(guidance=GuidanceSpec(scale=0.2))
    full, short = (next(iter(synth.stream(Request(num_samples=n)))) for n in (6, 4))
    assert short.curves["bn"] == full.curves["bn"]
    assert short.curves["ce"] == [values[:4] for values in full.curves["ce"]]
    assert short.notes["logits"].shape[0] == short.labels.shape[0] == short.targets.shape[0] == len(short.prompts) == 4
