"""Record: what a search did, as report.json has it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from porter.search import additive, knapsack
from porter.search.choices import Assignment, Item, Kind
from porter.search.costs import Costs
from porter.search.repair import Round

POINTS = 40  # of the front, about
KINDS: dict[str, tuple[Kind, ...]] = {"weights": ("weight",), "kv": ("key", "value")}


@dataclass
class Record:
    """`offset`: amounts that are there whatever is chosen (a fixed cache scheme, rounded activations, the
    lowering), [measures]; `tokens` that sensitivities were measured on, in `runs` runs."""

    costs: Costs
    measures: tuple[str, ...]
    items: Sequence[Item]
    tokens: int
    offset: np.ndarray
    rounds: list[Round] = field(default_factory=list)

    def to_json(self, chosen: Assignment) -> dict[str, object]:
        """Plain values; every cost with its unit. Drift is promised (a sum of what was measured for each
        item) or measured (of the whole model after its passes)."""
        cost, unit = self.costs.shown(chosen.cost(self.costs.minimize))
        return {
            "minimize": self.costs.minimize,
            "unit": unit,
            "kind": "measured" if unit == "bytes" else "estimated",
            "context": self.costs.context,
            "tokens": self.tokens,
            "cost": cost,
            "bound": self.costs.shown(chosen.bound)[0],
            "bits": _bits(chosen),
            "promised": self._promised(chosen.promised()),
            "rounds": [self._round(r) for r in self.rounds],
            "front": self.front(),
            "items": [self._item(item, o) for item, o in zip(chosen.items, chosen.chosen, strict=True)],
        }

    def front(self) -> list[dict[str, object]]:
        """Points (cost, bits, drift) that no other assignment beats as promised, by the first measure; those
        that were verified with what was measured."""
        costs = [item.costs(self.costs.minimize) for item in self.items]
        weights = [item.amounts()[:, 0] for item in self.items]
        usable = [np.isfinite(c) & np.isfinite(w) for c, w in zip(costs, weights, strict=True)]
        places = [np.flatnonzero(u) for u in usable]
        hulled = knapsack.hull(*([x[u] for x, u in zip(xs, usable, strict=True)] for xs in (costs, weights)))
        picked = np.unique(np.linspace(0, len(hulled) - 1, POINTS).astype(int))
        found = [tuple(int(p[o]) for p, o in zip(places, hulled[i], strict=True)) for i in picked]
        points = [self._point(Assignment(tuple(self.items), chosen), None) for chosen in found]
        points += [self._point(r.assignment, r) for r in self.rounds]
        return sorted(points, key=lambda p: float(p["cost"]))  # type: ignore[arg-type]

    def _point(self, assignment: Assignment, verified: Round | None) -> dict[str, object]:
        return {
            "cost": self.costs.shown(assignment.cost(self.costs.minimize))[0],
            "bits": _bits(assignment),
            "promised": self._promised(assignment.promised()),
            "measured": None if verified is None else self._promised(verified.measured),
        }

    def _promised(self, amounts: np.ndarray) -> dict[str, float]:
        return additive.shown(amounts + self.offset, self.measures)

    def _round(self, found: Round) -> dict[str, object]:
        return {**self._point(found.assignment, found), "holds": found.holds}

    def _item(self, item: Item, chosen: int) -> dict[str, object]:
        options = [
            {
                "name": o.name,
                "bits": 8 * o.bytes / item.numbers,
                "seconds": None if math.isnan(o.seconds) else o.seconds,
                **additive.shown(np.array(o.amounts), self.measures),
            }
            for o in item.options
        ]
        place = {"layer": item.layer} if item.kind != "weight" else {}
        chose = item.options[chosen].name
        return {
            "name": item.name,
            "kind": item.kind,
            **place,
            "numbers": item.numbers,
            "chosen": chose,
            "options": options,
        }


def _bits(assignment: Assignment) -> dict[str, float]:
    """Average bits of a stored weight, and of a cached number, where these were searched."""
    found = {name: assignment.bits(*kinds) for name, kinds in KINDS.items()}
    return {name: bits for name, bits in found.items() if not math.isnan(bits)}
