"""Attention over a cache with an exact copy: over the codes, with a bound on what that changes, and over the copy
for the heads and queries whose bound is too large (`porter.kvgraph.certified`).

Two kernels. The first is the ordinary one (`porter.lower.kernels.attention`) over codes whose values have one
channel more, eps_t, the most that the value is off by: what it makes of it is sum p_t eps_t. The second finds
the other terms of `porter.kv.bounds`, in float32 as that says, from the steps of the keys and the norms of
the decoded values; it reads the copy of a (row, head, query) only where that is not within tolerance.
"""

from __future__ import annotations

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

TILE = 32  # tokens between two rescalings, and of values decoded at a time
PIECES = 8  # of the context, for the norms of values: something for so many cores and each KV head
INFINITY = float("inf")


@dataclass(frozen=True)
class Erring:
    """A Source: decoded values, and behind them one channel with each token's eps."""

    values: Stored

    @property
    def width(self) -> int:
        """Head size and one."""
        return self.values.width + 1

    @property
    def label(self) -> str:
        """The element, and that its error is there."""
        return f"{self.values.label}_eps"

    def buffers(self, name: str, heads: int, length: Dim) -> list[Spec]:
        """Those of the values."""
        return self.values.buffers(name, heads, length)

    def fill(
        self, at: Buffers, name: str, tile: Tile, row: tuple[Expr, Expr], span: tuple[Expr, Expr], total: Expr
    ) -> None:
        """See Source."""
        self.values.fill(at, name, tile, row, span, total)
        with loop(span[1] - span[0]) as i:
            error = value_error(self.values, at[f"{name}_scale"], (*row, span[0] + i))
            store(tile.rows, error, tile.at(i, self.values.width, 1))


def value_error(values: Stored, scale: tirx.Buffer, where: tuple[Expr, Expr, Expr]) -> Expr:
    """eps of a token (`bounds.value_errors`)."""
    width = values.width
    group = values.side.group or width
    squares: Expr = f32(0)
    for g, first in enumerate(range(0, width, group)):
        step = tirx.max(scale[(*where, i64(g))], f32(bounds.LEAST))
        squares = squares + step * step * f32(min(group, width - first))
    return tirx.sqrt(squares) * f32((0.5 + bounds.ROUNDING) * bounds.enlarged(width, 0))


def of_codes(spec: Attention) -> Attention:
    """The first kernel: its result has one channel more than the values."""
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
    """q, key scale and copy, value codes, scale and copy, the first kernel's result, lengths (, mask) -> y, bound
    float32 [b, hq, s], exact bool [b, hq, s]."""
    attention = spec.attention
    heads, width = attention.query_heads, attention.value.width
    key, value = (
        {suffix: (shape, dtype) for suffix, shape, dtype in side.planned(attention.heads)}
        for side in (attention.key, attention.value)
    )
    planned = [("k", key, ("_scale", "_copy")), ("v", value, ("_codes", "_scale", "_copy"))]
    buffers: list[Spec] = [
        ("q", ("b", heads, "s", attention.key.width), "float32"),
        *((n + part, ("b", *side[part][0]), side[part][1]) for n, side, parts in planned for part in parts),
        ("held", ("b", heads, "s", width + 1), "float32"),
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
        norms = T.alloc_buffer((count, PIECES), "float32")
        with loop(count * i64(PIECES), "parallel") as part:
            store(norms, self._norm_of_piece(part), part // i64(PIECES), part % i64(PIECES))
        with loop(self.batch * heads * self.steps, "parallel") as task:
            place = self._place(task // self.steps // heads, task // self.steps % heads, task % self.steps)
            bound, norm = local(1), local(1)
            store(bound, self._bound(place, norms), 0)
            store(norm, tirx.sqrt(self._summed(lambda d: self._square(place, d), attention.value.width)), 0)
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

    def _norm_of_piece(self, part: Expr) -> Expr:
        """max ||v^|| + eps over a piece of a row's tokens and a KV head."""
        values, heads = self.spec.attention.value, i64(self.spec.attention.heads)
        row = (part // i64(PIECES) // heads, part // i64(PIECES) % heads)
        total = self._total(row[0])
        each = (total + i64(PIECES - 1)) // i64(PIECES)
        begin = part % i64(PIECES) * each
        end = tirx.min(begin + each, total)
        width, padded = values.width, -(-values.width // LANES) * LANES
        best, tile = local(1), local(TILE * padded)
        store(best, f32(0), 0)
        at = {name: self.at[name] for name in ("v_codes", "v_scale")}
        with loop(tirx.max(end - begin + i64(TILE - 1), i64(0)) // i64(TILE)) as number:
            first = begin + number * i64(TILE)
            last = tirx.min(first + i64(TILE), end)
            values.fill(at, "v", Tile(tile, padded), row, (first, last), total)
            with loop(last - first) as t:

                def square(d: Expr, t: Expr = t) -> Expr:
                    value = tile[t * i64(padded) + d]
                    return value * value

                norm = tirx.sqrt(self._summed(square, width))
                error = value_error(values, self.at["v_scale"], (*row, first + t))
                store(best, tirx.max(best[0], norm + error), 0)
        return best[0]

    def _summed(self, term: object, width: int) -> Expr:
        """The sum over channels, in lanes."""
        sums, rest = local(LANES), width % LANES
        with loop(LANES, "vectorized") as v:
            store(sums, f32(0), v)
        with loop(width // LANES) as chunk, loop(LANES, "vectorized") as v:
            store(sums, sums[v] + term(chunk * i64(LANES) + v), v)
        for d in range(width - rest, width):
            store(sums, sums[d % LANES] + term(i64(d)), d % LANES)
        return _folded(sums, lambda a, b: a + b)

    def _square(self, place: _Place, d: Expr) -> Expr:
        value = self.at["held"][place.b, place.head, place.i, d]
        return value * value

    def _bound(self, place: _Place, norms: tirx.Buffer) -> Expr:
        """`bounds.bounds` of one query."""
        attention, count = self.spec.attention, tirx.Cast("float32", place.total)
        size, width = attention.key.width, attention.value.width

        def enlarged(channels: int) -> Expr:
            return count * f32(2 * bounds.ROUNDOFF) + f32(bounds.enlarged(channels, 0))

        def magnitude(d: Expr) -> Expr:
            value = self.at["q"][place.b, place.head, place.i, d]
            return tirx.max(value, f32(0) - value)

        half = 0.5 + bounds.ROUNDING + (size + 4) * 128 * bounds.ROUNDOFF
        steps = local(1)
        store(steps, self._largest_step(place), 0)
        delta = self._summed(magnitude, size) * steps[0] * (enlarged(size) * f32(half * abs(attention.scale)))
        delta = delta + f32(16 * bounds.ROUNDOFF * attention.softcap + bounds.LEAST)
        variation = tirx.min(tanh(delta * f32(0.5)) * f32(1 + 8 * bounds.ROUNDOFF), f32(1))
        largest, row = local(1), place.b * i64(attention.heads) + place.kv
        store(largest, norms[row, 0], 0)
        for piece in range(1, PIECES):
            store(largest, tirx.max(largest[0], norms[row, piece]), 0)
        rest = (count + f32(256)) * f32(4 * bounds.ROUNDOFF)
        moved = (variation * f32(2) + rest) * largest[0]
        own = self.at["held"][place.b, place.head, place.i, i64(width)]
        return (moved + own) * enlarged(width)

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

        value = self.kernel._summed(product, attention.key.width)
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


def _folded(lanes: tirx.Buffer, fold: object) -> Expr:
    """Lanes folded into one."""
    size = LANES
    while size > 1:
        size //= 2
        with loop(size, "vectorized") as v:
            store(lanes, fold(lanes[v], lanes[v + i64(size)]), v)
    return lanes[0]
