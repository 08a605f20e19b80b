"""Integer tensors: sizes that are known only at run time, and indices made safe to read with."""

from __future__ import annotations

from porter.lower.kernels.define import Spec, check, define, i64, loop, store, tirx

OUTSIDE = "an index lies outside of what it reads from"


def scalars(count: int, rank: int) -> tirx.PrimFunc:
    """`count` int64 arguments -> an int64 tensor of them, of rank 0 or 1."""

    def body(out, **values):
        for i in range(count):
            store(out, values[f"e{i}"], *([i64(i)] * rank))

    shape = (count,) if rank else ()
    arguments: list[Spec] = [(f"e{i}", (), "scalar") for i in range(count)]
    return define(f"sizes_{count}_{rank}", [*arguments, ("out", shape, "int64")], body)


def counting() -> tirx.PrimFunc:
    """first -> int64 [n]: first, first + 1, …"""

    def body(out, first, n):
        with loop(n) as i:
            store(out, first + i, i)

    return define("counting", [("first", (), "scalar"), ("out", ("n",), "int64")], body)


def wrapped(dtype: str) -> tirx.PrimFunc:
    """indices [m], size -> int64 [m] in 0..size-1, negative ones counted from the end; stops at one beyond it."""

    def body(indices, out, size, m):
        with loop(m) as i:
            index = tirx.Cast("int64", indices[i])
            check(tirx.all(index >= -size, index < size), OUTSIDE)
            store(out, tirx.Select(index < i64(0), index + size, index), i)

    buffers: list[Spec] = [("indices", ("m",), dtype), ("size", (), "scalar"), ("out", ("m",), "int64")]
    return define(f"wrapped_{dtype}", buffers, body)
