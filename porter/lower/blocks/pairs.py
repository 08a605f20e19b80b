"""Products of two tensors that are computed at run time, with both operands rounded."""

from __future__ import annotations

from porter.lower.blocks.define import Spec, block, choose, define, f32, i64, marked, scratch, store, tirx
from porter.lower.blocks.unit import Unit, products
from porter.lower.kernels.define import Dim


def pairs(m: Dim, k: Dim, n: Dim, unit: Unit) -> tirx.PrimFunc:
    """x [t, m, k], y [t, k, n] float32 -> [t, m, n]. Blocks `x_cast`, `y_cast` (turned), `product`."""

    def body(x, y, out, t, **sizes):
        rows, inner, columns = (sizes[d] if isinstance(d, str) else i64(d) for d in (m, k, n))
        padded = unit.padded(inner)
        last = inner - i64(1)
        left = scratch("x_operand", [t, rows, padded], unit.x.storage)
        with block("x_cast", [t, rows, padded]) as (b, i, p):
            read = choose(p < inner, x[b, i, tirx.min(p, last)], f32(0))
            store(left, unit.x.rounded(read), b, i, p)
        right = scratch("y_operand", [t, columns, padded], unit.w.storage)
        with block("y_cast", [t, columns, padded]) as (b, j, p):
            read = choose(p < inner, y[b, tirx.min(p, last), j], f32(0))
            store(right, unit.w.rounded(read), b, j, p)
        products(
            unit,
            [t, rows, columns],
            unit.steps(inner),
            lambda b, i, j, p: left[b, i, p],
            lambda b, i, j, p: right[b, j, p],
            out,
        )

    buffers: list[Spec] = [
        ("x", ("t", m, k), "float32"),
        ("y", ("t", k, n), "float32"),
        ("out", ("t", m, n), "float32"),
    ]
    return define(f"pairs_{unit.label}", buffers, body).with_attr(marked("pairs", unit.name))
