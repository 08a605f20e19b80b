"""Repair: solve, verify, and where the sum of what was measured misled, solve again under other limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from porter.search import knapsack
from porter.search.choices import Assignment, Item

ROUNDS = 5  # verifications
MARGIN = 0.97  # of what a limit was corrected to
CLOSE = 0.9  # of a limit: what comes so close to one is not loosened


@dataclass(frozen=True)
class Limits:
    """What may add up: `amounts` [measures] of drift, and `seconds` of a decode step (inf: all)."""

    amounts: np.ndarray
    seconds: float = np.inf


@dataclass(frozen=True, eq=False)
class Round:
    """An assignment that was verified: what it really adds up to, [measures], and whether that holds."""

    assignment: Assignment
    measured: np.ndarray
    holds: bool


Verify = Callable[[Assignment], Round]


def assign(items: Sequence[Item], limits: Limits, minimize: str) -> Assignment | None:
    """The cheapest assignment whose promises keep the limits; None where there is none."""
    costs = [item.costs(minimize) for item in items]
    weights, bounds = [item.amounts() for item in items], limits.amounts
    if np.isfinite(limits.seconds):
        seconds = [np.array([[o.seconds] for o in item.options]) for item in items]
        weights = [np.hstack(pair) for pair in zip(weights, seconds, strict=True)]
        bounds = np.append(bounds, limits.seconds)
    found = knapsack.solve(costs, weights, bounds)
    return found and Assignment(tuple(items), found.chosen, found.bound)


def safest(items: Sequence[Item], limits: Limits) -> Assignment:
    """The assignment that promises the least drift, as far as seconds allow."""
    scale = np.where(limits.amounts > 0, limits.amounts, 1)
    worst = [np.max(item.amounts() / scale, axis=1, initial=0) for item in items]
    seconds = [
        item.costs("time") if np.isfinite(limits.seconds) else np.zeros(len(item.options)) for item in items
    ]
    found = knapsack.solve(worst, [s[:, None] for s in seconds], np.array([min(limits.seconds, 1e300)]))
    chosen = found.chosen if found else tuple(int(np.argmin(s)) for s in seconds)
    return Assignment(tuple(items), chosen)


def search(items: Sequence[Item], limits: Limits, minimize: str, verify: Verify) -> list[Round]:
    """Rounds of solving and verifying; the last resort is the assignment with the least drift.

    The first is solved under the limits themselves. After one that fails, each limit that it broke is lowered
    by how much more was measured than promised; after one that leaves room, they are raised in the same way;
    between one that holds and one that does not, their mean is tried.
    """
    rounds: list[Round] = []
    target, held, failed = limits.amounts, None, None
    while len(rounds) < ROUNDS:
        found = assign(items, Limits(target, limits.seconds), minimize) or safest(items, limits)
        if any(found.chosen == r.assignment.chosen for r in rounds):
            break
        now = verify(found)
        rounds.append(now)
        if now.holds:
            held = target
            if (now.measured >= CLOSE * limits.amounts).any():
                break
        else:
            failed = target
        between = held is not None and failed is not None
        target = np.sqrt(held * failed) if between else _corrected(now, limits.amounts, target)
    if not any(r.holds for r in rounds):
        last = safest(items, limits)
        if all(last.chosen != r.assignment.chosen for r in rounds):
            rounds.append(verify(last))
    return rounds


def _corrected(now: Round, limits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """What may be promised, if what is measured stays in proportion to it."""
    promised, measured = now.assignment.promised(), now.measured
    known = (measured > 0) & np.isfinite(measured)
    fitted = np.where(known, limits * promised * MARGIN / np.where(known, measured, 1), target)
    if now.holds:
        return np.maximum(target, fitted)
    return np.where(measured > limits, np.where(known, fitted, target / 2), target)


def best(rounds: Sequence[Round], minimize: str) -> Round | None:
    """The cheapest that holds."""
    holding = [r for r in rounds if r.holds]
    return min(holding, key=lambda r: r.assignment.cost(minimize), default=None)


def closest(rounds: Sequence[Round], limits: np.ndarray) -> Round:
    """The one that is least over its limits."""
    scale = np.where(limits > 0, limits, 1e-300)
    return min(rounds, key=lambda r: float(np.max(r.measured / scale, initial=0)))
