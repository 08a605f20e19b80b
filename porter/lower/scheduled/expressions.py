"""TIR's integer expressions as the simulator's, under names that are unique in a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from porter.errors import TargetError
from porter.simulate.expression import Expression, folded

_BINARY = {
    "Add": "+",
    "Sub": "-",
    "Mul": "*",
    "FloorDiv": "//",
    "FloorMod": "%",
    "Min": "min",
    "Max": "max",
    "LT": "<",
    "LE": "<=",
    "EQ": "==",
    "NE": "!=",
    "And": "and",
    "Or": "or",
}
_TURNED = {"GT": "<", "GE": "<="}


class Names:
    """Of each variable of a kernel, what stands for it: a name of its own, or an expression.

    `symbols` are the names of those that are no loop's, in the order in which they were met.
    """

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.known: dict[Any, Expression] = {}
        self.taken: set[str] = set()
        self.symbols: list[str] = []

    def symbol(self, variable: Any) -> str:
        """A dimension, or an integer that the kernel is called with."""
        if variable not in self.known:
            self.known[variable] = self._name(variable)
            self.symbols.append(str(self.known[variable]))
        return str(self.known[variable])

    def _name(self, variable: Any) -> str:
        name = str(variable.name)
        while name in self.taken:
            name += "'"
        self.taken.add(name)
        return name

    def loop(self, loop: Any) -> tuple[str, Expression]:
        """A name for the variable of a loop, and its extent; the variable counts from the loop's start."""
        name = self._name(loop.loop_var)
        extent, start = self.expression(loop.extent), self.expression(loop.min)
        self.known[loop.loop_var] = name if start == 0 else ("+", name, start)
        return name, extent

    def bind(self, realize: Any) -> None:
        """The variables of a block stand for what they are bound to."""
        for iterator, value in zip(realize.block.iter_vars, realize.iter_values, strict=True):
            self.known[iterator.var] = self.expression(value)

    def expression(self, node: Any) -> Expression:
        """Raises TargetError PORT-0445 for what is no integer."""
        kind = type(node).__name__
        if isinstance(node, bool | int):
            return int(node)
        if kind == "IntImm":
            return int(node.value)
        if kind == "Cast":
            return self.expression(node.value)
        if kind == "Var":
            return self.known[node] if node in self.known else self.symbol(node)
        if kind in _BINARY:
            return folded(_BINARY[kind], self.expression(node.a), self.expression(node.b))
        if kind in _TURNED:
            return folded(_TURNED[kind], self.expression(node.b), self.expression(node.a))
        if kind == "Not":
            return ("not", self.expression(node.a))
        if kind == "Select":
            parts = node.condition, node.true_value, node.false_value
            return ("select", *(self.expression(part) for part in parts))
        if kind == "Call" and str(getattr(node.op, "name", "")).endswith(("if_then_else", "likely")):
            parts = tuple(self.expression(part) for part in node.args)
            return ("select", *parts) if len(parts) == 3 else parts[0]
        what = f"an extent or index of a scheduled program is no expression of integers: {kind}"
        raise TargetError("PORT-0445", what, f"{self.kernel}: {node}")

    def place(self, node: Any) -> Expression:
        """An index: as `expression`, or `("gathered", ...)` and what it depends on, where data decides."""
        loads = list(_loads(node))
        if not loads:
            return self.expression(node)
        return ("gathered", *(self.place(index) for load in loads for index in load.indices))


def _loads(node: Any) -> Iterator[Any]:
    if type(node).__name__ in ("TensorLoad", "BufferLoad"):
        yield node
        return
    parts = [
        getattr(node, key, None) for key in ("a", "b", "value", "condition", "true_value", "false_value")
    ]
    for part in (*parts, *getattr(node, "args", ())):
        if part is not None and not isinstance(part, int | float):
            yield from _loads(part)
