"""MatMul, Gemm and Transpose: where a constant matrix meets a packed kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from porter.lower.importer.attributes import attribute
from porter.lower.importer.broadcast import agreed, broadcast_dims, broadcastable
from porter.lower.importer.constants import arrays, layout_of
from porter.lower.importer.precision import cast, in_float32
from porter.lower.importer.program import Importer
from porter.lower.importer.quantized import expand
from porter.lower.importer.templates import Multiplied
from porter.lower.importer.values import Ints, Picked, Quantized, Value, Weight
from porter.lower.kernels.codecs import CODECS
from porter.lower.kernels.layout import Layout
from porter.lower.kernels.naming import format_name, format_of
from porter.lower.kernels.products import Activation, fits

op = relax.op

FLOAT_CODECS = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
CODES = ("int8", "uint8", "e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz")  # of x, multiplied as they are


def is_matrix(imp: Importer, value: Value) -> bool:
    """A constant float matrix or stack of matrices, plain or as codes."""
    if isinstance(value, Weight):
        return len(value.shape) in (2, 3) and value.type in FLOAT_CODECS
    return isinstance(value, Quantized) and value.constant and len(imp.shape(value)) in (2, 3)


def layout_for(imp: Importer, rows: Value) -> Layout | None:
    """How kernels read a constant [n, k], or stack of them, row by row; None where it is none, or empty."""
    if not is_matrix(imp, rows) or 0 in imp.shape(rows):
        return None
    if isinstance(rows, Quantized):
        found = layout_of(rows)
    else:
        stack = rows.shape[0] if len(rows.shape) == 3 else 1
        found = Layout(FLOAT_CODECS[rows.type], *rows.shape[-2:], stack=stack)
    return None if found is None else imp.templates.layout(found)


def packed(imp: Importer, rows: Weight | Quantized, layout: Layout) -> list[relax.Var]:
    """The parameters of a matrix; the same matrix asked for twice is stored once."""
    makers = (
        {"w": lambda: layout.pack_codes(_values(rows))} if isinstance(rows, Weight) else arrays(rows, layout)
    )
    return [
        imp.weights.parameter((rows, name, layout), shape, dtype, makers[name])
        for name, shape, dtype in layout.buffers()
    ]


def _values(rows: Weight) -> np.ndarray:
    return np.ascontiguousarray(rows.numpy())


def _matmul(imp: Importer, node: ir.Node, a: Value, b: Value) -> Value:
    if isinstance(b, Weight | Quantized | Picked) and len(imp.shape(b)) > 2:
        from porter.lower.importer.experts import stacked  # it uses what is above

        found = stacked(imp, a, b)
        return _general(imp, node, a, b) if found is None else found
    rows = b.turned() if is_matrix(imp, b) else b  # kernels want [n, k]
    layout = layout_for(imp, rows)
    if layout is None or len(imp.shape(a)) == 0:
        return _general(imp, node, a, b)
    lead, dtype = imp.shape(a)[:-1], imp.dtype(a)
    count = imp.product(lead)
    coded = _coded(imp, a, layout, count)
    if coded is None:
        x = cast(imp, agreed(imp, imp.tensor(a), [*lead, layout.k]), "float32")
        arguments = [flattened(imp, x, [count, layout.k])]
        kernel = imp.kernel(("matmul", layout), lambda: imp.templates.matmul(layout))
        multiplied(imp, rows, layout)
    else:
        spec, arguments = coded
        kernel = imp.kernel(("products", layout, spec), lambda: imp.templates.products(layout, spec))
        multiplied(imp, rows, layout, a.codec)
    y = imp.call(kernel, [*arguments, *packed(imp, rows, layout)], [count, layout.n], "float32")
    return flattened(imp, cast(imp, y, dtype), [*lead, layout.n])


def multiplied(imp: Importer, rows: Weight | Quantized, layout: Layout, codec: str = "") -> None:
    """Note that a constant matrix is multiplied, by floats or by codes."""
    activations = format_of(codec) if codec else ""
    imp.multiplied[rows, activations] = Multiplied("weights", format_name(layout), activations)


def flattened(imp: Importer, x: relax.Expr, dims: list[Any]) -> relax.Expr:
    """The same elements in another shape."""
    own = imp.shape(x)
    if len(own) == len(dims) and all(imp.same(p, q) for p, q in zip(own, dims, strict=True)):
        return x
    return imp.emit(op.reshape(x, [imp.dim(d) for d in dims]))


def _coded(imp: Importer, a: Value, layout: Layout, count: Any) -> tuple[Activation, list[relax.Expr]] | None:
    """How a product reads an x of 8-bit codes, and its arguments; None where it must be widened first."""
    if not isinstance(a, Quantized) or a.constant or a.raw or a.codec not in CODES:
        return None
    dims = imp.shape(a)
    block = layout.k if a.axis == -1 else min(a.block, layout.k)
    kept = CODECS[a.codec].integer is not None or imp.templates.keeps_codes
    spec = Activation(a.codec if kept else "fp32", block or layout.k, a.zeros is not None)
    if (a.axis != -1 and (not a.block or a.axis != len(dims) - 1)) or not fits(layout, spec):
        return None
    groups = -(-layout.k // spec.group)

    def per_row(given: relax.Expr, dtype: str) -> relax.Expr:
        tensor = cast(imp, given, dtype)
        if a.axis != -1:
            return flattened(imp, tensor, [count, groups])
        return imp.emit(op.broadcast_to(flattened(imp, tensor, [1, 1]), [imp.dim(count), imp.dim(1)]))

    # 8-bit floats are widened once, not for every column that they meet; their products stay exact.
    codes = a.codes if kept else expand(imp, replace(a, scales=None, zeros=None))
    codes = agreed(imp, codes, [*dims[:-1], layout.k])
    arguments = [flattened(imp, codes, [count, layout.k]), per_row(a.scales, "float32")]
    return spec, arguments if a.zeros is None else [*arguments, per_row(a.zeros, "int32")]


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
    return product_of(imp, x, y)


def product_of(imp: Importer, x: relax.Expr, y: relax.Expr) -> relax.Var:
    """numpy's matmul of two tensors; floats are float32."""
    if str(x.ty.dtype) != "float32":  # integers: no matter of rounding
        return imp.emit(op.matmul(x, y))
    p, q = imp.shape(x), imp.shape(y)
    rows, columns = [1, *p][-2:], [*q, 1][-2:] if len(q) == 1 else q[-2:]
    sizes = [
        d if isinstance(d, int) else name for d, name in ((rows[0], "m"), (rows[1], "k"), (columns[1], "n"))
    ]
    func = imp.templates.pairs(*sizes)
    if func is None:
        return imp.emit(op.matmul(x, y))
    imp.multiplied[imp.current, len(imp.multiplied)] = Multiplied("tensors", "fp32")
    lead = broadcast_dims(imp, p[:-2], q[:-2])
    count = imp.product(lead)
    x, y = (
        flattened(imp, imp.emit(op.broadcast_to(t, [imp.dim(d) for d in [*lead, *last]])), [count, *last])
        for t, last in (
            (flattened(imp, x, [*p[:-2], *rows]), rows),
            (flattened(imp, y, [*q[:-2], *columns]), columns),
        )
    )
    kernel = imp.kernel(("pairs", *sizes), lambda: func)
    found = imp.call(kernel, [x, y], [count, rows[0], columns[1]], "float32")
    return flattened(
        imp, found, [*lead, *([rows[0]] if len(p) > 1 else []), *([columns[1]] if len(q) > 1 else [])]
    )


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
    last_two = [*range(len(order) - 2), len(order) - 1, len(order) - 2]
    if order == last_two and (is_matrix(imp, x) or isinstance(x, Picked)):
        return x.turned()
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
