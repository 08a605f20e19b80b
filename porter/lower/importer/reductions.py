"""Reductions, running sums and the choice of the largest."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import onnx_ir as ir
from tvm import relax

from porter.errors import TargetError
from porter.lower.importer.attributes import attribute, axis_of
from porter.lower.importer.precision import in_float32
from porter.lower.importer.program import Importer
from porter.lower.importer.shapes import axes_of, known
from porter.lower.importer.values import Ints, Value

op = relax.op


def _reduce(
    reduction: Callable[..., Any], int_op: Callable[[Any, Any], Any] | None = None, start: int = 0
) -> Callable[..., Value]:
    """`int_op` from `start` on folds sizes, so that a product of them stays symbolic."""

    def run(imp: Importer, node: ir.Node, x: Value, axes: Value | None = None) -> Value:
        found, keep = axes_of(imp, node, axes), bool(attribute(node, "keepdims", 1))
        if not found and attribute(node, "noop_with_empty_axes", 0):
            return x
        if isinstance(x, Ints) and x.values.ndim == 1 and int_op:
            total = imp.simplify(reduce(int_op, x.flat(), start))
            return Ints.of([total] if keep else total, x.dtype)
        return imp.emit(reduction(imp.tensor(x), found or None, keep))

    return in_float32(run)


def _l2(tensor: relax.Expr, axes: list[int] | None, keep: bool) -> relax.Expr:
    return op.sqrt(op.sum(op.multiply(tensor, tensor), axes, keep))


def _l1(tensor: relax.Expr, axes: list[int] | None, keep: bool) -> relax.Expr:
    return op.sum(op.abs(tensor), axes, keep)


def _sum_of_squares(tensor: relax.Expr, axes: list[int] | None, keep: bool) -> relax.Expr:
    return op.sum(op.multiply(tensor, tensor), axes, keep)


def _cumsum(imp: Importer, node: ir.Node, x: Value, axis: Value) -> Value:
    tensor = imp.tensor(x)
    where = known(imp, axis, "the axis of a CumSum")[0] % len(imp.shape(tensor))
    backwards = bool(attribute(node, "reverse", 0))
    tensor = imp.emit(op.flip(tensor, where)) if backwards else tensor
    exclusive = bool(attribute(node, "exclusive", 0))
    total = imp.emit(op.cumsum(tensor, axis=where, dtype=str(tensor.ty.dtype), exclusive=exclusive))
    return imp.emit(op.flip(total, where)) if backwards else total


def _top_k(imp: Importer, node: ir.Node, x: Value, k: Value) -> tuple[Value, Value]:
    """Of equals the first comes first, as ONNX has it."""
    tensor = imp.tensor(x)
    count = known(imp, k, "the number of a TopK")[0]
    axis = axis_of(node, len(imp.shape(tensor)), -1)
    if not isinstance(count, int):
        raise TargetError("PORT-0415", "a TopK of a symbolic number has no lowering", where=imp.current)
    both = imp.emit(op.topk(tensor, count, axis, "both", bool(attribute(node, "largest", 1)), "int64"))
    return imp.emit(relax.TupleGetItem(both, 0)), imp.emit(relax.TupleGetItem(both, 1))


TABLE: dict[str, Callable[..., Value]] = {
    "ReduceMean": _reduce(op.mean),
    "ReduceSum": _reduce(op.sum, lambda a, b: a + b),
    "ReduceMax": _reduce(op.max),
    "ReduceMin": _reduce(op.min),
    "ReduceProd": _reduce(op.prod, lambda a, b: a * b, 1),
    "ReduceL1": _reduce(_l1),
    "ReduceL2": _reduce(_l2),
    "ReduceSumSquare": _reduce(_sum_of_squares),
    "CumSum": in_float32(_cumsum),
    "TopK": in_float32(_top_k),
}
