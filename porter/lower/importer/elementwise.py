"""Elementwise operators; integer ones stay symbolic where their inputs are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx
from tvm.ir import Expr

from porter.lower.importer.attributes import attribute
from porter.lower.importer.broadcast import broadcast_dims, broadcastable
from porter.lower.importer.precision import cast, in_float32
from porter.lower.importer.program import SMALL, Importer
from porter.lower.importer.quantized import times
from porter.lower.importer.values import Ints, Value, Weight

op = relax.op


def as_ints(imp: Importer, value: Value | None) -> Ints | None:
    """A value of known integers of rank 0 or 1, else None."""
    if isinstance(value, Ints):
        return value
    entries = imp.ints(value) if value is not None else None
    if entries is None or len(value.shape) > 1:
        return None
    return Ints.of(entries if len(value.shape) else entries[0], imp.dtype(value))


def few_ints(imp: Importer, value: Value) -> Ints | None:
    """Sizes, and integer constants short enough to be some."""
    if isinstance(value, Weight) and np.prod(value.shape) > SMALL:
        return None
    return as_ints(imp, value)


def _ints_pair(imp: Importer, a: Value, b: Value) -> tuple[Ints, Ints] | None:
    """Both as Ints: sizes, or a size and a constant, or two short constants."""
    sized = isinstance(a, Ints) or isinstance(b, Ints)
    x, y = ((as_ints if sized else few_ints)(imp, v) for v in (a, b))
    return None if x is None or y is None else (x, y)


def _on_ints(function: Callable[..., Any], *values: Ints, dtype: str | None = None) -> Ints | None:
    """`function` entry by entry; None when it returns None for any of them."""
    arrays = np.broadcast_arrays(*(v.values for v in values))
    entries = [function(*row) for row in zip(*(a.reshape(-1) for a in arrays), strict=True)]
    if any(e is None for e in entries):
        return None
    return Ints.of(entries if arrays[0].ndim else entries[0], dtype or values[0].dtype)


def _binary(
    tensor_op: Callable[..., Any], int_op: Callable[..., Any] | None = None, *, answers: bool = False
) -> Callable[..., Value]:
    """`int_op(imp, a, b)` on known integers, None where it cannot tell; `answers`: the results are bool."""

    def run(imp: Importer, node: ir.Node, a: Value, b: Value) -> Value:
        pair = _ints_pair(imp, a, b) if int_op else None
        known = (
            _on_ints(lambda x, y: int_op(imp, x, y), *pair, dtype="bool" if answers else None)
            if pair
            else None
        )
        return known or imp.emit(tensor_op(*broadcastable(imp, imp.tensor(a), imp.tensor(b))))

    return run


def _arithmetic(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda imp, a, b: imp.simplify(function(a, b))


def _comparison(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Decided where it holds, or fails, for all sizes within their bounds."""

    def decide(imp: Importer, a: Any, b: Any) -> int | None:
        found = imp.holds(function(a, b))
        return None if found is None else int(found)

    return decide


def _equal(a: Any, b: Any) -> Any:
    """An Expr's own == compares structure, not value."""
    return tirx.EQ(tirx.convert(a), tirx.convert(b)) if isinstance(a, Expr) or isinstance(b, Expr) else a == b


def _equal_tensors(x: relax.Expr, y: relax.Expr) -> relax.Expr:
    """LLVM has no comparison of bools."""
    return op.logical_not(op.logical_xor(x, y)) if str(x.ty.dtype) == "bool" else op.equal(x, y)


def _quotient(imp: Importer, a: Any, b: Any) -> Any:
    """ONNX rounds toward zero, which for sizes is down."""
    if isinstance(a, int) and isinstance(b, int):
        return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    positive = imp.holds(a >= 0) and imp.holds(b > 0)
    return imp.simplify((tirx.floordiv if positive else tirx.truncdiv)(tirx.convert(a), tirx.convert(b)))


def _remainder(imp: Importer, a: Any, b: Any) -> Any:
    return a % b if isinstance(a, int) and isinstance(b, int) else imp.simplify(tirx.floormod(a, b))


def _safely(divide: Callable[[Expr, Expr], Expr], by_minus_one: Callable[[Expr], Expr]) -> Callable[..., Any]:
    """Division that cannot trap: x / 0 is 0, and the lowest integer / -1 wraps around, as in numpy."""

    def element(x: Expr, y: Expr) -> Expr:
        zero, one = tirx.IntImm(str(x.ty.dtype), 0), tirx.IntImm(str(x.ty.dtype), 1)
        unsigned = str(x.ty.dtype).startswith("u")
        trap = y == zero if unsigned else tirx.any(y == zero, y == zero - one)
        plain = divide(x, tirx.Select(trap, one, y))
        special = zero if unsigned else tirx.Select(y == zero, zero, by_minus_one(x))
        return tirx.Select(trap, special, plain)

    return element


def _by_element(element: Callable[[Expr, Expr], Expr], name: str) -> Callable[..., Any]:
    """A tensor operator from one on scalars."""

    def run(imp: Importer, a: relax.Expr, b: relax.Expr) -> relax.Expr:
        x, y = broadcastable(imp, a, b)
        whole = broadcast_dims(imp, imp.shape(x), imp.shape(y))
        x, y = (imp.emit(op.broadcast_to(t, [imp.dim(d) for d in whole])) for t in (x, y))
        return imp.te(lambda p, q: te.compute(p.shape, lambda *i: element(p(*i), q(*i))), x, y, name=name)

    return run


_truncdiv = _by_element(_safely(tirx.truncdiv, lambda x: tirx.IntImm(str(x.ty.dtype), 0) - x), "truncdiv")
_floormod = _by_element(_safely(tirx.floormod, lambda x: tirx.IntImm(str(x.ty.dtype), 0)), "floormod")
_truncmod = _by_element(_safely(tirx.truncmod, lambda x: tirx.IntImm(str(x.ty.dtype), 0)), "truncmod")
_fmod = _by_element(lambda x, y: tirx.call_pure_extern("float32", "fmodf", x, y), "fmod")


def _mul(imp: Importer, node: ir.Node, a: Value, b: Value) -> Value:
    """A constant of a narrow type keeps its factor beside it."""
    return times(a, b) or times(b, a) or _multiply(imp, node, a, b)


def _div(imp: Importer, node: ir.Node, a: Value, b: Value) -> Value:
    if (pair := _ints_pair(imp, a, b)) is not None:
        return _on_ints(lambda x, y: _quotient(imp, x, y), *pair)
    x, y = imp.tensor(a), imp.tensor(b)
    return (
        _truncdiv(imp, x, y) if "int" in str(x.ty.dtype) else imp.emit(op.divide(*broadcastable(imp, x, y)))
    )


def _mod(imp: Importer, node: ir.Node, a: Value, b: Value) -> Value:
    """The sign is the divisor's, or with `fmod` the dividend's."""
    like_c = bool(attribute(node, "fmod", 0))
    if (pair := _ints_pair(imp, a, b)) is not None and not like_c:
        return _on_ints(lambda x, y: _remainder(imp, x, y), *pair)
    x, y = imp.tensor(a), imp.tensor(b)
    if "int" not in str(x.ty.dtype):
        return in_float32(lambda imp, node, *pair: _fmod(imp, *pair))(imp, node, x, y)
    return (_truncmod if like_c else _floormod)(imp, x, y)


def _many(pairwise: Callable[..., Value]) -> Callable[..., Value]:
    """Min, Max and Sum of any number of inputs."""

    def run(imp: Importer, node: ir.Node, *inputs: Value) -> Value:
        result = inputs[0]
        for other in inputs[1:]:
            result = pairwise(imp, node, result, other)
        return result

    return run


def _smaller(a: Any, b: Any) -> Any:
    return (
        min(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.min(tirx.convert(a), tirx.convert(b))
    )


def _larger(a: Any, b: Any) -> Any:
    return (
        max(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.max(tirx.convert(a), tirx.convert(b))
    )


def _not(imp: Importer, node: ir.Node, x: Value) -> Value:
    if isinstance(x, Ints) and all(isinstance(v, int) for v in x.flat()):
        return _on_ints(lambda v: int(not v), x)
    return imp.emit(op.logical_not(imp.tensor(x)))


def _neg(imp: Importer, node: ir.Node, x: Value) -> Value:
    return _on_ints(lambda v: -v, x) if isinstance(x, Ints) else imp.emit(op.negative(imp.tensor(x)))


def _where(imp: Importer, node: ir.Node, condition: Value, a: Value, b: Value) -> Value:
    x, y = as_ints(imp, a), as_ints(imp, b)
    if isinstance(condition, Ints) and x is not None and y is not None:
        chosen = _on_ints(lambda c, p, q: (p if c else q) if isinstance(c, int) else None, condition, x, y)
        if chosen is not None:
            return Ints(chosen.values, x.dtype)
    test = cast(imp, imp.tensor(condition), "bool")
    return imp.emit(op.where(*broadcastable(imp, test, imp.tensor(a), imp.tensor(b))))


def _pow(imp: Importer, node: ir.Node, x: Value, y: Value) -> Value:
    exponent, base = imp.array(y), imp.tensor(x)
    if (
        exponent is not None
        and exponent.size == 1
        and exponent.ndim <= len(imp.shape(base))
        and exponent.item() in (2, 3)
    ):
        square = imp.emit(op.multiply(base, base))  # powf is neither fast nor exact for squares and cubes
        return square if exponent.item() == 2 else imp.emit(op.multiply(square, base))
    dtype = str(base.ty.dtype)
    wide = dtype if dtype in ("float32", "float64") else "float64" if "int" in dtype else "float32"
    pair = broadcastable(imp, cast(imp, base, wide), cast(imp, imp.tensor(y), wide))
    return cast(imp, imp.emit(op.power(*pair)), dtype)


_multiply = _binary(op.multiply, _arithmetic(lambda a, b: a * b))
_add = _binary(op.add, _arithmetic(lambda a, b: a + b))

TABLE: dict[str, Callable[..., Value]] = {
    "Add": _add,
    "Sub": _binary(op.subtract, _arithmetic(lambda a, b: a - b)),
    "Mul": _mul,
    "Div": _div,
    "Mod": _mod,
    "Min": _many(_binary(op.minimum, _arithmetic(_smaller))),
    "Max": _many(_binary(op.maximum, _arithmetic(_larger))),
    "Sum": _many(_add),
    "Pow": _pow,
    "Equal": _binary(_equal_tensors, _comparison(_equal), answers=True),
    "Less": _binary(op.less, _comparison(lambda a, b: a < b), answers=True),
    "LessOrEqual": _binary(op.less_equal, _comparison(lambda a, b: a <= b), answers=True),
    "Greater": _binary(op.greater, _comparison(lambda a, b: a > b), answers=True),
    "GreaterOrEqual": _binary(op.greater_equal, _comparison(lambda a, b: a >= b), answers=True),
    "And": _binary(op.logical_and, lambda imp, a, b: int(a and b), answers=True),
    "Or": _binary(op.logical_or, lambda imp, a, b: int(a or b), answers=True),
    "Xor": _binary(op.logical_xor, lambda imp, a, b: int(a != b), answers=True),
    "Not": _not,
    "Where": _where,
    "Neg": _neg,
}
