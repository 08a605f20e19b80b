"""Judging: which sites are further off than their like.

A format's rounding is no fault: int4 weights leave about 20 dB wherever they stand. So a site is compared
with sites of the same operator and the same storage, by medians, which a few faults do not move:

- a linear layer whose weight can be weighed, by the error of its weight, by that of the worst group in it,
  and by how much of its noise that error leaves unexplained;
- what comes out of a cache, by that of the worst token in it, besides;
- any other site by its local SQNR at the worst step.

What is within FLOAT32 of the reference is float arithmetic in another order, and never stands out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from porter.drift.blame.measure import CAP, Measured
from porter.drift.blame.sites import Site
from porter.drift.blame.weighing import Weighed

# Rounding of float32 leaves 144 dB a number; sums, and functions that are computed otherwise, some 20 less.
FLOAT32 = 120.0
EXACT = 110.0  # where the like are above this, they hold nothing but float32
SPREAD = 5 * 1.4826  # medians of deviations: 5 standard deviations, were they normal
SLOT = "one token in its cache"
LIKE = 4  # with fewer of the same operator and storage, all of the same kind are its like


@dataclass(frozen=True)
class Margins:
    """How far below its like a site has to be, in dB, however little they differ among themselves."""

    weight: float = 4.0
    group: float = 8.0
    explained: float = 9.0
    slot: float = 8.0
    local: float = 8.0
    exact: float = 15.0


@dataclass(frozen=True)
class Judged:
    """`expected_db` is what its like have; `below_db` how far the site is under what would still be usual
    (0: it is not); `why` says by which measure."""

    expected_db: float
    below_db: float
    why: str


def judge(
    sites: Sequence[Site],
    measured: Measured,
    weighed: Mapping[str, Weighed],
    margins: Margins = Margins(),
) -> dict[str, Judged]:
    """By value."""
    local = {s.value: _capped(measured.local[s.value].worst) for s in sites}
    usual = _Usual(sites, lambda s: local[s.value])
    weights = _Usual([s for s in sites if s.value in weighed], lambda s: _capped(weighed[s.value].db))
    groups = _Usual([s for s in sites if s.value in weighed], lambda s: _capped(weighed[s.value].group_db))
    slots = _Usual(
        [s for s in sites if s.value in measured.slots], lambda s: _capped(measured.slots[s.value])
    )
    found = {}
    for site in sites:
        own = local[site.value]
        if (w := weighed.get(site.value)) is not None and w.db < FLOAT32:
            tests = [
                weights.test(site, _capped(w.db), margins.weight, margins.exact, "the error of its weight"),
                groups.test(
                    site, _capped(w.group_db), margins.group, margins.exact, "one group of its weight"
                ),
            ]
            if math.isfinite(w.explained_db):
                below = w.explained_db - margins.explained - own
                why = "more noise than the error of its weight explains"
                tests.append(Judged(w.explained_db, max(0.0, below), why))
            worst = max(tests, key=lambda j: j.below_db)
            found[site.value] = worst if worst.below_db else Judged(usual.of(site)[0], 0.0, "")
        elif site.value in measured.slots:
            worst_slot = _capped(measured.slots[site.value])
            found[site.value] = max(
                usual.test(site, own, margins.local, margins.exact, "its local SQNR"),
                slots.test(site, worst_slot, margins.slot, margins.exact, SLOT),
                key=lambda j: j.below_db,
            )
        else:
            found[site.value] = usual.test(site, own, margins.local, margins.exact, "its local SQNR")
    return found


class _Usual:
    """What sites of a kind have: medians, and the spread around them."""

    def __init__(self, sites: Sequence[Site], figure: Callable[[Site], float]) -> None:
        self._known: dict[tuple, list[float]] = defaultdict(list)
        for site in sites:
            for key in _kinds(site):
                self._known[key].append(figure(site))
        lossy = [np.median(v) for key, v in self._known.items() if key[0] == "op" and len(v) >= LIKE]
        self._least = float(min(lossy, default=CAP))

    def of(self, site: Site) -> tuple[float, float]:
        """Median and spread (median of deviations) of its like."""
        for key in _kinds(site):
            like = self._known[key]
            if len(like) >= LIKE:
                middle = float(np.median(like))
                return middle, float(np.median(np.abs(np.asarray(like) - middle)))
        return (self._least, 0.0) if site.storage else (CAP, 0.0)

    def test(self, site: Site, own: float, margin: float, exact: float, why: str) -> Judged:
        """How far under its like the site is."""
        middle, spread = self.of(site)
        room = max(exact if middle >= EXACT else margin, SPREAD * min(spread, middle / 4))
        below = min(middle, FLOAT32 + room) - room - own if own < FLOAT32 else 0.0
        return Judged(middle, max(0.0, below), why if below > 0 else "")


def _kinds(site: Site) -> list[tuple]:
    """From near to far. A kernel's error is the target's, whatever the weight is stored in."""
    kind = "matrices" if site.heavy else "elements"
    found = [("op", site.op, site.storage), ("kind", kind, site.storage)]
    return [*found, ("kind", kind)] if site.kernel else found


def _capped(db: float) -> float:
    return max(-CAP, min(CAP, db))
