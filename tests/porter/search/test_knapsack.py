"""The knapsack against every choice there is, its bound, and its hull."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from porter.search.knapsack import hull, solve

# Sums of up to 6 float64 of size 1000 in two orders: 6 * 2^-53 * 6000 < 1e-11.
ROUNDING = 1e-11


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Up to 5 items of up to 4 options under up to 3 limits, many ties and infinite weights among them."""
    items, k = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    number = st.one_of(st.integers(0, 6).map(float), st.floats(0, 1000))
    costs, weights = [], []
    for _ in range(items):
        options = draw(st.integers(1, 4))
        costs.append(np.array(draw(st.lists(number, min_size=options, max_size=options))))
        heavy = st.one_of(number, number, number, st.just(np.inf))
        rows = st.lists(st.lists(heavy, min_size=k, max_size=k), min_size=options, max_size=options)
        weights.append(np.array(draw(rows)))
    limits = np.array(draw(st.lists(number, min_size=k, max_size=k)))
    return costs, weights, limits


def cheapest(costs: list[np.ndarray], weights: list[np.ndarray], limits: np.ndarray) -> float:
    """Of every choice; inf where none keeps the limits."""
    best = np.inf
    for chosen in itertools.product(*(range(len(c)) for c in costs)):
        weight = sum(w[o] for w, o in zip(weights, chosen, strict=True))
        if (weight <= limits * (1 + 1e-12)).all():
            best = min(best, sum(c[o] for c, o in zip(costs, chosen, strict=True)))
    return best


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_cheapest_of_all_choices(problem: tuple) -> None:
    costs, weights, limits = problem
    best, found = cheapest(costs, weights, limits), solve(costs, weights, limits)
    if found is None:
        assert best == np.inf
        return
    assert found.exact
    assert abs(found.cost - best) <= ROUNDING
    assert abs(sum(c[o] for c, o in zip(costs, found.chosen, strict=True)) - found.cost) <= ROUNDING
    weight = sum(w[o] for w, o in zip(weights, found.chosen, strict=True))
    assert (weight <= limits * (1 + 1e-11) + ROUNDING * (limits > 0)).all()


@settings(max_examples=200, deadline=None)
@given(problems())
def test_with_few_states_the_bound_still_holds(problem: tuple) -> None:
    costs, weights, limits = problem
    best, found = cheapest(costs, weights, limits), solve(costs, weights, limits, states=2)
    if found is not None:
        assert found.bound - ROUNDING <= best <= found.cost + ROUNDING


def test_a_large_one_is_solved_within_a_thousandth() -> None:
    rng = np.random.default_rng(1)
    bits = np.array([2.5, 3.1, 3.5, 4.1, 4.5, 6.0, 8.0, 16.0, 32.0])
    sizes, slopes = rng.integers(1000, 100_000, 80), rng.lognormal(0, 1.5, 80)
    costs = [size * bits for size in sizes]
    for k in (1, 2):
        noise = rng.lognormal(0, 0.3, (80, len(bits), k))
        weights = [slope * 4.0 ** -bits[:, None] * z for slope, z in zip(slopes, noise, strict=True)]
        found = solve(costs, weights, np.full(k, 0.24))
        assert found is not None
        assert found.bound <= found.cost <= found.bound * 1.001


rows = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.lists(rows, min_size=1, max_size=5))
def test_the_hull_has_the_cheapest_of_each_weight(items: list[list[tuple[int, int]]]) -> None:
    costs, weights = ([np.array([o[j] for o in item], float) for item in items] for j in (0, 1))
    totals = []
    for chosen in hull(costs, weights):
        cost = sum(c[o] for c, o in zip(costs, chosen, strict=True))
        weight = sum(w[o] for w, o in zip(weights, chosen, strict=True))
        totals.append((cost, weight))
        best = cheapest(costs, [w[:, None] for w in weights], np.array([weight]))
        assert cost <= best + ROUNDING
    assert totals == sorted(totals, key=lambda t: t[0])
    assert all(a[1] >= b[1] - ROUNDING for a, b in itertools.pairwise(totals))
