"""Expressions in ranges, against their values one point at a time."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from porter.errors import TargetError
from porter.simulate.expression import Varies, bounds, exact, value
from tests.support.stepped import number

NAMES = ("i", "j")
_LEAVES = st.one_of(st.integers(-9, 9), st.sampled_from(NAMES))


_POSITIVE = st.integers(1, 7)


def _parts(inner: Any) -> Any:
    condition = st.tuples(st.sampled_from(["<", "<=", "==", "!="]), inner, inner)
    return st.one_of(
        st.tuples(st.sampled_from(["+", "-", "*", "min", "max"]), inner, inner),
        st.tuples(st.sampled_from(["//", "%"]), inner, _POSITIVE),
        condition,
        st.tuples(st.sampled_from(["and", "or"]), condition, condition),
        st.tuples(st.just("not"), condition),
        st.tuples(st.just("select"), condition, inner, inner),
    )


def _counted(inner: Any) -> Any:
    box = st.tuples(st.tuples(st.just("b"), _POSITIVE), st.tuples(st.just("c"), _POSITIVE))
    inside = st.tuples(st.just("+"), inner, st.sampled_from(["b", "c"]))
    guard = st.tuples(st.just("<"), inside, inner)
    count = st.tuples(st.just("count"), box, st.tuples(st.just("and"), guard, guard))
    pair = st.tuples(count, _POSITIVE)
    return count | st.tuples(st.just("together"), st.tuples(pair, pair))


PLAIN = st.recursive(_LEAVES, _parts, max_leaves=6)
EXPRESSIONS = PLAIN | _counted(PLAIN) | st.tuples(st.just("*"), _counted(PLAIN), PLAIN)
RANGES = st.tuples(st.integers(-5, 5), st.integers(0, 4)).map(lambda pair: (pair[0], sum(pair)))


@settings(max_examples=400, deadline=None)
@given(EXPRESSIONS, RANGES, RANGES)
def test_values_lie_in_the_bounds(expression: Any, i: tuple[int, int], j: tuple[int, int]) -> None:
    ranges = {"i": i, "j": j}
    points = itertools.product(*(range(low, high + 1) for low, high in (i, j)))
    values = {number(expression, dict(zip(NAMES, point, strict=True))) for point in points}
    low, high = bounds(expression, ranges)
    assert low <= min(values)
    assert max(values) <= high
    free = {name for name in NAMES if ranges[name][0] != ranges[name][1]}
    try:
        found, loose = {exact(expression, ranges)}, frozenset[str]()
    except Varies as varies:
        found, loose = values, varies.variables
        assert loose, "halving no range would help"
    assert found == values
    assert loose <= free


@given(EXPRESSIONS, st.integers(-5, 5), st.integers(-5, 5))
def test_at_one_point_the_value_is_exact(expression: Any, i: int, j: int) -> None:
    assert exact(expression, {"i": (i, i), "j": (j, j)}) == number(expression, {"i": i, "j": j})


def test_a_guard_over_too_many_points_is_refused() -> None:
    box = tuple((name, 1 << 10) for name in "abc")
    joint = ("<", ("+", ("+", "a", "b"), "c"), 1000)
    with pytest.raises(TargetError) as error:
        exact(("count", box, joint), {})
    assert error.value.code == "PORT-0448"


def test_conditions_that_share_no_loop_are_counted_apart() -> None:
    box = tuple((name, 1 << 20) for name in "abc")
    apart = ("and", ("<", "a", 3), ("and", ("<", "b", 5), ("<", "c", 7)))
    assert exact(("count", box, apart), {}) == 105


def test_arrays_have_the_values_of_their_points() -> None:
    assert value(("not", ("<", "i", 2)), {"i": 3})
