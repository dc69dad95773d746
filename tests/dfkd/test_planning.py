"""`synthkd plan`: figures by hand, O(1) in the number of images, rates from a set that is there, wrong inputs."""

import json
import math
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from synthkd.dfkd.cli import app
from synthkd.dfkd.cli_plan import parse_count
from synthkd.dfkd.planning import plan_cost
from synthkd.dfkd.presets import load_preset, preset_names
from synthkd.dfkd.rates import Rates, rates_of_set, recorded_cases, recorded_rates
from synthkd.engine import Plan, Request, SynthkdError

RATES = Rates(
    case="x", measured="by hand", seconds={"denoise": 0.03, "decode": 0.01}, bytes={"shards": 1000.0, "rows": 100.0},
    student=500.0, labels=2000.0,
)  # fmt: skip
CALL = CliRunner()


def test_figures_by_hand(recipe: Callable[..., Any]) -> None:
    """1,000 images in groups of 6, shards of 3 groups: 167 groups, 56 shards; 7 each at most for 8 processes."""
    plan = Plan(recipe(), Request(num_samples=1000))
    found = plan_cost(plan, RATES, 8, price=2.0, student_images=50_000, views=4)
    assert (found.groups, found.shards, found.shards_per_process) == (167, 56, 7)
    by_stage = {s.stage: s for s in found.stages}
    assert by_stage["denoise"].hours == pytest.approx(1002 * 0.03 / 3600)  # the last group is drawn whole
    assert by_stage["denoise"].cost == pytest.approx(2 * 1002 * 0.03 / 3600)
    assert by_stage["labels"].hours == pytest.approx(4 * 1000 / 2000 / 3600)
    assert by_stage["student"].hours == pytest.approx(50_000 / 500 / 3600)
    assert found.wall_hours == pytest.approx(7 * 18 * 0.04 / 3600)
    assert found.bytes["shards"] == 1e6


def test_what_the_plan_says_of_a_cut_that_idles(recipe: Callable[..., Any]) -> None:
    few = plan_cost(Plan(recipe(), Request(num_samples=100)), RATES, 8)
    assert any("idle" in line for line in few.advice)
    many = plan_cost(Plan(recipe(), Request(num_samples=10**8)), RATES, 8)
    assert any("groups_per_shard" in line and "instead of 5,555,556" in line for line in many.advice)


def test_rounds_wait_for_one_another(recipe: Callable[..., Any]) -> None:
    """1,000 images: 56 shards, rounds of 4, 4 and 48, for 5 processes; a student before two of them."""
    plan = Plan(recipe(rounds=3, groups_per_round=12), Request(num_samples=1000))
    found = plan_cost(plan, RATES, 5, round_images=10_000)
    assert found.shards_per_process == 1 + 1 + 10
    assert found.wall_hours == pytest.approx(((1 + 1 + 10) * 18 * 0.04 + 2 * 20) / 3600)
    assert {s.stage: s.hours for s in found.stages}["round students"] == pytest.approx(40 / 3600)
    assert any("2 students between rounds" in line for line in plan_cost(plan, RATES, 5).advice)


def test_stored_labels_take_room_and_what_has_no_rate_is_told(recipe: Callable[..., Any]) -> None:
    plan = Plan(recipe(), Request(num_samples=1000))
    found = plan_cost(plan, replace(RATES, labels=0.0, student=0.0), 1, student_images=9, views=4)
    assert found.bytes["labels"] == 1000 * 4 * (2 * 3 + 45)
    assert [line.partition(":")[0] for line in found.advice] == ["not counted"] * 2
    assert plan_cost(plan, RATES, 1).advice == ()  # nothing to share out


def test_a_billion_images_are_arithmetic() -> None:
    """The same memory for 10^3 and 10^12 images: nothing is listed."""
    preset, peaks = load_preset("digits"), []
    for count in (10**3, 10**12):
        tracemalloc.start()
        plan = Plan(preset.job.recipe, Request(num_samples=count))
        found, last = plan_cost(plan, RATES, 1024), plan.unit(plan.num_groups - 1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found.samples == count
        assert last.ids[last.kept - 1] == count - 1
        assert plan.shard_samples(plan.num_shards - 1) == count - (plan.num_shards - 1) * 400
    assert peaks[1] < max(2 * peaks[0], 10**5)


def test_rates_of_a_set(recipe: Callable[..., Any], tmp_path: Path) -> None:
    """Seconds by stage and bytes an image, from its rows alone."""
    from synthkd.dfkd.methods.growing import group_batch
    from synthkd.engine import write_shards

    class Timed:
        plan = Plan(recipe(), Request(num_samples=14))
        environment: dict[str, Any] = {"device": "abacus"}  # noqa: RUF012
        identity: dict[str, Any] = {  # noqa: RUF012
            "fingerprint": "f", "recipe": plan.recipe.to_dict(), "seed": 0, "guidance": {}, "model_sha256": "m",
        }  # fmt: skip

        def draw(self, units: Any) -> Any:
            import torch

            for unit in units:
                pixels, labels = torch.zeros(6, 3, 16, 16, dtype=torch.uint8), torch.tensor(unit.classes)
                yield group_batch(unit, pixels, labels, 3, seconds={"decode": 0.6, "denoise": 1.2, "compile": 90.0})

    write_shards(Timed(), tmp_path)
    found = rates_of_set(tmp_path)
    assert found.seconds == pytest.approx({"denoise": 0.2, "decode": 0.1})  # of 18 drawn, and no compiling
    assert list(found.seconds) == ["denoise", "decode"]
    assert found.bytes["shards"] == (tmp_path / "shard-000000.tar").stat().st_size / 14
    assert "abacus" in found.measured
    done = CALL.invoke(app, ["plan", "--from", str(tmp_path), "--num-samples", "2k", "--gpus", "4", "--json"])
    told = json.loads(done.stdout)
    assert told["samples"] == 2000
    assert told["stages"][0]["hours"] == pytest.approx(2004 * 0.2 / 3600)
    done = CALL.invoke(app, ["plan", "--from", str(tmp_path), "--views", "4", "--student-steps", "100", "--json"])
    told = json.loads(done.stdout)
    assert [stage["stage"] for stage in told["stages"]][-2:] == ["labels", "student"]
    assert "labels and student as recorded for case 'digits'" in told["measured"]


def test_the_recorded_rates_are_whole() -> None:
    for name, rates in recorded_cases().items():
        assert name.partition(" ")[0] in preset_names()
        assert math.isfinite(rates.images_per_second)
        assert rates.images_per_second > 0
        assert rates.bytes["shards"] > 100
    with pytest.raises(SynthkdError, match="did you mean 'digits'"):
        recorded_rates("digit")


@pytest.mark.parametrize(
    ("text", "count"), [("1e9", 10**9), ("50k", 50_000), ("1.5M", 1_500_000), ("2B", 2 * 10**9), ("1_000", 1000)]
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "words",
    [
        ("--num-samples", "many"),
        ("--num-samples", "0"),
        ("--num-samples", "1.5"),
        ("--num-samples", "inf"),
        ("--num-samples", ""),
        ("--gpus", "0"),
        ("--price", "nan"),
        ("--images-per-second", "0"),
        ("--case", "digit"),
        ("--preset", "digit"),
        ("--views", "-1"),
        ("--from", "nowhere"),
    ],
)
def test_wrong_inputs_are_one_line(words: tuple[str, ...]) -> None:
    done = CALL.invoke(app, ["plan", *words])
    assert isinstance(done.exception, SynthkdError)
    assert "\n" not in str(done.exception)
