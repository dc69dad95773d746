"""`synthkd bench engine` and `ablation`: the baseline is what it says, and rows keep their bookkeeping straight."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

pytest.importorskip("diffusers", reason="priors are diffusers' own")
pytest.importorskip("sklearn", reason="the embedded case reads scikit-learn's digits")

from synthkd.bench import ablation, engine, engine_cases, quality, record
from synthkd.bench.as_published import AsPublished
from synthkd.bench.cli import app
from synthkd.bench.engine import Contender, EngineSpec, Timing, measure_engine, rows_of, summary, time_variants
from synthkd.bench.engine_cases import CASES, DECODERS, embedded_variants, random_recipe, recipe_with
from synthkd.bench.quality import class_balance, paired, spread
from synthkd.bench.timing import Quartiles, compute_ceiling
from synthkd.dfkd.methods.diffdfkd import TeacherGuidance
from synthkd.dfkd.presets import Preset, load_preset
from synthkd.dfkd.teachers import load_teacher
from synthkd.engine import CutMixSpec, Plan, Recipe, Request, Synthesizer, SynthkdError, random_models
from synthkd.engine.clock import StageClock

CPU = torch.device("cpu")


@pytest.fixture
def published(
    pipeline: Any, pipeline64: Any, recipe: Callable[..., Any], teacher_card: Path
) -> Callable[..., AsPublished]:
    """The baseline over the tiny pipeline; `double=True` in float64."""

    def make(weight: float = 1.0, double: bool = False, **changes: Any) -> AsPublished:
        teacher = load_teacher(str(teacher_card))
        loss = TeacherGuidance(teacher.double() if double else teacher)
        wanted = recipe(dtype="float64" if double else "float32", **changes)
        return AsPublished(Synthesizer.from_pipeline(pipeline64 if double else pipeline, wanted, guidance=loss), weight)

    return make


def _unit(drawer: AsPublished) -> Any:
    recipe = drawer.recipe
    return Plan(recipe, Request(num_samples=recipe.group_size, seed=3)).unit(0)


def test_without_its_gradient_the_baseline_samples_plainly(published: Callable[..., AsPublished]) -> None:
    """The same ids, noise, prompts and boxes as the Synthesizer's, CFG at the recipe's calls, DDIM's step."""
    boxes = {"cutmix": CutMixSpec(every=2, last_clean=1), "cfg_start": 0.25, "cfg_stop": 0.75, "eta": 0.5}
    ours, plain = published(weight=0.0, **boxes), published(weight=0.0, **boxes).synth
    drawn, wanted = ours.run(_unit(ours), 3), plain.run(_unit(ours), 3)
    # a box is exchanged before the denoiser there, behind the solver's step here: with it they are not the same
    assert not torch.equal(drawn.images, wanted.images)
    assert torch.equal(drawn.labels, wanted.labels)
    without = {**boxes, "cutmix": CutMixSpec()}
    ours, plain = published(weight=0.0, **without), published(**without).synth
    assert torch.equal(ours.run(_unit(ours), 3).images, plain.run(_unit(ours), 3).images)
    assert not torch.equal(published(**without).run(_unit(ours), 3).images, plain.run(_unit(ours), 3).images)


def test_its_gradient_is_the_derivative_of_the_groups_loss(published: Callable[..., AsPublished]) -> None:
    """B times the loss, in z_t, through VAE and denoiser with CFG: against a central difference in float64."""
    ours, clock = published(double=True), StageClock(CPU)
    with ours._ready():
        z, denoise, steer = ours.prepared(_unit(ours), 3, clock)
        grad = ours.gradient(2, z, denoise, steer, clock)

        def loss(z: Tensor) -> Tensor:
            c, t = ours._tables.at(2), ours._tables.timesteps[2]
            cond, uncond = denoise(z, t, True)
            assert uncond is not None
            x0 = (z - c.sigma * (uncond + 3.0 * (cond - uncond))) / c.alpha
            return len(z) * ours._loss(ours.synth.model.decoder(x0).clamp(0, 1), steer.targets[2])[0]

        along = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            slope = (loss(z + 1e-6 * along) - loss(z - 1e-6 * along)) / 2e-6
    assert float((grad * along).sum()) == pytest.approx(float(slope), rel=1e-5)


def test_its_class_gradient_is_that_of_a_batch_of_one(published: Callable[..., AsPublished]) -> None:
    """Of each image alone, whatever the group: what the factor B is for."""
    ours, clock = published(double=True), StageClock(CPU)
    ours._loss.alpha = 0.0  # type: ignore[attr-defined]
    with ours._ready():
        z, denoise, steer = ours.prepared(_unit(ours), 3, clock)
        group = ours.gradient(1, z, denoise, steer, clock)
        one = replace(steer, targets=[target[:1] for target in steer.targets])
        alone = ours.gradient(1, z[:1], denoise.part(slice(0, 1)), one, clock)
    torch.testing.assert_close(group[:1], alone)


def test_it_has_two_denoiser_passes_a_call_and_moves_z_before_the_second(
    published: Callable[..., AsPublished], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first at z_t with a graph, the second at z_t - grad without; the boxes of the event between the two."""
    ours, clock = published(cutmix=CutMixSpec(every=2, last_clean=1), cfg_stop=0.5), StageClock(CPU)
    seen: list[tuple[Tensor, bool, bool]] = []
    denoise = type(ours.synth.model).denoise

    def spy(model: Any, z: Tensor, t: Tensor, cond: Any, uncond: Any) -> Any:
        seen.append((z.detach().clone(), torch.is_grad_enabled(), uncond is not None))
        return denoise(model, z, t, cond, uncond)

    monkeypatch.setattr(type(ours.synth.model), "denoise", spy)
    gradients: list[Tensor] = []
    gradient = ours.gradient
    monkeypatch.setattr(ours, "gradient", lambda *a: gradients.append(gradient(*a)) or gradients[-1])
    with ours._ready():
        z, told, steer = ours.prepared(_unit(ours), 3, clock)
        ours.latents(z, told, steer, clock)
    assert [grad for _, grad, _ in seen] == [True, False] * 4
    assert [cfg for _, _, cfg in seen] == [True] * 4 + [False] * 4
    for i, grad in enumerate(gradients):
        moved = seen[2 * i][0] - grad
        map_ = steer.maps[i]
        if map_ is not None:
            moved = torch.gather(moved, 0, map_.long()[:, None].expand_as(moved))
        torch.testing.assert_close(seen[2 * i + 1][0], moved)
    assert sum(m is not None for m in steer.maps) == 1


def test_another_solver_is_refused(published: Callable[..., AsPublished]) -> None:
    """The published step is DDIM's."""
    with pytest.raises(SynthkdError, match="sampler is 'euler'; expected 'ddim'"):
        published(sampler="euler")


@pytest.fixture(scope="module")
def small() -> Preset:
    """The embedded preset at 3 calls and groups of 10, CFG in the first two thirds, a student of 3 steps."""
    preset = load_preset("digits")
    spec = replace(preset.job.recipe.guidance, start=0.0, stop=0.67, every=1, decoder="vae")
    changes = {"steps": 3, "samples_per_class": 1, "guidance": spec, "cfg_start": 0.0, "cfg_stop": 0.67}
    recipe = replace(preset.job.recipe, cutmix=CutMixSpec(), **changes)  # type: ignore[arg-type]
    distill = replace(preset.distill, steps=3, batch_size=8)
    return replace(preset, job=replace(preset.job, recipe=recipe), num_images=20, distill=distill)


def test_embedded_rows_hold_speed_arithmetic_and_quality(small: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    """All columns of each variant that is asked for, in one row each."""
    monkeypatch.setattr(quality, "score_all", lambda jobs: [(key, quality.score(job)) for key, job in jobs.items()])
    names, small, counted = ("plain", "guided"), recipe_with(small, cfg_stop=1.0), engine.count_embedded
    guiding = embedded_variants(small)["guided"]  # counting takes seconds: one is enough

    def count(entrant: Any) -> float:
        return 1.0 if entrant == guiding else counted(entrant)

    monkeypatch.setattr(engine, "count_embedded", count)
    rows = list(
        measure_engine(EngineSpec(case="embedded", device=CPU, variants=names, repeats=1, num_images=20), small)
    )
    assert [row["variant"] for row in rows] == list(names)
    plain, guided = rows
    for row in rows:
        assert row["failed"] is None
        assert row["images_per_second"] == pytest.approx(10 / row["seconds_per_group"]["median"], rel=1e-3)
        rate = row["tflop_per_image"] * row["images_per_second"]
        assert row["tflop_per_s"] == pytest.approx(rate, rel=1e-3)
        assert row["percent_of_ceiling"] == pytest.approx(100 * rate / row["ceiling_tflop_per_s"], rel=1e-3)
        assert 0 <= row["student_accuracy"] <= 100
        assert 0 <= row["judge_agreement"] <= 100
        assert 0 <= row["class_balance"] <= 1
        assert row["intra_class_feature_distance"] > 0
        json.dumps(row, allow_nan=False)
    assert plain["times_plain"] == 1
    # three CFG calls of the UNet and a decode, of what 20 calls and a decode cost: 0.00748 TFLOP
    assert 0.1 < plain["tflop_per_image"] / 0.00748 < 0.2
    assert guided["tflop_per_image"] == 1.0


def test_a_failed_variant_has_a_row_and_stops_no_other(small: Preset) -> None:
    """As out of memory, or a compiler that gives up."""

    def fails() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory:\n 2 GiB")

    plain = embedded_variants(small)["plain"]
    timing = time_variants({"plain": plain.build, "vae": fails}, CPU, seed=0, repeats=1)
    ours, theirs = rows_of("embedded", 0, timing, {"plain": 0.5, "vae": 1.0}, {})
    assert ours["images_per_second"] > 0
    assert theirs["failed"] == "OutOfMemoryError: CUDA out of memory: 2 GiB"
    assert theirs["images_per_second"] is theirs["times_plain"] is None
    assert theirs["tflop_per_image"] == 1.0


def test_variants_differ_in_what_they_say(small: Preset) -> None:
    """full-cost differs from guided in decoder, rhythm and scale alone; all-CFG ones only where CFG is partial."""
    found = embedded_variants(small)
    assert list(found)[4:] == ["plain, all CFG", "guided, all CFG", "as-published, all CFG"]
    guided, full = (found[name].preset.job.recipe for name in ("guided", "full-cost"))
    changes = {"decoder": "vae", "start": 0.0, "stop": 1.0, "every": 1, "scale": 0.7}
    assert full == replace(guided, guidance=replace(guided.guidance, **changes))  # type: ignore[arg-type]
    plain = found["plain"].preset.job.recipe
    assert plain == replace(guided, guidance=replace(guided.guidance, scale=0.0))
    everywhere = recipe_with(small, cfg_start=0.0, cfg_stop=1.0)
    assert list(embedded_variants(everywhere)) == ["plain", "guided", "full-cost", "as-published"]


def test_random_cases_without_a_gpu_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without speed; on a GPU a row says whether the bar for an H200 is reached."""
    monkeypatch.setattr(engine, "count_random", lambda case, variant: {"plain": 34.6, "guided": 35.3}[variant])
    monkeypatch.setattr(engine, "random_builders", lambda *_: dict.fromkeys(DECODERS))
    spec = EngineSpec(case="sd15-512", device=CPU, variants=("plain", "guided"))
    rows = list(measure_engine(spec, load_preset("digits")))
    assert [(r["variant"], r["tflop_per_image"], r["images_per_second"]) for r in rows] == [
        ("plain", 34.6, None),
        ("guided", 35.3, None),
    ]

    class Drawer:
        recipe, model = random_recipe(CASES["sd15-512"], "plain", torch.bfloat16), None

    monkeypatch.setattr(engine, "synth_of", lambda drawer: type("S", (), {"recipe": drawer.recipe, "model": Model()}))

    class Model:
        device = CPU

    entries = {n: Contender(drawer=Drawer(), seconds=Quartiles(s, s, s)) for n, s in (("plain", 2.0), ("guided", 4.0))}  # type: ignore[arg-type]
    timing = Timing(contenders=entries, ceiling=700.0)
    plain, guided = rows_of("sd15-512", 0, timing, {"plain": 34.6, "guided": 35.3}, CASES["sd15-512"].bars)
    assert (plain["images_per_second"], plain["bar_reached"]) == (16.0, True)
    assert (guided["times_plain"], guided["bar_reached"]) == (2.0, False)
    assert plain["roofline_images_per_second"] == pytest.approx(700 / 34.6, rel=1e-4)


def test_every_variant_of_a_random_case_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published architectures' code path on a CPU, at a thousandth of their size."""
    made = random_models.ARCHITECTURES["sd15"]
    unet = dict(made.networks["unet"][1], block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    vae = dict(made.networks["vae"][1], block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    networks = {"unet": ("UNet2DConditionModel", unet), "vae": ("AutoencoderKL", vae)}
    monkeypatch.setattr(random_models, "ARCHITECTURES", {"sd15": replace(made, networks=networks)})
    monkeypatch.setattr(engine_cases, "_CLASSES", 10)
    monkeypatch.setattr(engine_cases, "TEACHER_SIZE", (32, 32))
    reader = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    monkeypatch.setattr(engine_cases, "resnet50", lambda classes: reader.append(nn.Linear(8, classes)))
    monkeypatch.setattr(engine_cases, "Recipe", partial(Recipe, steps=2))
    case = replace(CASES["sd15-256"], height=64, width=128, group=3, published=2)
    builders = engine_cases.random_builders(case, CPU, torch.float32)
    assert list(builders) == [name for name in DECODERS if "compiled" not in name]
    timing = time_variants(builders, CPU, seed=0, repeats=1)
    assert {name: entry.failed for name, entry in timing.contenders.items()} == dict.fromkeys(builders)
    rows = rows_of("sd15-256", 0, timing, dict.fromkeys(builders, 1.0), {})
    assert [row["images_per_group"] for row in rows] == [3, 3, 3, 3, 3, 2]
    ratio = rows[0]["images_per_second"] / rows[5]["images_per_second"]
    assert rows[5]["times_plain"] == pytest.approx(ratio, rel=1e-3)


def test_paired_differences_by_students_t() -> None:
    """Five pairs of mean -0.2 and standard deviation 0.5: -0.2 - 2.776 x 0.5 / sqrt(5)."""
    deltas = [-0.9, -0.4, 0.0, -0.1, 0.4]
    mean = sum(deltas) / 5
    deviation = math.sqrt(sum((d - mean) ** 2 for d in deltas) / 4)
    found = paired([90 + d for d in deltas], [90.0] * 5)
    assert found.mean == pytest.approx(mean, abs=1e-4)
    assert found.lower == pytest.approx(mean - 2.776 * deviation / math.sqrt(5), abs=1e-3)
    assert paired([1.0], [2.0]) == (-1.0, None, 1)


def test_the_summary_says_what_is_reached() -> None:
    """Ratios by seed within one run, accuracies paired by seed."""
    speeds = {"plain": 10.0, "guided": 8.0, "as-published": 2.0, "full-cost": 4.0}
    rows = [
        {"case": "embedded", "variant": v, "seed": s, "images_per_second": x,
         "student_accuracy": 97.0 - s * (v == "guided")}
        for v, x in speeds.items()
        for s in (0, 1)
    ]  # fmt: skip
    found = summary(rows)
    assert found is not None
    assert found["guided_times_plain"] == 1.25
    assert found["guided_times_faster_than_as_published"] == 4.0
    assert found["guided_minus_full_cost"]["mean"] == -0.5
    assert list(found["reached"].values()) == [True, True, False]
    assert summary([]) is None


def test_balance_and_spread() -> None:
    """1 for equal shares, 0 for one class; the mean distance to class means."""
    assert class_balance(torch.tensor([0, 1, 2, 3] * 5), 4) == 1.0
    assert class_balance(torch.zeros(8, dtype=torch.long), 4) == 0.0
    features = torch.tensor([[0.0, 0.0], [0.0, 2.0], [5.0, 1.0], [5.0, 5.0]])
    assert spread(features, torch.tensor([0, 0, 1, 1])) == pytest.approx(1.5)


def test_the_ceiling_is_a_rate() -> None:
    """TFLOP/s: a CPU core has between a hundredth and ten."""
    assert 1e-3 < compute_ceiling(CPU, torch.float32, repeats=1) < 100


def test_ablation_skips_what_is_recorded(small: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the same variant, seed and settings is not made again; other settings are."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(ablation, "RESULTS", tmp_path)
    monkeypatch.setattr(ablation, "count_embedded", lambda entrant: 1.0)
    monkeypatch.setattr(
        ablation, "time_variants", lambda builders, *_: Timing(contenders={n: Contender() for n in builders})
    )
    scored: list[Any] = []

    def score_all(jobs: Mapping[str, Any]) -> Any:
        scored.extend((name, job.seed, job.entrant.preset.job.recipe.guidance.every) for name, job in jobs.items())
        return [(name, {"student_accuracy": 90.0}) for name in jobs]

    monkeypatch.setattr(quality, "score_all", score_all)

    def run(preset: Preset, *variants: str) -> None:
        spec = ablation.AblationSpec(device=CPU, variants=variants, seeds=(0, 1))
        for row in ablation.measure_ablation(spec, preset, ablation.recorded()):
            record.append_row("ablation", row)

    run(small, "baseline")
    run(small, "baseline", "every 2")
    assert scored == [("baseline", 0, 1), ("baseline", 1, 1), ("every 2", 0, 2), ("every 2", 1, 2)]
    run(replace(small, num_images=30), "baseline")
    assert len(scored) == 6


def test_every_ablation_is_a_recipe() -> None:
    """Each variant differs from the preset in something, but for those that name what it has."""
    preset = load_preset("digits")
    made = {name: change(preset) for name, change in ablation.VARIANTS.items()}
    assert made["baseline"] == preset
    assert made["cfg none"].job.recipe.cfg_active(10) is False
    half = replace(preset.job.recipe.guidance, start=0.5, stop=1.0)
    assert made["guided second half"].job.recipe.guidance == half
    assert len({ablation.settings_digest(p) for p in made.values()}) >= len(made) - 1


def test_wrong_options_are_one_line() -> None:
    """An unknown case or variant, with the known ones."""
    for words, message in (
        (["engine", "--case", "sd14"], "--case 'sd14'"),
        (["engine", "--variant", "guide"], "--variant 'guide'"),
        (["ablation", "--variants", "evry 2"], "--variant 'evry 2'"),
        (["engine", "--seeds", "a"], "--seeds 'a'"),
    ):
        error = CliRunner().invoke(app, [*words, "--device", "cpu"]).exception
        assert isinstance(error, SynthkdError)
        assert message in str(error)


def test_the_command_prints_a_row_per_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: Preset) -> None:
    """JSON rows, the summary last; --record appends both."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr("synthkd.bench.cli.load_preset", lambda name: small)
    monkeypatch.setattr(engine, "count_embedded", lambda entrant: 0.01)
    words = ["engine", "--device", "cpu", "--no-quality", "--repeats", "1", "--variant", "plain", "--variant", "guided"]
    done = CliRunner().invoke(app, [*words, "--json", "--record"])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["kind"] for row in rows] == ["engine", "engine", "summary"]
    assert [json.loads(line) for line in (tmp_path / "engine.jsonl").read_text().splitlines()] == rows
