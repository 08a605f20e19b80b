"""Whole numbers that depend on loop variables, as plain data.

An expression is an int, the name of a variable, or a tuple: `("+", a, b)`, likewise `- * // % min max`;
`< <= == !=`, `and`, `or` and `("not", a)`, which are 0 or 1; `("select", condition, a, b)`; and
`("count", ((variable, extent), ...), condition)`, how many points of a box fulfil a condition;
`("together", ((along, size), ...))`, how many elements lie together, of so many along dimensions of a size.

Variables have ranges. `exact` gives the value that an expression has everywhere in them, and otherwise says
which variables it depends on, so that a caller can halve a range and try again.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from porter.errors import TargetError

Expression = int | str | tuple[Any, ...]
Ranges = Mapping[str, tuple[int, int]]  # of each variable the least and the largest value

_OTHERS = ("min", "max", "and", "or", "not", "select", "count", "together")
POINTS = 1 << 24
"""Points that `count` looks at one by one, 16 bytes each, before it gives up."""

_PLAIN: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
}


KINDS = frozenset((*_PLAIN, *_OTHERS))
"""What the first entry of a tuple may be."""
_FOLDED: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "min": min,
    "max": max,
}


class Varies(Exception):
    """An expression is not the same everywhere in the ranges of `variables`."""

    def __init__(self, variables: frozenset[str]) -> None:
        super().__init__(variables)
        self.variables = variables


def variables(expression: Expression) -> frozenset[str]:
    """The names in it, without those that a `count` runs over."""
    if isinstance(expression, str):
        return frozenset((expression,))
    if isinstance(expression, int):
        return frozenset()
    if expression[0] == "together":
        return frozenset().union(*(variables(part) for pair in expression[1] for part in pair))
    if expression[0] == "count":
        _, box, condition = expression
        inner = frozenset(name for name, _ in box)
        outside = frozenset().union(*(variables(extent) for _, extent in box))
        return outside | (variables(condition) - inner)
    return frozenset().union(*(variables(part) for part in expression[1:]))


def folded(kind: str, a: Expression, b: Expression) -> Expression:
    """`(kind, a, b)`, as a number where both are."""
    if isinstance(a, int) and isinstance(b, int):
        if kind in _FOLDED:
            return _FOLDED[kind](a, b)
        if kind in ("//", "%") and b:
            return a // b if kind == "//" else a % b
    if kind == "and" and 1 in (a, b):
        return b if a == 1 else a
    return (kind, a, b)


def substituted(expression: Expression, at: Mapping[str, int]) -> Expression:
    """The expression with numbers for the variables in `at`."""
    if isinstance(expression, int):
        return expression
    if isinstance(expression, str):
        return at.get(expression, expression)
    kind, *parts = expression
    if kind == "together":
        return (kind, tuple(tuple(substituted(part, at) for part in pair) for pair in parts[0]))
    if kind == "count":
        box = tuple((name, substituted(extent, at)) for name, extent in parts[0])
        return (kind, box, substituted(parts[1], at))
    known = tuple(substituted(part, at) for part in parts)
    return folded(kind, *known) if len(known) == 2 else (kind, *known)


def value(expression: Expression, at: Mapping[str, Any]) -> Any:
    """At one point, or at many: the values may be arrays. Knows neither `count` nor `together`."""
    if isinstance(expression, int):
        return expression
    if isinstance(expression, str):
        return at[expression]
    kind, *parts = expression
    found = [value(part, at) for part in parts]
    if kind in _PLAIN:
        return _PLAIN[kind](*found)
    if kind in ("min", "max"):
        return (np.minimum if kind == "min" else np.maximum)(*found)
    if kind == "select":
        return np.where(*found)
    return {"and": np.logical_and, "or": np.logical_or, "not": np.logical_not}[kind](*found)


def exact(expression: Expression, ranges: Ranges) -> int:
    """The one value that it has in `ranges`; raises `Varies` where that is not certain."""
    if isinstance(expression, tuple) and expression[0] == "count":
        return _count(expression[1], expression[2], ranges)
    if isinstance(expression, tuple) and expression[0] == "together":
        return _together(expression[1], ranges)
    low, high = bounds(expression, ranges)
    if low != high:
        raise Varies(_loose(variables(expression), ranges))
    return low


def _loose(names: frozenset[str], ranges: Ranges) -> frozenset[str]:
    return frozenset(name for name in names if ranges[name][0] != ranges[name][1])


def bounds(expression: Expression, ranges: Ranges) -> tuple[int, int]:
    """Two numbers that it lies between; not always the closest, but equal once every range is one value."""
    if isinstance(expression, int):
        return expression, expression
    if isinstance(expression, str):
        return ranges[expression]
    kind, *parts = expression
    if kind in ("count", "together"):
        try:
            return (found := exact(expression, ranges)), found
        except Varies:
            sizes = (pair[kind == "count"] for pair in parts[0])
            return 0, math.prod(max(1, bounds(size, ranges)[1]) for size in sizes)
    return _combined(kind, [bounds(part, ranges) for part in parts])


def _combined(kind: str, known: list[tuple[int, int]]) -> tuple[int, int]:
    (a, b), *rest = known
    if kind == "not":
        return 1 - min(1, b), 1 - min(1, a)
    (c, d) = rest[0]
    if kind == "select":
        chosen = [*(rest[0] if b else ()), *(rest[1] if not a else ())]
        return min(chosen), max(chosen)
    if kind in ("and", "or", "min", "max"):
        pick = min if kind in ("and", "min") else max
        return pick(a, c), pick(b, d)
    if kind in ("<", "<="):
        less = _PLAIN[kind]
        return int(less(b, c)), int(less(a, d))
    if kind in ("==", "!="):
        same, apart = a == b == c == d, b < c or d < a
        low, high = (int(same), int(not apart))
        return (low, high) if kind == "==" else (1 - high, 1 - low)
    if kind == "%":
        within = c == d and a // c == b // c
        return (a % c, b % c) if within else (0, d - 1)
    corners = [_PLAIN[kind](x, y) for x, y in itertools.product((a, b), (c, d))]
    return min(corners), max(corners)


def conjuncts(condition: Expression) -> Iterator[Expression]:
    """The conditions that a condition is made of with `and`."""
    if isinstance(condition, tuple) and condition[0] == "and":
        yield from conjuncts(condition[1])
        yield from conjuncts(condition[2])
    else:
        yield condition


def _count(box: tuple[tuple[str, Expression], ...], condition: Expression, ranges: Ranges) -> int:
    """Conditions that hold everywhere fall away; the rest is looked at point by point.

    Conditions that share no variable of the box are counted apart, and multiplied.
    """
    extents = {name: exact(extent, ranges) for name, extent in box}
    if min(extents.values(), default=1) <= 0:
        return 0
    inside = {**ranges, **{name: (0, extent - 1) for name, extent in extents.items()}}
    open_: list[Expression] = []
    for part in conjuncts(condition):
        low, high = bounds(part, inside)
        if not high:
            return 0
        if not low:
            open_.append(part)
    total = math.prod(extents.values())
    for names, parts in _groups(open_, frozenset(extents)):
        outside = frozenset().union(*(variables(part) for part in parts)) - names
        if loose := _loose(outside, ranges):
            raise Varies(loose)
        total //= math.prod(extents[name] for name in names)
        fixed = tuple(sorted((name, ranges[name][0]) for name in outside))
        total *= _fulfilled(tuple(parts), tuple((name, extents[name]) for name in sorted(names)), fixed)
    return total


def _together(dimensions: tuple[tuple[Expression, Expression], ...], ranges: Ranges) -> int:
    total = 1
    for along, size in reversed(dimensions):
        elements = exact(along, ranges)
        total *= elements
        if elements != exact(size, ranges):
            break
    return total


def _groups(parts: list[Expression], inner: frozenset[str]) -> list[tuple[frozenset[str], list[Expression]]]:
    groups: list[tuple[frozenset[str], list[Expression]]] = []
    for part in parts:
        names, together = variables(part) & inner, [part]
        for group in [g for g in groups if g[0] & names]:
            groups.remove(group)
            names, together = names | group[0], group[1] + together
        groups.append((names, together))
    return groups


@lru_cache(maxsize=1 << 14)
def _fulfilled(
    parts: tuple[Expression, ...], box: tuple[tuple[str, int], ...], fixed: tuple[tuple[str, int], ...]
) -> int:
    if math.prod(extent for _, extent in box) > POINTS:
        what = "a guard of the scheduled program joins too many loops to be counted"
        raise TargetError("PORT-0448", what, ", ".join(name for name, _ in box))
    axes = np.ogrid[tuple(slice(0, extent) for _, extent in box)]
    at = dict(fixed) | {name: axis for (name, _), axis in zip(box, axes, strict=True)}
    shape = tuple(extent for _, extent in box)
    holds = np.ones(shape, bool)
    for part in parts:
        holds &= np.asarray(value(part, at), bool)
    return int(holds.sum())
