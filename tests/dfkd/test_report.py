"""The report: every section from a synthetic run, hostile text, missing parts, odd shapes."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from synthkd.dfkd import report_charts as c
from synthkd.dfkd import report_html as h
from synthkd.dfkd.report import load_run, read_log, write_report
from synthkd.engine.batch import Batch
from synthkd.engine.config import GuidanceSpec, Recipe, Request, fingerprint
from synthkd.engine.errors import SynthkdError
from synthkd.engine.plan import Plan, WorkUnit
from synthkd.engine.shards import write_shards

RUN_SECTIONS = ["summary", "images", "guidance", "distillation", "balance", "confidence", "confusion", "throughput",
                "provenance"]  # fmt: skip
HOSTILE = "<script>alert('x')</script>\"&"


class FakeStream:
    """A stream of random images that the real writer accepts; sharp: how sure the pretended teacher is."""

    def __init__(self, plan: Plan, *, logits: bool = True, sharp: float = 6.0) -> None:
        self.plan, self.logits, self.sharp = plan, logits, sharp
        self.environment = {"machine": "test", "versions": {"torch": "0"}}

    @property
    def identity(self) -> dict[str, Any]:
        recipe, seed = self.plan.recipe, self.plan.request.seed
        return {
            "fingerprint": fingerprint(recipe, seed, {}),
            "recipe": recipe.to_dict(),
            "seed": seed,
            "guidance": {"weights": {"bn": 1.0, "ce": 0.5}},
            "model_sha256": "x",
            "solver": {},
            "versions": {"torch": "0"},
        }

    def draw(self, units: Iterable[WorkUnit]) -> Iterator[Batch]:
        for unit in units:
            yield self._batch(unit)

    def _batch(self, unit: WorkUnit) -> Batch:
        recipe, size, classes = self.plan.recipe, len(unit.ids), len(self.plan.recipe.classes)
        rng = np.random.default_rng(unit.group)
        labels = torch.tensor(unit.classes)
        pixels = rng.integers(0, 256, (size, 3, recipe.height, recipe.width), dtype=np.uint8)
        logits = torch.from_numpy(rng.normal(size=(size, classes))).float()
        logits[torch.arange(size), labels] += self.sharp
        steps = sum(recipe.guidance.active(i, recipe.steps) for i in range(recipe.steps))
        curves = {
            "bn": [40.0 / (k + 1) + unit.group for k in range(steps)],
            "ce": [[2.0 / (k + 1)] * size for k in range(steps)],
        }
        return Batch(
            group=unit.group,
            round=unit.round,
            attempt=0,
            ids=tuple(unit.ids),
            prompts=tuple(recipe.prompts[0].replace("{class}", recipe.classes[c]) for c in unit.classes),
            images=torch.from_numpy(pixels),
            labels=labels,
            targets=torch.nn.functional.one_hot(labels, classes).float(),
            notes={"logits": logits} if self.logits else {},
            curves=curves if steps else {},
            seconds={"encode": 0.01, "denoise": 0.2, "guide": 0.6, "decode": 0.05} if steps else {"denoise": 0.2},
        ).first(unit.kept)


def make_recipe(classes: int = 10, scale: float = 0.1, **fields: Any) -> Recipe:
    """A small recipe with so many classes."""
    values = {"height": 8, "width": 8, "steps": 5, "classes_per_group": min(classes, 10), **fields}
    names = values.pop("names", tuple(f"class {i}" for i in range(classes)))
    return Recipe(classes=names, guidance=GuidanceSpec(scale=scale), **values)


def write_set(folder: Path, recipe: Recipe, samples: int = 40, **options: Any) -> None:
    """A finished set of random images."""
    write_shards(FakeStream(Plan(recipe, Request(num_samples=samples)), **options), folder)


def write_log(path: Path, rows: int = 30, start: float = 2.0) -> None:
    """A student's log; agreement is measured every fifth row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(rows):
        agreement = 50 + i if i % 5 == 4 else None
        lines.append(json.dumps({"step": 10 * i, "loss": start / (i + 1), "lr": 0.1, "agreement": agreement}))
    path.write_text("\n".join(lines) + "\n")


def make_result(count: int = 10, **more: Any) -> dict[str, Any]:
    """A result.json with every key."""
    matrix = (np.eye(count, dtype=int) * 9 + np.eye(count, k=1, dtype=int) * 2).tolist()
    return {
        "preset": "digits", "seed": 0, "teacher_accuracy": 99.7, "student_accuracy": 97.2,
        "unguided_student_accuracy": 91.4, "num_images": 40, "images_per_second": 80.0,
        "guided_images_per_second": 20.0, "seconds": 372.0,
        "stage_seconds": {"evaluate_teacher": 2.0, "synthesize": 100.0, "synthesize_unguided": 30.0, "distill": 200.0},
        "classes": [f"class {i}" for i in range(count)], "parameters": {"teacher": 700_000, "student": 70_000},
        "confusion": {"teacher": matrix, "student": matrix, "unguided": matrix},
        "judge": {"guided": 98.1, "unguided": 90.2}, "teacher_agreement": {"guided": 99.9, "unguided": 88.0},
        "versions": {"torch": "0"}, "device": "cpu", "test_set": "797 digits", **more,
    }  # fmt: skip


def make_run(folder: Path, classes: int = 10, samples: int = 40, **result: Any) -> Path:
    """A whole run with a control."""
    write_set(folder / "shards", make_recipe(classes), samples)
    write_set(folder / "control" / "shards", make_recipe(classes, 0.0), samples, sharp=2.0)
    write_log(folder / "student_log.jsonl")
    write_log(folder / "control" / "student_log.jsonl", start=3.0)
    (folder / "result.json").write_text(json.dumps(make_result(classes, **result)))
    return folder


def text_of(folder: Path) -> str:
    """The report's text; the checks that hold for every report are made here."""
    text = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in text
    for word in ("http://", "https://", "//cdn", "@import", "url("):
        assert word not in text
    assert ">nan" not in text.lower()
    assert "nan%" not in text.lower()
    assert "nan," not in text.lower()
    return text


def test_every_section_of_a_run_is_there(tmp_path: Path) -> None:
    text = text_of(make_run(tmp_path))
    assert [s for s in RUN_SECTIONS if f'<section id="{s}"' in text] == RUN_SECTIONS
    assert "97.2\xa0% on real test images, 2.5 points below its teacher and 5.8 above" in text
    assert text.count("data:image/png;base64,") == 2
    assert "synthkd replay" in text
    assert "98.1\xa0% of the guided images and 90.2\xa0% of the unguided images" in text


def test_the_page_is_the_same_when_written_again(tmp_path: Path) -> None:
    assert text_of(make_run(tmp_path)) == text_of(tmp_path)


def test_a_plain_set_gets_the_sections_that_apply(tmp_path: Path) -> None:
    write_set(tmp_path, make_recipe())
    text = text_of(tmp_path)
    absent = [s for s in RUN_SECTIONS if f'<section id="{s}"' not in text]
    assert absent == ["distillation", "confusion"]
    assert text.count("data:image/png;base64,") == 1


def test_a_run_without_its_optional_parts_says_so(tmp_path: Path) -> None:
    write_set(tmp_path / "shards", make_recipe(), logits=False)
    (tmp_path / "result.json").write_text(json.dumps({"student_accuracy": 90.0}))
    text = text_of(tmp_path)
    assert all(f'<section id="{s}"' in text for s in RUN_SECTIONS)
    assert "kept no log of the student" in text
    assert "no confusion matrix" in text
    assert "logits are not stored" in text
    assert "no unguided control to compare with" in text


def test_a_result_alone_still_makes_a_page(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(make_result()))
    text = text_of(tmp_path)
    assert all(f'<section id="{s}"' in text for s in RUN_SECTIONS)
    assert "not in its folder any more" in text


def test_wrong_types_and_values_in_a_result_are_passed_over(tmp_path: Path) -> None:
    result = {"student_accuracy": "x", "teacher_accuracy": float("nan"), "classes": 3, "confusion": [1],
              "judge": None, "stage_seconds": {"a": None, "b": float("inf")}, "parameters": {"teacher": 0}}  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert '<section id="summary"' in text_of(tmp_path)


def test_hostile_names_and_prompts_stay_text(tmp_path: Path) -> None:
    recipe = make_recipe(2, names=(HOSTILE, "b\udc80"), prompts=(HOSTILE + " {class}",))
    write_set(tmp_path / "shards", recipe, 8)
    result = make_result(2, preset=HOSTILE, device=HOSTILE, test_set=HOSTILE, seed=HOSTILE, classes=[HOSTILE, "b"],
                         stage_seconds={HOSTILE: 1.0})  # fmt: skip
    (tmp_path / "result.json").write_text(json.dumps(result))
    text = text_of(tmp_path)
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;&quot;&amp;" in text


@pytest.mark.parametrize(
    ("classes", "samples", "height", "width"), [(2, 4, 6, 10), (3, 1, 200, 100), (21, 42, 4, 4), (1000, 1000, 2, 3)]
)
def test_any_number_of_classes_and_any_shape(
    tmp_path: Path, classes: int, samples: int, height: int, width: int
) -> None:
    write_set(tmp_path / "shards", make_recipe(classes, height=height, width=width), samples)
    (tmp_path / "result.json").write_text(json.dumps(make_result(classes)))
    text = text_of(tmp_path)
    assert ("Shown: the 20 of" in text) == (classes > 20)
    assert text.count('<th scope="row" title="class') <= 3 * 20 + 40
    assert len(text) < 2_000_000


def test_the_sheets_hold_the_same_ids(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path))
    assert run.main is not None
    assert run.control is not None
    assert run.main.pixels.keys() == run.control.pixels.keys()
    assert sum(map(len, run.main.keys.values())) == 40


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_folder_that_is_neither_is_one_clear_line(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(SynthkdError, match=r"expected|not JSON") as caught:
        write_report(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(SynthkdError, match=r"report\.html: cannot be written"):
        write_report(tmp_path)


def test_impossible_times_and_counts_draw_nothing_impossible(tmp_path: Path) -> None:
    matrix = [[-1, 2], [0, 0]]
    result = make_result(2, stage_seconds={"a": -3.0, "b": 2.0}, confusion={"student": matrix})
    (tmp_path / "result.json").write_text(json.dumps(result))
    text = text_of(tmp_path)
    assert 'width="-' not in text
    assert "no confusion matrix" in text


def test_a_long_log_is_thinned_and_bad_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": i, "loss": 1.0}) for i in range(1000)]
    path.write_text("\n".join([*lines, '{"step": 1, "loss": NaN}', "{torn", '{"step": 2, "loss": null}']))
    steps, values = read_log(path, "loss")
    assert len(steps) <= 150
    assert values == [1.0] * len(steps)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234567.8, "1,234,568"), (0.012345, "0.0123"), (-2.5, "−2.5"), (100.0, "100"), (float("nan"), "–")],
)
def test_numbers_read_well(value: float, text: str) -> None:
    assert h.number(value) == text


def test_durations_read_well() -> None:
    assert [h.duration(s) for s in (0.0123, 4.21, 372, 3720)] == ["12.3 ms", "4.21 s", "6 min 12 s", "1 h 2 min"]


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [1e-9, 2e-9], [0.0, 1e9], [-3.0, 4.0]])
def test_axes_enclose_their_values_and_have_ticks(values: list[float]) -> None:
    axis = c.Axis.over("", values)
    assert axis.low <= min(values)
    assert axis.high >= max(values)
    assert 2 <= len(axis.ticks()) <= 8
    assert all(0 <= axis.share(v) <= 1 for v in values)


def test_log_axes_tick_inside_their_range() -> None:
    axis = c.Axis.over("loss", [0.02, 3.0], log=True)
    assert axis.ticks() == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2], rel=1e-9)
