"""Expressions over a program's symbols as plain data, which `porter.run.trees` evaluates: numbers, names of
symbols, and lists of an operator and its operands."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx

BINARY = {
    tirx.Add: "+", tirx.Sub: "-", tirx.Mul: "*", tirx.FloorDiv: "//", tirx.FloorMod: "%", tirx.Min: "min",
    tirx.Max: "max", tirx.LT: "<", tirx.LE: "<=", tirx.GT: ">", tirx.GE: ">=", tirx.EQ: "==", tirx.NE: "!=",
    tirx.And: "and", tirx.Or: "or",
}  # fmt: skip
NATURAL = {tirx.Div: "//", tirx.Mod: "%"}  # of numbers that are not negative, as sizes are

Tree = int | str | list


class Trees:
    """Makes trees; `bounds` are the largest values of the symbols, by name."""

    def __init__(self, bounds: dict[str, int]) -> None:
        self.bounds, self.analyzer = bounds, tvm.sym.Analyzer()
        self.bound: set[Any] = set()

    def simplified(self, expression: Any) -> Any:
        """The expression, knowing that symbols are not negative and within their bounds."""
        if isinstance(expression, int):
            return expression
        for symbol in tirx.analysis.undefined_vars(expression):
            if symbol not in self.bound:
                self.bound.add(symbol)
                self.analyzer.bind(symbol, tvm.ir.Range(0, self.bounds[symbol.name] + 1))
        return self.analyzer.simplify(expression)

    def of(self, expression: Any) -> Tree:
        """The tree. Raises ValueError for what has none."""
        return tree(self.simplified(expression))


def tree(node: Any) -> Tree:
    """An expression as data."""
    if isinstance(node, int):
        return node
    if isinstance(node, tirx.IntImm):
        return int(node.value)
    if isinstance(node, tirx.Var):
        return str(node.name)
    if isinstance(node, tirx.Cast):
        return tree(node.value)
    if isinstance(node, tirx.Select):
        return ["if", tree(node.condition), tree(node.true_value), tree(node.false_value)]
    if isinstance(node, tirx.Not):
        return ["not", tree(node.a)]
    name = BINARY.get(type(node)) or NATURAL.get(type(node))
    if name is None:
        raise ValueError(f"{type(node).__name__} stands in a size")
    return [name, tree(node.a), tree(node.b)]
