"""Append to a preallocated cache in place: the work of ONNX TensorScatter on axis 2."""

from __future__ import annotations

from porter.lower.kernels.define import T, define, i64, loop, store, tirx


def append(heads: int, capacity: int, width: int, dtype: str, *, circular: bool = False) -> tirx.PrimFunc:
    """cache [b, heads, capacity, width], new [b, heads, s, width], starts [b] int64.

    cache[n, :, starts[n] + t] = new[n, :, t]. A token past the capacity wraps around when `circular` and is
    dropped otherwise: never written out of bounds.
    """

    def body(cache, new, starts, b, s):
        with loop(b) as n, loop(heads) as h, loop(s) as t:
            at = starts[n] + t
            at = at % i64(capacity) if circular else at
            with T.If(tirx.all(at >= i64(0), at < i64(capacity))), T.Then(), loop(width) as d:
                store(cache, new[n, h, t, d], n, h, at, d)

    buffers = [
        ("cache", ("b", heads, capacity, width), dtype),
        ("new", ("b", heads, "s", width), dtype),
        ("starts", ("b",), "int64"),
    ]
    return define(f"append_h{heads}_c{capacity}_w{width}_{dtype}", buffers, body)
