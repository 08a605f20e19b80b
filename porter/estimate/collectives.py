"""Collectives: how long chips take to sum or gather what each of them has.

What was measured goes first: of the ways that a link tells, the fastest. Straight lines join measured points,
and the last goes on. For another number of chips the part beyond the first point grows as what a ring sends:
2 (n-1) / n of the bytes for an all-reduce, (n-1) / n for the others. Without measurements:

- mesh, switch: every chip sends to every other at once: 1 or 2 latencies, a ring's bytes over all ports;
- ring, torus: n - 1 hops for each half, over the two ports of a ring of neighbours (one where n is 2).

Sources: the ring and its cost, Patarasuk and Yuan 2009; rings of neighbours in a torus, the scaling book.
"""

from __future__ import annotations

from itertools import pairwise

from porter.errors import TargetError
from porter.estimate.timing import Time
from porter.estimate.work import Work
from porter.target import TargetSpec
from porter.target.links import Collective, Link


def collective(work: Work, spec: TargetSpec, chips: int) -> Time:
    """The time of an all-reduce or all-gather of `work.bytes` on `chips` chips.

    Raises TargetError PORT-0334 when no link joins so many.
    """
    link = joining(spec, chips)
    ways = link.collectives.get(work.kernel) or {}
    halves = 2 if work.kernel == "all-reduce" else 1
    if not ways and halves == 2 and (told := link.collectives.get("all-gather")):
        parts = [_measured(way, link, work.bytes, chips, 1) for way in nearest(told, chips)]
        fixed, seconds = min(((2 * f, 2 * t) for f, t in parts), key=lambda found: found[1])
    elif ways:
        found = [_measured(way, link, work.bytes, chips, halves) for way in nearest(ways, chips)]
        fixed, seconds = min(found, key=lambda found: found[1])
    else:
        fixed, seconds = _formula(link, work.bytes, chips, halves)
    return Time(seconds, links=seconds - fixed, fixed=fixed)


def joining(spec: TargetSpec, chips: int) -> Link:
    """The first link that joins so many chips."""
    for link in spec.links.values():
        if link.topology not in ("host", "network") and link.chips and link.chips.value >= chips:
            return link
    reach = max((int(x.chips.value) for x in spec.links.values() if x.chips), default=1)
    what = f"no link of {spec.name} joins {chips} chips, the largest joins {reach}"
    raise TargetError(
        "PORT-0334", what, where="--tp", hint="split it over fewer chips, or into narrower weights"
    )


def nearest(ways: dict[str, Collective], chips: int) -> list[Collective]:
    """The ways that were measured on as many chips, else on the next more, else on the next fewer."""

    def distance(way: Collective) -> tuple[bool, int]:
        told = int(way.chips.value) if way.chips else chips
        return told < chips, abs(told - chips)

    best = min(distance(way) for way in ways.values())
    return [way for way in ways.values() if distance(way) == best]


def _measured(way: Collective, link: Link, size: float, chips: int, halves: int) -> tuple[float, float]:
    """(fixed, all) seconds of one measured way."""
    wire = halves * (chips - 1) / chips
    if way.points:
        points = way.points.value
        told = int(way.chips.value) if way.chips else chips
        fixed = points[0][1]
        return fixed, fixed + (_line(points, size) - fixed) * wire / (halves * (told - 1) / told)
    fixed = float(way.latency.value) if way.latency else _hops(link, chips, halves)
    rate = float(way.bandwidth.value) if way.bandwidth else float(link.bandwidth.value)
    return fixed, fixed + size * wire / rate


def _line(points: tuple[tuple[int, float], ...], size: float) -> float:
    """Seconds at a size, on the lines between measured points; below the first as there."""
    if size <= points[0][0]:
        return points[0][1]
    lines = list(pairwise(points))
    (a, s), (b, t) = next((line for line in lines if size <= line[1][0]), lines[-1])
    return s + (t - s) * (size - a) / (b - a)


def _hops(link: Link, chips: int, halves: int) -> float:
    latency = float(link.latency.value) if link.latency else 0.0
    direct = link.topology in ("mesh", "switch")
    return latency * halves * (1 if direct else chips - 1)


def _formula(link: Link, size: float, chips: int, halves: int) -> tuple[float, float]:
    rate = float(link.bandwidth.value)
    if link.topology == "mesh" and link.chips:
        rate *= (chips - 1) / (int(link.chips.value) - 1)  # of the ports, those to chips that take part
    elif link.topology.startswith(("ring", "torus")) and link.ports:
        rate *= min(2 if chips > 2 else 1, int(link.ports.value)) / int(link.ports.value)
    fixed = _hops(link, chips, halves)
    return fixed, fixed + size * halves * (chips - 1) / chips / rate
