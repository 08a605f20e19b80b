"""Attention over a float or quantized cache in one pass over the keys, a tile of tokens at a time.

    y = softmax(softcap(scale * q kᵀ) + mask) v

with running maximum and sum (online softmax: Milakov & Gimelshein 2018; Dao 2022). A tile is decoded once for
all query heads that share its KV head. With one query, the context is cut in pieces that run in parallel, and
their maxima, sums and outputs are merged (Flash-Decoding: Dao et al. 2023).

Layouts are ONNX's: q [b, hq, s, d], k [b, hk, t, d], v [b, hk, t, dv]; hq is a multiple of hk (grouped
queries).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from porter.lower.kernels import vectors as vec
from porter.lower.kernels.decoded import Decoded
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
from porter.lower.kernels.packed import TILE, Codes, codes_of
from porter.lower.kernels.packed_keys import Keys
from porter.lower.kernels.packed_values import Values
from porter.lower.kernels.rows import LANES, padded
from porter.lower.kernels.stored import Cache, Source

ROWS = 8  # at most so many query heads share a decoded tile
TASKS = 16  # one query's heads and pieces of the context: something for so many cores
# A finite "minus infinity": exp(-inf - LOWEST) is 0, exp(-inf - -inf) would be NaN. It is the lowest float32
# because that is what exporters put into masks: a row in which every key has it is spread evenly, as by
# softmax.
LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Attention:
    """One attention kernel. `length` is the axis of k and v: a symbol, or the capacity of a static cache.

    `offset` says where query i stands among the keys when `causal`: `start` at key i, `end` at length - s +
    i, `lengths` at lengths[b] - s + i with the extra input lengths [b] int64, which also hides later keys.
    `mask` is its shape with 1 where it broadcasts (batch, heads, s, t), or () for none; `mask_dtype` bool or
    float32.
    """

    query_heads: int
    heads: int
    key: Source
    value: Source
    length: Dim
    scale: float
    causal: bool = False
    offset: str = "start"
    softcap: float = 0.0
    mask: tuple[Dim, ...] = ()
    mask_dtype: str = "bool"

    @property
    def name(self) -> str:
        """The kernel's name, readable in a plan; the module makes it unique."""
        heads, codecs = f"h{self.query_heads}_{self.heads}", f"{self.key.label}_{self.value.label}"
        return f"attention_{heads}_d{self.key.width}_{codecs}"


__all__ = ["Attention", "Cache", "attention", "with_mask"]


def with_mask(spec: Attention, shape: tuple[Dim, ...], dtype: str) -> Attention:
    """The same kernel with a mask."""
    return replace(spec, mask=shape, mask_dtype=dtype)


def attention(spec: Attention) -> tirx.PrimFunc:
    """q, keys…, values… (, lengths) (, mask) -> y [b, hq, s, dv]; no key seen gives zeros."""
    key = spec.key.buffers("k", spec.heads, spec.length)
    value = spec.value.buffers("v", spec.heads, spec.length)
    buffers: list[Spec] = [("q", ("b", spec.query_heads, "s", spec.key.width), "float32"), *key, *value]
    if spec.offset == "lengths":
        buffers.append(("lengths", ("b",), "int64"))
    if spec.mask:
        buffers.append(("mask", spec.mask, spec.mask_dtype))
    buffers.append(("y", ("b", spec.query_heads, "s", spec.value.width), "float32"))
    names = [n for n, _, _ in buffers]

    def body(*args, **dims):
        _Kernel(spec, dict(zip(names, args, strict=True)), dims).emit()

    return define(spec.name, buffers, body)


@dataclass(frozen=True)
class _Kernel:
    """The body. A task is a query of some heads of one KV head (`rows`, alike in what they see) and a piece
    of the context; tasks are parallel."""

    spec: Attention
    at: dict[str, tirx.Buffer]
    dims: dict[str, tirx.Var]

    @property
    def rows(self) -> int:
        """Query heads of a task."""
        shared = self.spec.query_heads // self.spec.heads
        return max(n for n in range(1, ROWS + 1) if shared % n == 0)

    @property
    def pieces(self) -> int:
        """Pieces of the context where there is one query."""
        return -(-TASKS // (self.spec.query_heads // self.rows))

    def emit(self) -> None:
        spec, steps = self.spec, self.dims["s"]
        blocks = spec.query_heads // self.rows
        tasks = self.dims["b"] * i64(blocks) * steps
        if self.pieces == 1:
            with loop(tasks, "parallel") as task:
                place = self._place(task, blocks)
                state = self._piece(place, i64(0), i64(1))
                self._result(place, state)
            return
        pieces = tirx.Select(steps == i64(1), i64(self.pieces), i64(1))
        width = padded(spec.value.width)
        outs = T.alloc_buffer((tasks * pieces, self.rows * width), "float32")
        ends = T.alloc_buffer((tasks * pieces, 2 * self.rows), "float32")
        with loop(tasks * pieces, "parallel") as part:
            state = self._piece(self._place(part // pieces, blocks), part % pieces, pieces)
            with loop(self.rows * width, "vectorized") as v:
                store(outs, state.out[v], part, v)
            for r in range(self.rows):
                store(ends, state.top[r], part, r)
                store(ends, state.total[r], part, self.rows + r)
        with loop(tasks, "parallel") as task:
            state = _State(self.rows, width)
            with loop(pieces) as piece:
                part = task * pieces + piece
                self._merge(state, outs, ends, part)
            self._result(self._place(task, blocks), state)

    def _place(self, task: Expr, blocks: int) -> _Place:
        steps = self.dims["s"]
        block = task // steps % i64(blocks)
        head = block * i64(self.rows)
        shared = i64(self.spec.query_heads // self.spec.heads)
        return _Place(task // steps // i64(blocks), head, head // shared, task % steps)

    def _merge(self, state: _State, outs: tirx.Buffer, ends: tirx.Buffer, part: Expr) -> None:
        """Add a piece: what has the smaller maximum fades."""
        for r in range(self.rows):
            top, fade, gain = local(1), local(1), local(1)
            store(top, tirx.max(state.top[r], ends[part, r]), 0)
            store(fade, exp_below_zero(state.top[r] - top[0]), 0)
            store(gain, exp_below_zero(ends[part, r] - top[0]), 0)
            store(state.top, top[0], r)
            store(state.total, state.total[r] * fade[0] + ends[part, self.rows + r] * gain[0], r)
            with loop(state.width, "vectorized") as v:
                d = i64(r * state.width) + v
                store(state.out, state.out[d] * fade[0] + outs[part, d] * gain[0], d)

    def _result(self, place: _Place, state: _State) -> None:
        for r in range(self.rows):
            with loop(self.spec.value.width, "vectorized") as d:
                value = state.out[i64(r * state.width) + d] / state.total[r]
                value = tirx.Select(state.total[r] > f32(0), value, f32(0))
                store(self.at["y"], value, place.b, place.head + i64(r), place.i, d)

    def _piece(self, place: _Place, piece: Expr, pieces: Expr) -> _State:
        """The softmax over one of `pieces` pieces of what the query sees, piece by tiles."""
        spec, steps = self.spec, self.dims["s"]
        whole = self.dims[spec.length] if isinstance(spec.length, str) else i64(spec.length)
        total = self.at["lengths"][place.b] if spec.offset == "lengths" else whole
        # A wrong length must not read what lies beside the cache.
        total_here = vec.held(tirx.max(tirx.min(total, whole), i64(0)))
        seen = total
        if spec.causal:
            first = {"start": i64(0), "end": whole - steps, "lengths": seen - steps}[spec.offset]
            seen = tirx.min(seen, first + place.i + i64(1))
        seen = vec.held(tirx.max(tirx.min(seen, total_here), i64(0)))
        coded = self._coded()
        # Tiles of codes begin with the groups, behind the sinks.
        shift = -coded[0].stored.scheme.sink % TILE if coded else 0
        tiles = tirx.Select(seen > i64(0), (seen + i64(shift + TILE - 1)) // i64(TILE), i64(0))
        each = (tiles + pieces - i64(1)) // pieces
        begin, end = vec.held(piece * each), tirx.min((piece + i64(1)) * each, tiles)
        count = vec.held(tirx.max(end - begin, i64(0)))
        key_width, width = padded(spec.key.width), padded(spec.value.width)
        query, state = local(self.rows * key_width), _State(self.rows, width)
        for r in range(self.rows):
            for d in range(spec.key.width, key_width):
                store(query, f32(0), r * key_width + d)
            with loop(spec.key.width, "vectorized") as d:
                value = self.at["q"][place.b, place.head + i64(r), place.i, d] * f32(spec.scale)
                store(query, value, i64(r * key_width) + d)
        scores, tile = vec.scratch(self.rows * TILE), vec.scratch(TILE * max(key_width, width))
        work = _Work(query, scores, tile, place, state, total_here)
        keys, values = self._multipliers(coded, query, state)
        with loop(count) as number:
            at = (begin + number) * i64(TILE) - i64(shift)
            first, last = vec.held(tirx.max(at, i64(0))), vec.held(tirx.min(at + i64(TILE), seen))
            self._keys(work, keys, first, last)
            self._softmax(work.scores, state, place, first, last - first)
            self._values(work, values, first, last)
        if values:
            values.to_order(state.out, back=True)
        return state

    def _coded(self) -> list[Codes]:
        """The sides whose codes are multiplied as they are; their tiles must begin alike."""
        sides = [codes_of(side) for side in (self.spec.key, self.spec.value)]
        found = [side for side in sides if side is not None]
        return [side for side in found if side.stored.scheme.sink == found[0].stored.scheme.sink]

    def _multipliers(
        self, coded: list[Codes], query: tirx.Buffer, state: _State
    ) -> tuple[Keys | None, Values | None]:
        keys = values = None
        zero = vec.hidden_zero(self.dims["s"])
        for side in coded:
            if side.stored is self.spec.key:
                keys = Keys(side, self.rows, self.at, "k", zero)
                keys.prepare(query)
            else:
                values = Values(side, self.rows, self.at, "v", zero)
        return keys, values

    def _keys(self, work: _Work, keys: Keys | None, first: Expr, last: Expr) -> None:
        """The scores of tokens from `first` to `last` - 1."""
        row = (work.place.b, work.place.kv)
        decoded = Decoded(self.spec.key, self.rows, self.at, "k", work.tile)
        if keys is None:
            decoded.scores(work.scores, work.query, row, (first, last), work.total)
            return
        with T.If(vec.held(keys.codes.whole(first, work.total))):
            with T.Then():
                keys.scores(work.query, work.scores, row, vec.held(keys.codes.coded(first)))
            with T.Else():
                decoded.scores(work.scores, work.query, row, (first, last), work.total)

    def _values(self, work: _Work, values: Values | None, first: Expr, last: Expr) -> None:
        """The weighted sum of those tokens' values."""
        row, state = (work.place.b, work.place.kv), work.state
        decoded = Decoded(self.spec.value, self.rows, self.at, "v", work.tile)
        if values is None:
            decoded.weigh(state.out, work.scores, state.fade, row, (first, last), work.total)
            return
        with T.If(vec.held(values.codes.whole(first, work.total))):
            with T.Then():
                token = vec.held(values.codes.coded(first))
                values.weigh(state.out, work.scores, state.fade, row, token)
            with T.Else():
                values.to_order(state.out, back=True)
                decoded.weigh(state.out, work.scores, state.fade, row, (first, last), work.total)
                values.to_order(state.out)

    def _softmax(self, scores: tirx.Buffer, state: _State, place: _Place, first: Expr, count: Expr) -> None:
        """Scores to weights under the new maximum; the sums so far fade."""
        spec = self.spec
        with T.If(vec.held(count < i64(TILE))), T.Then():
            for r in range(self.rows):
                with loop(TILE - count) as t:
                    store(scores, f32(float("-inf")), i64(r * TILE) + count + t)
        for r in range(self.rows):
            at, top = i64(r * TILE), local(1)
            if spec.softcap or spec.mask:
                with loop(count) as t:
                    value = scores[at + t]
                    if spec.softcap:
                        value = tanh(value / f32(spec.softcap)) * f32(spec.softcap)
                    where = (place.b, place.head + i64(r), place.i, first + t)
                    store(scores, self._masked(value, where), at + t)
            vectors = [at + i64(i) for i in range(0, TILE, LANES)]
            highest = vec.largest([vec.load(scores, (), i, LANES) for i in vectors])
            store(top, tirx.max(state.top[r], highest), 0)
            store(state.fade, exp_below_zero(state.top[r] - top[0]), r)
            store(state.top, top[0], r)
            weights = []
            for i in vectors:  # as they are read again: LLVM takes a wider store apart number by number
                less = vec.held(vec.load(scores, (), i, LANES) - T.broadcast(top[0], LANES))
                weight = exp_below_zero(less, LANES)
                weights.append(vec.held(weight))
                vec.put(scores, weights[-1], i, LANES)
            added = vec.total(weights)
            store(state.total, state.total[r] * state.fade[r] + added, r)

    def _masked(self, value: Expr, where: tuple[Expr, ...]) -> Expr:
        spec = self.spec
        if not spec.mask:
            return value
        index = [i64(0) if dim == 1 else i for dim, i in zip(spec.mask, where, strict=True)]
        mask = self.at["mask"][tuple(index)]
        return tirx.Select(mask, value, f32(float("-inf"))) if spec.mask_dtype == "bool" else value + mask


@dataclass(frozen=True)
class _Place:
    """A task's batch row, first query head, KV head and query."""

    b: Expr
    head: Expr
    kv: Expr
    i: Expr


@dataclass(frozen=True)
class _Work:
    """What a task works with: its query's rows, a tile's scores, decoded tokens, and how many there are."""

    query: tirx.Buffer
    scores: tirx.Buffer
    tile: tirx.Buffer
    place: _Place
    state: _State
    total: Expr


class _State:
    """Of each row: the largest score, the sum of weights, what they faded by last, and the weighted sum of
    values."""

    def __init__(self, rows: int, width: int) -> None:
        self.width = width
        self.top, self.total, self.fade, self.out = local(rows), local(rows), local(rows), local(rows * width)
        for r in range(rows):
            store(self.top, f32(LOWEST), r)
            store(self.total, f32(0), r)
        with loop(rows * width, "vectorized") as v:
            store(self.out, f32(0), v)
