"""Attention of one query over a cache's exact copy, and what it shares with the bound of attention over its
codes: sums over channels, what a query may see (`porter.lower.kernels.certified`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from porter.lower.kernels.attention import LOWEST, Attention
from porter.lower.kernels.define import Expr, exp_below_zero, f32, i64, local, loop, store, tanh, tirx
from porter.lower.kernels.stored import LANES, Buffers

TILE = 32  # tokens between two rescalings


@dataclass(frozen=True)
class Place:
    """A query: its row, head, KV head and step; the row's tokens, and how many of the first it may see."""

    b: Expr
    head: Expr
    kv: Expr
    i: Expr
    total: Expr
    seen: Expr


@dataclass(frozen=True)
class Exact:
    """Attention of one query over the copy, with running maximum and sum."""

    attention: Attention
    at: Buffers
    place: Place

    def emit(self) -> None:
        """Write y of the query."""
        attention, place, at = self.attention, self.place, self.at
        width = attention.value.width
        query, scores, out = local(attention.key.width), local(TILE), local(width)
        top, total, fade = local(1), local(1), local(1)
        with loop(attention.key.width) as d:
            store(query, at["q"][place.b, place.head, place.i, d] * f32(attention.scale), d)
        with loop(width) as d:
            store(out, f32(0), d)
        store(top, f32(LOWEST), 0)
        store(total, f32(0), 0)
        with loop((place.seen + i64(TILE - 1)) // i64(TILE)) as number:
            first = number * i64(TILE)
            count = tirx.min(i64(TILE), place.seen - first)
            store(fade, top[0], 0)
            with loop(count) as t:
                store(scores, self._score(query, first + t), t)
                store(top, tirx.max(top[0], scores[t]), 0)
            store(fade, exp_below_zero(fade[0] - top[0]), 0)
            store(total, total[0] * fade[0], 0)
            with loop(count) as t:
                store(scores, exp_below_zero(scores[t] - top[0]), t)
                store(total, total[0] + scores[t], 0)
            self._weigh(out, scores, fade[0], first, count)
        with loop(width) as d:
            value = tirx.Select(total[0] > f32(0), out[d] / total[0], f32(0))
            store(at["y"], value, place.b, place.head, place.i, d)

    def _score(self, query: tirx.Buffer, t: Expr) -> Expr:
        attention, place = self.attention, self.place
        copy = self.at["k_copy"]

        def product(d: Expr) -> Expr:
            return query[d] * tirx.Cast("float32", copy[place.b, place.kv, t, d])

        value = summed(product, attention.key.width)
        if attention.softcap:
            value = tanh(value / f32(attention.softcap)) * f32(attention.softcap)
        return unmasked(attention, self.at, value, f32(float("-inf")), place, t)

    def _weigh(self, out: tirx.Buffer, scores: tirx.Buffer, fade: Expr, first: Expr, count: Expr) -> None:
        """out = out * fade + weights . values, some channels at a time."""
        copy, place, width = self.at["v_copy"], self.place, int(out.shape[0])
        for start, lanes in ((0, LANES), (width // LANES * LANES, 1)):
            with loop((width - start) // lanes) as chunk:
                d, sums = i64(start) + chunk * i64(lanes), local(lanes)
                with loop(lanes, "vectorized") as v:
                    store(sums, out[d + v] * fade, v)
                with loop(count) as t, loop(lanes, "vectorized") as v:
                    value = tirx.Cast("float32", copy[place.b, place.kv, first + t, d + v])
                    store(sums, sums[v] + scores[t] * value, v)
                with loop(lanes, "vectorized") as v:
                    store(out, sums[v], d + v)


def unmasked(attention: Attention, at: Buffers, value: Expr, other: Expr, place: Place, t: Expr) -> Expr:
    """The value where the mask lets the query see token t."""
    if not attention.mask:
        return value
    where = (place.b, place.head, place.i, t)
    index = [i64(0) if dim == 1 else i for dim, i in zip(attention.mask, where, strict=True)]
    return tirx.Select(at["mask"][tuple(index)], value, other)


def summed(term: Callable[[Expr], Expr], width: int) -> Expr:
    """The sum over channels, in lanes."""
    sums, rest = local(LANES), width % LANES
    with loop(LANES, "vectorized") as v:
        store(sums, f32(0), v)
    with loop(width // LANES) as chunk, loop(LANES, "vectorized") as v:
        store(sums, sums[v] + term(chunk * i64(LANES) + v), v)
    for d in range(width - rest, width):
        store(sums, sums[d % LANES] + term(i64(d)), d % LANES)
    return folded(sums, lambda a, b: a + b)


def folded(lanes: tirx.Buffer, fold: Callable[[Expr, Expr], Expr]) -> Expr:
    """Lanes folded into one."""
    size = LANES
    while size > 1:
        size //= 2
        with loop(size, "vectorized") as v:
            store(lanes, fold(lanes[v], lanes[v + i64(size)]), v)
    return lanes[0]
