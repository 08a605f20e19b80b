"""Elementwise operators and casts; integer ones stay symbolic where their inputs are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx
from tvm.ir import Expr

from porter.lower.importer.attributes import attribute
from porter.lower.importer.program import DTYPES, SMALL, Importer
from porter.lower.importer.values import Ints, Value, Weight

op = relax.op


def _ints_pair(imp: Importer, a: Value, b: Value) -> tuple[Ints, Ints] | None:
    """Both as Ints when at least one is symbolic and the other is known too."""
    if not (isinstance(a, Ints) or isinstance(b, Ints)):
        return None
    return None if (x := as_ints(imp, a)) is None or (y := as_ints(imp, b)) is None else (x, y)


def as_ints(imp: Importer, value: Value | None) -> Ints | None:
    """A value of known integers of rank 0 or 1, else None."""
    if isinstance(value, Ints):
        return value
    entries = imp.ints(value) if value is not None else None
    if entries is None or len(value.shape) > 1:
        return None
    return Ints.of(entries if len(value.shape) else entries[0])


def _binary(tensor_op: Callable[..., Any], int_op: Callable[[Any, Any], Any] | None) -> Callable[..., Value]:
    def run(imp: Importer, node: ir.Node, a: Value, b: Value) -> Value:
        pair = _ints_pair(imp, a, b) if int_op else None
        if pair:
            out = np.vectorize(int_op, otypes=[object])(pair[0].values, pair[1].values)
            return Ints(np.asarray(np.vectorize(imp.simplify, otypes=[object])(out), object))
        return imp.emit(tensor_op(imp.tensor(a), imp.tensor(b)))

    return run


def _unary(tensor_op: Callable[..., Any]) -> Callable[..., Value]:
    return lambda imp, node, x: imp.emit(tensor_op(imp.tensor(x)))


def _divide(a: Any, b: Any) -> Any:
    """ONNX integer division rounds toward zero; dimensions are not negative, so that is floor."""
    return tirx.floordiv(a, b) if isinstance(a, Expr) or isinstance(b, Expr) else int(a / b)


def _div(imp: Importer, node: ir.Node, a: Value, b: Value) -> Value:
    if _ints_pair(imp, a, b):
        return _binary(op.divide, _divide)(imp, node, a, b)
    x, y = imp.tensor(a), imp.tensor(b)
    if "int" in str(x.ty.dtype):
        return imp.te(lambda p, q: te.compute(p.shape, lambda *i: tirx.truncdiv(p(*i), q(*i))), *_broadcast(imp, x, y),
                      name="truncdiv")  # fmt: skip
    return imp.emit(op.divide(x, y))


def _broadcast(imp: Importer, a: relax.Expr, b: relax.Expr) -> list[relax.Expr]:
    shape = imp.emit(op.add(a, b)).ty.shape
    return [imp.emit(op.broadcast_to(v, shape)) for v in (a, b)]


def _extreme(tensor_op: Callable[..., Any], int_op: Callable[[Any, Any], Any]) -> Callable[..., Value]:
    """Min and Max of any number of inputs."""
    pairwise = _binary(tensor_op, int_op)

    def run(imp: Importer, node: ir.Node, *inputs: Value) -> Value:
        result = inputs[0]
        for other in inputs[1:]:
            result = pairwise(imp, node, result, other)
        return result

    return run


def _equal_ints(imp: Importer, a: Any, b: Any) -> bool | None:
    """Provably equal, provably not, or None."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    x, y = tirx.convert(a), tirx.convert(b)
    if imp.analyzer.can_prove_equal(x, y):
        return True
    return False if imp.analyzer.can_prove(x != y) else None


def _equal(imp: Importer, node: ir.Node, a: Value, b: Value) -> Value:
    pair = _ints_pair(imp, a, b)
    if pair:
        x, y = np.broadcast_arrays(pair[0].values, pair[1].values)
        known = [_equal_ints(imp, p, q) for p, q in zip(x.reshape(-1), y.reshape(-1), strict=True)]
        if None not in known:
            return Ints.of([int(k) for k in known] if x.ndim else int(known[0]))
    return imp.emit(op.equal(imp.tensor(a), imp.tensor(b)))


def _where(imp: Importer, node: ir.Node, condition: Value, a: Value, b: Value) -> Value:
    known = as_ints(imp, condition) if isinstance(condition, Ints) else None
    x, y = as_ints(imp, a), as_ints(imp, b)
    if known is not None and x is not None and y is not None:
        chosen = np.broadcast_arrays(known.values, x.values, y.values)
        flat = [p if c else q for c, p, q in zip(*(v.reshape(-1) for v in chosen), strict=True)]
        return Ints.of(flat if chosen[0].ndim else flat[0])
    test = imp.tensor(condition)
    test = test if str(test.ty.dtype) == "bool" else imp.emit(op.astype(test, "bool"))
    return imp.emit(op.where(test, imp.tensor(a), imp.tensor(b)))


def _cast(imp: Importer, node: ir.Node, x: Value) -> Value:
    return _cast_to(imp, x, ir.DataType(attribute(node, "to")))


def _cast_like(imp: Importer, node: ir.Node, x: Value, like: Value) -> Value:
    if isinstance(like, Ints):
        return _cast_to(imp, x, ir.DataType.INT64)
    return _cast_to(
        imp, x, like.value.dtype if isinstance(like, Weight) else node.inputs[1].dtype or _type(imp, like)
    )


def _type(imp: Importer, value: Value) -> ir.DataType:
    return next(t for t, name in DTYPES.items() if name == str(imp.tensor(value).ty.dtype))


def _cast_to(imp: Importer, x: Value, to: ir.DataType) -> Value:
    if isinstance(x, Ints) and to in (ir.DataType.INT64, ir.DataType.INT32):
        return x
    if isinstance(x, Weight) and x.value.const_value.size <= SMALL:
        name = f"{x.value.name}_{to.name.lower()}"
        cast = ir.tensor(x.numpy().astype(to.numpy()), name=name)
        return Weight(ir.Value(name=name, const_value=cast, type=ir.TensorType(to)))
    tensor = imp.tensor(x)
    if str(tensor.ty.dtype) == "bool" or DTYPES[to] != "bool":
        return imp.emit(op.astype(tensor, DTYPES[to]))
    return imp.emit(op.not_equal(tensor, relax.const(0, str(tensor.ty.dtype))))


def _pow(imp: Importer, node: ir.Node, x: Value, y: Value) -> Value:
    exponent = imp.array(y)
    base = imp.tensor(x)
    if exponent is not None and exponent.size == 1 and float(exponent.reshape(-1)[0]) == 2.0:
        return imp.emit(op.multiply(base, base))  # powf is neither fast nor exact for squares
    power = imp.tensor(y)
    if str(power.ty.dtype) != str(base.ty.dtype):
        power = imp.emit(op.astype(power, str(base.ty.dtype)))
    return imp.emit(op.power(base, power))


def _swish(imp: Importer, node: ir.Node, x: Value) -> Value:
    """x * sigmoid(alpha x) (opset 24)."""
    tensor, alpha = imp.tensor(x), float(attribute(node, "alpha", 1.0))
    scaled = tensor if alpha == 1.0 else op.multiply(tensor, relax.const(alpha, "float32"))
    return imp.emit(op.multiply(tensor, op.sigmoid(scaled)))


def _gelu(imp: Importer, node: ir.Node, x: Value) -> Value:
    """0.5 x (1 + erf(x / sqrt 2)), or the tanh form."""
    tensor = imp.tensor(x)
    return imp.emit(
        op.nn.gelu_tanh(tensor) if attribute(node, "approximate", "none") == "tanh" else op.nn.gelu(tensor)
    )


def _round(imp: Importer, node: ir.Node, x: Value) -> Value:
    """Half to even."""
    return imp.te(
        lambda t: te.compute(t.shape, lambda *i: tirx.nearbyint(t(*i))), imp.tensor(x), name="round"
    )


def _same(imp: Importer, node: ir.Node, x: Value, *rest: Value) -> Value:
    return x


def _reciprocal(imp: Importer, node: ir.Node, x: Value) -> Value:
    tensor = imp.tensor(x)
    return imp.emit(op.divide(relax.const(1, str(tensor.ty.dtype)), tensor))


def _softmax(imp: Importer, node: ir.Node, x: Value) -> Value:
    return imp.emit(op.nn.softmax(imp.tensor(x), axis=int(attribute(node, "axis", -1))))


TABLE: dict[str, Callable[..., Value]] = {
    "Add": _binary(op.add, lambda a, b: a + b),
    "Sub": _binary(op.subtract, lambda a, b: a - b),
    "Mul": _binary(op.multiply, lambda a, b: a * b),
    "Div": _div,
    "Min": _extreme(
        op.minimum, lambda a, b: min(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.min(a, b)
    ),
    "Max": _extreme(
        op.maximum, lambda a, b: max(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.max(a, b)
    ),
    "Pow": _pow,
    "Equal": _equal,
    "Less": _binary(op.less, None),
    "LessOrEqual": _binary(op.less_equal, None),
    "Greater": _binary(op.greater, None),
    "GreaterOrEqual": _binary(op.greater_equal, None),
    "And": _binary(op.logical_and, None),
    "Or": _binary(op.logical_or, None),
    "Not": _unary(op.logical_not),
    "IsNaN": _unary(op.isnan),
    "Where": _where,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Neg": _unary(op.negative),
    "Abs": _unary(op.abs),
    "Sqrt": _unary(op.sqrt),
    "Reciprocal": _reciprocal,
    "Exp": _unary(op.exp),
    "Log": _unary(op.log),
    "Sin": _unary(op.sin),
    "Cos": _unary(op.cos),
    "Tanh": _unary(op.tanh),
    "Erf": _unary(op.erf),
    "Sigmoid": _unary(op.sigmoid),
    "Relu": _unary(op.nn.relu),
    "Floor": _unary(op.floor),
    "Ceil": _unary(op.ceil),
    "Round": _round,
    "Swish": _swish,
    "Gelu": _gelu,
    "Softmax": _softmax,
    "Identity": _same,
    "Dropout": _same,
}
