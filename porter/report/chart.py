"""Where the marks of the chart of drift against context length go; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from porter.report.axis import Axis
from porter.report.words import value

WIDTH, HEIGHT = 720, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 48


@dataclass(frozen=True)
class Mark:
    """A point in pixels: centre, ends of its interval; the context length under it, the value beside it."""

    x: float
    y: float
    low: float
    high: float
    label: str
    text: str
    infinite: bool


@dataclass(frozen=True)
class Chart:
    """Marks in reading order, `line` through the finite ones, ticks (pixel, text) of the upright axis."""

    marks: tuple[Mark, ...]
    line: str
    ticks: tuple[tuple[float, str], ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


def chart(context: Sequence[Mapping[str, object]], measure: str = "kl_mean") -> Chart | None:
    """Mean KL against context length, lengths evenly spaced, from 0 up; None with fewer than two lengths.

    An infinite value is a mark at the top, labelled as such; the scale is that of the finite ones.
    """
    found = [r for r in context if r.get(measure) is not None]
    rows = [(str(r["tokens"]), float(r[measure]), _width(r)) for r in found]  # type: ignore[arg-type]
    if len(rows) < 2:
        return None
    y = Axis.to(max((v + w for _, v, w in rows if math.isfinite(v)), default=1.0), HEIGHT - BOTTOM, TOP)
    gap = (WIDTH - LEFT - RIGHT) / len(rows)
    marks = tuple(
        Mark(
            x=round(LEFT + gap * (i + 0.5), 1),
            y=y(v),
            low=y(v - w),
            high=y(v + w),
            label=f"≤ {n}",
            text=value(v),
            infinite=not math.isfinite(v),
        )
        for i, (n, v, w) in enumerate(rows)
    )
    line = " ".join(f"{m.x},{m.y}" for m in marks if not m.infinite)
    return Chart(marks, line, tuple((y(v), f"{v:.4g}") for v in y.values))


def _width(row: Mapping[str, object]) -> float:
    """Half width of the interval, 0 where none is known."""
    found = row.get("kl_ci95")
    width = 0.0 if found is None else float(found)  # type: ignore[arg-type]
    return width if math.isfinite(width) else 0.0
