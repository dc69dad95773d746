"""One self-contained HTML page about a run: what went in, what was drawn, what the student learned from it."""

import io
import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from synthkd.dfkd import report_html as h
from synthkd.dfkd.report_data import CLASSES_SHOWN, DrawnSet, Run, load_run, read_log
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import ENVIRONMENTS, flatten

REPORT, STUDENT_LOG = "report.html", "student_log.jsonl"
_CELL, _BINS = 80, 20
_STAGES = {"guide": "guided", "denoise": "rest"}
_NO_CONTROL = "This run has no unguided control to compare with."


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the folder of a run or of a drawn set, and return its path.

    Raises SynthkdError where the folder is neither, or what it holds is damaged.
    """
    run = load_run(run_dir)
    makers = [summary, images, guidance, distillation, balance, confidence, confusion, throughput, provenance]
    if run.result is None:
        makers = [m for m in makers if m not in (distillation, confusion)]
    text = h.page(_title(run), _lead(run), _colours(run), [make(run) for make in makers])
    path = run_dir / REPORT
    temporary = path.with_name(REPORT + ".tmp")
    try:
        temporary.write_bytes(text.encode("utf-8", "replace"))
        temporary.replace(path)
    except OSError as error:
        raise SynthkdError(f"{path}: cannot be written ({error.strerror}); make its folder writable") from error
    return path


def _title(run: Run) -> str:
    name = run.text("preset") or run.folder.resolve().name
    seed = (run.result or {}).get("seed", run.main.manifest["seed"] if run.main else "–")
    return f"{name}, seed {seed}"


def _lead(run: Run) -> str:
    if run.result is None:
        return "A synthetic set: images drawn by a latent diffusion model for a classifier's classes."
    return "Distillation without data: a diffusion model, steered by a teacher, drew the training set of its student."


def _colours(run: Run) -> h.Html:
    names = {"guided": "guided by the teacher", "unguided": "unguided control", "teacher": "teacher"}
    present = {s.tone for s in run.sets} | ({"teacher"} if run.result else set())
    present |= {"unguided"} if run.number("unguided_student_accuracy") is not None else set()
    return h.legend((tone, text) for tone, text in names.items() if tone in present)


def _pct(value: float) -> str:
    return f"{value:.1f}\N{NO-BREAK SPACE}%"


def _points(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def summary(run: Run) -> h.Section:
    """The figures a reader takes home."""
    teacher, student = run.number("teacher_accuracy"), run.number("student_accuracy")
    plain = run.number("unguided_student_accuracy")
    told = [
        ("Teacher", teacher, "accuracy on real test images", "teacher"),
        ("Student", student, "trained on guided images only", "guided"),
        ("Unguided control", plain, "same student, unguided images", "unguided"),
    ]
    hero = [h.Figure(name, f"{v:.1f}", "%", aside, tone) for name, v, aside, tone in told if v is not None]
    if student is not None and plain is not None:
        hero.append(h.Figure("Gain of guidance", _points(student - plain), "points", "student minus control"))
    body = [h.figures(items, hero=items is hero) for items in (hero, _small_figures(run)) if items]
    used = "the teacher's weights, its class names and the image prior"
    text = f"Not used: any image the teacher was trained on. The input was {used}."
    if hero:
        text += f" Real images ({run.text('test_set') or 'the test set'}) served to measure accuracy, never to train."
    return h.Section("summary", "Summary", _summary_sentence(run, teacher, student, plain), [*body, h.note(text)])


def _summary_sentence(run: Run, teacher: float | None, student: float | None, plain: float | None) -> str:
    if student is None:
        count = run.main.total if run.main else int(run.number("num_images") or 0)
        text = f"{count:,} labelled images in {len(run.classes):,} classes"
        return f"{text}, drawn without any image the classifier was trained on."
    text = f"The student reaches {_pct(student)} on real test images"
    if teacher is not None:
        gap = teacher - student
        text += f", {abs(gap):.1f} points {'below' if gap >= 0 else 'above'} its teacher"
    if plain is not None:
        gain = student - plain
        text += f" and {abs(gain):.1f} {'above' if gain >= 0 else 'below'} the same student taught by unguided images"
    return text + "."


def _small_figures(run: Run) -> list[h.Figure]:
    count = run.main.total if run.main else run.number("num_images")
    out = [h.Figure("Images drawn", f"{count:,.0f}", "", f"in {len(run.classes):,} classes")] if count else []
    workers = run.number("workers")
    aside = f"on {workers:.0f} process{'es' if workers > 1 else ''}" if workers else ""
    out += [h.Figure(f"Speed, {tone}", h.number(rate), "images/s", aside) for tone, rate in _rates(run).items()]
    big, small = run.number("parameters", "teacher"), run.number("parameters", "student")
    if big and small:
        aside = f"{small:,.0f} of {big:,.0f} parameters"
        out.append(h.Figure("Student is smaller by", f"{h.number(big / small, 2)}×", "", aside))
    seconds = run.number("seconds")
    if seconds:
        out.append(h.Figure("Whole run", h.duration(seconds), "", f"on {run.text('device') or 'this machine'}"))
    return out


def _rates(run: Run) -> dict[str, float]:
    """Images per second, as the result states them or as the groups' stage times add up."""
    found = {s.tone: 1 / sum(s.seconds.values()) for s in run.sets if sum(s.seconds.values()) > 0}
    stated = {"guided": run.number("guided_images_per_second"), "unguided": run.number("images_per_second")}
    return {**found, **{tone: rate for tone, rate in stated.items() if rate}}


def images(run: Run) -> h.Section:
    """Contact sheets, the same noise at the same place."""
    if run.main is None:
        return h.Section("images", "Images", "The images of this run are not in its folder any more.")
    shown = [c for c in range(min(CLASSES_SHOWN, len(run.main.counts))) if run.main.keys.get(c)]
    rows = [run.main.keys[c] for c in shown]
    names = [run.main.recipe.classes[c] for c in shown]
    sheets = []
    for drawn in run.sets:
        png, crisp = _sheet_png(drawn.pixels, rows)
        alt = f"Contact sheet of {drawn.tone} images: one row per class ({', '.join(names)}), ids as listed below."
        sheets.append(h.sheet(names, png, alt, drawn.tone, max(map(len, rows), default=1), crisp))
    size = f"{run.main.recipe.width} × {run.main.recipe.height} pixels"
    text = f"The first {max(map(len, rows), default=0)} ids of each class, {size}, nothing picked by hand."
    if run.control:
        text += " The same place holds the same id, and so the same initial noise, with and without guidance."
    elif run.result is not None:
        text += f" {_NO_CONTROL}"
    if len(run.main.counts) > len(shown):
        text += f" Shown: {len(shown)} of {len(run.main.counts):,} classes."
    return h.Section("images", "Images", _images_sentence(run), [h.grid(sheets, wide=True), h.note(text)])


def _images_sentence(run: Run) -> str:
    for who, key in (("A network that took no part in drawing", "judge"), ("The teacher", "teacher_agreement")):
        read = {tone: run.number(key, tone) for tone in ("guided", "unguided")}
        told = [f"{_pct(v)} of the {tone} images" for tone, v in read.items() if v is not None]
        if told:
            return f"{who} reads the intended class in {' and '.join(told)}."
    if run.main and run.control:
        both = [(p, run.control.pixels[k]) for k, p in run.main.pixels.items() if k in run.control.pixels]
        moved = [float(np.abs(a.astype(int) - b).mean()) for a, b in both if a.shape == b.shape]
        if moved:
            return f"Guidance moves a pixel by {h.number(float(np.mean(moved)), 2)} of 255 grey levels on average."
    return f"{run.main.total if run.main else 0:,} images were drawn; no independent network has read them."


def _sheet_png(pixels: Mapping[str, NDArray[np.uint8]], rows: Sequence[Sequence[str]]) -> tuple[bytes, bool]:
    """A contact sheet with transparent gaps, and whether it is so small that its pixels should stay square."""
    first = next(iter(pixels.values()), np.zeros((1, 1, 3), np.uint8))
    tall, wide = first.shape[:2]
    shrink = min(1.0, _CELL / max(tall, wide))
    tall, wide = max(1, round(tall * shrink)), max(1, round(wide * shrink))
    gap = max(1, wide // 24)
    columns = max(map(len, rows), default=1)
    out = Image.new("RGBA", (columns * (wide + gap) - gap, max(1, len(rows) * (tall + gap) - gap)))
    for i, row in enumerate(rows):
        for j, key in enumerate(row):
            if key in pixels:
                cell = Image.fromarray(pixels[key])
                cell = cell.resize((wide, tall), Image.Resampling.LANCZOS) if shrink < 1 else cell
                out.paste(cell, (j * (wide + gap), i * (tall + gap)))
    buffer = io.BytesIO()
    out.save(buffer, "PNG", optimize=True)
    return buffer.getvalue(), shrink == 1.0


def guidance(run: Run) -> h.Section:
    """Each term of the guidance loss over the denoising steps, over all groups."""
    terms = _curves(run.main) if run.main else {}
    if run.main is None or not terms:
        return h.Section("guidance", "Guidance", "No guidance term was recorded while these images were drawn.")
    steps = [i + 1 for i in range(run.main.recipe.steps) if run.main.recipe.guidance.active(i, run.main.recipe.steps)]
    charts, told = [], []
    for name, values in terms.items():
        xs = steps if len(steps) == values.shape[1] else list(range(1, values.shape[1] + 1))
        mean, low, high = (f(values, axis=0).tolist() for f in (np.mean, np.min, np.max))
        ends = f"{h.number(mean[0], 2)}\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}{h.number(mean[-1], 2)}"
        told.append(f"{name} {ends}")
        curve = h.Curve(h.number(mean[-1], 2), "guided", xs, mean, low, high)
        x = h.Axis(f"denoising step, of {run.main.recipe.steps} (noise → image)", xs[0], xs[-1])
        y = h.Axis.over("", [*low, *high, 0.0])
        charts.append(h.line_chart(name, "loss before weighting", [curve], x, y, f"{name}: {ends}"))
    groups = next(iter(terms.values())).shape[0]
    text = f"Line: mean over {groups:,} groups; band: lowest to highest." if groups > 1 else "One group only: no band."
    sentence = f"Over {len(xs)} guided steps the mean over groups moves: {', '.join(told)}."
    return h.Section("guidance", "Guidance", sentence, [h.grid(charts), h.note(text)])


def _curves(drawn: DrawnSet) -> dict[str, NDArray[np.float64]]:
    """Term -> values [groups, steps] of the groups whose curve is whole and finite."""
    out = {}
    for name in sorted({name for row in drawn.rows for name in row.curves}):
        held = [c for row in drawn.rows if (c := row.curves.get(name)) and all(map(math.isfinite, c))]
        length = Counter(map(len, held)).most_common(1)[0][0] if held else 0
        if length:
            out[name] = np.asarray([c for c in held if len(c) == length], dtype=np.float64)
    return out


def distillation(run: Run) -> h.Section:
    """How the student learned, from guided and from unguided images."""
    folders, charts, final = {"guided": run.folder, "unguided": run.folder / "control"}, [], {}
    units = {"loss": ("Loss of the student", "training batches, log scale"),
             "agreement": ("Agreement with the teacher", "% of held-out images")}  # fmt: skip
    for column, (title, unit) in units.items():
        found = {tone: read_log(folder / STUDENT_LOG, column) for tone, folder in folders.items()}
        curves = [h.Curve(f"{t} {h.number(ys[-1])}", t, xs, ys) for t, (xs, ys) in found.items() if xs]
        if not curves:
            continue
        final[column] = {c.tone: c.ys[-1] for c in curves}
        x = h.Axis.over("optimiser step", [v for c in curves for v in c.xs])
        y = h.Axis.over("", values := [v for c in curves for v in c.ys], log=column == "loss" and min(values) > 0)
        alt = f"{title}: " + ", ".join(f"{c.label} at the end" for c in curves)
        charts.append(h.line_chart(title, unit, curves, x, y, alt))
    if not final:
        return h.Section("distillation", "Distillation", f"This run kept no log of the student ({STUDENT_LOG}).")
    column = "agreement" if "agreement" in final else "loss"
    told = [f"{_pct(v) if column == 'agreement' else h.number(v)} ({t})" for t, v in final[column].items()]
    what = {"agreement": "agrees with the teacher on", "loss": "has a loss of"}[column]
    where = " of held-out synthetic images" if column == "agreement" else ""
    sentence = f"At the end the student {what} {' and '.join(told)}{where}."
    return h.Section("distillation", "Distillation", sentence, [h.grid(charts, wide=True)])


def balance(run: Run) -> h.Section:
    """Images per class, and how many the teacher reads as that class."""
    if run.main is None:
        return h.Section("balance", "Balance", "The set is not in the folder any more: its classes were not counted.")
    counts, names = run.main.counts, run.main.recipe.classes
    low, high = min(counts), max(counts)
    sentence = f"Each of the {len(counts):,} classes has {low:,} images." if low == high else (
        f"The {len(counts):,} classes have {low:,} ({names[counts.index(low)]}) to {high:,} "
        f"({names[counts.index(high)]}) images."
    )  # fmt: skip
    read = [s for s in run.sets if s.readings]
    if len(counts) > 2 * CLASSES_SHOWN:
        y = h.Axis.over("", [0, *counts])
        x = h.Axis("class number", 0, len(counts))
        ys = [*counts, counts[-1]]
        curve = h.Curve(h.number(counts[-1]), run.main.tone, range(len(ys)), ys, stepped=True)
        chart = h.line_chart("Images per class", "images", [curve], x, y, sentence)
        return h.Section("balance", "Balance", sentence, [h.grid([chart], wide=True)])
    top = max(high, *(max(s.readings.values()) for s in read), 1)
    rows = []
    for i, name in enumerate(names):
        dots = [(s.readings[i] / top, s.tone) for s in reversed(read)]
        bar = h.track([(counts[i] / top, "faint")], dots)
        rows.append([name, bar, f"{counts[i]:,}", *(f"{s.readings[i]:,}" for s in read)])
    head = ["class", "bar: asked for; dots: as the teacher reads them" if read else "", "images"]
    head += [f"read, {s.tone}" for s in read]
    return h.Section("balance", "Balance", sentence, [h.table("Images per class", head, rows)])


def confidence(run: Run) -> h.Section:
    """How sure the teacher is of the finished images."""
    sets = [s for s in run.sets if s.intended]
    if not sets:
        return h.Section("confidence", "Confidence", "The teacher's logits are not stored beside these images.")
    charts, x = [], h.Axis("probability the teacher gives (softmax)", 0.0, 1.0)
    for title, pick in (("For the intended class", "intended"), ("For its own first choice", "top")):
        edges = np.linspace(0, 1, _BINS + 1).tolist()
        shares = [np.histogram(getattr(s, pick), _BINS, (0, 1))[0] * 100 / len(s.intended) for s in sets]
        curves = [
            h.Curve(f"{s.tone} {h.number(share[-1])}", s.tone, edges, [*share.tolist(), share[-1]], stepped=True)
            for s, share in zip(sets, shares, strict=True)
        ]
        y = h.Axis.over("", [0.0, *(v for c in curves for v in c.ys)])
        alt = f"{title}: share of images above {1 - 1 / _BINS:.2f}: " + ", ".join(c.label for c in curves)
        charts.append(h.line_chart(title, "% of images, by probability", curves, x, y, alt))
    told = [f"{h.number(float(np.median(s.intended)))} in {s.tone} images" for s in sets]
    agreed = [f"{_pct(100 * s.agreed / len(s.intended))} of {s.tone} images" for s in sets]
    text = f"Labels: share of images in the last bin. Its first choice is the intended class in {' and '.join(agreed)}"
    sentence = f"The teacher's median probability for the intended class is {' and '.join(told)}."
    return h.Section("confidence", "Confidence", sentence, [h.grid(charts, wide=True), h.note(text + ".")])


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
    text += "" if held["unguided"] else f" {_NO_CONTROL}"
    return h.Section("confusion", "Confusion", sentence, [h.grid(tables, wide=True), h.note(text)])


def _confusion_table(run: Run, tone: str, matrix: NDArray[Any], shown: list[int]) -> h.Html:
    part = matrix[np.ix_(shown, shown)]
    capped = len(shown) < len(matrix)
    if capped:
        part = np.column_stack([part, matrix[shown].sum(axis=1) - part.sum(axis=1)])
    right = 100 * np.trace(matrix) / max(1, matrix.sum())
    caption = f"Student from {tone} images: {_pct(float(right))} right"
    return h.heat_table(caption, [run.classes[k] for k in shown], part.tolist(), tone, capped)


def throughput(run: Run) -> h.Section:
    """Where the time of an image, and of the run, went."""
    per_image = {s.tone: s.seconds for s in run.sets if sum(s.seconds.values()) > 0}
    body, sentence = [], "No stage times were recorded."
    if per_image:
        body.append(_stage_table(per_image))
        first, *others = per_image.items()
        total = sum(first[1].values())
        sentence = f"One {first[0]} image takes {h.duration(total)}"
        sentence += f", {h.number(total / sum(others[0][1].values()), 2)} times a plain one" if others else ""
        share = 100 * first[1].get("guide", 0) / total
        sentence += f"; guidance is {share:.0f}\N{NO-BREAK SPACE}% of it." if share else "."
    stages = (run.result or {}).get("stage_seconds")
    times = {str(n): s for n in (stages if isinstance(stages, dict) else {}) if (s := run.number("stage_seconds", n))}
    if times:
        tones = {"synthesize": "guided", "synthesize_unguided": "unguided", "evaluate_teacher": "teacher"}
        top = max(times.values())
        bars = {n: h.track([(s / top, tones.get(n, "rest"))]) for n, s in times.items()}
        rows = [[n.replace("_", " "), bars[n], h.duration(s)] for n, s in times.items()]
        body.append(h.table("The whole run, by stage", ["stage", "", "time"], rows))
    return h.Section("throughput", "Throughput", sentence, body)


def _stage_table(per_image: Mapping[str, Mapping[str, float]]) -> h.Html:
    """One stacked bar per set, and the milliseconds of each stage."""
    names = list(dict.fromkeys(n for seconds in per_image.values() for n in seconds))
    top = max(sum(seconds.values()) for seconds in per_image.values())
    rows = []
    for tone, seconds in per_image.items():
        bar = h.track([(seconds.get(n, 0) / top, _STAGES.get(n, "faint")) for n in names], height=22)
        cells = [h.number(1e3 * seconds[n]) if n in seconds else "–" for n in names]
        total = sum(seconds.values())
        rows.append([tone, bar, *cells, h.number(1e3 * total), h.number(1 / total)])
    keys = [h.key(_STAGES.get(n, "faint"), n) for n in names]
    return h.table("Time per image in one process, milliseconds", ["images", "", *keys, "all", "images/s"], rows)


def provenance(run: Run) -> h.Section:
    """What it takes to draw any of these images again."""
    if run.main is None:
        facts = {k: v for k, v in (run.result or {}).items() if k in ("preset", "seed", "device", "versions")}
        rows = [[k, str(v)] for k, v in flatten(facts).items()]
        sentence = "The set is gone from the folder; the result names its preset and seed."
        return h.Section("provenance", "Provenance", sentence, [h.table("The run", ["field", "value"], rows, "facts")])
    manifest = run.main.manifest
    identity = {"fingerprint": manifest["fingerprint"], "seed": manifest["seed"], "samples": run.main.total}
    parts = ("source", "model_sha256", "guidance", "solver", "versions")
    more: dict[str, Any] = {k: manifest[k] for k in parts if k in manifest}
    rows = [[k, _value(v)] for k, v in {**identity, **flatten(more), "device": run.text("device") or "–"}.items()]
    path = run.main.folder / ENVIRONMENTS
    for key, detail in (json.loads(path.read_text()) if path.is_file() else {}).items():
        rows.append([f"environment {key}", _value(", ".join(f"{k}: {v}" for k, v in flatten(detail).items()))])
    declared = {**manifest["recipe"], "classes": ", ".join(run.main.recipe.classes)}
    recipe = [[k, _value(v)] for k, v in flatten(declared).items()]
    example = next(iter(run.main.pixels), "0")
    folder = run.main.folder.relative_to(run.folder.parent) if run.folder.name else run.main.folder
    replay = h.wrap("pre", h.wrap("code", f"synthkd replay {shlex.quote(str(folder))} --id {int(example)}"))
    sentence = f"Every one of the {run.main.total:,} images can be drawn again by itself, from its id alone."
    head = ["field", "value"]
    tables = [h.table("Identity", head, rows, "facts"), h.table("Recipe", head, recipe, "facts")]
    return h.Section("provenance", "Provenance", sentence, [h.grid(tables, wide=True), replay])


def _value(value: Any) -> str:
    text = "\n".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 2000 else text[:2000] + " …"
