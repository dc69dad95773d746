"""The report's scores: how far the sets lie from real images, accuracy by class, and the mistakes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from synthkd.dfkd import report_charts as c
from synthkd.dfkd import report_html as h
from synthkd.dfkd.metrics import per_class_accuracy
from synthkd.dfkd.report_data import CLASSES_SHOWN, Run
from synthkd.dfkd.report_images import NO_CONTROL

_PAIRS = {
    "guided_real": ("guided – real", "guided"),
    "unguided_real": ("unguided – real", "unguided"),
    "guided_unguided": ("guided – unguided", "rest"),
}
_NETWORKS = {
    "judge": "the judge, a network that took no part in drawing",
    "teacher": "the teacher, which also steered the drawing: its view flatters guided images",
}
_CONFUSIONS = {"guided": "student", "unguided": "unguided", "teacher": "teacher"}
_WHO = {"guided": "student", "unguided": "control", "teacher": "teacher"}


def distance(run: Run) -> h.Section | None:
    """Distances between the sets, and to the real test images; None where they were not measured."""
    found = {pair: both for pair in _PAIRS if (both := _distances(run, pair))}
    if not found:
        return None
    top = max(frechet for frechet, _ in found.values()) or 1.0
    rows = []
    for pair, (frechet, kernel) in found.items():
        name, tone = _PAIRS[pair]
        rows.append([name, c.track([(frechet / top, tone)]), h.number(frechet), h.number(kernel)])
    network = str((run.result or {})["feature_distance"].get("network", "network"))
    text = (
        f"Distances are taken in what the last linear layer reads of {_NETWORKS.get(network, network)}. A smaller one "
        "means more alike to that network, not prettier. Fréchet: between Gaussian fits, squared; few images raise "
        "it. Kernel: unbiased however few the images; about 0, or just below, means no difference was found. Neither "
        "compares with figures from another network, such as published FID."
    )
    text += " Real test images are used to score, never to draw or to train." if "guided_real" in found else ""
    head = ["sets", "bar: Fréchet", "Fréchet", "kernel"]
    table = h.table("Distance between sets of images, in a network's features", head, rows)
    return h.Section("distance", "Feature distance", _distance_sentence(found, network), [table, h.note(text)])


def _distances(run: Run, pair: str) -> tuple[float, float] | None:
    frechet, kernel = (run.number("feature_distance", pair, name) for name in ("frechet", "kernel"))
    return None if frechet is None or kernel is None or frechet < 0 else (frechet, kernel)


def _distance_sentence(found: dict[str, tuple[float, float]], network: str) -> str:
    ours, plain = found.get("guided_real"), found.get("unguided_real")
    if ours is None or plain is None:
        names, frechet = " and ".join(next(iter(found)).split("_")), h.number(next(iter(found.values()))[0])
        return f"In the {network}'s features {names} images lie a Fréchet distance of {frechet} apart."
    pairs = zip(("Fréchet", "kernel"), ours, plain, strict=True)
    told = ", ".join(f"{name} {h.number(a)} against {h.number(b)}" for name, a, b in pairs)
    nearer = {a < b for a, b in zip(ours, plain, strict=True)}
    if len(nearer) == 2:
        return f"The two distances disagree on whether guided or unguided images lie nearer to real ones: {told}."
    where = "nearer to" if nearer == {True} else "no nearer to"
    return f"In the {network}'s features guided images lie {where} real test images than unguided ones: {told}."


def classes(run: Run) -> h.Section | None:
    """Accuracy on real test images class by class; None where no student was scored."""
    held = {tone: run.confusion(key) for tone, key in _CONFUSIONS.items()}
    right = {tone: per_class_accuracy(counts) for tone, counts in held.items() if counts is not None}
    order = sorted((v, i) for i, v in enumerate(right.get("guided", [])) if v is not None)
    if not order:
        return None
    shown = sorted(i for _, i in order[:CLASSES_SHOWN])
    rows = [_class_row(run.classes[i], {tone: values[i] for tone, values in right.items()}) for i in shown]
    head = ["class", "dots: percent right", *(h.key(tone, _WHO[tone]) for tone in right)]
    body = [h.table("Percent of real test images read right, by class", head, rows)]
    if len(order) > len(shown):
        body.append(h.note(f"Shown: the {len(shown)} of {len(order):,} classes in which the student is weakest."))
    return h.Section("classes", "Per class", _classes_sentence(run, right, order), body)


def _class_row(name: str, right: dict[str, float | None]) -> list[object]:
    dots = [(value / 100, tone) for tone, value in reversed(right.items()) if value is not None]
    cells = ["–" if value is None else f"{value:.1f}" for value in right.values()]
    return [name, c.track([(1.0, "faint")], dots), *cells]


def _classes_sentence(run: Run, right: dict[str, list[float | None]], order: list[tuple[float, int]]) -> str:
    (low, weakest), (high, best) = order[0], order[-1]
    text = f"By class the student reads {h.percent(low)} (“{run.classes[weakest]}”) to {h.percent(high)} "
    text += f"(“{run.classes[best]}”) of real test images right"
    plain = right.get("unguided")
    if plain is None:
        return text + "."
    better = sum(value > (plain[i] or 0.0) for value, i in order)
    return text + f", more than its unguided control in {better:,} of {len(order):,} classes."


def confusion(run: Run) -> h.Section:
    """What the students get wrong on real images."""
    held = {tone: run.confusion(key) for tone, key in (("guided", "student"), ("unguided", "unguided"))}
    counts = held["guided"]
    if counts is None:
        return h.Section("confusion", "Confusion", "This run has no confusion matrix of the student.")
    names, matrix = run.classes, np.asarray(counts)
    wrong = matrix - np.diag(np.diag(matrix))
    i, j = np.unravel_index(wrong.argmax(), wrong.shape)
    sentence = "The student makes no mistake on the real test set."
    if wrong.any():
        what = f"{wrong[i, j]:,} of {matrix[i].sum():,} “{names[i]}” are read as “{names[j]}”"
        sentence = f"The student's commonest mistake on real images: {what}"
        teacher = run.confusion("teacher")
        sentence += f" (by the teacher: {teacher[i][j]:,})." if teacher else "."
    recall = np.diag(matrix) / np.maximum(matrix.sum(axis=1), 1)
    shown = sorted(np.argsort(recall, kind="stable")[:CLASSES_SHOWN].tolist())
    tables = [_confusion_table(run, tone, np.asarray(m), shown) for tone, m in held.items() if m is not None]
    text = "Rows: the true class of real test images; columns: the class they are read as; tint: share of the row."
    if len(shown) < len(names):
        text += f" Shown: the {len(shown)} of {len(names):,} classes in which the student is weakest."
    text += "" if held["unguided"] else f" {NO_CONTROL}"
    return h.Section("confusion", "Confusion", sentence, [h.grid(tables, wide=True), h.note(text)])


def _confusion_table(run: Run, tone: str, matrix: NDArray[Any], shown: list[int]) -> h.Html:
    part = matrix[np.ix_(shown, shown)]
    capped = len(shown) < len(matrix)
    if capped:
        part = np.column_stack([part, matrix[shown].sum(axis=1) - part.sum(axis=1)])
    right = 100 * np.trace(matrix) / max(1, matrix.sum())
    caption = f"Student from {tone} images: {h.percent(float(right))} right"
    return h.heat_table(caption, [run.classes[k] for k in shown], part.tolist(), tone, capped)
