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
from porter.lower.kernels import scan

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


def _in_three(imp: Importer, tensor: relax.Expr, axis: int) -> tuple[relax.Expr, list[Any]]:
    """The tensor as [outer, n, inner] around an axis, and these sizes."""
    dims = imp.shape(tensor)
    sizes = [imp.product(dims[:axis]), dims[axis], imp.product(dims[axis + 1 :])]
    return imp.emit(op.reshape(tensor, [imp.dim(d) for d in sizes])), sizes


def _cumsum(imp: Importer, node: ir.Node, x: Value, axis: Value) -> Value:
    tensor = imp.tensor(x)
    dims, dtype = imp.shape(tensor), str(tensor.ty.dtype)
    three, sizes = _in_three(imp, tensor, known(imp, axis, "the axis of a CumSum")[0] % len(dims))
    exclusive, reverse = (bool(attribute(node, name, 0)) for name in ("exclusive", "reverse"))
    kernel = imp.kernel(
        ("running_sum", dtype, exclusive, reverse),
        lambda: scan.running_sum(dtype, exclusive=exclusive, reverse=reverse),
    )
    return imp.emit(op.reshape(imp.call(kernel, [three], sizes, dtype), [imp.dim(d) for d in dims]))


def _top_k(imp: Importer, node: ir.Node, x: Value, k: Value) -> tuple[Value, Value]:
    tensor = imp.tensor(x)
    dims, dtype, count = imp.shape(tensor), str(tensor.ty.dtype), known(imp, k, "the number of a TopK")[0]
    axis = axis_of(node, len(dims), -1)
    if not isinstance(count, int) or not isinstance(dims[axis], int) or not 0 < count <= dims[axis]:
        what = f"a TopK of {count} among {dims[axis]} has no lowering: both must be fixed"
        raise TargetError("PORT-0415", what, where=imp.current)
    three, (outer, _, inner) = _in_three(imp, tensor, axis)
    largest = bool(attribute(node, "largest", 1))
    kernel = imp.kernel(("top_k", count, dtype, largest), lambda: scan.top_k(count, dtype, largest=largest))
    shape = [outer, count, inner]
    types = [relax.TensorType([imp.dim(d) for d in shape], t) for t in (dtype, "int64")]
    both = imp.emit(relax.call_tir(kernel, [three], types))
    found = [imp.dim(count if i == axis else d) for i, d in enumerate(dims)]
    values, places = (imp.emit(op.reshape(imp.emit(relax.TupleGetItem(both, i)), found)) for i in (0, 1))
    return values, places


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
