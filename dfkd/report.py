"""One self-contained HTML page about a run: what went in, what was drawn, what the student learned from it."""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from synthkd.dfkd import report_charts as c
from synthkd.dfkd import report_html as h
from synthkd.dfkd.report_controls import controls
from synthkd.dfkd.report_data import CLASSES_SHOWN, Run, load_run, read_log
from synthkd.dfkd.report_guidance import guidance
from synthkd.dfkd.report_images import copies, images
from synthkd.dfkd.report_players import players
from synthkd.dfkd.report_scores import classes, confusion, distance
from synthkd.engine.errors import SynthkdError
from synthkd.engine.index import flatten, read_environments

REPORT, STUDENT_LOG = "report.html", "student_log.jsonl"
_BINS = 20
_STAGES = {"guide": "guided", "denoise": "rest"}
Maker = Callable[[Run], h.Section | None]


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the folder of a run or of a drawn set, and return its path.

    Raises SynthkdError where the folder is neither, or what it holds is damaged.
    """
    run = load_run(run_dir)
    text = h.page(_title(run), _lead(run), _colours(run), sections(run))
    path = run_dir / REPORT
    temporary = path.with_name(REPORT + ".tmp")
    try:
        temporary.write_bytes(text.encode("utf-8", "replace"))
        temporary.replace(path)
    except OSError as error:
        raise SynthkdError(f"{path}: cannot be written ({error.strerror}); make its folder writable") from error
    return path


def sections(run: Run) -> list[h.Section]:
    """What there is to say about the run, in the order of the page."""
    before: list[Maker] = [summary, controls, images, copies, distance, _steered]
    learned: list[Maker] = [distillation, lambda run: players(run.folder / STUDENT_LOG)] if run.result else []
    scored: list[Maker] = [classes, confusion] if run.result else []
    makers = [*before, *learned, balance, confidence, *scored, throughput, provenance]
    return [section for make in makers if (section := make(run)) is not None]


def _steered(run: Run) -> h.Section | None:
    """The guidance's terms; nothing to say of a method that has no denoising steps."""
    return guidance(run) if _has_prior(run) else None


def _has_prior(run: Run) -> bool:
    """Whether a diffusion model drew the images."""
    return run.text("method") in ("", "diffdfkd", "diffusion", "dda")


def _title(run: Run) -> str:
    name = " ".join(filter(None, (run.text("preset"), run.text("method")))) or run.folder.resolve().name
    seed = (run.result or {}).get("seed", run.main.manifest["seed"] if run.main else "–")
    return f"{name}, seed {seed}"


def _lead(run: Run) -> str:
    if run.result is None:
        return "A synthetic set: images drawn by a latent diffusion model for a classifier's classes."
    if run.text("method") not in ("", "diffdfkd", "diffusion"):
        return f"Distillation without the teacher's data: method {run.text('method')}, and what its student learned."
    return "Distillation without data: a diffusion model, steered by a teacher, drew the training set of its student."


def _colours(run: Run) -> h.Html:
    mine = f"method {run.text('method')}" if run.text("method") else "guided by the teacher"
    names = {"guided": mine, "unguided": "unguided control", "teacher": "teacher"}
    present = {s.tone for s in run.sets} | ({"teacher"} if run.result else set())
    present |= {"unguided"} if run.number("unguided_student_accuracy") is not None else set()
    return h.legend((tone, text) for tone, text in names.items() if tone in present)


def summary(run: Run) -> h.Section:
    """The figures a reader takes home."""
    score, words = ("miou", "mean IoU") if run.number("student_miou") is not None else ("accuracy", "accuracy")
    teacher, student = run.number(f"teacher_{score}"), run.number(f"student_{score}")
    plain = run.number("unguided_student_accuracy")
    method = run.text("method")
    told = [
        ("Teacher", teacher, f"{words} on real test images", "teacher"),
        ("Student", student, f"by method {method}" if method else "trained on guided images only", "guided"),
        ("Unguided control", plain, "same student, unguided images", "unguided"),
    ]
    hero = [h.Figure(name, f"{v:.1f}", "%", aside, tone) for name, v, aside, tone in told if v is not None]
    if student is not None and plain is not None:
        hero.append(h.Figure("Gain of guidance", h.points(student - plain), "points", "student minus control"))
    body = [h.figures(items, hero=items is hero) for items in (hero, _small_figures(run)) if items]
    used = "the teacher's weights, its class names" + (" and the image prior" if _has_prior(run) else "")
    used += " and a pool of other images" if run.text("pool") else ""
    text = f"Not used: any image the teacher was trained on. The input was {used}."
    if isinstance(said := (run.result or {}).get("declared"), dict):
        text += f" Trained on, as declared: {'; '.join(f'{who}: {what}' for who, what in said.items())}."
    if hero:
        text += f" Real images ({run.text('test_set') or 'the test set'}) served to measure {words}, never to train."
    return h.Section("summary", "Summary", _summary_sentence(run, teacher, student, plain), [*body, h.note(text)])


def _summary_sentence(run: Run, teacher: float | None, student: float | None, plain: float | None) -> str:
    if student is None:
        count = run.main.total if run.main else int(run.number("num_images") or 0)
        text = f"{count:,} labelled images in {len(run.classes):,} classes"
        return f"{text}, drawn without any image the classifier was trained on."
    text = f"The student reaches {h.percent(student)} on real test images"
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


def distillation(run: Run) -> h.Section:
    """How the student learned, from guided and from unguided images."""
    return learning({"guided": run.folder, "unguided": run.folder / "control"})


_CURVES = {
    "loss": ("Loss of the student", "training batches, log scale"),
    "agreement": ("Agreement with the teacher", "% of held-out images"),
    "images_per_second": ("Speed of the training", "images/s"),
    "data_wait": ("Time spent waiting for data", "%"),
}


def learning(folders: Mapping[str, Path]) -> h.Section:
    """Curves of students' logs, a colour each."""
    charts, final = [], {}
    for column, (title, unit) in _CURVES.items():
        found = {tone: read_log(folder / STUDENT_LOG, column) for tone, folder in folders.items()}
        curves = [c.Curve(_told(t, h.number(ys[-1]), folders), t, xs, ys) for t, (xs, ys) in found.items() if xs]
        if not curves:
            continue
        final[column] = {c.tone: c.ys[-1] for c in curves}
        x = c.Axis.over("optimiser step", [v for c in curves for v in c.xs])
        values = [v for c in curves for v in c.ys] + ([] if column in ("loss", "agreement") else [0.0])
        y = c.Axis.over("", values, log=column == "loss" and min(values) > 0)
        alt = f"{title}: " + ", ".join(f"{c.label} at the end" for c in curves)
        charts.append(c.line_chart(title, unit, curves, x, y, alt))
    if not final:
        return h.Section("distillation", "Distillation", f"This run kept no log of the student ({STUDENT_LOG}).")
    column = "agreement" if "agreement" in final else "loss"
    ends = {t: h.percent(v) if column == "agreement" else h.number(v) for t, v in final[column].items()}
    told = [f"{v} ({t})" if len(folders) > 1 else v for t, v in ends.items()]
    what = {"agreement": "agrees with the teacher on", "loss": "has a loss of"}[column]
    where = " of held-out synthetic images" if column == "agreement" else ""
    sentence = f"At the end the student {what} {' and '.join(told)}{where}."
    return h.Section("distillation", "Distillation", sentence, [h.grid(charts, wide=True)])


def _told(tone: str, value: str, folders: Mapping[str, Path]) -> str:
    """A curve's label: whose it is, where there are several."""
    return f"{tone} {value}" if len(folders) > 1 else value


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
        y = c.Axis.over("", [0, *counts])
        x = c.Axis("class number", 0, len(counts))
        ys = [*counts, counts[-1]]
        curve = c.Curve(h.number(counts[-1]), run.main.tone, range(len(ys)), ys, stepped=True)
        chart = c.line_chart("Images per class", "images", [curve], x, y, sentence)
        return h.Section("balance", "Balance", sentence, [h.grid([chart], wide=True)])
    top = max(high, *(max(s.readings.values()) for s in read), 1)
    rows = []
    for i, name in enumerate(names):
        dots = [(s.readings[i] / top, s.tone) for s in reversed(read)]
        bar = c.track([(counts[i] / top, "faint")], dots)
        rows.append([name, bar, f"{counts[i]:,}", *(f"{s.readings[i]:,}" for s in read)])
    head = ["class", "bar: asked for; dots: as the teacher reads them" if read else "", "images"]
    head += [f"read, {s.tone}" for s in read]
    return h.Section("balance", "Balance", sentence, [h.table("Images per class", head, rows)])


def confidence(run: Run) -> h.Section:
    """How sure the teacher is of the finished images."""
    sets = [s for s in run.sets if s.intended]
    if not sets:
        return h.Section("confidence", "Confidence", "The teacher's logits are not stored beside these images.")
    charts, x = [], c.Axis("probability the teacher gives (softmax)", 0.0, 1.0)
    for title, pick in (("For the intended class", "intended"), ("For its own first choice", "top")):
        edges = np.linspace(0, 1, _BINS + 1).tolist()
        shares = [np.histogram(getattr(s, pick), _BINS, (0, 1))[0] * 100 / len(s.intended) for s in sets]
        curves = [
            c.Curve(f"{s.tone} {h.number(share[-1])}", s.tone, edges, [*share.tolist(), share[-1]], stepped=True)
            for s, share in zip(sets, shares, strict=True)
        ]
        y = c.Axis.over("", [0.0, *(v for c in curves for v in c.ys)])
        alt = f"{title}: share of images above {1 - 1 / _BINS:.2f}: " + ", ".join(c.label for c in curves)
        charts.append(c.line_chart(title, "% of images, by probability", curves, x, y, alt))
    told = [f"{h.number(float(np.median(s.intended)))} in {s.tone} images" for s in sets]
    agreed = [f"{h.percent(100 * s.agreed / len(s.intended))} of {s.tone} images" for s in sets]
    text = f"Labels: share of images in the last bin. Its first choice is the intended class in {' and '.join(agreed)}"
    sentence = f"The teacher's median probability for the intended class is {' and '.join(told)}."
    return h.Section("confidence", "Confidence", sentence, [h.grid(charts, wide=True), h.note(text + ".")])


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
        bars = {n: c.track([(s / top, tones.get(n, "rest"))]) for n, s in times.items()}
        rows = [[n.replace("_", " "), bars[n], h.duration(s)] for n, s in times.items()]
        body.append(h.table("The whole run, by stage", ["stage", "", "time"], rows))
    return h.Section("throughput", "Throughput", sentence, body)


def _stage_table(per_image: Mapping[str, Mapping[str, float]]) -> h.Html:
    """One stacked bar per set, and the milliseconds of each stage."""
    names = list(dict.fromkeys(n for seconds in per_image.values() for n in seconds))
    top = max(sum(seconds.values()) for seconds in per_image.values())
    rows = []
    for tone, seconds in per_image.items():
        bar = c.track([(seconds.get(n, 0) / top, _STAGES.get(n, "faint")) for n in names], height=22)
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
    for key, detail in read_environments(run.main.folder).items():
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
