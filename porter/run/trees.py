"""Trees: the expressions of a device's plan, which are numbers, names of symbols, and [operator, operands…].

Division rounds towards minus infinity, as Python's does. `porter.lower.simt.trees` makes them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

Tree = int | str | list[Any]

OPERATORS: dict[str, Callable[..., Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "%": operator.mod,
    "min": min, "max": max, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    "==": operator.eq, "!=": operator.ne, "not": operator.not_,
    "and": lambda a, b: a and b, "or": lambda a, b: a or b,
}  # fmt: skip


def evaluate(tree: Tree, symbols: Mapping[str, int]) -> int:
    """The number that a tree stands for. Raises KeyError for a symbol or an operator that is not known."""
    if isinstance(tree, str):
        return symbols[tree]
    if not isinstance(tree, list):
        return tree
    name, *operands = tree
    if name == "if":
        condition, value, other = operands
        return evaluate(value if evaluate(condition, symbols) else other, symbols)
    return OPERATORS[name](*(evaluate(o, symbols) for o in operands))
