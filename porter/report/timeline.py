"""The timeline of a step on the target: what its kernels take, one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from porter.report.axis import Axis
from porter.report.words import amount, clean

WIDTH = 720
LEFT, RIGHT = 8, 8
NAMED = 8  # kernels that are named beside the picture


@dataclass(frozen=True)
class Segment:
    """A kernel's calls in pixels; `shade` 0 to 3 says which bound, in order of their time."""

    x: float
    width: float
    shade: int
    text: str


@dataclass(frozen=True)
class Named:
    """A kernel that takes long, as text."""

    name: str
    calls: str
    time: str
    share: str
    bound: str
    shade: int


@dataclass(frozen=True)
class Timeline:
    """One step: its segments, the axis, what binds (shade, words, share), and the longest kernels."""

    title: str
    total: str
    kind: str
    segments: tuple[Segment, ...]
    ticks: tuple[tuple[float, str], ...]
    bounds: tuple[tuple[int, str, str], ...]
    longest: tuple[Named, ...]
    width: int = WIDTH


def timelines(estimate: Mapping[str, Any]) -> Iterator[Timeline]:
    """Those of prefill and decode, where there are times of kernels (see `kernel_time` in the schema)."""
    for name in ("prefill", "decode"):
        step = estimate.get(name)
        if isinstance(step, Mapping) and step.get("kernels"):
            yield _timeline(name, step)


def _timeline(name: str, step: Mapping[str, Any]) -> Timeline:
    calls = [(k, float(k["seconds"]) * int(k["calls"])) for k in step["kernels"]]
    total = math.fsum(t for _, t in calls)
    by_bound: dict[str, float] = {}
    for kernel, seconds in calls:
        by_bound[kernel["bound_by"]] = by_bound.get(kernel["bound_by"], 0.0) + seconds
    order = sorted(by_bound, key=lambda bound: -by_bound[bound])
    shades = {bound: min(i, 3) for i, bound in enumerate(order)}
    x = Axis(total or 1.0, Axis.to(total, 0, 1).step, LEFT, WIDTH - RIGHT)
    segments, at = [], 0.0
    for kernel, seconds in calls:
        said = f"{clean(kernel['name'])}, {kernel['calls']} times: {amount(seconds, 's')}"
        left, right = x(at), x(at + seconds)
        segments.append(Segment(left, round(right - left, 1), shades[kernel["bound_by"]], said))
        at += seconds
    kind = clean(step.get("kind", "simulated"))
    size = f"of {step.get('tokens')}" if name == "prefill" else f"step at {step.get('context')}"
    title = f"{name} {size} tokens"
    return Timeline(
        title,
        amount(total, "s"),
        kind,
        tuple(segments),
        tuple((x(v), amount(v, "s")) for v in Axis.to(total, 0, 1).values if v <= total),
        tuple((shades[b], clean(b), _share(by_bound[b], total)) for b in order),
        tuple(_longest(calls, total, shades)),
    )


def _longest(
    calls: list[tuple[Mapping[str, Any], float]], total: float, shades: Mapping[str, int]
) -> Iterator[Named]:
    spent: dict[tuple[str, str], list[float]] = {}
    for kernel, seconds in calls:
        entry = spent.setdefault((kernel["name"], kernel["bound_by"]), [0.0, 0.0])
        entry[0] += seconds
        entry[1] += int(kernel["calls"])
    for (name, bound), (seconds, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:NAMED]:
        share = _share(seconds, total)
        yield Named(clean(name), f"{count:.0f}", amount(seconds, "s"), share, clean(bound), shades[bound])


def _share(seconds: float, total: float) -> str:
    return f"{100 * seconds / total:.1f} %" if total else "–"
