"""Attention over a cache with an exact copy: over the codes, with a bound on what that changes, and over the
copy for the heads and queries whose bound is too large (`porter.kvgraph.certified`).

Two kernels. The first is the ordinary one (`porter.lower.kernels.attention`) over codes whose values have
three channels more: eps_t, the most that the value is off by, its square, and ||v^_t||^2. So their means
under the weights are of the same pass. The second makes the bound of `porter.kv.bounds` of these, in float32
as that says, and of the steps of keys and values; it reads the copy of a (row, head, query) only where the
bound is not within tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from porter.kv import bounds
from porter.lower.kernels.attention import Attention
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
    tirx,
)
from porter.lower.kernels.exact import Exact, Place, folded, summed, unmasked
from porter.lower.kernels.stored import LANES, Buffers, Stored, Tile

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
                    Exact(attention, self.at, place).emit()

    def _place(self, b: Expr, head: Expr, i: Expr) -> Place:
        attention = self.spec.attention
        # A wrong length must not read what lies beside the cache.
        total = self._total(b)
        seen = total
        if attention.causal:
            seen = tirx.max(tirx.min(total, self.at["lengths"][b] - self.steps + i + i64(1)), i64(0))
        shared = i64(attention.query_heads // attention.heads)
        return Place(b, head, head // shared, i, total, seen)

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

    def _square(self, place: Place, d: Expr) -> Expr:
        value = self.at["held"][place.b, place.head, place.i, d]
        return value * value

    def _bound(self, place: Place, norm: Expr, largest: Expr) -> Expr:
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

    def _logit_bound(self, place: Place, count: Expr) -> Expr:
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

    def _largest_step(self, place: Place) -> Expr:
        """Of the keys that the query sees."""
        scale, best = self.at["k_scale"], local(LANES)
        groups = int(scale.shape[3])
        with loop(LANES, "vectorized") as v:
            store(best, f32(0), v)

        def step(t: Expr) -> Expr:
            found = scale[place.b, place.kv, t, i64(0)]
            for g in range(1, groups):
                found = tirx.max(found, scale[place.b, place.kv, t, i64(g)])
            return unmasked(self.spec.attention, self.at, found, f32(0), place, t)

        with loop(place.seen // i64(LANES)) as chunk, loop(LANES, "vectorized") as v:
            store(best, tirx.max(best[v], step(chunk * i64(LANES) + v)), v)
        whole = place.seen // i64(LANES) * i64(LANES)
        with loop(place.seen - whole) as t:
            store(best, tirx.max(best[0], step(whole + t)), 0)
        return folded(best, tirx.max)
