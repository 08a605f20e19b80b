"""DynamicQuantizeLinear and MatMulInteger: products of 8-bit integers as other tools write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx
from tvm.ir import Expr

from porter.lower.importer.broadcast import agreed
from porter.lower.importer.constants import CODEC_OF, layout_of
from porter.lower.importer.linear import flattened, packed
from porter.lower.importer.precision import cast
from porter.lower.importer.program import Importer
from porter.lower.importer.quantized import nonzero, rounded
from porter.lower.importer.values import Quantized, Value, Weight
from porter.lower.kernels.products import Activation, exact

op = relax.op
EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)


def _dynamic(imp: Importer, node: ir.Node, x: Value) -> tuple[Value, ...]:
    """x -> uint8 codes, their scale and zero point, which the range of x, stretched to hold 0, decides."""
    tensor, nothing = imp.tensor(x), relax.const(0.0, "float32")
    low = imp.emit(op.minimum(imp.emit(op.min(tensor)), nothing))
    high = imp.emit(op.maximum(imp.emit(op.max(tensor)), nothing))

    def step(a: te.Tensor, b: te.Tensor) -> te.Tensor:
        size = (b() - a()) / tirx.FloatImm("float32", 255)
        return te.compute((), lambda: tirx.Select(a() == b(), tirx.FloatImm("float32", 1), size))

    def zero(a: te.Tensor, s: te.Tensor) -> te.Tensor:
        return te.compute((), lambda: rounded("uint8", tirx.FloatImm("float32", 0) - a() / s()))

    def codes(t: te.Tensor, s: te.Tensor, z: te.Tensor) -> te.Tensor:
        def element(*index: Any) -> Expr:
            return rounded("uint8", t(*index) / s(), tirx.Cast("float32", z()))

        return te.compute(t.shape, element)

    scale = imp.te(step, low, high, name="dynamic_scale")
    zeros = imp.te(zero, low, scale, name="dynamic_zero")
    return imp.te(codes, tensor, scale, zeros, name="quantize"), scale, zeros


def _matmul_integer(
    imp: Importer,
    node: ir.Node,
    a: Value,
    b: Value,
    a_zero: Value | None = None,
    b_zero: Value | None = None,
) -> Value:
    """(a - a_zero) (b - b_zero) in int32."""
    a_zero, b_zero = nonzero(imp, a_zero), nonzero(imp, b_zero)
    rows = _rows(b, b_zero)
    layout = None if rows is None else layout_of(rows)
    layout = None if layout is None else imp.templates.layout(layout)
    scalar = a_zero is None or imp.product(imp.shape(a_zero)) == 1
    if layout is None or not scalar or len(imp.shape(a)) < 2:
        return _plainly(imp, a, b, a_zero, b_zero)
    spec = Activation(imp.dtype(a), layout.k, a_zero is not None)
    if not exact(layout, spec):
        return _plainly(imp, a, b, a_zero, b_zero)
    lead = imp.shape(a)[:-1]
    count = imp.product(lead)
    one = [imp.dim(count), imp.dim(1)]
    x = flattened(imp, agreed(imp, imp.tensor(a), [*lead, layout.k]), [count, layout.k])
    arguments = [x, imp.emit(op.ones(relax.ShapeExpr(one), "float32"))]
    if a_zero is not None:
        zero = flattened(imp, cast(imp, imp.tensor(a_zero), "int32"), [1, 1])
        arguments.append(imp.emit(op.broadcast_to(zero, one)))
    kernel = imp.kernel(
        ("products", layout, spec, "int32"), lambda: imp.templates.products(layout, spec, "int32")
    )
    y = imp.call(kernel, [*arguments, *packed(imp, rows, layout)], [count, layout.n], "int32")
    return flattened(imp, y, [*lead, layout.n])


def _rows(b: Value, zero: Value | None) -> Quantized | None:
    """A constant matrix [k, n] as the kernels want it, [n, k]; its scales are ones."""
    if not isinstance(b, Weight) or b.type not in EIGHT_BITS or len(b.shape) != 2:
        return None
    if zero is not None and not isinstance(zero, Weight):
        return None
    shape = zero.shape if zero is not None else ()
    axis = -1 if int(np.prod(shape)) == 1 else 1
    ones = Weight.of(np.ones(shape if axis == 1 else (), np.float32), "ones")
    return Quantized(b, CODEC_OF[b.type], ones, axis, zeros=zero).turned()


def _plainly(imp: Importer, a: Value, b: Value, a_zero: Value | None, b_zero: Value | None) -> Value:
    """By widening both first: neither is a constant matrix, or a zero point goes with each row."""

    def widened(value: Value, zero: Value | None, axis: int) -> relax.Expr:
        tensor = cast(imp, imp.tensor(value), "int32")
        if zero is None:
            return tensor
        less = cast(imp, imp.tensor(zero), "int32")
        if len(imp.shape(less)) == 1 and axis == -2:
            less = imp.emit(op.expand_dims(less, [-1]))
        return imp.emit(op.subtract(tensor, less))

    return imp.emit(op.matmul(widened(a, a_zero, -2), widened(b, b_zero, -1)))


TABLE: dict[str, Callable[..., Value]] = {
    "DynamicQuantizeLinear": _dynamic,
    "MatMulInteger": _matmul_integer,
}
