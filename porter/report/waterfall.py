"""The bars of the attribution: each step from what there was before it to what there is after it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from porter.drift.attribution import Attribution
from porter.report.axis import Axis
from porter.report.words import Attributed, attributed

WIDTH = 1000  # of a bar's own picture, which is stretched to its cell


@dataclass(frozen=True)
class Bar:
    """A row, and its bar: where the step's own part lies, and where its interaction leads to from there
    (pixels, left and width); `back` where that is less."""

    row: Attributed
    own: tuple[float, float]
    other: tuple[float, float]
    back: bool


@dataclass(frozen=True)
class Waterfall:
    """The bars, and the axis above them: (pixel, text)."""

    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    width: int = WIDTH


def waterfall(found: Attribution) -> Waterfall | None:
    """The bars of all parts and the whole; None where there are none, or where one is no number."""
    rows = attributed(found)
    chain = found.chain
    levels = [found.amount(p.after) for p in chain]
    own = [found.amount(p.own) for p in chain]
    if not chain or not all(map(math.isfinite, [*levels, *own])):
        return None
    before = [0.0, *levels[:-1]]
    x = Axis.to(max(*levels, *(b + o for b, o in zip(before, own, strict=True))), 0, WIDTH)
    bars = [Bar(r, (0, 0), (0, 0), False) for r in rows[: len(rows) - 1 - len(chain)]]  # of the export
    for row, start, amount, end in zip(rows[-1 - len(chain) :], before, own, levels, strict=False):
        bars.append(
            Bar(row, _span(x, start, start + amount), _span(x, start + amount, end), end < start + amount)
        )
    bars.append(Bar(rows[-1], _span(x, 0, levels[-1]), (0, 0), False))
    return Waterfall(tuple(bars), tuple((x(v), f"{v:.4g}") for v in x.values))


def _span(x: Axis, start: float, end: float) -> tuple[float, float]:
    low, high = sorted((x(start), x(end)))
    return low, round(high - low, 1)
