"""The report's pictures: contact sheets of the drawn images, and the images that repeat one another."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from synthkd.dfkd import report_html as h
from synthkd.dfkd.report_data import CLASSES_SHOWN, DrawnSet, Run
from synthkd.engine.plan import preview_key

NO_CONTROL = "This run has no unguided control to compare with."
PAIRS_SHOWN, STRIPS_SHOWN, _CELL = 4, 6, 80


def images(run: Run) -> h.Section:
    """Contact sheets, the same noise at the same place."""
    if run.main is None:
        return h.Section("images", "Images", "The images of this run are not in its folder any more.")
    shown = [c for c in range(min(CLASSES_SHOWN, len(run.main.counts))) if run.main.keys.get(c)]
    rows = [run.main.keys[c] for c in shown]
    names = [run.main.recipe.classes[c] for c in shown]
    sheets = []
    for drawn in run.sets:
        png, crisp = sheet_png(drawn.pixels, rows)
        alt = f"Contact sheet of {drawn.tone} images: one row per class ({', '.join(names)}), ids as listed below."
        title = run.text("method")
        sheets.append(h.sheet(names, png, alt, drawn.tone, max(map(len, rows), default=1), crisp, title))
    size = f"{run.main.recipe.width} × {run.main.recipe.height} pixels"
    text = f"The first {max(map(len, rows), default=0)} ids of each class, {size}, nothing picked by hand."
    if run.control:
        text += " The same place holds the same id, and so the same initial noise, with and without guidance."
    elif run.result is not None and not run.text("method"):
        text += f" {NO_CONTROL}"
    if len(run.main.counts) > len(shown):
        text += f" Shown: {len(shown)} of {len(run.main.counts):,} classes."
    body = [h.grid(sheets, wide=True), h.note(text), *_forming(run)]
    return h.Section("images", "Images", _images_sentence(run), body)


def contact_sheet(drawn: DrawnSet, title: str, tone: str) -> h.Html:
    """The first images of each class of one set under a title."""
    shown = [c for c in range(min(CLASSES_SHOWN, len(drawn.counts))) if drawn.keys.get(c)]
    rows, names = [drawn.keys[c] for c in shown], [drawn.recipe.classes[c] for c in shown]
    png, crisp = sheet_png(drawn.pixels, rows)
    return h.sheet(names, png, f"Images of {title}", tone, max(map(len, rows), default=1), crisp, title)


def _forming(run: Run) -> list[h.Html]:
    """The previews of the first image of some classes, in the order of the run, and the image itself."""
    sheets = []
    for drawn in run.sets:
        shown = [c for c in sorted(drawn.keys) if drawn.keys[c]][:STRIPS_SHOWN] if drawn.previews else []
        shares, names = drawn.recipe.previews, [drawn.recipe.classes[c] for c in shown]
        first = [drawn.keys[c][0] for c in shown]
        rows = [[*(preview_key(key, share) for share in shares), key] for key in first]
        if rows:
            png, crisp = sheet_png({**drawn.pixels, **drawn.previews}, rows)
            at = ", ".join(h.percent(100 * share) for share in shares)
            alt = f"How {drawn.tone} images form: the clean latent at {at} of the run, and the finished image."
            sheets.append(h.sheet(names, png, alt, drawn.tone, len(rows[0]), crisp))
    text = "Previews, samples of their own in the set: the clean latent in the run, decoded; last the finished image."
    return [h.grid(sheets, wide=True), h.note(text)] if sheets else []


def _images_sentence(run: Run) -> str:
    for who, key in (("A network that took no part in drawing", "judge"), ("The teacher", "teacher_agreement")):
        read = {tone: run.number(key, tone) for tone in ("guided", "unguided")}
        told = [f"{h.percent(v)} of the {tone} images" for tone, v in read.items() if v is not None]
        if told:
            return f"{who} reads the intended class in {' and '.join(told)}."
    if run.main and run.control:
        both = [(p, run.control.pixels[k]) for k, p in run.main.pixels.items() if k in run.control.pixels]
        moved = [float(np.abs(a.astype(int) - b).mean()) for a, b in both if a.shape == b.shape]
        if moved:
            return f"Guidance moves a pixel by {h.number(float(np.mean(moved)), 2)} of 255 grey levels on average."
    return f"{run.main.total if run.main else 0:,} images were drawn; no independent network has read them."


def sheet_png(pixels: Mapping[str, NDArray[np.uint8]], rows: Sequence[Sequence[str]]) -> tuple[bytes, bool]:
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


def copies(run: Run) -> h.Section | None:
    """How many images repeat an earlier one, and the likest pairs; None where nobody counted."""
    counts = {tone: run.number("near_duplicates", tone) for tone in ("guided", "unguided")}
    known = {tone: int(n) for tone, n in counts.items() if n is not None}
    total = int(run.number("num_images") or 0)
    if not known:
        return None
    told = " and ".join(f"{f'{n:,}' if n else 'none'} of the {total:,} {tone} images" for tone, n in known.items())
    body = [h.pictures(pairs, s.tone) for s in run.sets if (pairs := _pairs(run, s))]
    limit = run.number("near_duplicates", "threshold")
    bar = f" of {h.number(limit)} or more" if limit else ""
    text = (
        f"A near-copy has a likeness{bar} to an image drawn before it in the same set; it adds next to nothing to a "
        "training set. Likeness: cosine of the pixels, pooled to 16 × 16, each colour channel less its mean."
    )
    shown = " Shown: the likest pairs of each set." if body else ""
    return h.Section(
        "copies", "Near-copies", f"Near-copies of an earlier image: {told}.", [*body, h.note(text + shown)]
    )


def _pairs(run: Run, drawn: DrawnSet) -> list[tuple[bytes, str, str, bool]]:
    out = []
    for earlier, later, likeness in run.near_copies(drawn.tone)[:PAIRS_SHOWN]:
        if {earlier, later} <= drawn.copied.keys():
            png, crisp = sheet_png(drawn.copied, [[earlier, later]])
            caption = f"{drawn.tone}, ids {int(earlier)} and {int(later)}, likeness {likeness:.3f}"
            out.append(
                (png, f"Two {drawn.tone} images side by side, ids {int(earlier)} and {int(later)}.", caption, crisp)
            )
    return out
