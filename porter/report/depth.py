"""Where the marks of the chart of error against depth go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from porter.drift.depth import Level
from porter.report.axis import Axis
from porter.report.words import clean, value

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 48
LABELS = 16  # layers that are numbered; of more, every second, third …


@dataclass(frozen=True)
class Mark:
    """A value in pixels; `label` is its layer's number, at the last value of a layer that is numbered."""

    x: float
    y: float
    text: str
    label: str


@dataclass(frozen=True)
class Depth:
    """The marks, the line through them, and the ticks (pixel, text)."""

    marks: tuple[Mark, ...]
    line: str
    ticks: tuple[tuple[float, str], ...]
    summary: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


def depth(levels: Sequence[Level]) -> Depth | None:
    """The chart of the finite levels; None with fewer than two."""
    found = [level for level in levels if math.isfinite(level.sqnr_db)]
    if len(found) < 2:
        return None
    y = Axis.to(max(max(level.sqnr_db for level in found), 1.0), HEIGHT - BOTTOM, TOP)
    gap = (WIDTH - LEFT - RIGHT) / len(found)
    every = -(-len({level.layer for level in found}) // LABELS)
    marks = []
    for i, level in enumerate(found):
        ends = i + 1 == len(found) or found[i + 1].layer != level.layer
        label = str(level.layer) if ends and level.layer % every == 0 else ""
        said = f"layer {level.layer}, {clean(level.name)}: {value(level.sqnr_db, 'sqnr_db')}"
        marks.append(Mark(round(LEFT + gap * (i + 0.5), 1), y(level.sqnr_db), said, label))
    ends = (value(level.sqnr_db, "sqnr_db") for level in (found[0], found[-1]))
    summary = "from {} after the first addition to {} after the last".format(*ends)
    line = " ".join(f"{m.x},{m.y}" for m in marks)
    return Depth(tuple(marks), line, tuple((y(v), f"{v:.4g}") for v in y.values), summary)
