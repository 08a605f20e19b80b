"""Functions of one tensor, element by element or along an axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from tvm import relax, te, tirx
from tvm.ir import Expr

from porter.lower.importer.attributes import attribute
from porter.lower.importer.precision import in_float32
from porter.lower.importer.program import Importer
from porter.lower.importer.values import Value
from porter.lower.kernels.define import f32, tanh

op = relax.op


def _unary(tensor_op: Callable[..., Any]) -> Callable[..., Value]:
    return lambda imp, node, x: imp.emit(tensor_op(imp.tensor(x)))


def _by_element(name: str, function: Callable[[Expr], Expr]) -> Callable[..., Value]:
    """From a function of one number."""

    def run(imp: Importer, node: ir.Node, x: Value) -> Value:
        return imp.te(lambda t: te.compute(t.shape, lambda *i: function(t(*i))), imp.tensor(x), name=name)

    return run


def _gelu_by_tanh(x: Expr) -> Expr:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x³)))."""
    inner = f32(0.7978845608028654) * (x + f32(0.044715) * x * x * x)
    return f32(0.5) * x * (f32(1) + tanh(inner))


def _swish(imp: Importer, node: ir.Node, x: Value) -> Value:
    """x * sigmoid(alpha x) (opset 24)."""
    tensor, alpha = imp.tensor(x), float(attribute(node, "alpha", 1.0))
    scaled = tensor if alpha == 1.0 else op.multiply(tensor, relax.const(alpha, str(tensor.ty.dtype)))
    return imp.emit(op.multiply(tensor, op.sigmoid(scaled)))


def _gelu(imp: Importer, node: ir.Node, x: Value) -> Value:
    """0.5 x (1 + erf(x / sqrt 2)), or the tanh form."""
    if attribute(node, "approximate", "none") == "tanh":
        return _by_element("gelu_tanh", _gelu_by_tanh)(imp, node, x)
    return imp.emit(op.nn.gelu(imp.tensor(x)))


def _is_inf(imp: Importer, node: ir.Node, x: Value) -> Value:
    tensor = imp.tensor(x)
    zero, found = relax.const(0, str(tensor.ty.dtype)), op.isinf(tensor)
    if not attribute(node, "detect_negative", 1):
        found = op.logical_and(found, op.greater(tensor, zero))
    if not attribute(node, "detect_positive", 1):
        found = op.logical_and(found, op.less(tensor, zero))
    return imp.emit(found)


def _same(imp: Importer, node: ir.Node, x: Value, *rest: Value) -> Value:
    return x


def _reciprocal(imp: Importer, node: ir.Node, x: Value) -> Value:
    tensor = imp.tensor(x)
    return imp.emit(op.divide(relax.const(1, str(tensor.ty.dtype)), tensor))


def _softmax(imp: Importer, node: ir.Node, x: Value) -> Value:
    return imp.emit(op.nn.softmax(imp.tensor(x), axis=int(attribute(node, "axis", -1))))


TABLE: dict[str, Callable[..., Value]] = {
    "IsNaN": _unary(op.isnan),
    "IsInf": _is_inf,
    "Abs": _unary(op.abs),
    "Sign": _unary(op.sign),
    "Sqrt": _unary(op.sqrt),
    "Reciprocal": _reciprocal,
    "Exp": _unary(op.exp),
    "Log": _unary(op.log),
    "Sin": _unary(op.sin),
    "Cos": _unary(op.cos),
    "Tanh": in_float32(_by_element("tanh", tanh)),
    "Erf": _unary(op.erf),
    "Sigmoid": _unary(op.sigmoid),
    "Relu": _unary(op.nn.relu),
    "Floor": _unary(op.floor),
    "Ceil": _unary(op.ceil),
    "Round": _by_element("round", tirx.nearbyint),  # half to even
    "Swish": _swish,
    "Gelu": in_float32(_gelu),
    "Softmax": in_float32(_softmax),
    "Identity": _same,
    "Dropout": _same,
}
