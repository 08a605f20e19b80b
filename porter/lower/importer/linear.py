"""MatMul, Gemm and Transpose: where a constant matrix meets a packed kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from porter.lower.importer.attributes import attribute
from porter.lower.importer.broadcast import agreed, broadcast_dims, broadcastable
from porter.lower.importer.precision import cast, in_float32
from porter.lower.importer.program import Importer
from porter.lower.importer.quantized import matrix_codes, matrix_layout, matrix_scales
from porter.lower.importer.values import Ints, Quantized, Value, Weight
from porter.lower.kernels import matmul as kernels

op = relax.op

FLOAT_CODECS = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}


def is_matrix(value: Value) -> bool:
    """A constant float matrix, plain or as codes."""
    if isinstance(value, Weight):
        return len(value.shape) == 2 and value.type in FLOAT_CODECS
    return isinstance(value, Quantized) and isinstance(value.codes, Weight) and len(value.codes.shape) == 2


def has_kernel(rows: Value) -> bool:
    """A constant matrix [n, k] that kernels read row by row; of codes, the scales must run along the rows."""
    return is_matrix(rows) and (isinstance(rows, Weight) or matrix_layout(rows) is not None)


def packed(imp: Importer, rows: Weight | Quantized) -> tuple[kernels.Layout, list[relax.Var]]:
    """The layout and parameters of a matrix [n, k]; the same matrix asked for twice is stored once."""
    if isinstance(rows, Weight):
        n, k = rows.shape
        layout = kernels.Layout(FLOAT_CODECS[rows.type], n, k)
        codes = _parameter(imp, layout, 0, rows, lambda: layout.pack_codes(_bits(rows)))
        return layout, [codes]
    layout = matrix_layout(rows)
    assert layout is not None
    codes = _parameter(imp, layout, 0, rows, lambda: layout.pack_codes(matrix_codes(rows)))
    scales = _parameter(imp, layout, 1, rows, lambda: layout.pack_scales(matrix_scales(rows)))
    return layout, [codes, scales]


def _bits(rows: Weight) -> np.ndarray:
    array = np.ascontiguousarray(rows.numpy())
    return array.view(np.uint16) if rows.type == ir.DataType.BFLOAT16 else array


def _parameter(
    imp: Importer,
    layout: kernels.Layout,
    which: int,
    rows: Weight | Quantized,
    make: Callable[[], np.ndarray],
) -> relax.Var:
    source = rows.value if isinstance(rows, Weight) else (rows.codes.value, rows.scales.value)
    _, shape, dtype = layout.buffers()[which]
    return imp.weights.parameter((source, which, layout, rows.transposed), shape, dtype, make)


def _turned(value: Weight | Quantized) -> Weight | Quantized:
    return value.turned() if isinstance(value, Quantized) else Weight(value.value, not value.transposed)


def _matmul(imp: Importer, node: ir.Node, a: Value, b: Value) -> Value:
    rows = _turned(b) if is_matrix(b) else b  # kernels want [n, k]
    if not has_kernel(rows):
        return _general(imp, node, a, b)
    x = imp.tensor(a)
    layout, parameters = packed(imp, rows)
    lead = imp.shape(x)[:-1]
    x, dtype = agreed(imp, x, [*lead, layout.k]), str(x.ty.dtype)
    x, count = cast(imp, x, "float32"), imp.product(lead)
    flat = x if len(lead) == 1 else imp.emit(op.reshape(x, [imp.dim(count), imp.dim(layout.k)]))
    kernel = imp.kernel(("matmul", layout), lambda: kernels.matmul(layout))
    y = cast(imp, imp.call(kernel, [flat, *parameters], [count, layout.n], "float32"), dtype)
    return y if len(lead) == 1 else imp.emit(op.reshape(y, [imp.dim(d) for d in [*lead, layout.n]]))


@in_float32
def _general(imp: Importer, node: ir.Node, a: Value, b: Value) -> Value:
    """Two tensors computed at run time, or a constant that is no matrix."""
    x, y = imp.tensor(a), imp.tensor(b)
    p, q = imp.shape(x), imp.shape(y)
    if len(p) > 1 and len(q) > 1:
        lead = broadcast_dims(imp, p[:-2], q[:-2])
        x, y = (
            agreed(imp, x, [*_kept(p[:-2], lead), *p[-2:]]),
            agreed(imp, y, [*_kept(q[:-2], lead), p[-1], q[-1]]),
        )
    return imp.emit(op.matmul(x, y))


def _kept(dims: list[Any], whole: list[Any]) -> list[Any]:
    """The dimensions as they stand in a broadcast to `whole`: a 1 stays."""
    tail = whole[len(whole) - len(dims) :]
    return [a if isinstance(a, int) and a == 1 else b for a, b in zip(dims, tail, strict=True)]


def _gemm(imp: Importer, node: ir.Node, a: Value, b: Value, c: Value | None = None) -> Value:
    """alpha A' B' + beta C (' where transA, transB say so)."""
    x = _permuted(imp, a, [1, 0]) if attribute(node, "transA", 0) else a
    w = _permuted(imp, b, [1, 0]) if attribute(node, "transB", 0) else b
    y = imp.tensor(_matmul(imp, node, x, w))
    dtype, alpha, beta = (
        str(y.ty.dtype),
        float(attribute(node, "alpha", 1.0)),
        float(attribute(node, "beta", 1.0)),
    )
    y = y if alpha == 1.0 else imp.emit(op.multiply(y, relax.const(alpha, dtype)))
    if c is None or beta == 0.0:
        return y
    bias = imp.tensor(c)
    bias = bias if beta == 1.0 else imp.emit(op.multiply(bias, relax.const(beta, dtype)))
    return imp.emit(op.add(*broadcastable(imp, y, bias)))


def _transpose(imp: Importer, node: ir.Node, x: Value) -> Value:
    rank = len(imp.shape(x))
    given = attribute(node, "perm")
    return _permuted(imp, x, [int(p) for p in given] if given is not None else list(range(rank))[::-1])


def _permuted(imp: Importer, x: Value, order: list[int]) -> Value:
    """A constant is turned when it is packed, all else when the program runs."""
    if order == sorted(order):
        return x
    if is_matrix(x):
        return _turned(x)
    if isinstance(x, Weight):
        return _lazily_permuted(x, order)
    return x if isinstance(x, Ints) else imp.emit(op.permute_dims(imp.tensor(x), order))


def _lazily_permuted(x: Weight, order: list[int]) -> Weight:
    shape = ir.Shape([x.shape[i] for i in order])
    tensor = ir.LazyTensor(
        lambda: ir.tensor(x.numpy().transpose(order)), dtype=x.type, shape=shape, name=x.value.name
    )
    return Weight(ir.Value(name=x.value.name, const_value=tensor, type=ir.TensorType(x.type)))


TABLE: dict[str, Callable[..., Value]] = {"MatMul": _matmul, "Gemm": _gemm, "Transpose": _transpose}
