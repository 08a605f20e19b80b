"""How tokens of a cache become float32 in an attention kernel: plain rows, or a side of a `porter.kv` scheme.

A kernel asks for a tile of a few tokens at a time: codes are read packed, turned into numbers in registers
and laid in a tile that stays in the first-level cache, where every query head that shares the KV head reads
them. Nothing larger than a tile is ever decoded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from porter.kv.layout import buffers as planned
from porter.kv.layout import row_bytes
from porter.kv.scheme import Scheme, Side
from porter.lower.kernels.codecs import CODECS
from porter.lower.kernels.define import Dim, Expr, Spec, define, f32, i64, local, loop, store, tirx
from porter.lower.kernels.rows import DTYPES, LANES, WIDE, Buffers, Rows, Scales, Tile, spread


class Source(Protocol):
    """Keys or values as they are stored."""

    @property
    def width(self) -> int:
        """Head size."""

    @property
    def label(self) -> str:
        """A word for kernels' names."""

    def buffers(self, name: str, heads: int, length: Dim) -> list[Spec]:
        """What is read, in order, each name beginning with `name`."""

    def fill(
        self, at: Buffers, name: str, tile: Tile, row: tuple[Expr, Expr], span: tuple[Expr, Expr], total: Expr
    ) -> None:
        """Decode tokens span[0] to span[1] - 1 of a row of `total` tokens, (batch, head), to the tile."""


@dataclass(frozen=True)
class Cache:
    """Rows of a codec; codes have one float32 scale for each token and head."""

    codec: str = "fp32"
    width: int = 0

    @property
    def label(self) -> str:
        """The codec."""
        return self.codec

    def buffers(self, name: str, heads: int, length: Dim) -> list[Spec]:
        """Codes [b, heads, length, words], then scales [b, heads, length, 1] where the codec needs them."""
        codec = CODECS[self.codec]
        storage = WIDE.get(self.codec, codec.storage)
        codes: Spec = (name, ("b", heads, length, codec.words(self.width)), storage)
        wide = self.codec in WIDE
        return [codes] if wide else [codes, (f"{name}_scale", ("b", heads, length, 1), "float32")]

    def fill(
        self, at: Buffers, name: str, tile: Tile, row: tuple[Expr, Expr], span: tuple[Expr, Expr], total: Expr
    ) -> None:
        """See Source."""
        first, end = span
        with loop(end - first) as i:
            where = (*row, first + i)
            scale = local(1)
            store(scale, f32(1) if self.codec in WIDE else at[f"{name}_scale"][(*where, 0)], 0)
            rows = Rows(at[name], where, self.codec, self.width)
            if self.codec in WIDE:
                rows.decode(tile, i, lambda value, channel, lanes: value)
            else:
                rows.decode(tile, i, lambda value, channel, lanes: value * spread(scale[0], lanes))


@dataclass(frozen=True)
class Stored:
    """One side, `key` or `value`, of a scheme's planned buffers (`porter.kv.layout`)."""

    scheme: Scheme
    name: str
    width: int
    capacity: int

    @property
    def side(self) -> Side:
        """How it is stored."""
        return self.scheme.side(self.name)

    @property
    def label(self) -> str:
        """The element."""
        return self.side.element

    def step(self, name: str, heads: int) -> list[Spec]:
        """The buffer of static steps, where there are any."""
        shape = {"tensor": (1, 1, 1), "head": (heads, 1, 1), "channel": (heads, 1, self.width)}
        return [(f"{name}_step", shape[self.side.static], "float32")] if self.side.static else []

    def planned(self, heads: int) -> list[tuple[str, tuple[int, ...], str]]:
        """(suffix, shape after the batch, TIR dtype) of each buffer of this side, in the layout's order."""
        plan = planned(self.scheme, self.width, heads, self.capacity)
        mine = [b for b in plan if b.name.split("_")[0] == self.name]
        return [
            (b.name.removeprefix(self.name), b.shape[1:], DTYPES.get(b.dtype.name, b.dtype.name))
            for b in mine
        ]

    def buffers(self, name: str, heads: int, length: Dim) -> list[Spec]:
        """The planned buffers but for the exact copy, which attention does not read; then static steps."""
        planned: list[Spec] = [
            (name + suffix, ("b", *shape), dtype)
            for suffix, shape, dtype in self.planned(heads)
            if suffix != "_copy"
        ]
        return planned + self.step(name, heads)

    def fill(
        self, at: Buffers, name: str, tile: Tile, row: tuple[Expr, Expr], span: tuple[Expr, Expr], total: Expr
    ) -> None:
        """See Source."""
        first, end = span
        if not self.side.coded:
            _copy(tile, at[name], row, span, i64(0), lambda t: t)
            return
        sink, done = i64(self.scheme.sink), self.rounded(total)
        if self.scheme.windowed(self.side) and f"{name}_window" in at:
            window = at[f"{name}_window"]
            _copy(tile, window, row, (first, tirx.min(end, sink)), i64(0), lambda t: t)
            late = tirx.max(first, sink + done)
            _copy(tile, window, row, (late, end), late - first, self.slot)
        if f"{name}_codes" in at:
            begin = tirx.max(first, sink)
            stop = tirx.min(end, sink + done)
            with loop(tirx.max(stop - begin, i64(0))) as i:
                self._decode(at, name, tile, begin - first + i, row, begin - sink + i)

    def rounded(self, total: Expr) -> Expr:
        """How many tokens of `total` are codes (`Scheme.rounded`)."""
        coded = tirx.max(total - i64(self.scheme.sink + self.scheme.recent), i64(0))
        flush = i64(self.side.flush)
        return coded // flush * flush if self.side.flush > 1 else coded

    def slot(self, token: Expr) -> Expr:
        """The window's slot of a token after the sinks."""
        sink = i64(self.scheme.sink)
        return sink + (token - sink) % i64(max(self.scheme.ring(self.side), 1))

    def _decode(
        self, at: Buffers, name: str, tile: Tile, to: Expr, row: tuple[Expr, Expr], token: Expr
    ) -> None:
        """Token `token` after the sinks to the tile's row `to`."""
        where, codes = (*row, token), at[f"{name}_codes"]
        if self.side.element.startswith("lloyd"):
            self._decode_sets(at, name, tile, to, where)
            return
        step = at[f"{name}_step" if self.side.static else f"{name}_scale"]
        scales = Scales(self.side, step, at.get(f"{name}_min"), where, self.width)
        rows = Rows(codes, where, self.side.element, self.width, scales.unsigned)
        rows.decode(tile, to, scales.applied)

    def _decode_sets(
        self, at: Buffers, name: str, tile: Tile, to: Expr, where: tuple[Expr, Expr, Expr]
    ) -> None:
        byte = channel = 0
        for i, (size, bits) in enumerate(self.side.sets(self.width)):
            step = local(1)
            store(step, tirx.Cast("float32", at[f"{name}_scale"][(*where, i)]), 0)
            rows = Rows(at[f"{name}_codes"], where, f"lloyd{bits}", size, byte=byte, channel=channel)
            rows.decode(tile, to, lambda value, _, lanes, step=step: value * spread(step[0], lanes))
            byte += row_bytes(dataclasses.replace(self.side, element=f"lloyd{bits}", mixed=False),
                              f"lloyd{bits}", size)  # fmt: skip
            channel += size


READ = 32  # tokens


class Readable(Source, Protocol):
    """A source of known capacity: one side, `key` or `value`, of a scheme."""

    name: str
    capacity: int


def read_stored(spec: Readable, heads: int) -> tirx.PrimFunc:
    """The side's buffers… (but for the copy), total lengths [b] int64 -> all tokens, float32 [b, heads,
    capacity, width]; 0 past a row's length."""
    given = spec.buffers("c", heads, spec.capacity)
    padded = -(-spec.width // LANES) * LANES

    def body(*args, b):
        *caches, lengths, y = args
        at = {name: buffer for (name, _, _), buffer in zip(given, caches, strict=True)}
        with loop(b * i64(heads), "parallel") as task:
            row = (task // i64(heads), task % i64(heads))
            total = tirx.max(tirx.min(lengths[row[0]], i64(spec.capacity)), i64(0))
            rows = local(READ * padded)
            with loop(-(-spec.capacity // READ)) as number:
                first = number * i64(READ)
                end = tirx.max(tirx.min(first + i64(READ), total), first)
                spec.fill(at, "c", Tile(rows, padded), row, (first, end), total)
                with loop(tirx.min(i64(READ), i64(spec.capacity) - first)) as t, loop(spec.width) as d:
                    value = tirx.Select(first + t < end, rows[t * i64(padded) + d], f32(0))
                    store(y, value, *row, first + t, d)

    shape = ("b", heads, spec.capacity, spec.width)
    buffers = [*given, ("lengths", ("b",), "int64"), ("y", shape, "float32")]
    return define(f"read_{spec.name}_{spec.label}_h{heads}_d{spec.width}", buffers, body)


def _copy(
    tile: Tile,
    buffer: tirx.Buffer,
    row: tuple[Expr, Expr],
    span: tuple[Expr, Expr],
    to: Expr,
    slot: Callable[[Expr], Expr],
) -> None:
    """Tokens of floats, each from its slot, to the tile's rows from `to` on."""
    width = int(buffer.shape[3])
    with loop(tirx.max(span[1] - span[0], i64(0))) as i:
        where = (*row, slot(span[0] + i))
        Rows(buffer, where, "", width).decode(tile, to + i, lambda value, channel, lanes: value)
