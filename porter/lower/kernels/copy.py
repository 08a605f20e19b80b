"""A copy, or a cast, that no pass merges with what stands around it."""

from __future__ import annotations

from porter.lower.kernels.define import define, loop, store, tirx


def copied(rank: int, dtype: str, to: str) -> tirx.PrimFunc:
    """x -> y, of any shape of this rank, cast where `to` is another element type."""
    dims = tuple(f"n{i}" for i in range(rank))

    def body(x, y, **sizes):
        def nest(index: tuple[tirx.Var, ...]) -> None:
            if len(index) == rank:
                value = x[index] if rank else x[()]
                store(y, value if to == dtype else tirx.Cast(to, value), *index)
                return
            with loop(sizes[dims[len(index)]]) as i:
                nest((*index, i))

        nest(())

    return define(f"copied_{rank}_{dtype}_{to}", [("x", dims, dtype), ("y", dims, to)], body)
