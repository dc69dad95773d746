"""The report's section on guidance: every term of the loss over the denoising steps, round by round."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from synthkd.dfkd import report_charts as c
from synthkd.dfkd import report_html as h
from synthkd.dfkd.decoding import said
from synthkd.dfkd.report_data import DrawnSet, Run
from synthkd.engine.index import decoder_note

ROUNDS_SHOWN = 6
_ARROW = "\N{NO-BREAK SPACE}→\N{NO-BREAK SPACE}"


class Term(NamedTuple):
    """What a term of the guidance loss is called within a sentence, and what a low value of it means."""

    title: str
    hint: str


TERMS = {
    "bn": Term("BatchNorm distance", "lower: statistics nearer to the teacher's"),
    "ce": Term("cross-entropy", "lower: the teacher is surer of the class"),
    "adv": Term("adversarial term (disagreement with the student)", "lower: they disagree more"),
    "entropy": Term("entropy term", "lower is better"),
    "head": Term("classifier-head term", "lower is better"),
    "patch": Term("patch term", "lower: more patches pass for real"),
    "moments": Term("feature-moment distance", "lower: features nearer to the teacher's"),
}

Values = NDArray[np.float64]


def term(name: str) -> Term:
    """Title and hint of any term; an unknown one goes by its own name."""
    return TERMS.get(name, Term(name, "lower is better"))


def rounds_of(drawn: DrawnSet) -> list[int]:
    """The round in which each of a set's groups was drawn."""
    return [drawn.recipe.round_of(row.group) for row in drawn.rows]


def curves(drawn: DrawnSet) -> dict[str, dict[int, Values]]:
    """Term -> round -> values [groups, steps] of the groups that hold the term, its curve whole and finite."""
    out: dict[str, dict[int, Values]] = {}
    rounds = rounds_of(drawn)
    for name in _in_order({name for row in drawn.rows for name in row.curves}):
        for number in sorted(set(rounds)):
            rows = [row for row, r in zip(drawn.rows, rounds, strict=True) if r == number]
            values = _whole([row.curves.get(name) or [] for row in rows])
            if values.size:
                out.setdefault(name, {})[number] = values
    return out


def _in_order(names: set[str]) -> list[str]:
    known = list(TERMS)
    return sorted(names, key=lambda n: (known.index(n) if n in known else len(known), n))


def _whole(held: Sequence[Sequence[float]]) -> Values:
    """The finite curves of the commonest length, [groups, steps]."""
    finite = [curve for curve in held if curve and all(map(math.isfinite, curve))]
    length = Counter(map(len, finite)).most_common(1)[0][0] if finite else 0
    return np.asarray([curve for curve in finite if len(curve) == length], dtype=np.float64)


def guidance(run: Run) -> h.Section:
    """Each term of the guidance loss over the denoising steps, over all groups of a round."""
    terms = curves(run.main) if run.main else {}
    if run.main is None or not terms:
        return h.Section("guidance", "Guidance", "No guidance term was recorded while these images were drawn.")
    rounds = max(rounds_of(run.main)) + 1
    charts = [_chart(run.main, name, by_round, rounds) for name, by_round in terms.items()]
    told = ", ".join(f"{term(name).title} {_ends(by_round[max(by_round)])}" for name, by_round in terms.items())
    count = max(values.shape[1] for by_round in terms.values() for values in by_round.values())
    where = f"the last of {rounds:,} rounds" if rounds > 1 else "all groups"
    sentence = f"Over {count} guided steps the mean over {where} moves: {told}."
    if "chosen" in (note := decoder_note(run.main.manifest)):
        sentence += f" Here {said(note)}."
    return h.Section("guidance", "Guidance", sentence, [h.grid(charts), h.note(_remark(terms, rounds))])


def _ends(values: Values) -> str:
    first, last = values.mean(axis=0)[[0, -1]].tolist()
    return f"{h.number(first, 2)}{_ARROW}{h.number(last, 2)}"


def _chart(drawn: DrawnSet, name: str, by_round: dict[int, Values], rounds: int) -> h.Html:
    """One term: a curve with its band, or one curve per round in ever fuller shade."""
    if rounds > 1:
        shown = _spread(sorted(by_round))
        lines = [_line(drawn, by_round[r], f"round {r + 1}", 0.35 + 0.65 * (r + 1) / rounds) for r in shown]
    else:
        lines = [_banded(drawn, by_round[0])]
    title = term(name).title
    alt = f"{title}: " + ", ".join(f"{line.label or 'mean'}: {_ends(np.asarray([line.ys]))}" for line in lines)
    drawn_steps = [x for line in lines for x in line.xs]
    x = c.Axis(f"denoising step, of {drawn.recipe.steps} (noise → image)", min(drawn_steps), max(drawn_steps))
    y = c.Axis.over("", [0.0, *(v for line in lines for v in (*line.ys, *line.low, *line.high))])
    return c.line_chart(title[0].upper() + title[1:], term(name).hint, lines, x, y, alt)


def _line(drawn: DrawnSet, values: Values, label: str, shade: float) -> c.Curve:
    return c.Curve(label, "guided", _steps(drawn, values.shape[1]), values.mean(axis=0).tolist(), shade=shade)


def _banded(drawn: DrawnSet, values: Values) -> c.Curve:
    mean, low, high = (f(values, axis=0).tolist() for f in (np.mean, np.min, np.max))
    return c.Curve(h.number(mean[-1], 2), "guided", _steps(drawn, len(mean)), mean, low, high)


def _steps(drawn: DrawnSet, count: int) -> list[int]:
    """The guided steps, from 1; plain positions where the recipe guides another number of them."""
    steps = drawn.recipe.steps
    guided = [i + 1 for i in range(steps) if drawn.recipe.guidance.active(i, steps)]
    return guided if len(guided) == count else list(range(1, count + 1))


def _spread(rounds: Sequence[int]) -> list[int]:
    """At most ROUNDS_SHOWN of them, first and last among them."""
    count = min(len(rounds), ROUNDS_SHOWN)
    return [rounds[i] for i in sorted(set(np.linspace(0, len(rounds) - 1, count).round().astype(int).tolist()))]


def _remark(terms: dict[str, dict[int, Values]], rounds: int) -> str:
    text = "Values are losses before weighting; guidance pushes their weighted sum down."
    groups = max(sum(map(len, by_round.values())) for by_round in terms.values())
    if rounds == 1:
        band = f"Line: mean over {groups:,} groups; band: lowest to highest."
        return f"{text} {band if groups > 1 else 'One group only: no band.'}"
    text += f" Lines: means over the groups of a round, the latest in the fullest colour ({groups:,} groups in all)."
    late = {name: min(by_round) for name, by_round in terms.items() if min(by_round) > 0}
    told = [f"{term(name).title} from round {first + 1} on" for name, first in late.items()]
    text += f" Recorded later than the rest: {', '.join(told)}." if told else ""
    shown = max(map(len, terms.values()))
    return text + (f" Shown: {ROUNDS_SHOWN} of {rounds:,} rounds." if shown > ROUNDS_SHOWN else "")
