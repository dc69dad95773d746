"""The report's comparison of a run with its controls: what the same student learned from other images."""

from dataclasses import dataclass
from typing import Any

from synthkd.dfkd import report_charts as c
from synthkd.dfkd import report_html as h
from synthkd.dfkd.report_data import Run

_LEARNS = {
    "pool": "images of other things",
    "fastdfkd": "images of a generator (FastDFKD)",
    "mosaickd": "the pool and images of a generator (MosaicKD)",
    "deepinversion": "inverted images (DeepInversion)",
    "dda": "diversified images (DDA)",
}


@dataclass(frozen=True)
class _Arm:
    """name, what its student saw, whose colour; accuracy in percent, images made, seconds of drawing and training."""

    name: str
    saw: str
    tone: str
    accuracy: float
    images: float | None
    seconds: float | None


def controls(run: Run) -> h.Section | None:
    """Table and bars of all students; None for a run without controls, or without scores."""
    found = (run.result or {}).get("controls")
    named = list(found) if isinstance(found, dict) else []
    arms = [arm for arm in (_drawn(run, "guided"), _drawn(run, "unguided")) if arm is not None]
    others = [arm for name in named if (arm := _control(run, str(name))) is not None]
    if not others or not arms:
        return None
    teacher = run.number("teacher_accuracy")
    rows = [["teacher", _bar(teacher, "teacher"), f"{teacher:.2f}", "", "", ""]] if teacher is not None else []
    rows += [_row(arm) for arm in (*arms, *others)]
    head = ["student of", "bar: accuracy", "accuracy, %", "what it saw", "images made", "time"]
    table = h.table("The same student, by what it learned from", head, rows)
    return h.Section("controls", "Controls", _sentence(arms[0], others), [table, h.note(_note(run))])


def _drawn(run: Run, name: str) -> _Arm | None:
    accuracy = run.number("student_accuracy" if name == "guided" else "unguided_student_accuracy")
    if accuracy is None:
        return None
    saw = "images steered by the teacher" if name == "guided" else "the same prior's, not steered"
    return _Arm(name, saw, name, accuracy, run.number("num_images"), run.number("arm_seconds", name))


def _control(run: Run, name: str) -> _Arm | None:
    accuracy, images, seconds = (
        run.number("controls", name, field) for field in ("student_accuracy", "num_images", "seconds")
    )
    return None if accuracy is None else _Arm(name, _LEARNS.get(name, "a method"), "rest", accuracy, images, seconds)


def _row(arm: _Arm) -> list[Any]:
    images = "–" if arm.images is None else f"{arm.images:,.0f}"
    time = "–" if arm.seconds is None else h.duration(arm.seconds)
    return [arm.name, _bar(arm.accuracy, arm.tone), f"{arm.accuracy:.2f}", arm.saw, images, time]


def _bar(accuracy: float, tone: str) -> h.Html:
    return c.track([(accuracy / 100, tone)])


def _sentence(guided: _Arm, others: list[_Arm]) -> str:
    best = max(others, key=lambda arm: arm.accuracy)
    gain = guided.accuracy - best.accuracy
    text = f"The best control is {best.name} with {h.percent(best.accuracy)}: the guided student is"
    return f"{text} {abs(gain):.1f} points {'above' if gain >= 0 else 'below'} it."


def _note(run: Run) -> str:
    steps, batch = run.number("steps"), run.number("batch_size")
    budget = f" for {steps:,.0f} steps of {batch:,.0f} images" if steps and batch else ""
    return (
        f"Every student is the same network from the same initial weights, trained{budget} under the same teacher: "
        "their steps are equal, the time that making images takes is not. Times are of drawing and training."
    )
