"""Running sums and the largest entries along an axis, of tensors seen as [outer, n, inner]."""

from __future__ import annotations

from porter.lower.kernels.define import Expr, T, define, i64, local, loop, store, tirx

SHAPE = ("outer", "n", "inner")


def running_sum(dtype: str, *, exclusive: bool, reverse: bool) -> tirx.PrimFunc:
    """y[i] = x[0] + … + x[i], summed in that order; without x[i] if `exclusive`, from the end if `reverse`."""

    def body(x, y, outer, n, inner):
        with loop(outer) as o, loop(inner) as lane:
            total = local(1, dtype)
            store(total, tirx.const(0, dtype), 0)
            with loop(n) as step:
                at = n - i64(1) - step if reverse else step
                if exclusive:
                    store(y, total[0], o, at, lane)
                store(total, total[0] + x[o, at, lane], 0)
                if not exclusive:
                    store(y, total[0], o, at, lane)

    return define(f"running_sum_{dtype}", [("x", SHAPE, dtype), ("y", SHAPE, dtype)], body)


def top_k(k: int, dtype: str, *, largest: bool) -> tirx.PrimFunc:
    """The k largest (or smallest) entries in order [outer, k, inner] and where they stood, int64; the first of equals first.

    By insertion into the k found so far. `n` must be at least k.
    """

    def body(x, values, places, outer, n, inner):
        def better(a: Expr, b: Expr) -> Expr:
            return a > b if largest else a < b

        def insert(o: Expr, lane: Expr, j: Expr, filled: Expr) -> None:
            """Move what is worse than x[j] down by one, from the last of `filled` entries on; the k-th drops out."""
            with loop(filled) as back:
                at = filled - i64(1) - back
                with T.If(better(x[o, j, lane], values[o, at, lane])), T.Then():
                    with T.If(at + i64(1) < i64(k)), T.Then():
                        store(values, values[o, at, lane], o, at + i64(1), lane)
                        store(places, places[o, at, lane], o, at + i64(1), lane)
                    store(values, x[o, j, lane], o, at, lane)
                    store(places, j, o, at, lane)

        with loop(outer) as o, loop(inner) as lane, loop(n) as j:
            with T.If(j < i64(k)), T.Then():
                store(values, x[o, j, lane], o, j, lane)
                store(places, j, o, j, lane)
            insert(o, lane, j, tirx.min(j, i64(k)))

    found = ("outer", k, "inner")
    return define(
        f"top_{k}_{dtype}", [("x", SHAPE, dtype), ("values", found, dtype), ("places", found, "int64")], body
    )
