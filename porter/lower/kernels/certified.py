"""Attention over a cache with an exact copy: over the codes, with a bound on what that changes, and over the
copy for the heads and queries whose bound is too large (`porter.kvgraph.certified`).

Two kernels. The first is the ordinary one (`porter.lower.kernels.attention`) over codes whose values have
three channels more: eps_t, the most that the value is off by, its square, and ||v^_t||^2. So their means
under the weights are of the same pass. The second makes the bound of `porter.kv.bounds` of these, in float32
as that says, and of the steps of keys and values; it reads the copy of a (row, head, query) only where the
bound is not within tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from porter.kv import bounds
from porter.lower.kernels.attention import LOWEST, Attention
from porter.lower.kernels.define import (
    Dim,
    Expr,
    Spec,
    T,
    define,
    exp_below_zero,
    f32,
    i64,
    local,
    loop,
    store,
    tanh,
    tirx,
)
from porter.lower.kernels.stored import LANES, Buffers, Stored, Tile

TILE = 32  # tokens between two rescalings
MORE = 3  # channels
INFINITY = float("inf")


@dataclass(frozen=True)
class Erring:
    """A Source: decoded values, and behind them each token's eps, eps^2 and ||v^||^2."""

    values: Stored

    @property
    def width(self) -> int:
        """Head size and three."""
        return self.values.width + MORE

    @property
    def label(self) -> str:
        """The element, and what is with it."""
        return f"{self.values.label}_eps"

    def buffers(self, name: str, heads: int, length: Dim) -> list[Spec]:
        """Those of the values."""
        return self.values.buffers(name, heads, length)

    def fill(
        self, at: Buffers, name: str, tile: Tile, row: tuple[Expr, Expr], span: tuple[Expr, Expr], total: Expr
    ) -> None:
        """See Source."""
        self.values.fill(at, name, tile, row, span, total)
        width = self.values.width
        with loop(span[1] - span[0]) as i:
            error = local(1)
            store(error, value_error(self.values, at[f"{name}_scale"], (*row, span[0] + i)), 0)

            def square(d: Expr, i: Expr = i) -> Expr:
                value = tile.rows[tile.at(i, 0, 1) + d]
                return value * value

            for k, value in enumerate((error[0], error[0] * error[0], summed(square, width))):
                store(tile.rows, value, tile.at(i, width + k, 1))


def value_error(values: Stored, scale: tirx.Buffer, where: tuple[Expr, Expr, Expr]) -> Expr:
    """eps of a token (`bounds.value_errors`)."""
    width = values.width
    group = values.side.group or width
    squares: Expr = f32(0)
    for g, first in enumerate(range(0, width, group)):
        step = tirx.max(scale[(*where, i64(g))], f32(bounds.LEAST))
        squares = squares + step * step * f32(min(group, width - first))
    return tirx.sqrt(squares) * f32(bounds.value_half(width))


def summed(term: Callable[[Expr], Expr], width: int) -> Expr:
    """The sum over channels, in lanes."""
    sums, rest = local(LANES), width % LANES
    with loop(LANES, "vectorized") as v:
        store(sums, f32(0), v)
    with loop(width // LANES) as chunk, loop(LANES, "vectorized") as v:
        store(sums, sums[v] + term(chunk * i64(LANES) + v), v)
    for d in range(width - rest, width):
        store(sums, sums[d % LANES] + term(i64(d)), d % LANES)
    return _folded(sums, lambda a, b: a + b)


def of_codes(spec: Attention) -> Attention:
    """The first kernel: its result has three channels more than the values."""
    return replace(spec, value=Erring(spec.value))


@dataclass(frozen=True)
class Certify:
    """The second kernel, of an attention over two `Stored` sides with offset `lengths`."""

    attention: Attention
    tolerance: float

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.attention.name.replace("attention", "certify", 1)


def certify(spec: Certify) -> tirx.PrimFunc:
    """q, key scale and copy, value scale and copy, the first kernel's result, lengths (, mask) -> y, bound
    float32 [b, hq, s], exact bool [b, hq, s]."""
    attention = spec.attention
    heads, width = attention.query_heads, attention.value.width
    key, value = (
        {suffix: (shape, dtype) for suffix, shape, dtype in side.planned(attention.heads)}
        for side in (attention.key, attention.value)
    )
    planned = [("k", key, ("_scale", "_copy")), ("v", value, ("_scale", "_copy"))]
    buffers: list[Spec] = [
        ("q", ("b", heads, "s", attention.key.width), "float32"),
        *((n + part, ("b", *side[part][0]), side[part][1]) for n, side, parts in planned for part in parts),
        ("held", ("b", heads, "s", width + MORE), "float32"),
        ("lengths", ("b",), "int64"),
    ]
    if attention.mask:
        buffers.append(("mask", attention.mask, "bool"))
    buffers += [
        ("y", ("b", heads, "s", width), "float32"),
        ("bound", ("b", heads, "s"), "float32"),
        ("exact", ("b", heads, "s"), "bool"),
    ]
    names = [n for n, _, _ in buffers]

    def body(*args, b, s):
        _Kernel(spec, dict(zip(names, args, strict=True)), b, s).emit()

    return define(spec.name, buffers, body)


@dataclass(frozen=True)
class _Place:
    """A query: its row, head, KV head and step; the row's tokens, and how many of the first it may see."""

    b: Expr
    head: Expr
    kv: Expr
    i: Expr
    total: Expr
    seen: Expr


@dataclass(frozen=True)
class _Kernel:
    """The body."""

    spec: Certify
    at: dict[str, tirx.Buffer]
    batch: tirx.Var
    steps: tirx.Var

    def emit(self) -> None:
        attention = self.spec.attention
        heads, count = i64(attention.query_heads), self.batch * i64(attention.heads)
        largest = T.alloc_buffer((count,), "float32")
        with loop(count, "parallel") as row:
            store(largest, self._largest_error(row // i64(attention.heads), row % i64(attention.heads)), row)
        with loop(self.batch * heads * self.steps, "parallel") as task:
            place = self._place(task // self.steps // heads, task // self.steps % heads, task % self.steps)
            bound, norm = local(1), local(1)
            store(norm, tirx.sqrt(summed(lambda d: self._square(place, d), attention.value.width)), 0)
            row = place.b * i64(attention.heads) + place.kv
            store(bound, self._bound(place, norm[0], largest[row]), 0)
            # A bound or a norm that is no finite number is not within.
            limit = norm[0] * f32(bounds.allowed(self.spec.tolerance, attention.value.width))
            within = local(1, "bool")
            store(within, tirx.all(bound[0] <= limit, norm[0] < f32(INFINITY)), 0)
            where = (place.b, place.head, place.i)
            store(self.at["bound"], bound[0], *where)
            store(self.at["exact"], tirx.Not(within[0]), *where)
            with T.If(within[0]):
                with T.Then(), loop(attention.value.width, "vectorized") as d:
                    store(self.at["y"], self.at["held"][(*where, d)], *where, d)
                with T.Else():
                    _Exact(self, place).emit()

    def _place(self, b: Expr, head: Expr, i: Expr) -> _Place:
        attention = self.spec.attention
        # A wrong length must not read what lies beside the cache.
        total = self._total(b)
        seen = total
        if attention.causal:
            seen = tirx.max(tirx.min(total, self.at["lengths"][b] - self.steps + i + i64(1)), i64(0))
        shared = i64(attention.query_heads // attention.heads)
        return _Place(b, head, head // shared, i, total, seen)

    def _total(self, b: Expr) -> Expr:
        return tirx.max(tirx.min(self.at["lengths"][b], i64(self.spec.attention.length)), i64(0))

    def _largest_error(self, b: Expr, kv: Expr) -> Expr:
        """max eps over a row's tokens."""
        best = local(1)
        store(best, f32(0), 0)
        with loop(self._total(b)) as t:
            error = value_error(self.spec.attention.value, self.at["v_scale"], (b, kv, t))
            store(best, tirx.max(best[0], error), 0)
        return best[0]

    def _square(self, place: _Place, d: Expr) -> Expr:
        value = self.at["held"][place.b, place.head, place.i, d]
        return value * value

    def _bound(self, place: _Place, norm: Expr, largest: Expr) -> Expr:
        """`bounds.output_bound` of one query."""
        value, count = self.spec.attention.value, tirx.Cast("float32", place.total)
        means = local(MORE)
        for k in range(MORE):
            store(means, self.at["held"][place.b, place.head, place.i, i64(value.width + k)], k)
        error, error_square, square = (means[k] for k in range(MORE))
        room = (count + f32(value.width + 16)) * f32(8 * bounds.ROUNDOFF)

        def deviation(square: Expr, mean: Expr) -> Expr:
            return tirx.sqrt(tirx.max(square - mean * mean, f32(0)) + square * room)

        delta = local(1)
        store(delta, self._logit_bound(place, count), 0)
        # 1 / exp(-x): infinite where float32 has no more.
        power = f32(1) / exp_below_zero(delta[0] * delta[0] / f32(-6))
        moved = delta[0] * power * f32(1 + 16 * bounds.ROUNDOFF)
        spread = deviation(square, norm) + deviation(error_square, error)
        rest = tirx.sqrt(square) * ((count + f32(256)) * f32(4 * bounds.ROUNDOFF))
        factor = count * f32(bounds.VANISHED * bounds.longest(value.side.element))
        vanished = largest * factor / exp_below_zero(delta[0] * f32(-2))
        return (error + moved * spread + rest + vanished) * self._enlarged(count, value.width)

    def _logit_bound(self, place: _Place, count: Expr) -> Expr:
        attention = self.spec.attention
        size, steps = attention.key.width, local(1)

        def magnitude(d: Expr) -> Expr:
            value = self.at["q"][place.b, place.head, place.i, d]
            return tirx.max(value, f32(0) - value)

        store(steps, self._largest_step(place), 0)
        half = f32(bounds.key_half(size) * abs(attention.scale))
        delta = summed(magnitude, size) * steps[0] * (self._enlarged(count, size) * half)
        own = f32(16 * bounds.ROUNDOFF * attention.softcap + bounds.LEAST)
        return delta + ((count + f32(256)) * f32(bounds.ROUNDOFF) + own)

    def _enlarged(self, count: Expr, channels: int) -> Expr:
        return count * f32(2 * bounds.ROUNDOFF) + f32(bounds.enlarged(channels, 0))

    def _largest_step(self, place: _Place) -> Expr:
        """Of the keys that the query sees."""
        scale, best = self.at["k_scale"], local(LANES)
        groups = int(scale.shape[3])
        with loop(LANES, "vectorized") as v:
            store(best, f32(0), v)

        def step(t: Expr) -> Expr:
            found = scale[place.b, place.kv, t, i64(0)]
            for g in range(1, groups):
                found = tirx.max(found, scale[place.b, place.kv, t, i64(g)])
            return self.unmasked(found, f32(0), place, t)

        with loop(place.seen // i64(LANES)) as chunk, loop(LANES, "vectorized") as v:
            store(best, tirx.max(best[v], step(chunk * i64(LANES) + v)), v)
        whole = place.seen // i64(LANES) * i64(LANES)
        with loop(place.seen - whole) as t:
            store(best, tirx.max(best[0], step(whole + t)), 0)
        return _folded(best, tirx.max)

    def unmasked(self, value: Expr, other: Expr, place: _Place, t: Expr) -> Expr:
        """The value where the mask lets the query see token t."""
        shape = self.spec.attention.mask
        if not shape:
            return value
        where = (place.b, place.head, place.i, t)
        index = [i64(0) if dim == 1 else i for dim, i in zip(shape, where, strict=True)]
        return tirx.Select(self.at["mask"][tuple(index)], value, other)


@dataclass(frozen=True)
class _Exact:
    """Attention of one query over the copy, with running maximum and sum."""

    kernel: _Kernel
    place: _Place

    def emit(self) -> None:
        attention, place, at = self.kernel.spec.attention, self.place, self.kernel.at
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
        attention, place = self.kernel.spec.attention, self.place
        copy = self.kernel.at["k_copy"]

        def product(d: Expr) -> Expr:
            return query[d] * tirx.Cast("float32", copy[place.b, place.kv, t, d])

        value = summed(product, attention.key.width)
        if attention.softcap:
            value = tanh(value / f32(attention.softcap)) * f32(attention.softcap)
        return self.kernel.unmasked(value, f32(-INFINITY), place, t)

    def _weigh(self, out: tirx.Buffer, scores: tirx.Buffer, fade: Expr, first: Expr, count: Expr) -> None:
        """out = out * fade + weights . values, some channels at a time."""
        copy, place, width = self.kernel.at["v_copy"], self.place, int(out.shape[0])
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


def _folded(lanes: tirx.Buffer, fold: Callable[[Expr, Expr], Expr]) -> Expr:
    """Lanes folded into one."""
    size = LANES
    while size > 1:
        size //= 2
        with loop(size, "vectorized") as v:
            store(lanes, fold(lanes[v], lanes[v + i64(size)]), v)
    return lanes[0]
