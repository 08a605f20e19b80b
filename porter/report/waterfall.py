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
    """A row, and the pieces of its bar (kind, left and width in pixels): `part` is what stays of the step's
    own part, `undone` what does not, `met` what comes on top, `less` what there is less than before it."""

    row: Attributed
    pieces: tuple[tuple[str, float, float], ...]


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
    bars = [Bar(row, ()) for row in rows[: len(rows) - 1 - len(chain)]]  # of the export
    for row, start, amount, end in zip(rows[-1 - len(chain) : -1], before, own, levels, strict=True):
        reached = start + amount
        stays = max(start, min(reached, end))
        pieces = {"part": (start, stays), "undone": (stays, reached), "met": (reached, end)}
        pieces["less"] = end, start
        bars.append(Bar(row, tuple((kind, *_span(x, *ends)) for kind, ends in pieces.items())))
    bars.append(Bar(rows[-1], (("part", *_span(x, 0, levels[-1])),)))
    return Waterfall(tuple(bars), tuple((x(v), f"{v:.4g}") for v in x.values))


def _span(x: Axis, start: float, end: float) -> tuple[float, float]:
    return x(start), round(max(0.0, x(end) - x(start)), 1)
