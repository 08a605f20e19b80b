"""The picture of the planned memory: when each buffer of the workspace lives, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from porter.report.axis import Axis
from porter.report.words import amount, clean

WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 84, 16, 34, 48
MOST = 800  # buffers that are drawn, the largest first: more is a file of megabytes


@dataclass(frozen=True)
class Block:
    """A buffer in pixels, with its words."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Picture:
    """Blocks, ticks (pixel, text) of both axes, and the line of the lower bound; `left_out` small buffers."""

    blocks: tuple[Block, ...]
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]
    bound: tuple[float, str]
    launches: int
    summary: str
    left_out: int
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def picture(plan: Mapping[str, Any]) -> Picture | None:
    """The picture of a plan in its JSON form; None where there is no workspace."""
    places: Sequence[Mapping[str, int]] = plan["storages"]
    found = [b for b in plan["buffers"] if b["storage"] is not None and b["bytes"]]
    if not found or not plan["workspace_bytes"]:
        return None
    launches = len(plan["launches"])
    x = Axis(max(1, launches), Axis.to(launches, 0, 1).step, LEFT, WIDTH - RIGHT)
    y = Axis.to(plan["workspace_bytes"], HEIGHT - BOTTOM, TOP, binary=True)
    drawn = sorted(found, key=lambda b: -b["bytes"])[:MOST]
    blocks = []
    for b in sorted(drawn, key=lambda b: (b["first"], b["storage"])):
        start = places[b["storage"]]["offset"]
        low, high = y(start), y(start + b["bytes"])
        left, right = x(b["first"]), x(b["last"] + 1)
        said = f"{clean(b['name'])}: {amount(b['bytes'], 'bytes')} at {amount(start, 'bytes')}, "
        said += f"launches {b['first']} to {b['last']}"
        blocks.append(Block(left, high, round(right - left, 1), round(max(low - high, 0.5), 1), said))
    steps = [v for v in Axis.to(launches, 0, 1).values if v <= launches]
    bound, total = plan["lower_bound_bytes"], plan["workspace_bytes"]
    words = (
        f"{len(found)} buffers in {amount(total, 'bytes')}, of which {amount(bound, 'bytes')} live at once"
    )
    return Picture(
        tuple(blocks),
        tuple((x(v), f"{v:.0f}") for v in steps),
        tuple((y(v), amount(v, "bytes")) for v in y.values),
        (y(bound), f"{amount(bound, 'bytes')} live at once"),
        launches,
        words,
        len(found) - len(drawn),
    )
