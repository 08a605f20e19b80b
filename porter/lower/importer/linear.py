"""MatMul, Gemm, Transpose and Gather: where a constant matrix meets a packed kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from tvm import relax

from porter.lower.importer.attributes import attribute, axis_of
from porter.lower.importer.program import DTYPES, Importer
from porter.lower.importer.quantized import matrix_layout
from porter.lower.importer.values import Ints, Quantized, Value, Weight
from porter.lower.kernels import matmul as kernels

op = relax.op


def _is_matrix(value: Value) -> bool:
    """A constant float matrix, plain or as codes."""
    if isinstance(value, Weight):
        return len(value.shape) == 2 and DTYPES.get(value.value.dtype) == "float32"
    return isinstance(value, Quantized) and isinstance(value.codes, Weight) and len(value.codes.shape) == 2


def _has_kernel(rows: Value) -> bool:
    """A constant matrix [n, k] that kernels read row by row; of codes, the scales must run along the rows."""
    return _is_matrix(rows) and (isinstance(rows, Weight) or matrix_layout(rows) is not None)


def _packed(imp: Importer, rows: Weight | Quantized) -> tuple[kernels.Layout, list[relax.Var]]:
    """The layout and parameters of a matrix [n, k]; the same matrix asked for twice is stored once."""
    if isinstance(rows, Weight):
        n, k = rows.shape
        layout = kernels.Layout("fp32", n, k)
        return layout, [_parameter(imp, layout, rows, "codes")]
    layout = matrix_layout(rows)
    assert layout is not None
    return layout, [_parameter(imp, layout, rows, part) for part in ("codes", "scales")]


def _parameter(imp: Importer, layout: kernels.Layout, rows: Weight | Quantized, part: str) -> relax.Var:
    from porter.lower.importer.quantized import matrix_codes, matrix_scales

    source = (
        rows.value.name if isinstance(rows, Weight) else f"{rows.codes.value.name}/{rows.scales.value.name}"
    )
    _, shape, dtype = layout.buffers()[0 if part == "codes" else 1]

    def make() -> np.ndarray:
        if isinstance(rows, Weight):
            return layout.pack_codes(np.ascontiguousarray(rows.numpy()))
        return (
            layout.pack_codes(matrix_codes(rows))
            if part == "codes"
            else layout.pack_scales(matrix_scales(rows))
        )

    key = (source, part, layout, rows.transposed)
    return imp.weights.parameter(key, shape, dtype, make)


def _matmul(imp: Importer, node: ir.Node, a: Value, b: Value) -> Value:
    rows = replace(b, transposed=not b.transposed) if _is_matrix(b) else b  # kernels want [n, k]
    if not _has_kernel(rows):
        return imp.emit(op.matmul(imp.tensor(a), imp.tensor(b)))
    layout, parameters = _packed(imp, rows)
    x = imp.tensor(a)
    lead = imp.shape(x)[:-1]
    flat = x if len(lead) == 1 else imp.emit(op.reshape(x, [_rows(lead), layout.k]))
    kernel = imp.kernel(("matmul", layout), lambda: kernels.matmul(layout))
    y = imp.call(kernel, [flat, *parameters], [_rows(lead), layout.n], "float32")
    return y if len(lead) == 1 else imp.emit(op.reshape(y, [*lead, layout.n]))


def _rows(lead: list[object]) -> object:
    total: object = 1
    for dim in lead:
        total = total * dim  # type: ignore[operator]
    return total


def _gemm(imp: Importer, node: ir.Node, a: Value, b: Value, c: Value | None = None) -> Value:
    """alpha A' B' + beta C (' where transA, transB say so)."""
    x = imp.emit(op.permute_dims(imp.tensor(a))) if attribute(node, "transA", 0) else a
    w = _turn(imp, b) if attribute(node, "transB", 0) else b
    y = _matmul(imp, node, x, w)
    alpha, beta = float(attribute(node, "alpha", 1.0)), float(attribute(node, "beta", 1.0))
    y = y if alpha == 1.0 else imp.emit(op.multiply(y, relax.const(alpha, "float32")))
    if c is None or beta == 0.0:
        return y
    bias = imp.tensor(c)
    bias = bias if beta == 1.0 else imp.emit(op.multiply(bias, relax.const(beta, "float32")))
    return imp.emit(op.add(y, bias))


def _turn(imp: Importer, value: Value) -> Value:
    if _is_matrix(value):
        return replace(value, transposed=not value.transposed)
    return imp.emit(op.permute_dims(imp.tensor(value)))


def _transpose(imp: Importer, node: ir.Node, x: Value) -> Value:
    permutation = attribute(node, "perm")
    if _is_matrix(x):
        return x if permutation is not None and list(permutation) == [0, 1] else _turn(imp, x)
    return imp.emit(
        op.permute_dims(imp.tensor(x), None if permutation is None else [int(p) for p in permutation])
    )


def _gather(imp: Importer, node: ir.Node, data: Value, indices: Value) -> Value:
    known = imp.ints(indices)
    if isinstance(data, Ints):
        rank = data.values.ndim and (indices.values.ndim if isinstance(indices, Ints) else len(indices.shape))
        entries = [data.flat()[int(i)] for i in known]
        return Ints.of(entries if rank else entries[0])
    axis = axis_of(node, len(imp.shape(data)), 0)
    if axis == 0 and _has_kernel(data):
        return _gather_rows(imp, data, imp.tensor(indices))
    table, where = imp.tensor(data), imp.tensor(indices)
    if known is not None and all(isinstance(i, int) and i >= 0 for i in known):
        return imp.emit(op.take(table, where, axis=axis, mode="fast"))
    size = relax.const(0, str(where.ty.dtype))
    wrapped = op.where(op.less(where, size), op.add(where, _size_like(imp, table, axis, where)), where)
    return imp.emit(op.take(table, imp.emit(wrapped), axis=axis, mode="fast"))


def _size_like(imp: Importer, table: relax.Expr, axis: int, like: relax.Expr) -> relax.Expr:
    size = imp.tensor(Ints.of(imp.shape(table)[axis]))
    dtype = str(like.ty.dtype)
    return size if dtype == "int64" else imp.emit(op.astype(size, dtype))


def _gather_nd(imp: Importer, node: ir.Node, data: Value, indices: Value) -> Value:
    return imp.emit(
        op.gather_nd(imp.tensor(data), imp.tensor(indices), int(attribute(node, "batch_dims", 0)))
    )


def _gather_rows(imp: Importer, table: Weight | Quantized, indices: relax.Expr) -> Value:
    layout, parameters = _packed(imp, table)
    if str(indices.ty.dtype) != "int64":
        indices = imp.emit(op.astype(indices, "int64"))
    lead = imp.shape(indices)
    flat = indices if len(lead) == 1 else imp.emit(op.reshape(indices, [_rows(lead)]))
    kernel = imp.kernel(("gather", layout), lambda: kernels.gather(layout))
    y = imp.call(kernel, [flat, *parameters], [_rows(lead), layout.k], "float32")
    return y if len(lead) == 1 else imp.emit(op.reshape(y, [*lead, layout.k]))


TABLE: dict[str, Callable[..., Value]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Transpose": _transpose,
    "Gather": _gather,
    "GatherND": _gather_nd,
}
