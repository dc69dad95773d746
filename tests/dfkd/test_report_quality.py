"""The report's parts on quality: feature distances, near-copies, accuracy by class, guidance terms and rounds."""

import importlib.util
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synthkd.dfkd import report_charts as c
from synthkd.dfkd.report_data import DrawnSet, Run, load_run, load_set
from synthkd.dfkd.report_guidance import curves, guidance, rounds_of
from synthkd.dfkd.report_images import copies
from synthkd.dfkd.report_scores import classes, distance


def _neighbour() -> Any:
    spec = importlib.util.spec_from_file_location("report_makers", Path(__file__).with_name("test_report.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


made = _neighbour()
DISTANCES = {
    "network": "judge",
    "guided_unguided": {"frechet": 12.0, "kernel": 0.2},
    "guided_real": {"frechet": 33.0, "kernel": 0.05},
    "unguided_real": {"frechet": 60.0, "kernel": 0.09},
}
COPIES = {
    "guided": 3,
    "unguided": 0,
    "threshold": 0.99,
    "examples": {"guided": [[0, 4, 0.9991], [1, 39, 0.997]], "unguided": []},
}


def scored(**result: Any) -> Run:
    """A run of which only the result is left."""
    return Run(Path("run"), {**made.make_result(3), **result}, None, None)


def test_the_new_sections_stand_where_they_belong(tmp_path: Path) -> None:
    folder = made.make_run(tmp_path, feature_distance=DISTANCES, near_duplicates=COPIES)
    text = made.text_of(folder)
    order = ["images", "copies", "distance", "guidance", "confidence", "classes", "confusion"]
    places = [text.index(f'<section id="{name}"') for name in order]
    assert places == sorted(places)
    assert text.count("data:image/png;base64,") == 4
    assert "ids 1 and 39, likeness 0.997" in text


def test_an_old_result_has_neither_distance_nor_copies(tmp_path: Path) -> None:
    text = made.text_of(made.make_run(tmp_path))
    assert '<section id="copies"' not in text
    assert '<section id="distance"' not in text
    assert '<section id="classes"' in text


@pytest.mark.parametrize(
    "junk",
    [
        {"feature_distance": 3, "near_duplicates": [1]},
        {"feature_distance": {"guided_real": {"frechet": None, "kernel": "x"}}, "near_duplicates": {"guided": "many"}},
        {
            "feature_distance": {},
            "near_duplicates": {"guided": 2, "examples": {"guided": [[0], [0, -1, 1], "x", None]}},
        },
        {"feature_distance": {"network": 7, "guided_unguided": {"frechet": float("nan"), "kernel": 0}}},
        {"near_duplicates": {"guided": 2, "examples": {"guided": [[0, 999_999, 1.0], [True, 0, 1]]}}},
    ],
)
def test_wrong_values_are_passed_over(tmp_path: Path, junk: dict[str, Any]) -> None:
    text = made.text_of(made.make_run(tmp_path, **junk))
    assert text.count("data:image/png;base64,") == 2
    assert '<section id="distance"' not in text


def test_the_distance_says_which_set_lies_nearer() -> None:
    said = {}
    for name, ours, plain in (
        ("nearer", (3, 0.1), (4, 0.2)),
        ("farther", (5, 0.3), (4, 0.2)),
        ("split", (5, 0.1), (4, 0.2)),
    ):
        pairs = {"guided_real": ours, "unguided_real": plain}
        held = {pair: {"frechet": f, "kernel": k} for pair, (f, k) in pairs.items()}
        section = distance(scored(feature_distance={"network": "teacher", **held}))
        assert section is not None
        said[name] = section.takeaway
        assert "flatters" in section.body[-1]
    assert "guided images lie nearer to real test images than unguided ones: Fréchet 3 against 4" in said["nearer"]
    assert "guided images lie no nearer to real test images" in said["farther"]
    assert "disagree" in said["split"]


def test_without_real_images_the_distance_is_between_the_sets() -> None:
    section = distance(scored(feature_distance={k: DISTANCES[k] for k in ("network", "guided_unguided")}))
    assert section is not None
    assert section.takeaway == "In the judge's features guided and unguided images lie a Fréchet distance of 12 apart."
    assert "Real test images" not in section.body[-1]


def test_no_copies_are_told_as_none() -> None:
    section = copies(scored(near_duplicates={"guided": 0, "unguided": 1200, "threshold": 0.99}, num_images=1300))
    assert section is not None
    assert section.takeaway == (
        "Near-copies of an earlier image: none of the 1,300 guided images and 1,200 of the 1,300 unguided images."
    )
    assert copies(scored()) is None


def test_copies_do_not_join_the_contact_sheet(tmp_path: Path) -> None:
    folder = made.make_run(tmp_path, samples=120, near_duplicates={**COPIES, "examples": {"guided": [[0, 119, 1.0]]}})
    run = load_run(folder)
    assert run.main is not None
    assert set(run.main.copied) == {"000000000", "000000119"}
    assert "000000119" not in run.main.pixels


def test_accuracy_by_class_against_control_and_teacher() -> None:
    counts = {"student": [[9, 1, 0], [0, 4, 6], [0, 0, 0]], "unguided": [[5, 5, 0], [0, 6, 4], [0, 0, 0]]}
    section = classes(scored(confusion={**counts, "teacher": [[10, 0, 0], [0, 10, 0], [0, 0, 0]]}))
    assert section is not None
    assert "40.0\xa0% (“class 1”) to 90.0\xa0% (“class 0”)" in section.takeaway
    assert "more than its unguided control in 1 of 2 classes" in section.takeaway
    assert section.body[0].count("<circle") == 6
    assert 'cx="40.00%"' in section.body[0]


@pytest.mark.parametrize("confusion", [{}, {"student": [[0, 0, 0]] * 3}, {"teacher": [[1, 0, 0]] * 3}])
def test_without_a_scored_student_there_is_no_accuracy_by_class(confusion: dict[str, Any]) -> None:
    assert classes(scored(confusion=confusion)) is None


def test_many_classes_show_the_weakest() -> None:
    matrix = (np.diag(np.arange(30)) + np.eye(30, k=1, dtype=int)).tolist()
    held = {**made.make_result(30), "confusion": {"student": matrix}}
    section = classes(Run(Path("run"), held, None, None))
    assert section is not None
    assert section.body[0].count('scope="row"') == 20
    assert "the 20 of 30 classes" in section.body[1]


def in_rounds(folder: Path, rounds: int, groups: int, terms: dict[str, int]) -> DrawnSet:
    """A set whose groups hold each term from the given round on, two groups per round."""
    several: dict[str, Any] = {"rounds": rounds, "groups_per_round": 2} if rounds > 1 else {}
    made.write_set(folder, made.make_recipe(samples_per_class=2, groups_per_shard=1, **several), 20 * groups)
    drawn = load_set(folder)
    drawn.rows = [
        replace(
            r, curves={t: [1.0 + r.group, 0.5] for t, first in terms.items() if min(r.group // 2, rounds - 1) >= first}
        )
        for r in drawn.rows
    ]
    return drawn


def test_one_curve_per_round_and_late_terms(tmp_path: Path) -> None:
    drawn = in_rounds(tmp_path, 3, 7, {"bn": 0, "adv": 1, "novel": 2})
    assert rounds_of(drawn) == [0, 0, 1, 1, 2, 2, 2]
    found = curves(drawn)
    assert list(found) == ["bn", "adv", "novel"]
    assert [values.shape for values in found["bn"].values()] == [(2, 2), (2, 2), (3, 2)]
    assert list(found["adv"]) == [1, 2]
    section = guidance(Run(tmp_path, None, drawn, None))
    charts, note = section.body
    assert charts.count("<polyline") == 3 + 2 + 1
    assert charts.count("color-mix") == 2 + 1
    assert "Disagreement" not in charts
    assert "Adversarial term (disagreement with the student)" in charts
    assert "the last of 3 rounds moves: BatchNorm distance 6 → 0.5" in section.takeaway.replace("\xa0", " ")
    assert "adversarial term (disagreement with the student) from round 2 on, novel from round 3 on" in note


def test_one_round_keeps_the_band(tmp_path: Path) -> None:
    drawn = in_rounds(tmp_path, 1, 3, {"ce": 0, "entropy": 0, "head": 0, "moments": 0})
    section = guidance(Run(tmp_path, None, drawn, None))
    assert section.body[0].count('class="band') == 4
    assert "Cross-entropy" in section.body[0]
    assert "band: lowest to highest" in section.body[1]


def test_many_rounds_show_six(tmp_path: Path) -> None:
    drawn = in_rounds(tmp_path, 10, 20, {"bn": 0})
    section = guidance(Run(tmp_path, None, drawn, None))
    assert section.body[0].count("<polyline") == 6
    assert ">round 1<" in section.body[0]
    assert ">round 10<" in section.body[0]
    assert "Shown: 6 of 10 rounds." in section.body[1]


def test_labels_at_the_floor_stay_in_the_chart() -> None:
    """Six curves that end at 0: labels apart, and none below the axis."""
    placed = c._apart([170.0] * 6)
    assert max(placed) <= 172
    assert all(b - a >= 13 - 1e-9 for a, b in itertools.pairwise(placed))
