"""A plain copy that no pass takes for a view."""

from __future__ import annotations

from porter.lower.kernels.define import define, loop, store, tirx


def copied(rank: int, dtype: str) -> tirx.PrimFunc:
    """x -> y, of any shape of this rank."""
    dims = tuple(f"n{i}" for i in range(rank))

    def body(x, y, **sizes):
        def nest(index: tuple[tirx.Var, ...]) -> None:
            if len(index) == rank:
                store(y, x[index] if rank else x[()], *index)
                return
            with loop(sizes[dims[len(index)]]) as i:
                nest((*index, i))

        nest(())

    return define(f"copied_{rank}_{dtype}", [("x", dims, dtype), ("y", dims, dtype)], body)
