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


def wrapped(dtype: str, count: int = 1) -> tirx.PrimFunc:
    """indices [m, count], a size for each column -> int64 [m, count], negative indices counted from the end.

    An index that lies outside of its size stops the program; without asserts, it wraps around.
    """

    def body(indices, out, m, **sizes):
        with loop(m) as i:
            for column in range(count):
                index, size = tirx.Cast("int64", indices[i, column]), sizes[f"size{column}"]
                check(tirx.all(index >= -size, index < size), OUTSIDE)
                # Also where there is no stopping, on a device, none is read that lies outside.
                store(out, tirx.floormod(index, size), i, column)

    arguments: list[Spec] = [(f"size{i}", (), "scalar") for i in range(count)]
    shape = ("m", count)
    return define(
        f"wrapped_{dtype}_{count}", [("indices", shape, dtype), *arguments, ("out", shape, "int64")], body
    )
