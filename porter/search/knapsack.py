"""The cheapest choice of one option for each item under limits: a multiple-choice knapsack, with a proof.

    minimize  sum_i cost[i][o_i]   with   sum_i weight[i][o_i] <= limit, in each of k measures

Lagrange multipliers give a lower bound that is a sum over items, and near-optimal choices. Then items are
added one after the other to all partial choices that may still become a better whole (cost + bound of the
rest below the best known), less those that another partial choice dominates (no dearer, no heavier). Where
more than `STATES` are left, the most promising are kept, and the bound that is given back is the smallest of
those that were let go: `cost == bound` says that the answer is exact.

Sources: Fisher 1981 (Lagrangian bounds), Nemhauser and Ullmann 1969 (lists of undominated partial choices),
Sinha and Zoltners 1979 (the hull of a multiple choice).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

STATES = 4_000  # partial choices that are kept
STEPS = 400  # of the multipliers' ascent
ELITE = 64  # partial choices that others are compared with, under several limits
SLACK = 1e-12  # of a limit: sums of float64 in another order


@dataclass(frozen=True)
class Solution:
    """An option for each item, what they cost, and below what no choice under the limits can cost."""

    chosen: tuple[int, ...]
    cost: float
    bound: float

    @property
    def exact(self) -> bool:
        """Whether nothing can be cheaper."""
        return self.cost <= self.bound


def solve(
    costs: Sequence[np.ndarray], weights: Sequence[np.ndarray], limits: np.ndarray, states: int = STATES
) -> Solution | None:
    """The cheapest choice; None where none keeps the limits (or, with few `states`, none was found).

    `costs`: float64 [options] of each item, `weights`: float64 [options, k] >= 0, `limits`: float64 [k] >= 0.
    """
    problem = _Problem.of(costs, weights, limits)
    if not np.isfinite(problem.costs).any(axis=1).all():
        return None
    multipliers, best = problem.multipliers()
    return problem.exact(multipliers, best, states)


def hull(costs: Sequence[np.ndarray], weights: Sequence[np.ndarray]) -> list[tuple[int, ...]]:
    """Choices on the lower convex hull of (cost, weight), cheapest first; `weights`: float64 [options].

    Each is the cheapest of its weight: one option of the one before it is exchanged, where a cost buys most.
    """
    steps, start = [], []
    for i, (cost, weight) in enumerate(zip(costs, weights, strict=True)):
        found = _lower_hull(cost, weight)
        start.append(found[0])
        for a, b in pairwise(found):
            steps.append(((weight[a] - weight[b]) / (cost[b] - cost[a]), i, b))
    chosen, out = list(start), [tuple(start)]
    for _, i, option in sorted(steps, key=lambda step: -step[0]):
        chosen[i] = option
        out.append(tuple(chosen))
    return out


def _lower_hull(cost: np.ndarray, weight: np.ndarray) -> list[int]:
    """Options from the cheapest to the lightest, each step buying less than the one before."""
    hulled: list[int] = []
    for o in np.lexsort((weight, cost)).tolist():
        if hulled and (weight[o] >= weight[hulled[-1]] or cost[o] <= cost[hulled[-1]]):
            continue
        while len(hulled) > 1:
            a, b = hulled[-2:]
            if (weight[a] - weight[b]) * (cost[o] - cost[b]) > (weight[b] - weight[o]) * (cost[b] - cost[a]):
                break
            hulled.pop()
        hulled.append(o)
    return hulled


@dataclass(frozen=True, eq=False)
class _Problem:
    """Costs [items, most options] (inf where there is no such option, or it is too heavy alone), weights
    [items, most options, k] in parts of the limits, which are all 1 (or 0)."""

    costs: np.ndarray
    weights: np.ndarray
    limits: np.ndarray

    @classmethod
    def of(cls, costs: Sequence[np.ndarray], weights: Sequence[np.ndarray], limits: np.ndarray) -> _Problem:
        most, k = max(map(len, costs)), len(limits)
        c, w = np.full((len(costs), most), np.inf), np.zeros((len(costs), most, k))
        scale = np.where(limits > 0, limits, 1)
        for i, (cost, weight) in enumerate(zip(costs, weights, strict=True)):
            fits = (weight <= limits * (1 + SLACK)).all(axis=1)
            c[i, : len(cost)] = np.where(fits, cost, np.inf)
            w[i, : len(cost)] = np.where(fits[:, None], weight, 0) / scale
        return cls(c, w, np.where(limits > 0, 1.0, 0.0))

    def sums(self, chosen: np.ndarray) -> tuple[float, np.ndarray]:
        """Cost and weights of a whole choice, int [items]."""
        rows = np.arange(len(chosen))
        return float(self.costs[rows, chosen].sum()), self.weights[rows, chosen].sum(axis=0)

    def keeps(self, weight: np.ndarray) -> np.ndarray:
        """Whether weights [..., k] are within the limits."""
        return (weight <= self.limits + SLACK).all(axis=-1)

    def multipliers(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Multipliers [k] >= 0 with a high bound, and the cheapest choice under the limits met on the way."""
        best, least = self._safest(), np.inf
        if best is not None:
            best = self._improved(best)
            least = self.sums(best)[0]
        chosen_multipliers, highest = np.zeros(len(self.limits)), -np.inf
        multipliers, share, idle = np.zeros(len(self.limits)), 1.0, 0
        scale = float(np.abs(self.costs[np.isfinite(self.costs)]).max())
        for _ in range(STEPS):
            chosen = np.argmin(self.costs + self.weights @ multipliers, axis=1)
            cost, weight = self.sums(chosen)
            bound = cost + float(multipliers @ (weight - self.limits))
            idle += 1
            if bound > highest:
                chosen_multipliers, highest, idle = multipliers, bound, 0
            if self.keeps(weight):
                chosen = self._improved(chosen)
                if (cost := self.sums(chosen)[0]) < least:
                    best, least = chosen, cost
            slope = weight - self.limits
            if idle > 10:
                share, idle, multipliers = share / 2, 0, chosen_multipliers
            norm = float(slope @ slope)
            if share < 1e-6 or norm == 0 or highest >= least:
                break
            gap = (least if np.isfinite(least) else highest + scale) - bound
            multipliers = np.maximum(0, multipliers + share * gap / norm * slope)
        return chosen_multipliers, best

    def _safest(self) -> np.ndarray | None:
        """The choice of the lightest options, where that keeps the limits."""
        heaviest = np.where(np.isfinite(self.costs), self.weights.max(axis=2, initial=0), np.inf)
        chosen = np.argmin(heaviest, axis=1)
        return chosen if self.keeps(self.sums(chosen)[1]) and np.isfinite(self.sums(chosen)[0]) else None

    def _improved(self, chosen: np.ndarray) -> np.ndarray:
        """Exchange single options while that saves and keeps the limits, the largest saving first."""
        chosen, rows = chosen.copy(), np.arange(len(chosen))
        _, weight = self.sums(chosen)
        while True:
            saved = self.costs[rows, chosen][:, None] - self.costs
            after = weight + self.weights - self.weights[rows, chosen][:, None]
            saved[~self.keeps(after)] = 0
            i, o = np.unravel_index(np.argmax(saved), saved.shape)
            if saved[i, o] <= 0:
                return chosen
            chosen[i] = o
            _, weight = self.sums(chosen)

    def exact(self, multipliers: np.ndarray, best: np.ndarray | None, states: int) -> Solution | None:
        """Every partial choice that may become cheaper than `best`."""
        least = np.inf if best is None else self.sums(best)[0]
        reduced = (self.costs + self.weights @ multipliers).min(axis=1)
        lightest = np.where(np.isfinite(self.costs)[..., None], self.weights, np.inf).min(axis=1)
        order = np.argsort(-np.where(np.isfinite(self.costs), self.costs, 0).max(axis=1), kind="stable")
        rest_bound, rest_weight = float(reduced.sum()), lightest.sum(axis=0)
        cost, weight = np.zeros(1), np.zeros((1, len(self.limits)))
        taken: list[tuple[np.ndarray, np.ndarray]] = []
        dropped = np.inf
        for i in order:
            rest_bound, rest_weight = rest_bound - reduced[i], rest_weight - lightest[i]
            options = np.flatnonzero(np.isfinite(self.costs[i]))
            parent, option = np.repeat(np.arange(len(cost)), len(options)), np.tile(options, len(cost))
            cost, weight = cost[parent] + self.costs[i, option], weight[parent] + self.weights[i, option]
            bound = cost + (weight - self.limits) @ multipliers + rest_bound
            keep = self.keeps(weight + rest_weight) & (bound < least)
            keep = np.flatnonzero(keep)
            keep = keep[_undominated(cost[keep], weight[keep], bound[keep])]
            if len(keep) > states:
                keep = keep[np.argsort(bound[keep], kind="stable")]
                dropped = min(dropped, float(bound[keep[states]]))
                keep = keep[:states]
            cost, weight = cost[keep], weight[keep]
            taken.append((parent[keep], option[keep]))
        if len(cost):
            best, least = _followed(order, taken, int(np.argmin(cost))), float(cost.min())
        if best is None:
            return None
        least = self.sums(best)[0]
        return Solution(tuple(best.tolist()), least, min(least, dropped))


def _undominated(cost: np.ndarray, weight: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Indices of partial choices that no other is at least as good as; under several limits, that none of
    the ELITE most promising is."""
    if not len(cost):
        return np.zeros(0, int)
    order = np.lexsort((*weight.T, cost))
    cost, weight = cost[order], weight[order]
    if weight.shape[1] == 1:
        before = np.minimum.accumulate(np.concatenate([[np.inf], weight[:-1, 0]]))
        return order[weight[:, 0] < before]
    first = np.ones(len(cost), bool)
    first[1:] = (cost[1:] != cost[:-1]) | (weight[1:] != weight[:-1]).any(axis=1)
    order, cost, weight = order[first], cost[first], weight[first]
    elite = np.argsort(bound[order], kind="stable")[:ELITE]
    worse = np.zeros(len(cost), bool)
    for e in elite:
        as_good = (cost >= cost[e]) & (weight >= weight[e]).all(axis=1)
        as_good[e] = False
        worse |= as_good
    return order[~worse]


def _followed(order: np.ndarray, taken: list[tuple[np.ndarray, np.ndarray]], last: int) -> np.ndarray:
    """The options of a whole choice, back from its last state."""
    chosen = np.zeros(len(order), int)
    for i, (parent, option) in zip(order[::-1], reversed(taken), strict=True):
        chosen[i], last = option[last], parent[last]
    return chosen
