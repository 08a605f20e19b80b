"""Attention's products on a tile of tokens decoded to float32: any source, any part of a tile."""

from __future__ import annotations

from dataclasses import dataclass

from porter.lower.kernels.define import Expr, T, f32, i64, local, loop, store, tirx
from porter.lower.kernels.packed import TILE
from porter.lower.kernels.rows import LANES, Buffers, Tile, padded
from porter.lower.kernels.stored import Source

Row = tuple[Expr, Expr]  # batch, KV head
Span = tuple[Expr, Expr]  # the first token, and the one after the last


@dataclass(frozen=True)
class Decoded:
    """Keys or values of a source for `rows` query heads; `memory` has room for a tile."""

    source: Source
    rows: int
    at: Buffers
    name: str
    memory: tirx.Buffer

    @property
    def _tile(self) -> Tile:
        return Tile(self.memory, padded(self.source.width))

    def scores(self, scores: tirx.Buffer, query: tirx.Buffer, row: Row, span: Span, total: Expr) -> None:
        """scores[r, t] = query r · key t; of tokens past the last, anything."""
        self._clear()
        self.source.fill(self.at, self.name, self._tile, row, span, total)
        self._multiply(scores, query, self._tile)

    def weigh(
        self, out: tirx.Buffer, weights: tirx.Buffer, fade: tirx.Buffer, row: Row, span: Span, total: Expr
    ) -> None:
        """out[r] = out[r] * fade[r] + weights · values."""
        self.source.fill(self.at, self.name, self._tile, row, span, total)
        self._add(out, weights, fade, self._tile, span[1] - span[0])

    def _clear(self) -> None:
        """Channels past the width, which values may have overwritten: 0 times anything but NaN is 0."""
        tile, width = self._tile, self.source.width
        if tile.padded > width:
            with loop(TILE) as t:
                for d in range(width, tile.padded):
                    store(tile.rows, f32(0), tile.at(t, d, 1))

    def _multiply(self, scores: tirx.Buffer, query: tirx.Buffer, keys: Tile) -> None:
        """scores[r, t] = query r · key t, a few tokens at a time; rows of the tile past the last token are
        anything."""
        tokens = next(n for n in (8, 4, 2, 1) if n * self.rows <= 8 or n == 1)
        count = tokens * self.rows
        with loop(TILE // tokens) as number:
            t, sums = number * i64(tokens), local(count * LANES)
            with loop(count * LANES, "vectorized") as v:
                store(sums, f32(0), v)
            with loop(keys.padded // LANES) as chunk:
                d = chunk * i64(LANES)
                for r in range(self.rows):
                    q = query[T.ramp(i64(r * keys.padded) + d, 1, LANES)]
                    for j in range(tokens):
                        at = T.ramp(i64((r * tokens + j) * LANES), 1, LANES)
                        key = keys.rows[keys.at(t + i64(j), d, LANES)]
                        T.buffer_store(sums, sums[at] + q * key, [at])
            found = _added(sums, count)
            for r in range(self.rows):
                for j in range(tokens):
                    store(scores, found[r * tokens + j], i64(r * TILE + j) + t)

    def _add(
        self, out: tirx.Buffer, weights: tirx.Buffer, fade: tirx.Buffer, values: Tile, count: Expr
    ) -> None:
        """out = out * fade + weights · values."""
        lanes = 2 * LANES if values.padded % (2 * LANES) == 0 and self.rows <= 4 else LANES
        with loop(values.padded // lanes) as chunk:
            d, sums = chunk * i64(lanes), local(self.rows * lanes)
            with loop(self.rows * lanes, "vectorized") as v:
                store(sums, f32(0), v)
            with loop(count) as t:
                for r in range(self.rows):
                    at = T.ramp(i64(r * lanes), 1, lanes)
                    weight = T.broadcast(weights[i64(r * TILE) + t], lanes)
                    T.buffer_store(sums, sums[at] + weight * values.rows[values.at(t, d, lanes)], [at])
            for r in range(self.rows):
                at = T.ramp(i64(r * values.padded) + d, 1, lanes)
                faded = out[at] * T.broadcast(fade[r], lanes)
                T.buffer_store(out, faded + sums[T.ramp(i64(r * lanes), 1, lanes)], [at])


def _added(sums: tirx.Buffer, count: int) -> tirx.Buffer:
    """The sum of each of `count` registers: registers are added in pairs, so that one holds eight sums."""
    vectors = [sums[T.ramp(i64(i * LANES), 1, LANES)] for i in range(count)]
    neighbours = [(0, 2, 8, 10, 4, 6, 12, 14), (1, 3, 9, 11, 5, 7, 13, 15)]
    halves = [(0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)]
    for order in (neighbours, neighbours, halves):
        vectors += vectors[-1:] * (len(vectors) % 2)
        kept = local(len(vectors) // 2 * LANES)
        for i, (a, b) in enumerate(zip(vectors[::2], vectors[1::2], strict=True)):
            both = [tirx.Shuffle([a, b], [tirx.IntImm("int32", lane) for lane in lanes]) for lanes in order]
            T.buffer_store(kept, both[0] + both[1], [T.ramp(i64(i * LANES), 1, LANES)])
        vectors = [kept[T.ramp(i64(i * LANES), 1, LANES)] for i in range(len(vectors) // 2)]
    return kept
