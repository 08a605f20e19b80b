"""Symbolic dimensions: their names in the model, their variables in the program, their bounds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir
import tvm
from tvm import tirx
from tvm.ir import Expr

from porter.errors import TargetError


class Dimensions:
    """The variables of one program, and what is provable about expressions of them."""

    def __init__(self, bounds: dict[str, int], inputs: Iterable[ir.Value]) -> None:
        """`bounds` has the largest value of every symbol that the shapes of `inputs` name."""
        self._bounds = bounds
        self._plain = {str(d.value) for v in inputs for d in v.shape or () if _is_plain(d)}
        self._analyzer = tvm.sym.Analyzer()
        self._variables: dict[str, tirx.Var] = {}
        self.upper: dict[str, int] = {}  # of the variables in use

    def of(self, dim: int | ir.SymbolicDim, fallback: str) -> Expr:
        """The dimension of an input; `a + b` is a sum if inputs have both by themselves, else just a name.

        `fallback` names a dimension that has no name. Raises TargetError PORT-0419 when it has no upper
        bound.
        """
        if isinstance(dim, int):
            return tirx.IntImm("int64", dim)
        name = str(dim.value or fallback)
        terms = _terms(name)
        if len(terms) > 1 and all(t.isdecimal() or t in self._plain for t in terms):
            parts = [
                tirx.IntImm("int64", int(t)) if t.isdecimal() else self._variable(t, fallback) for t in terms
            ]
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            return total
        return self._variable(name, fallback)

    def simplify(self, value: Any) -> Any:
        """An integer expression in its simplest form; an int when it is constant."""
        value = self._analyzer.simplify(tirx.convert(value)) if isinstance(value, Expr) else value
        return int(value) if isinstance(value, tirx.IntImm) else value

    def same(self, a: Any, b: Any) -> bool:
        """Provably equal?"""
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        return self._analyzer.can_prove_equal(tirx.convert(a), tirx.convert(b))

    def holds(self, condition: Any) -> bool | None:
        """True or False where either is provable, else None."""
        if isinstance(condition, bool | int):
            return bool(condition)
        if self._analyzer.can_prove(condition):
            return True
        return False if self._analyzer.can_prove(tirx.Not(condition)) else None

    def _variable(self, name: str, where: str) -> tirx.Var:
        if name not in self._variables:
            self.upper[name] = self._bound(name, where)
            self._variables[name] = tirx.Var(name, "int64")
            self._analyzer.bind(self._variables[name], tvm.ir.Range(0, self.upper[name] + 1))
        return self._variables[name]

    def _bound(self, name: str, where: str) -> int:
        if name in self._bounds:
            return self._bounds[name]
        terms = [int(t) if t.isdecimal() else self._bounds.get(t) for t in _terms(name)]
        if None in terms:
            what = f"the dimension {name!r} has no upper bound to plan memory for"
            hint = "name it batch, sequence or past, or make it a fixed size"
            raise TargetError("PORT-0419", what, where=where, hint=hint)
        return sum(terms)


def _terms(name: str) -> list[str]:
    return [t.strip() for t in name.split("+")]


def _is_plain(dim: int | ir.SymbolicDim) -> bool:
    return not isinstance(dim, int) and dim.value is not None and len(_terms(str(dim.value))) == 1
