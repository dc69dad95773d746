"""The report's drawings: scales, line charts, and bars with dots, as inline SVG."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from synthkd.dfkd.report_html import Html, esc, join, number, wrap


@dataclass(frozen=True)
class Axis:
    """A scale from low to high with a label that carries the unit."""

    label: str
    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, label: str, values: Iterable[float], *, log: bool = False) -> "Axis":
        """An axis around values: rounded outwards to its ticks, or exact where logarithmic."""
        held = list(values) or [0.0, 1.0]
        low, high = min(held), max(held)
        if log and low > 0:
            return cls(label, low, high, True)
        if low == high:
            low, high = min(low, 0.0), max(high, 0.0) or 1.0
        step = _nice_step(high - low)
        return cls(label, math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)

    def share(self, value: float) -> float:
        """Where a value lies, 0 at low and 1 at high."""
        low, high, v = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return (v - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[float]:
        """Round values on the axis."""
        if not self.log or self.high < 5 * self.low:
            step = _nice_step(self.high - self.low)
            first = math.ceil(self.low / step - 1e-9)
            return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        digits = (1, 2, 5) if self.high < 200 * self.low else (1,)
        return [d * 10.0**k for k in decades for d in digits if self.low <= d * 10.0**k <= self.high]


def _nice_step(span: float, count: int = 4) -> float:
    raw = (span or 1.0) / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if raw <= m * power * (1 + 1e-9))


@dataclass(frozen=True)
class Curve:
    """A line with its direct label; low and high bound an optional band, `stepped` draws a histogram's outline.

    shade: how much of its tone the line has, from 0 to 1.
    """

    label: str
    tone: str
    xs: Sequence[float]
    ys: Sequence[float]
    low: Sequence[float] = field(default=())
    high: Sequence[float] = field(default=())
    stepped: bool = False
    shade: float = 1.0


_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 360, 214, 44, 10, 42


def line_chart(title: str, unit: str, curves: Sequence[Curve], x: Axis, y: Axis, alt: str) -> Html:
    """A small chart; every curve is labelled at its right end, the y axis by `unit` beside the title."""
    right = _WIDTH - 8 - max((7.7 * len(c.label) for c in curves), default=0)
    floor = _HEIGHT - _BOTTOM

    def at(u: float, v: float) -> tuple[float, float]:
        return _LEFT + x.share(u) * (right - _LEFT), floor - y.share(v) * (floor - _TOP)

    parts = [_axes(x, y, right)]
    ends = []
    for curve in curves:
        line = [at(u, v) for u, v in zip(curve.xs, curve.ys, strict=True)]
        if curve.low:
            edge = [*zip(curve.xs, curve.high, strict=True), *reversed([*zip(curve.xs, curve.low, strict=True)])]
            parts.append(f'<polygon class="band {curve.tone}" points="{_points([at(u, v) for u, v in edge])}"/>')
        if curve.stepped:
            line = [p for a, b in itertools.pairwise(line) for p in (a, (b[0], a[1]))]
            base = f"{line[0][0]:.1f},{floor} {_points(line)} {line[-1][0]:.1f},{floor}"
            parts.append(f'<polygon class="band {curve.tone}" points="{base}"/>')
        parts.append(f'<polyline class="line {curve.tone}"{_shaded(curve)} points="{_points(line)}"/>')
        ends.append((line[-1][1], curve))
    parts += _end_labels(ends, right)
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{esc(alt)}">{"".join(parts)}</svg>'
    caption = wrap("figcaption", join([title, " ", wrap("span", unit)]))
    return wrap("figure", join([caption, Html(svg)]), 'class="chart"')


@dataclass(frozen=True)
class Dot:
    """A labelled point with the reach of its y."""

    label: str
    tone: str
    x: float
    y: float
    low: float
    high: float


def dot_chart(title: str, unit: str, dots: Sequence[Dot], x: Axis, y: Axis, alt: str) -> Html:
    """Points with a line for their reach, each labelled beside it."""
    right, floor = _WIDTH - 8 - max((7.7 * len(d.label) for d in dots), default=0), _HEIGHT - _BOTTOM
    parts = [_axes(x, y, right)]
    ordered = sorted(dots, key=lambda d: -d.y)
    heights = _apart([floor - y.share(d.y) * (floor - _TOP) for d in ordered])
    for dot, beside in zip(ordered, heights, strict=True):
        u = _LEFT + x.share(dot.x) * (right - _LEFT)
        low, at, high = (floor - y.share(v) * (floor - _TOP) for v in (dot.low, dot.y, dot.high))
        parts.append(f'<line class="line {dot.tone}" x1="{u:.1f}" x2="{u:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        parts.append(f'<circle class="dot {dot.tone}" cx="{u:.1f}" cy="{at:.1f}" r="5"/>')
        parts.append(f'<text class="tone {dot.tone}" x="{u + 8:.1f}" y="{beside + 4:.1f}">{esc(dot.label)}</text>')
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{esc(alt)}">{"".join(parts)}</svg>'
    caption = wrap("figcaption", join([title, " ", wrap("span", unit)]))
    return wrap("figure", join([caption, Html(svg)]), 'class="chart"')


def _shaded(curve: Curve) -> str:
    mix = f"color-mix(in srgb, var(--{curve.tone}) {100 * curve.shade:.0f}%, var(--bg))"
    return f' style="--tone: {mix}"' if curve.shade < 1 else ""


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{u:.1f},{v:.1f}" for u, v in points)


def _axes(x: Axis, y: Axis, right: float) -> str:
    floor, parts = _HEIGHT - _BOTTOM, []
    for tick in y.ticks():
        v = floor - y.share(tick) * (floor - _TOP)
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right:.1f}" y1="{v:.1f}" y2="{v:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{v + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x.ticks():
        u = _LEFT + x.share(tick) * (right - _LEFT)
        parts.append(f'<text x="{u:.1f}" y="{floor + 16}" text-anchor="middle">{number(tick)}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - 5}" text-anchor="middle">{esc(x.label)}</text>')
    return "".join(parts)


def _end_labels(ends: Sequence[tuple[float, Curve]], right: float) -> list[str]:
    """Labels at the curves' ends, moved apart where they would touch."""
    ordered = sorted(ends, key=lambda end: end[0])
    parts = []
    for v, (_, curve) in zip(_apart([v for v, _ in ordered]), ordered, strict=True):
        where = f'x="{right + 6:.1f}" y="{v + 4:.1f}"'
        parts.append(f'<text class="tone {curve.tone}" {where}>{esc(curve.label)}</text>')
    return parts


def _apart(heights: Sequence[float], gap: float = 13.0) -> list[float]:
    """Ascending heights at least `gap` apart: pushed down, then up again from the floor of the chart."""
    down: list[float] = []
    for v in heights:
        down.append(max(v, down[-1] + gap) if down else v)
    limit, up = float(_HEIGHT - _BOTTOM), list[float]()
    for v in reversed(down):
        up.append(min(v, up[-1] - gap if up else limit))
    return up[::-1]


def track(parts: Sequence[tuple[float, str]], marks: Sequence[tuple[float, str]] = (), height: int = 16) -> Html:
    """A horizontal bar as wide as its cell: (share, tone) end to end, and (position, tone) dots on it."""
    shapes, x = [], 0.0
    for share, tone in parts:
        share = min(max(share, 0.0), 1.0 - x)
        size = f'x="{100 * x:.2f}%" width="{100 * share:.2f}%" y="2" height="{height - 4}"'
        shapes.append(f'<rect class="fill {tone}" {size}/>')
        x += share
    shapes += [f'<circle class="dot {t}" cx="{100 * at:.2f}%" cy="{height / 2}" r="5"/>' for at, t in marks]
    return Html(f'<svg width="100%" height="{height}" aria-hidden="true">{"".join(shapes)}</svg>')
