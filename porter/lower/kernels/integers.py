"""Integer tensors made of sizes that are known only at run time."""

from __future__ import annotations

from porter.lower.kernels.define import Spec, define, i64, loop, store, tirx


def scalars(count: int, rank: int) -> tirx.PrimFunc:
    """`count` int64 arguments -> an int64 tensor of them, of rank 0 or 1."""

    def body(out, **values):  # noqa: ANN001, ANN003, ANN202
        for i in range(count):
            store(out, values[f"e{i}"], *([i64(i)] * rank))

    shape = (count,) if rank else ()
    arguments: list[Spec] = [(f"e{i}", (), "scalar") for i in range(count)]
    return define(f"sizes_{count}_{rank}", [*arguments, ("out", shape, "int64")], body)


def counting() -> tirx.PrimFunc:
    """first -> int64 [n]: first, first + 1, …"""

    def body(out, first, n):  # noqa: ANN001, ANN202
        with loop(n) as i:
            store(out, first + i, i)

    return define("counting", [("first", (), "scalar"), ("out", ("n",), "int64")], body)
