"""The report's pieces: plain values in, HTML and SVG out. Text is escaped here unless it is `Html` already."""

import base64
import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

# Nothing but inline styles and data: images may load, so the page can neither call out nor run a script.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_STYLE = """
:root { color-scheme: light dark; --bg: #fff; --ink: #1a1e23; --soft: #58616b; --line: #dde1e5; --guided: #0a6c93;
  --unguided: #69727c; --teacher: #a65100; --rest: #aeb6be; --faint: #dfe3e7; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171a; --ink: #e7eaed; --soft: #a5aeb8; --line: #333a41;
  --guided: #57bde6; --unguided: #99a3ae; --teacher: #efa04c; --rest: #5d6771; --faint: #373e45; } }
@media print { :root { color-scheme: light; --bg: #fff; --ink: #000; --soft: #444; --line: #ccc; --guided: #0a6c93;
  --unguided: #69727c; --teacher: #a65100; --rest: #aeb6be; --faint: #dfe3e7; }
  html { font-size: 11px; } nav { display: none !important; }
  section:not(#balance, #provenance), .takeaway, .chart, .sheet, tr, dl > div { break-inside: avoid; }
  h2, .takeaway, caption { break-after: avoid; } .scroll { overflow: visible !important; } }
@page { margin: 14mm; }
* { box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 68rem; background: var(--bg); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1, h2, h3, p, dl, dd, figure, ol, ul { margin: 0; padding: 0; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { font-size: .84rem; font-weight: 600; color: var(--soft); letter-spacing: .02em; }
h3, figcaption, caption { font-size: .92rem; font-weight: 600; text-align: left; }
figcaption span, caption span, .note, header p { color: var(--soft); font-weight: 400; }
header p { margin-top: .35rem; max-width: 46rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin-top: 1.1rem; font-size: .88rem; }
a { color: var(--guided); text-underline-offset: .18em; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin-top: 1rem; font-size: .88rem; list-style: none; }
.key { white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: .7em; height: .7em; margin-right: .45em;
  border-radius: 2px; background: var(--tone); }
section { margin-top: 2.4rem; padding-top: 1.3rem; border-top: 1px solid var(--line); }
.takeaway { margin: .25rem 0 1.2rem; max-width: 46rem; font-size: 1.2rem; line-height: 1.4; text-wrap: pretty;
  overflow-wrap: anywhere; }
.note { margin-top: .9rem; max-width: 46rem; font-size: .9rem; overflow-wrap: anywhere; }
.guided { --tone: var(--guided); } .unguided { --tone: var(--unguided); } .teacher { --tone: var(--teacher); }
.rest { --tone: var(--rest); } .faint { --tone: var(--faint); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(45%, 11.5rem), 1fr)); gap: 1.1rem 1.5rem; }
dt { font-size: .88rem; color: var(--soft); }
dd { font-size: 1.35rem; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; }
dd small { font-size: .62em; font-weight: 500; margin-left: .2em; }
dd.aside { font-size: .84rem; font-weight: 400; color: var(--soft); line-height: 1.4; }
dl.hero { margin-bottom: 1.6rem; } dl.hero dd:not(.aside) { font-size: clamp(2.1rem, 7vw, 2.7rem); line-height: 1.15;
  letter-spacing: -.025em; color: var(--tone, var(--ink)); } dl.hero small { font-size: .45em; letter-spacing: 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1.8rem 2rem; }
.grid.wide { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
section > .grid + .grid, section > .scroll + .scroll, section > .scroll + .grid,
section > .grid + .scroll { margin-top: 1.8rem; }
.chart { min-width: 0; max-width: 28rem; } .chart svg { display: block; width: 100%; height: auto; margin-top: .4rem; }
svg text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.chart svg { overflow: visible; } svg text.tone { fill: var(--tone); font-weight: 600; }
.axis { stroke: var(--line); stroke-width: 1; } .line { fill: none; stroke: var(--tone); stroke-width: 2;
  stroke-linejoin: round; } .band { fill: var(--tone); opacity: .16; } .fill { fill: var(--tone); }
.dot { fill: var(--tone); stroke: var(--bg); stroke-width: 1.5; }
.sheet { min-width: 0; } .sheet > div { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: .6rem;
  margin-top: .5rem; } .sheet img { display: block; width: 100%; height: auto; }
.sheet img.crisp { image-rendering: pixelated; }
.sheet ol { display: grid; grid-auto-rows: minmax(0, 1fr); list-style: none; font-size: .8rem; line-height: 1.1;
  grid-template-columns: minmax(0, 1fr); color: var(--soft); max-width: 6.5rem; }
.sheet li { display: flex; align-items: center; min-height: 0; }
.sheet li span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.1rem 1.5rem; margin-top: 1.1rem; }
.pictures figure { width: 10rem; border-left: .35rem solid var(--tone); padding-left: .6rem; }
.pictures img { display: block; width: 100%; height: auto; } .pictures img.crisp { image-rendering: pixelated; }
.pictures figcaption { margin-top: .3rem; font-size: .84rem; line-height: 1.35; }
.swatch { border-left: .35rem solid var(--tone); padding-left: .5rem; }
.scroll { overflow-x: auto; min-width: 0; } table { border-collapse: collapse; width: 100%; font-size: .86rem; }
caption { padding-bottom: .5rem; } th { font-weight: 500; text-align: right; color: var(--soft); }
td { text-align: right; font-variant-numeric: tabular-nums; } th[scope=row] { text-align: left; }
.plain th, .plain td { padding: .22rem 0 .22rem .9rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
.plain th:first-child { padding-left: 0; text-align: left; }
.plain thead th { white-space: normal; vertical-align: bottom; } .plain thead th:nth-child(2) { text-align: left; }
.plain td.wide { width: 60%; min-width: 7rem; }
.plain th[scope=row] { max-width: 11rem; overflow: hidden; text-overflow: ellipsis; color: var(--ink); }
.plain svg { display: block; overflow: visible; } .facts { table-layout: fixed; } .facts th, .facts td {
  padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: anywhere; } .facts th[scope=row] { width: 38%; } .facts td { white-space: pre-wrap; }
.heat { width: auto; font-size: .8rem; } .heat td { min-width: 1.85rem; height: 1.75rem; padding: 0 .2rem;
  text-align: center; border: 1px solid var(--bg); background: color-mix(in srgb, var(--tone) var(--heat), var(--bg)); }
.heat td.zero { color: var(--soft); } .heat td.sum { background: none; padding-left: .5rem; white-space: nowrap; }
.heat th { padding: 0 .4rem 0 0; max-width: 7.5rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.heat thead th { writing-mode: vertical-rl; transform: rotate(180deg); padding: .35rem 0 0; max-height: 7rem;
  text-align: left; margin: auto; } .heat thead th:first-child { writing-mode: initial; transform: none; }
.heat thead th:first-child { white-space: normal; width: 3.4rem; } .heat tbody th { text-align: right !important; }
@media (max-width: 30rem) { .plain th, .plain td { padding-left: .5rem; } .plain td.wide { min-width: 4.2rem; }
  .plain .key::before { margin-right: .25em; }
  .heat { font-size: .75rem; } .heat td { min-width: 1.5rem; padding: 0; } }
code { font: .92em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: .9rem 0 0; padding: .7rem .9rem; border: 1px solid var(--line); border-radius: 4px; overflow-x: auto; }
:focus-visible { outline: 2px solid var(--guided); outline-offset: 3px; }
"""


class Html(str):
    """Markup that needs no escaping any more."""

    __slots__ = ()


def esc(text: object) -> Html:
    """Any value as text that is safe between tags and inside quotes; `Html` passes as it is."""
    return text if isinstance(text, Html) else Html(html.escape(str(text), quote=True))


def join(parts: Iterable[object]) -> Html:
    """Parts one after the other, each escaped if need be."""
    return Html("".join(esc(part) for part in parts))


def wrap(tag: str, content: object, attributes: str = "") -> Html:
    """An element around content; `attributes` is markup."""
    return Html(f"<{tag}{' ' + attributes if attributes else ''}>{esc(content)}</{tag}>")


def number(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, with thousands separators and a true minus sign."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    text = f"{value:.1e}" if abs(value) < 1e-4 else f"{value:,.{max(places, 0)}f}"
    if "." in text and "e" not in text:
        text = text.rstrip("0").rstrip(".")
    return text.replace("-", "−")


def percent(value: float) -> str:
    """Percent with one digit."""
    return f"{value:.1f}\N{NO-BREAK SPACE}%"


def points(value: float) -> str:
    """A difference of percentages, with its sign."""
    return f"{value:+.1f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds in the unit a reader would choose."""
    if seconds < 1:
        return f"{number(seconds * 1e3)} ms"
    if seconds < 60:
        return f"{number(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def table(caption: object, head: Sequence[object], rows: Iterable[Sequence[object]], kind: str = "plain") -> Html:
    """A table whose first column heads its rows; `Html` cells that hold a drawing get the room that is left."""
    top = join(wrap("th", cell, 'scope="col"') for cell in head)
    lines = []
    for first, *rest in rows:
        cells = [wrap("td", c, 'class="wide"' if str(c).startswith("<svg") else "") for c in rest]
        lines.append(wrap("tr", join([wrap("th", first, f'scope="row" title="{_plain(first)}"'), *cells])))
    inner = join([wrap("caption", caption), wrap("thead", wrap("tr", top)), wrap("tbody", join(lines))])
    return _scroll(wrap("table", inner, f'class="{kind}"'), caption)


def heat_table(caption: object, names: Sequence[str], counts: Sequence[Sequence[int]], tone: str, ends: bool) -> Html:
    """A confusion matrix: rows true, columns predicted, tinted by the share of the row.

    ends: the last column of `counts` is what fell outside the classes shown.
    """
    heads = [*names, *(["others"] if ends else []), "right"]
    rows = []
    for i, (name, row) in enumerate(zip(names, counts, strict=True)):
        total = sum(row)
        cells = [_heat_cell(n, total) for n in row]
        right = f"{100 * row[i] / total:.1f}\N{NO-BREAK SPACE}%" if total else "–"
        rows.append(wrap("tr", join([wrap("th", name, f'scope="row" title="{esc(name)}"'), *cells, _sum_cell(right)])))
    top = join(wrap("th", h, f'scope="col" title="{esc(h)}"') for h in ["true ↓ read →", *heads])
    inner = join([wrap("caption", caption), wrap("thead", wrap("tr", top)), wrap("tbody", join(rows))])
    return _scroll(wrap("table", inner, f'class="heat {tone}"'), caption)


def _heat_cell(count: int, total: int) -> Html:
    if not count:
        return Html('<td class="zero" style="--heat:3%">·</td>')
    return Html(f'<td style="--heat:{8 + 42 * math.sqrt(count / total):.0f}%">{count:,}</td>')


def _sum_cell(text: str) -> Html:
    return wrap("td", text, 'class="sum"')


def _scroll(content: Html, caption: object) -> Html:
    return wrap("div", content, f'class="scroll" tabindex="0" role="region" aria-label="{_plain(caption)}"')


def _plain(text: object) -> Html:
    return esc("table") if isinstance(text, Html) else esc(text)


@dataclass(frozen=True)
class Figure:
    """One big number: what it is, its value and unit, a remark below, and whose colour it wears."""

    label: str
    value: str
    unit: str = ""
    aside: str = ""
    tone: str = ""


def figures(items: Sequence[Figure], hero: bool = False) -> Html:
    """Big numbers in a row."""
    cells = []
    for item in items:
        value = wrap("dd", join([item.value, wrap("small", item.unit) if item.unit else ""]))
        aside = wrap("dd", item.aside, 'class="aside"') if item.aside else ""
        cells.append(wrap("div", join([wrap("dt", item.label), value, aside]), f'class="{item.tone}"'))
    return wrap("dl", join(cells), 'class="hero"' if hero else "")


def sheet(
    names: Sequence[str], png: bytes, alt: str, tone: str, columns: int, crisp: bool, title: str = ""
) -> Html:
    """A contact sheet with its rows named; crisp: enlarge pixel by pixel; title: the tone's name by default."""
    labels = wrap("ol", join(wrap("li", wrap("span", n, f'title="{esc(n)}"')) for n in names), 'aria-hidden="true"')
    data = base64.b64encode(png).decode()
    kind = "crisp" if crisp else "photo"
    size = f'style="max-width:{5.5 * columns:g}rem"'
    image = Html(f'<img class="{kind}" {size} alt="{esc(alt)}" src="data:image/png;base64,{data}">')
    caption = wrap("figcaption", title or tone.capitalize(), f'class="swatch {tone}"')
    return wrap("figure", join([caption, wrap("div", join([labels, image]))]), 'class="sheet"')


def pictures(items: Iterable[tuple[bytes, str, str, bool]], tone: str) -> Html:
    """Small pictures with captions, side by side: (PNG, alternative text, caption, crisp) each."""
    figures = []
    for png, alt, caption, crisp in items:
        data, kind = base64.b64encode(png).decode(), "crisp" if crisp else "photo"
        image = Html(f'<img class="{kind}" alt="{esc(alt)}" src="data:image/png;base64,{data}">')
        figures.append(wrap("figure", join([image, wrap("figcaption", wrap("span", caption))]), f'class="{tone}"'))
    return wrap("div", join(figures), 'class="pictures"')


def grid(items: Iterable[Html], wide: bool = False) -> Html:
    """Figures side by side where there is room."""
    return wrap("div", join(items), f'class="grid{" wide" if wide else ""}"')


def note(text: object) -> Html:
    """A remark in small print."""
    return wrap("p", text, 'class="note"')


def key(tone: str, text: object) -> Html:
    """A text behind a swatch of its colour."""
    return wrap("span", text, f'class="key {tone}"')


def legend(items: Iterable[tuple[str, str]]) -> Html:
    """(tone, text) pairs with a colour swatch each."""
    return wrap("ul", join(wrap("li", key(tone, text)) for tone, text in items), 'class="legend"')


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, its name, what the data say in one sentence, and the evidence."""

    id: str
    title: str
    takeaway: str
    body: Sequence[Html] = field(default=())


def page(title: str, lead: str, colours: Html, sections: Sequence[Section]) -> str:
    """The whole document."""
    links = join(wrap("a", s.title, f'href="#{esc(s.id)}"') for s in sections)
    nav = wrap("nav", links, 'aria-label="Sections"')
    header = wrap("header", join([wrap("h1", title), wrap("p", lead), colours, nav]))
    body = []
    for s in sections:
        head = join([wrap("h2", s.title, f'id="{esc(s.id)}-title"'), wrap("p", s.takeaway, 'class="takeaway"')])
        names = f'id="{esc(s.id)}" aria-labelledby="{esc(s.id)}-title"'
        body.append(wrap("section", join([head, *s.body]), names))
    meta = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    meta += '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
    meta += f'<meta name="generator" content="synthkd"><title>{esc(title)}</title><style>{_STYLE}</style>'
    main = wrap("main", join(body))
    return f'<!doctype html>\n<html lang="en"><head>{meta}</head><body>{header}{main}</body></html>\n'
