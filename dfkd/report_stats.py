"""`synthkd stats` as one self-contained page."""

from pathlib import Path

import numpy as np

from synthkd.dfkd import report_charts as c
from synthkd.dfkd import report_html as h
from synthkd.dfkd.methods.diffdfkd import KIND
from synthkd.dfkd.report_images import sheet_png
from synthkd.dfkd.stats import BINS, SHEET_CLASSES, SetStats, Spread
from synthkd.engine.errors import SynthkdError
from synthkd.engine.plan import sample_key
from synthkd.engine.rows import write_atomically

_STAGES = {"guide": "guided", "denoise": "rest"}
_ROWS = 40  # classes that a table lists one by one
_LOSSES = 12


def write_stats(stats: SetStats, path: Path) -> Path:
    """Write the page as a whole; returns its path. Raises SynthkdError where it cannot be written."""
    lead = "Figures of a synthetic set. Counts, confidence, losses and sizes are of every image; pixels, readings and "
    lead += f"near-copies are of {len(stats.sample):,} images chosen by seed."
    tone = _tone(stats)
    colours = h.legend([(tone, f"this set, {tone}"), ("teacher", "teacher")])
    text = h.page(f"{stats.total:,} images in {len(stats.counts):,} classes", lead, colours, sections(stats))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode("utf-8", "replace").decode(), shared=True)
    except OSError as error:
        raise SynthkdError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
    return path


def sections(stats: SetStats) -> list[h.Section]:
    """What there is to say, in the order of the page."""
    makers = (_summary, _images, _balance, _confidence, _losses, _files, _pixels, _copies, _times, _provenance)
    return [section for make in makers if (section := make(stats)) is not None]


def _tone(stats: SetStats) -> str:
    kind = stats.manifest["guidance"].get("kind", KIND)
    return "guided" if stats.recipe.guidance.scale > 0 or kind != KIND else "unguided"


def _summary(stats: SetStats) -> h.Section:
    sure, read = stats.confidence.sum(), stats.pixels.agreement
    items = [h.Figure("Images", f"{stats.total:,}", "", f"in {len(stats.counts):,} classes, shards: {stats.shards:,}")]
    if stats.judged.sum():
        mean = h.number(float(sure / stats.judged.sum()))
        items.append(h.Figure("Mean confidence", mean, "", "teacher's probability of the label", "teacher"))
    if read is not None:
        items.append(h.Figure("Read as labelled", f"{read:.1f}", "%", f"of {stats.pixels.images:,} sampled", "teacher"))
    items.append(h.Figure("Size of a file", h.number(stats.sizes.mean / 1024), "KiB", "mean"))
    items.append(h.Figure("Near-copies", f"{stats.near.count:,}", "", f"of {len(stats.sample):,} sampled"))
    low, high = int(stats.counts.min()), int(stats.counts.max())
    each = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return h.Section(
        "summary", "Summary", f"{stats.total:,} images, {each} of each class.", [h.figures(items, hero=True)]
    )


def _images(stats: SetStats) -> h.Section:
    shown = [label for label in range(SHEET_CLASSES) if stats.sheet.get(label)]
    rows = [[sample_key(place.id) for place in stats.sheet[label]] for label in shown]
    names = [stats.recipe.classes[label] for label in shown]
    png, crisp = sheet_png(stats.pictures, rows)
    alt = f"Contact sheet: one row per class ({', '.join(names)}), the first ids of each."
    columns = max(map(len, rows), default=1)
    text = f"The first {columns} ids of each class, nothing picked by hand."
    if len(stats.counts) > len(shown):
        text += f" Shown: {len(shown)} of {len(stats.counts):,} classes."
    sentence = f"Images are {stats.recipe.width} × {stats.recipe.height} pixels, stored as {stats.recipe.image_format}."
    return h.Section(
        "images", "Images", sentence, [h.sheet(names, png, alt, _tone(stats), columns, crisp), h.note(text)]
    )


def _balance(stats: SetStats) -> h.Section:
    counts, names = stats.counts.tolist(), stats.recipe.classes
    low, high = int(np.argmin(counts)), int(np.argmax(counts))
    ends = f"{counts[low]:,} (“{names[low]}”) to {counts[high]:,} (“{names[high]}”)"
    sentence = f"The {len(counts):,} classes have {ends} images."
    if counts[low] == counts[high]:
        sentence = f"Each of the {len(counts):,} classes has {counts[low]:,} images."
    if len(counts) > _ROWS:
        ordered = sorted(counts, reverse=True)
        curve = c.Curve(
            h.number(ordered[-1]), _tone(stats), range(len(counts) + 1), [*ordered, ordered[-1]], stepped=True
        )
        axes = c.Axis("classes, the largest first", 0, len(counts)), c.Axis.over("", [0, *counts])
        chart = c.line_chart("Images per class", "images", [curve], *axes, sentence)
        return h.Section("balance", "Balance", sentence, [h.grid([chart], wide=True)])
    top = max(1, *counts)
    rows = [[name, c.track([(n / top, _tone(stats))]), f"{n:,}"] for name, n in zip(names, counts, strict=True)]
    return h.Section("balance", "Balance", sentence, [h.table("Images per class", ["class", "", "images"], rows)])


def _confidence(stats: SetStats) -> h.Section | None:
    if not stats.judged.sum():
        return None
    shares = 100 * stats.histogram.sum(axis=0) / stats.judged.sum()
    edges = np.linspace(0, 1, BINS + 1).tolist()
    curve = c.Curve(h.number(float(shares[-1])), "teacher", edges, [*shares.tolist(), float(shares[-1])], stepped=True)
    axes = c.Axis("teacher's probability of the label", 0.0, 1.0), c.Axis.over("", [0.0, *shares.tolist()])
    alt = f"{h.percent(float(shares[-1]))} of the images are above {1 - 1 / BINS:.2f}."
    chart = c.line_chart("Confidence", "% of images", [curve], *axes, alt)
    mean = stats.confidence / np.maximum(stats.judged, 1)
    order = [int(i) for i in np.argsort(mean, kind="stable") if stats.judged[i]]
    shown = sorted(order[:SHEET_CLASSES])
    rows = [
        [stats.recipe.classes[i], c.track([(float(mean[i]), "teacher")]), f"{mean[i]:.3f}", _read(stats, i)]
        for i in shown
    ]
    head = ["class", "bar: mean confidence", "mean", "read right, sample"]
    table = h.table("Confidence and readings by class", head, rows)
    low = h.percent(100 * float(stats.histogram[:, : BINS // 10].sum() / stats.judged.sum()))
    sentence = f"In {low} of the images the teacher gives the label a probability below 0.1"
    agreed = stats.pixels.agreement
    sentence += "." if agreed is None else f"; it reads {h.percent(agreed)} of the sample as labelled."
    text = (
        f"Shown: the {len(shown)} of {len(order):,} classes in which it is least sure."
        if len(shown) < len(order)
        else ""
    )
    return h.Section("confidence", "Confidence", sentence, [h.grid([chart]), table, *([h.note(text)] if text else [])])


def _read(stats: SetStats, label: int) -> str:
    asked = stats.pixels.asked[label]
    return f"{h.percent(100 * stats.pixels.right[label] / asked)} of {asked:,}" if asked else "–"


def _histogram(title: str, unit: str, values: list[float], tone: str, label: str) -> h.Html:
    """Shares of values by size; the highest and lowest hundredth are drawn into the outer bins."""
    low, high = np.quantile(values, [0.01, 0.99]).tolist()
    axis = c.Axis.over(label, [low, high])
    counts, edges = np.histogram(np.clip(values, axis.low, axis.high), BINS, (axis.low, axis.high))
    shares = (100 * counts / len(values)).tolist()
    median = float(np.median(values))
    curve = c.Curve("", tone, edges.tolist(), [*shares, shares[-1]], stepped=True)
    alt = f"{title}: median {h.number(median)}."
    return c.line_chart(
        f"{title}, median {h.number(median)}", unit, [curve], axis, c.Axis.over("", [0.0, *shares]), alt
    )


def _losses(stats: SetStats) -> h.Section | None:
    named = {name: spread for name, spread in sorted(stats.losses.items()) if spread.sampled}
    if not named:
        return None
    charts = [
        _histogram(name, "% of the sample", s.sampled, _tone(stats), "last value of the term")
        for name, s in list(named.items())[:_LOSSES]
    ]
    told = ", ".join(f"{name} {h.number(s.mean)}" for name, s in named.items())
    return h.Section(
        "losses", "Losses", f"Mean of each term at the last guided call: {told}.",
        [h.grid(charts), _spread_table("Terms over all images; quantiles of the sample", named, 1.0, _tone(stats))],
    )  # fmt: skip


def _spread_table(caption: str, named: dict[str, Spread], unit: float, tone: str) -> h.Html:
    head = ["", "bar: 10 % to 90 %; dot: median", "mean", "lowest", "10 %", "median", "90 %", "highest"]
    rows = [[name, _reach(s, tone), *(h.number(v / unit) for v in s.figures().values())] for name, s in named.items()]
    return h.table(caption, head, rows)


def _reach(spread: Spread, tone: str) -> h.Html:
    """The middle of the values, between the lowest and the highest."""
    _, low, *middle, high = spread.figures().values()
    first, median, last = ((v - low) / (high - low or 1.0) for v in middle)
    return c.track([(first, "faint"), (last - first, "rest"), (1 - last, "faint")], [(median, tone)])


def _files(stats: SetStats) -> h.Section:
    sizes = stats.sizes
    chart = _histogram("Image files", "% of the sample", [v / 1024 for v in sizes.sampled], _tone(stats), "KiB")
    sentence = f"All image files together are {h.number(sizes.total / 2**20)} MiB; {stats.equal:,} of {stats.total:,} "
    sentence += "are byte for byte an earlier one."
    pairs = ", ".join(f"{a} and {b}" for a, b in stats.equal_pairs)
    told = [h.note(f"Equal files, by id: {pairs}.")] if pairs else []
    table = _spread_table("Size of an image file, KiB", {"image": sizes}, 1024.0, _tone(stats))
    return h.Section("files", "Files", sentence, [h.grid([chart]), table, *told])


def _pixels(stats: SetStats) -> h.Section:
    figures, seen = stats.pixels.figures(), stats.pixels
    charts = [
        _histogram("Brightness", "% of the sample", seen.brightness, _tone(stats), "mean of an image, 0 to 1"),
        _histogram("Contrast", "% of the sample", seen.contrast, _tone(stats), "standard deviation within an image"),
    ]
    rows = [
        [n, c.track([(m, _tone(stats))]), f"{m:.4f}", f"{s:.4f}"]
        for n, m, s in zip(("red", "green", "blue"), figures["mean"], figures["std"], strict=True)
    ]
    sentence = f"Over {seen.images:,} images a pixel's mean is {figures['brightness']:.3f} of 1, an image's standard "
    sentence += f"deviation {figures['contrast']:.3f}."
    table = h.table("Channels over the sample, of 1", ["channel", "bar: mean", "mean", "standard deviation"], rows)
    return h.Section("pixels", "Pixels", sentence, [h.grid(charts), table])


def _copies(stats: SetStats) -> h.Section:
    near, items = stats.near, []
    for pair in near.examples:
        ids = stats.ids_of(pair)
        png, crisp = sheet_png(stats.pictures, [[sample_key(i) for i in ids]])
        caption = f"ids {ids[0]} and {ids[1]}, likeness {pair.likeness:.3f}"
        items.append((png, f"Two images side by side, {caption}.", caption, crisp))
    how = "Every pair of the sample was compared." if near.exact else (
        "The sample is too large to compare every pair: images that fall into one cell of random planes were, so the "
        "count is a lower bound."
    )  # fmt: skip
    text = (
        "A near-copy has a likeness of 0.99 or more to an earlier image of the sample. Likeness: cosine of the pixels, "
    )
    text += f"pooled to 16 × 16, each colour channel less its mean. {how}"
    sentence = f"{near.count:,} of {len(stats.sample):,} sampled images nearly repeat an earlier one."
    shown = [h.pictures(items, _tone(stats))] if items else []
    return h.Section("copies", "Near-copies", sentence, [*shown, h.note(text)])


def _times(stats: SetStats) -> h.Section:
    seconds, body = stats.stage_seconds, []
    total = sum(seconds.values())
    if total > 0:
        bars = {name: c.track([(value / total, _STAGES.get(name, "faint"))]) for name, value in seconds.items()}
        rows = [[n, bars[n], h.number(1e3 * v), h.percent(100 * v / total)] for n, v in seconds.items()]
        body.append(h.table("Time per image in one process", ["stage", "", "ms", "share"], rows))
    tried = [
        [f"{n + 1}", c.track([(count / max(1, stats.groups), "rest")]), f"{count:,}"]
        for n, count in sorted(stats.attempts.items())
    ]
    body.append(h.table("Attempts until a group was finite", ["attempt", "", "groups"], tried))
    sentence = f"An image took {h.duration(total)} of one process. " if total > 0 else "No times were recorded. "
    again = sum(count for n, count in stats.attempts.items() if n)
    sentence += f"{again:,} of {stats.groups:,} groups needed another attempt; "
    sentence += f"{stats.repaired:,} images were drawn again by `synthkd repair`."
    return h.Section("times", "Times", sentence, body)


def _provenance(stats: SetStats) -> h.Section:
    told = stats.described()
    rows = [
        [key, f"{count:,} images; {told[key] or 'not described'}"] for key, count in sorted(stats.environments.items())
    ]
    identity = [["fingerprint", stats.manifest["fingerprint"]], ["seed", str(stats.manifest["seed"])]]
    sentence = f"The images come from {len(rows):,} environment{'s' if len(rows) != 1 else ''}."
    head = ["field", "value"]
    tables = [h.table("Identity", head, identity, "facts"), h.table("Environments", head, rows, "facts")]
    return h.Section("provenance", "Provenance", sentence, tables)
